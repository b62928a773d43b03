"""A stage as phases: what is held at the same time in each, and how long its work takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignment.plan.devices import Device

# Kinds of memory, in the order in which they are shown.
KINDS = ("weights", "adapters", "gradients", "exchange", "optimizer", "activations", "kv_cache", "vllm", "program")


@dataclass(frozen=True)
class Phase:
    """Bytes by kind that one device holds at most in one part of a stage."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes read on one device; whichever takes longer counts."""

    flops: float
    bytes_read: float = 0.0

    def times(self, factor: float) -> Work:
        """So many times as much."""
        return Work(self.flops * factor, self.bytes_read * factor)

    def seconds(self, device: Device, utilisation: float) -> float:
        """On a device that reaches this share of its peak throughput and bandwidth."""
        return max(self.flops / device.flops, self.bytes_read / device.bandwidth) / utilisation


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs of each device.

    Attributes:
        name: in its pipeline, or the stage's own.
        stage: which stage it is.
        device: that it is planned for.
        phases: in their order.
        unit: what `unit_seconds` are of: a step, an iteration, a thousand prompts.
        unit_seconds: at the utilisation planned with.
        units: how many, or None where that is not known.
        responses: decoded side by side, where the stage samples.
        notes: what was assumed.
    """

    name: str
    stage: str
    device: Device
    phases: tuple[Phase, ...]
    unit: str
    unit_seconds: float
    units: float | None
    responses: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def worst(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes on one device at most."""
        return self.worst.total

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.peak <= self.device.memory

    @property
    def seconds(self) -> float | None:
        """Of the whole stage."""
        return None if self.units is None else self.units * self.unit_seconds

    def to_json(self) -> dict[str, Any]:
        """Figures in GB of 1e9 bytes and seconds."""
        phases = [
            {
                "name": phase.name,
                "total_gb": phase.total / 1e9,
                "parts_gb": {kind: phase.parts[kind] / 1e9 for kind in KINDS if phase.parts.get(kind)},
            }
            for phase in self.phases
        ]
        return {
            "name": self.name,
            "stage": self.stage,
            "device": self.device.name,
            "device_memory_gb": self.device.memory / 1e9,
            "fits": self.fits,
            "peak_gb": self.peak / 1e9,
            "peak_phase": self.worst.name,
            "phases": phases,
            "unit": self.unit,
            "seconds_per_unit": self.unit_seconds,
            "units": self.units,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def together(*parts: Mapping[str, int]) -> dict[str, int]:
    """What is held at the same time, kind by kind."""
    summed: dict[str, int] = {}
    for part in parts:
        for kind, size in part.items():
            assert kind in KINDS
            summed[kind] = summed.get(kind, 0) + size
    return {kind: size for kind, size in summed.items() if size}
