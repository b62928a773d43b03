"""What to change where a stage does not fit: every change is planned, so the numbers are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from alignment.cli.plan_stages import Planner, plan_stage
from alignment.config import StageConfig, build_config, merge
from alignment.errors import AlignError
from alignment.plan.devices import larger_devices
from alignment.plan.phases import StagePlan

Changes = Mapping[str, Any]


def advice(config: StageConfig, plan: StagePlan, planner: Planner) -> list[str]:
    """Changes of settings one by one and then together, other ways to share models, larger devices; the effect of each.

    Only what lowers the peak is named.
    """
    found, together = [], {}
    best = plan.peak
    for text, changes in _changes(config):
        changed = _replan(config, plan.name, planner, changes)
        if changed is None or changed.peak >= 0.99 * plan.peak:
            continue
        found.append(f"{text}: {_effect(changed)}")
        joined = merge(together, changes)
        both = _replan(config, plan.name, planner, joined)
        if both is not None and both.peak < best:
            together, best = joined, both.peak
    if len(found) > 1 and (all_of_them := _replan(config, plan.name, planner, together)) is not None:
        found.append(f"all that help together ({_shown(together)}): {_effect(all_of_them)}")
    return [*found, *_other_devices(config, plan, planner)]


def _changes(config: Any) -> Iterator[tuple[str, Changes]]:
    """What may make a stage smaller, what changes least in its results first."""
    has = type(config).model_fields
    if "train" in has and not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", {"model": {"gradient_checkpointing": True}}
    if "train" in has and (tokens := config.train.max_tokens_per_batch) > 512:
        for fewer in (tokens // 2, tokens // 4):
            yield f"train.max_tokens_per_batch={fewer}", {"train": {"max_tokens_per_batch": fewer}}
    if "data" in has and (length := config.data.max_length) > 1024:
        yield f"data.max_length={length // 2}", {"data": {"max_length": length // 2}}
    if "sampling" in has and (rows := config.sampling.max_rows or 0) > 8:
        for fewer in (rows // 2, rows // 4, rows // 8):
            yield f"sampling.max_rows={fewer}", {"sampling": {"max_rows": fewer}}
    if "rewards" in has and (tokens := config.rewards.max_tokens_per_batch) > 2048:
        yield "rewards.max_tokens_per_batch=2048", {"rewards": {"max_tokens_per_batch": 2048}}
    if "ppo" in has and not config.ppo.offload:
        yield "ppo.offload=true", {"ppo": {"offload": True}}
    if "lora" in has and not config.lora.r:
        yield "lora.r=16", {"lora": {"r": 16}}
    if "ppo" in has and config.ppo.share_backbone == "never":
        yield "ppo.share_backbone=auto", {"ppo": {"share_backbone": "auto"}}


def _other_devices(config: StageConfig, plan: StagePlan, planner: Planner) -> Iterator[str]:
    """FSDP over more devices, for the stages that can be split, and the smallest card that has room."""
    setting = planner.setting
    if config.stage in ("sft", "rm") and setting.device.kind == "gpu" and not setting.fsdp:
        for processes in (8, 16, 32):
            split = replace(setting, processes=processes, fsdp=True)
            changed = _replan(config, plan.name, replace(planner, setting=split), {})
            if changed is not None and changed.fits:
                yield f"--fsdp --gpus {processes} (run on CPUs only in this project): {_effect(changed)}"
                break
    elif config.stage not in ("sft", "rm"):
        yield "more devices do not help: every process holds whole models (FSDP is for sft and rm)"
    for card in larger_devices(setting.device):
        changed = _replan(config, plan.name, replace(planner, setting=replace(setting, device=card)), {})
        if changed is not None and changed.fits:
            yield f"--gpu {card.name}: {_effect(changed)}"
            return


def _replan(config: StageConfig, name: str, planner: Planner, changes: Changes) -> StagePlan | None:
    """The plan with other settings; None where they go with each other no more."""
    values = merge(config.model_dump(), changes)
    try:
        return plan_stage(build_config(type(config), values, name, check_inputs=False), name, planner)
    except AlignError:
        return None


def _effect(plan: StagePlan) -> str:
    return f"{plan.peak / 1e9:.1f} GB, {'fits' if plan.fits else 'still too much'}"


def _shown(changes: Changes, prefix: str = "") -> str:
    parts = []
    for key, value in changes.items():
        nested = isinstance(value, Mapping)
        parts.append(_shown(value, f"{prefix}{key}.") if nested else f"{prefix}{key}={str(value).lower()}")
    return " ".join(parts)
