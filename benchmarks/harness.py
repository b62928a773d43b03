"""What the benchmarks share: child processes in turn, the clock of optimizer steps, the machine's speed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

ALLOCATOR = {  # what the `align` command sets for itself, here for both sides
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_TOP_PAD_": str(2**28),
}
Side = tuple[str, int]


class StepClock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts with the first step, goes on to the last."""
        now = time.perf_counter()
        if state.global_step == 1:
            self.start = now
        self.seconds = now - self.start


def run_in_turn(
    script: str,
    sides: Sequence[Side],
    arguments: Sequence[str],
    *,
    rounds: int,
    figure: str,
    pythons: Mapping[str, str] | None = None,
    allocators: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[Side, dict[str, float] | None]:
    """The median figures of every side, each measurement a child process, the sides in turn in every round.

    None for a side that the kernel killed for want of memory. `pythons` names the interpreter of sides that have their
    own, `allocators` glibc's settings of sides that have others than `ALLOCATOR`.
    """
    found: dict[Side, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            python = (pythons or {}).get(side[0], sys.executable)
            allocator = (allocators or {}).get(side[0], ALLOCATOR)
            measured = _child(python, script, side, arguments, allocator)
            shown = f"{measured[figure]:.3f} {figure}" if measured else "killed: not enough memory"
            print(f"{side[0]:>12} {side[1]:>5}: {shown}", file=sys.stderr, flush=True)
            found[side] += [measured] if measured else []
    return {
        side: {name: median(run[name] for run in runs) for name in runs[0]} if len(runs) == rounds else None
        for side, runs in found.items()
    }


def print_comparison(
    found: Mapping[Side, Mapping[str, float] | None],
    names: Mapping[Side, str],
    *,
    figure: str,
    unit: str,
    share: float,
) -> None:
    """The table of both sides, and ours (sides `align...`) against every other and against the fastest other.

    Args:
        found: figures of every side, `peak_memory_gb` and `figure` among them.
        names: what to call each side.
        figure: the name of the speed.
        unit: what it counts, e.g. "pairs".
        share: of the machine's matrix throughput that the model's products need at one unit a second.
    """
    print(f"{'':34} {unit + '/s':>10} {'peak GB':>8} {'matrix share':>13}")
    for side, row in found.items():
        if row is None:
            print(f"{names[side]:34} {'does not fit into memory':>24}")
            continue
        needed = f"{share * row[figure]:.0%}" if _is_ours(side) else ""
        print(f"{names[side]:34} {row[figure]:10.3f} {row['peak_memory_gb']:8.2f} {needed:>13}")
    measured = {side: row for side, row in found.items() if row is not None}
    ours = [row for side, row in measured.items() if _is_ours(side)]
    fast = max(ours, key=lambda row: row[figure])
    lean = min(ours, key=lambda row: row["peak_memory_gb"])
    print()
    theirs = {side: row for side, row in measured.items() if not _is_ours(side)}
    for side, row in theirs.items():
        speed = fast[figure] / row[figure]
        memory, least = (each["peak_memory_gb"] / row["peak_memory_gb"] for each in (fast, lean))
        print(
            f"against {names[side]}: {speed:.2f}x the {unit} a second, {memory:.2f}x the memory ({least:.2f}x leanest)"
        )
    if theirs:
        best = max(row[figure] for row in theirs.values())
        print(f"against its best: {fast[figure] / best:.2f}x the {unit} a second")


def _is_ours(side: Side) -> bool:
    return side[0].startswith("align")


def parser(
    description: str, *, data: str, unit: str, count: int, trl_batch: Sequence[int], sides: Sequence[str]
) -> argparse.ArgumentParser:
    """The options that both benchmarks have; `unit` is what `count` of them are timed."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default=data)
    found.add_argument(f"--{unit}", type=int, default=count, help=f"timed {unit}, a multiple of 16")
    found.add_argument("--max-length", type=int, default=512)
    found.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    found.add_argument("--lora", type=int, default=0, help="rank; 0 is full fine-tuning")
    found.add_argument("--trl-batch", type=int, nargs="+", default=list(trl_batch), help="per-device batches of TRL")
    ours = [name for name in sides if name.startswith("align")]
    found.add_argument("--align", nargs="*", choices=ours, default=ours, help="ways of running ours")
    found.add_argument("--rounds", type=int, default=1)
    found.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    found.add_argument("--size", type=int, help=argparse.SUPPRESS)
    return found


def rows_in_order(config: Any, num_rows: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Our schedule with the rows in their order, as the other side takes them, and our trainer's arguments."""
    from alignment.runs import open_run
    from alignment.training import StepSchedule, training_arguments

    size = config.train.batch_size
    schedule = StepSchedule(num_rows, config.train, seed=0)
    schedule.steps = [list(range(start, start + size)) for start in range(0, num_rows, size)]
    options = {"num_steps": len(schedule), "dtype": dtype, "device": torch.device("cpu")}
    arguments = training_arguments(open_run(config), config, **options)
    return schedule, {**arguments, "save_strategy": "no", "logging_steps": 1000}


def machine_line(dtype: torch.dtype, *, rounds: int) -> tuple[str, float]:
    """Date, processor, threads and matrix throughput in words, and the throughput in 1e9 operations a second."""
    peak = matrix_gflops(dtype)
    processor = platform.processor() or "CPU"
    threads = torch.get_num_threads()
    return (
        f"{date.today()}, {processor}, {threads} threads, {peak:.0f} GFLOP/s on the MLP's product; median of {rounds}",
        peak,
    )


def matrix_gflops(dtype: torch.dtype) -> float:
    """What the machine reaches on the largest product of the model, in 1e9 floating-point operations a second."""
    left, right = torch.randn(2048, 1536).to(dtype), torch.randn(576, 1536).to(dtype)
    best = 0.0
    for _ in range(30):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = max(best, 2 * 2048 * 1536 * 576 / (time.perf_counter() - start) / 1e9)
    return best


def peak_memory_gb() -> float:
    """Most memory of this process so far; our package is not in the environment of every side."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024 / 1e9


def _child(
    python: str, script: str, side: Side, arguments: Sequence[str], allocator: Mapping[str, str]
) -> dict[str, float] | None:
    command = [python, script, "--side", side[0], "--size", str(side[1]), *arguments]
    done = subprocess.run(command, env={**os.environ, **allocator}, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])
