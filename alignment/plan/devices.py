"""What devices offer: memory, matrix throughput, memory bandwidth."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alignment.errors import ConfigError
from alignment.hardware import compute_dtype
from alignment.plan.shapes import DeviceKind

# Resident memory of a process that has imported torch, transformers and trl and holds no model, and of its data.
PROGRAM_BYTES = int(0.62e9)
# Where a container's limit of memory stands, by version of control groups.
LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Device:
    """A device of one process.

    Attributes:
        name: as the command line has it.
        kind: how attention and batches are computed there.
        memory: bytes.
        flops: operations a second that its matrix units make at most in `dtype`.
        bandwidth: bytes a second from its memory at most.
        dtype: what `model.dtype=auto` stands for.
        program: bytes taken before any model is there.
    """

    name: str
    kind: DeviceKind
    memory: int
    flops: float
    bandwidth: float
    dtype: torch.dtype
    program: int = 0

    def shared(self, processes: int) -> Device:
        """What each of several processes has: a card of its own, or its share of this machine."""
        if self.kind == "gpu":
            return self
        return replace(
            self,
            memory=self.memory // processes,
            flops=self.flops / processes,
            bandwidth=self.bandwidth / processes,
        )


# Memory in GB of 1e9 bytes, dense bfloat16 TFLOP/s, TB/s: the vendor's data sheets of the SXM or, where there is none,
# the PCIe card. Cards have a few per cent more memory than their name says (an H100 of 80 GB has 81,559 MiB): that is
# left to CUDA's context, NCCL's buffers and gaps between the allocator's blocks.
_CARDS: Mapping[str, tuple[int, float, float]] = {
    "rtx4090-24gb": (24, 165, 1.01),
    "l40s-48gb": (48, 362, 0.86),
    "a100-40gb": (40, 312, 1.56),
    "a100-80gb": (80, 312, 2.04),
    "h100-80gb": (80, 989, 3.35),
    "h200-141gb": (141, 989, 4.8),
    "b200-180gb": (180, 2250, 7.7),
}
DEVICE_NAMES = ("cpu", *_CARDS)


def find_device(name: str) -> Device:
    """The device of that name; `cpu` is this machine, measured in a few tenths of a second.

    Raises ConfigError where there is none.
    """
    if name == "cpu":
        return _this_cpu()
    if name not in _CARDS:
        raise ConfigError(f"--gpu {name}: no such device. Use one of {', '.join(DEVICE_NAMES)}.")
    memory, tera, bandwidth = _CARDS[name]
    return Device(name, "gpu", memory * 10**9, tera * 1e12, bandwidth * 1e12, torch.bfloat16)


def larger_devices(device: Device) -> list[Device]:
    """Cards with more memory, the smallest first."""
    cards = sorted((find_device(name) for name in _CARDS), key=lambda card: card.memory)
    return [card for card in cards if card.memory > device.memory] if device.kind == "gpu" else []


def _this_cpu() -> Device:
    memory = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_container_limits()])
    dtype = compute_dtype(torch.device("cpu"))
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    source, target = torch.ones(2**24), torch.zeros(2**24)  # 64 MB each, beyond any cache
    flops = 2 * 1024**3 / _best_seconds(lambda: torch.nn.functional.linear(left, right))
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    return Device("cpu", "cpu", memory, flops, bandwidth, dtype, PROGRAM_BYTES)


def _container_limits() -> Iterator[int]:
    """Bytes that a container may use, where this is one with a limit (cgroups of version 2 and 1)."""
    for path in LIMIT_FILES:
        with suppress(OSError, ValueError):  # no such file; "max"
            yield int(path.read_text(encoding="ascii"))


def _best_seconds(work: Callable[[], object]) -> float:
    tries = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        tries.append(time.perf_counter() - start)
    return min(tries)
