"""`align` in processes of its own, forked from one that has imported everything, which would take seconds a start."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "alignment.cli.main", "alignment.cli.stages", "alignment.cli.pipeline", "alignment.cli.scoring",
    "alignment.cli.inference", "alignment.cli.chat", "alignment.report", "sft.trainer", "sft.gatt",
    "sft.gatt_evaluation", "alignment.cli.distil", "reward_models.trainer", "rlhf.ppo_run", "rlhf.rejection_sampling",
    "rlhf.evaluate",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
])  # fmt: skip


def run_align(arguments: Sequence[str]) -> None:
    """What `python -m alignment.cli.main` does."""
    from alignment.cli.main import main

    sys.argv = ["align", *arguments]
    main()


def run_script(arguments: Sequence[str]) -> None:
    """What `python SCRIPT ARGUMENTS` does."""
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


def start(
    arguments: Sequence[object],
    streams: Path,
    *,
    stdin: str = "",
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    work: Callable[[Sequence[str]], None] = run_align,
) -> BaseProcess:
    """A process that works on these arguments; its output goes to `stdout` and `stderr` in the folder `streams`."""
    streams.mkdir(parents=True, exist_ok=True)
    (streams / "stdin").write_text(stdin, encoding="utf-8")
    environment = {**os.environ, **(env or {})}
    process = SERVER.Process(daemon=True, target=_work, args=(work, [*map(str, arguments)], streams, cwd, environment))
    process.start()
    return process


def align(
    *arguments: object,
    cwd: Path = ROOT,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    work: Callable[[Sequence[str]], None] = run_align,
) -> subprocess.CompletedProcess:
    """Runs a command, or other `work` on these arguments, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(arguments, Path(folder), stdin=stdin, cwd=cwd, env=env, work=work)
        process.join()
        out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _work(
    work: Callable[[Sequence[str]], None],
    arguments: Sequence[str],
    streams: Path,
    cwd: Path,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for name, flags, number in (("stdin", os.O_RDONLY, 0), ("stdout", os.O_WRONLY, 1), ("stderr", os.O_WRONLY, 2)):
        file = os.open(streams / name, flags | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    if num_threads := environment.get("OMP_NUM_THREADS"):  # the server has read its own
        torch.set_num_threads(int(num_threads))
    work(arguments)
