"""What the machine is good at: the faster arithmetic, the allocator's settings, peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn

from alignment.errors import ConfigError

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8

# How long processes wait for one another: the main one loads and saves hundreds of gigabytes while the others do.
PROCESS_TIMEOUT = timedelta(hours=4)

# What `auto` means on a type of device, while a run has settled it.
_settled: dict[str, torch.dtype] = {}


def compute_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """The type matrix products run in. `auto` takes bfloat16 where the device computes it faster than float32.

    GPUs say so themselves. CPUs do not: some that list AVX512-BF16 run it at half the speed of float32, so there
    both are timed once, in a few hundredths of a second, and bfloat16 must win by a fifth. A run settles it for all
    its processes and for its later parts (`settle_auto`).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type in _settled:
        return _settled[device.type]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_prefers_bf16() else torch.float32


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Matrix products in a type from `compute_dtype`: none is rounded in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def settle_auto(device: torch.device, dtype: torch.dtype) -> None:
    """What `auto` means on this type of device from now on, until `unsettle_auto`."""
    _settled[device.type] = dtype


def unsettle_auto() -> None:
    """Lets every device say again what it is good at."""
    _settled.clear()


def num_processes() -> int:
    """How many processes a launcher has started this with, as far as that is known yet: 1 before any state is made."""
    return PartialState().num_processes if PartialState._shared_state else 1


def process_state(device: str) -> PartialState:
    """accelerate's state of this process, on `auto`, `cpu` or `cuda`. Raises ConfigError where that is missing.

    Where the process has used another device before, as a notebook may, the state is made anew.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: cuda, but torch finds no CUDA device here. Use auto or cpu.")
    fastest = torch.accelerator.current_accelerator(check_available=True)
    wanted = "cpu" if device == "cpu" or fastest is None else fastest.type
    state = PartialState(cpu=device == "cpu", timeout=PROCESS_TIMEOUT)
    check_launch(state)
    if state.device.type != wanted and state.num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=device == "cpu", timeout=PROCESS_TIMEOUT)
    return state


def check_launch(state: PartialState) -> None:
    """Raises ConfigError where a launcher has started several processes that know nothing of one another.

    accelerate makes each the only one where torch finds no device that they could use.
    """
    if (started := _launched()) > 1 and state.num_processes == 1:
        raise ConfigError(
            f"started in {started} processes, but torch finds no CUDA device here (python -c 'import torch; "
            "print(torch.cuda.is_available())'). Mend the driver or torch's build, or set run.device=cpu."
        )


def check_no_launcher(command: str, instead: str = "") -> None:
    """Raises ConfigError where a command that works in one process was started in several."""
    if _launched() > 1:
        raise ConfigError(f"{command} runs in one process. Start it without a launcher{instead}.")


def _launched() -> int:
    """How many processes a launcher says that it has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def tune_allocator() -> None:
    """Keeps freed memory in the process (glibc only): tensors of a training step come and go at the same sizes.

    By default glibc maps every large tensor anew and the kernel clears its pages again. The same as
    MALLOC_ARENA_MAX=1, MALLOC_MMAP_MAX_=0 and large MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never: a step frees more than the 2 GiB that an int can say
        libc.mallopt(_M_TOP_PAD, 2**28)
        libc.mallopt(_M_ARENA_MAX, 1)  # the backward pass has a thread of its own, which would not share


def peak_memory_gb() -> float:
    """Peak memory since `reset_peak_memory`, in GB of 1e9 bytes: allocated on a CUDA device in use, else resident."""
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return allocated / 1e9
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory() -> None:
    """Frees what can be freed and starts the peak anew (on Linux), so that each stage reports its own."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A frozen model on `device` for the length of the block, then where it was, without a copy of its weights back."""
    data = [(parameter, parameter.data) for parameter in model.parameters()]
    tensors = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    model.to(device)
    try:
        yield
    finally:
        for parameter, kept in data:  # moved in place, or else replaced in its module
            parameter.data = kept
        for module, parameters, buffers in tensors:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


@functools.cache
def _cpu_prefers_bf16() -> bool:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(1024, 768, dtype=dtype), torch.ones(1024, 768, dtype=dtype)
        tries = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            tries.append(time.perf_counter() - start)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] * 1.2 < seconds[torch.float32]
