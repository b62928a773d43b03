"""`align` in two processes on a CPU, by the launcher that the documentation names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from alignment.models import model_folder

ROOT = Path(__file__).parents[1]
DDP = ("--multi_gpu",)  # gloo, where there is no GPU


def fsdp(*, efficient: str = "false", state_dict: str = "FULL_STATE_DICT") -> tuple[str, ...]:
    """The options of docs/scaling.md."""
    return (
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", efficient),
        *("--fsdp_state_dict_type", state_dict),
    )


def launch_two(
    split: tuple[str, ...], stage: str, settings: list[str], run_dir: Path, *options: str, dies: bool = False
) -> None:
    """Runs a stage to its end or, with `dies`, until SIGKILL after its first checkpoint."""
    model_folder("toy")  # made once, before two processes want it
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2"),
            *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", *split),
            *("tests/launched_on_cpu.py", stage, *settings, f"run.dir={run_dir}", *options),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIES": "1" if dies else ""},
    )
    assert (done.returncode != 0) == dies, done.stderr[-3000:]
