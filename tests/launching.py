"""`align` in two processes on a CPU, as the launcher that the documentation names starts them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from accelerate.commands.launch import launch_command, launch_command_parser
from launched_on_cpu import run_as_launched
from processes import ROOT, start

from alignment.model_folders import model_folder

DDP = ("--multi_gpu",)  # gloo, where there is no GPU


def fsdp(*, efficient: str = "false", state_dict: str = "FULL_STATE_DICT") -> tuple[str, ...]:
    """The options of docs/scaling.md."""
    return (
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", efficient),
        *("--fsdp_state_dict_type", state_dict),
    )


def launch_two(
    split: tuple[str, ...],
    stage: str,
    settings: list[str],
    run_dir: Path,
    *options: str,
    dies: bool = False,
    by_torchrun: bool = False,
) -> None:
    """Runs a stage to its end or, with `dies`, until SIGKILL after its first checkpoint.

    accelerate's launcher reads its options and sets the environment. It hands over to torchrun, which starts two
    interpreters; unless `by_torchrun`, two processes are forked instead, which is many seconds quicker.
    """
    model_folder("toy")  # made once, before two processes want it
    forkserver.ensure_running()  # with the environment of the tests, not with what is set below
    words = [
        *("--num_machines", "1", "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", *split, "tests/launched_on_cpu.py", stage, *settings, f"run.dir={run_dir}"),
        *options,
    ]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIES": "1" if dies else ""}
    if by_torchrun:
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *words],
            cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
        )  # fmt: skip
        assert (done.returncode != 0) == dies, done.stderr[-3000:]
        return
    failed: list[str] = []
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch("torch.distributed.run.run", lambda args: failed.extend(fork_two(args, run_dir))),
    ):
        launch_command(launch_command_parser().parse_args(words))
    assert bool(failed) == dies, failed


def fork_two(args: argparse.Namespace, run_dir: Path) -> list[str]:
    """In torchrun's place, with the launcher's environment: the error outputs of processes that failed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"},
    }
    streams = [run_dir.parent / f"{run_dir.name}-{time.monotonic_ns()}-{rank}" for rank in range(2)]
    processes = [
        start(
            args.training_script_args,
            streams[rank],
            env={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            work=run_as_launched,
        )
        for rank in range(2)
    ]
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        time.sleep(0.01)
    for process in processes:  # the one that is left waits for the other
        process.terminate()
        process.join()
    failed = [place for place, process in zip(streams, processes, strict=True) if process.exitcode]
    return [(place / "stderr").read_text(encoding="utf-8")[-3000:] for place in failed]
