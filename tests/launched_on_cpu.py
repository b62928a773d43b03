"""What tests/launching.py starts, no test itself: `align`, under FSDP where the launcher says so.

accelerate takes up its FSDP plugin only where it finds several accelerators. Here it is told to, by the same lines that
it has for those; all that follows (splitting, gathering, checkpoints) is its own code and torch's, over gloo.
"""

import os
import signal
import sys
from collections.abc import Sequence

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from alignment import training
from alignment.cli.main import main
from rlhf import checkpoint

start_state, mark_complete = AcceleratorState.__init__, training.mark_complete
splits = []


def start_with_fsdp(self, *args, fsdp_plugin=None, **options):
    start_state(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        splits.append(fsdp_plugin)


def mark_and_die(folder):
    mark_complete(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def run_as_launched(arguments: Sequence[str]) -> None:
    AcceleratorState.__init__ = start_with_fsdp
    if os.environ.get("DIES"):
        training.mark_complete = checkpoint.mark_complete = mark_and_die
    sys.argv = ["align", *arguments]
    try:
        main()
    finally:
        assert bool(splits) == (os.environ.get("ACCELERATE_USE_FSDP") == "true")


if __name__ == "__main__":
    run_as_launched(sys.argv[1:])
