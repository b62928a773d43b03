"""A trained model in memory: alone on its device, copied to several (DDP), or split over them (FSDP)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from alignment.plan.devices import Device
from alignment.plan.passes import Pass, Rows, run_pass
from alignment.plan.phases import Phase, together
from alignment.plan.shapes import ModelSpec, meta_model, weights


@dataclass(frozen=True)
class Setting:
    """Where a stage runs: `processes` of one device each, and whether FSDP splits trained models over them."""

    device: Device
    processes: int = 1
    fsdp: bool = False
    utilisation: float = 0.4

    @property
    def program(self) -> dict[str, int]:
        """What is there before any model."""
        return {"program": self.device.program}


def held(*specs: ModelSpec) -> dict[str, int]:
    """The weights of models that stand beside each other."""
    found = [weights(spec) for spec in specs]
    return together(*({"weights": each.base, "adapters": each.lora} for each in found))


def gradients(setting: Setting, *specs: ModelSpec) -> dict[str, int]:
    """Of all trained weights, in their own type; DDP exchanges them from buckets that are a second copy."""
    size = 4 * sum(weights(spec).trained for spec in specs)
    copies = setting.processes > 1 and not setting.fsdp
    return {"gradients": size, "exchange": size if copies else 0}


def optimizer_state(*specs: ModelSpec) -> dict[str, int]:
    """AdamW's two float32 moments of every trained weight."""
    return {"optimizer": 8 * sum(weights(spec).trained for spec in specs)}


def shards(setting: Setting, *parts: Mapping[str, int]) -> dict[str, int]:
    """A process's part of what FSDP splits."""
    return {kind: -(-size // setting.processes) for kind, size in together(*parts).items()}


def training_pass(spec: ModelSpec, rows: Rows, reader: str, setting: Setting) -> Pass:
    """Forward and backward of a micro-batch."""
    return run_pass(as_computed(spec, setting), rows, reader, device=setting.device.kind, train=True)


def as_computed(spec: ModelSpec, setting: Setting) -> ModelSpec:
    """The model that a pass sees: FSDP gathers weights in the arithmetic's type, so that autocast copies none."""
    return replace(spec, dtype=spec.arithmetic) if setting.fsdp else spec


def training_phases(
    spec: ModelSpec, rows: Rows, reader: str, setting: Setting, *, file_bytes: int
) -> tuple[list[Phase], Pass]:
    """The phases of SFT and reward-model training by transformers' Trainer, and the pass of a micro-batch.

    Its AdamW is fused and needs no memory of its own. FSDP splits the model layer by layer on its way to the devices,
    where it never takes as much then as in training.
    """
    learns = training_pass(spec, rows, reader, setting)
    activations = {"activations": learns.peak}
    model, extra = held(spec), together(gradients(setting, spec), optimizer_state(spec))
    if setting.fsdp:
        train = together(shards(setting, model, extra), gathered(spec), reduced(spec), activations)
        return [Phase("train", together(setting.program, train))], learns
    phases = load_phases(setting, model, file_bytes)
    phases.append(Phase("train", together(setting.program, model, extra, activations)))
    if spec.lora.r:
        phases += saving_phases(spec, setting, together(model, optimizer_state(spec)))
    return phases, learns


def load_phases(setting: Setting, models: dict[str, int], file_bytes: int) -> list[Phase]:
    """On a CPU the pages of the file that is read count beside the weights; a GPU's process has them elsewhere."""
    if setting.device.kind == "gpu":
        return []
    return [Phase("load", together(setting.program, models, {"weights": file_bytes}))]


def saving_phases(spec: ModelSpec, setting: Setting, held_there: Mapping[str, int]) -> list[Phase]:
    """Weights trained with LoRA are merged and written in float32 by the CPU: nothing more for a GPU."""
    if setting.device.kind == "gpu":
        return []
    found = weights(spec)
    # Merging makes the product of two adapters for one layer at a time.
    merged = {"weights": 4 * found.parameters, "activations": 4 * found.largest}
    exchange = {"exchange": 4 * found.trained if setting.processes > 1 else 0}
    return [Phase("save", together(setting.program, held_there, merged, exchange))]


def gathered(spec: ModelSpec) -> dict[str, int]:
    """Whole weights that FSDP holds at a time: two layers, the one in use and the next, and what is in no layer."""
    size, layers = spec.arithmetic.itemsize, spec.shape.num_hidden_layers
    layer = _layer(spec)
    assert layers * layer <= weights(spec).parameters
    return {"weights": size * (weights(spec).parameters - layers * layer + 2 * layer)}


def reduced(spec: ModelSpec) -> dict[str, int]:
    """Gradients that FSDP holds whole while processes add theirs up: a layer's in the arithmetic's type and in float32,
    and those of what is in no layer in the former, which come last.
    """
    if spec.lora.r:
        return {}
    layer, size = _layer(spec), spec.arithmetic.itemsize
    rest = weights(spec).parameters - spec.shape.num_hidden_layers * layer
    return {"gradients": (size + 4) * layer + size * rest}


@functools.cache
def _layer(spec: ModelSpec) -> int:
    """Parameters of one decoder layer."""
    plain = ModelSpec(spec.config, spec.head)
    one, two = (sum(p.numel() for p in meta_model(plain, layers=count).parameters()) for count in (1, 2))
    return two - one
