"""What to change where a stage does not fit: every change is planned, so the numbers are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from alignment.cli.plan_stages import is_split_by_fsdp, plan_stage
from alignment.cli.planner import Planner
from alignment.config import StageConfig, build_config, merge
from alignment.errors import AlignError
from alignment.plan.devices import larger_devices
from alignment.plan.phases import StagePlan

Changes = Mapping[str, Any]


def advice(config: StageConfig, plan: StagePlan, planner: Planner) -> list[str]:
    """Changes of settings one by one and then together, other ways to share models, larger devices; the effect of each.

    Only what lowers the peak is named; together are the first of them that are enough, or all.
    """
    found, together = [], {}
    best = plan
    for changes in _changes(config, plan, planner):
        changed = _replan(config, plan.name, planner, changes)
        if changed is None or changed.peak >= 0.99 * plan.peak:
            continue
        found.append(f"{_shown(changes)}: {_effect(changed)}")
        joined = merge(together, changes)
        both = None if best.fits else _replan(config, plan.name, planner, joined)
        if both is not None and both.peak < best.peak:
            together, best = joined, both
    if len(list(_leaves(together))) > 1:
        found.append(f"together {_shown(together)}: {_effect(best)}")
    return [*found, *_other_devices(config, plan, planner)]


def _changes(config: Any, plan: StagePlan, planner: Planner) -> Iterator[Changes]:
    """What may make a stage smaller, what changes least in its results first."""
    has = type(config).model_fields
    # The same results, to rounding:
    if "train" in has and not config.model.gradient_checkpointing:
        yield {"model": {"gradient_checkpointing": True}}
    if "train" in has and (tokens := config.train.max_tokens_per_batch) > 512:
        yield from ({"train": {"max_tokens_per_batch": tokens // part}} for part in (2, 4))
    if (rows := plan.responses or 0) > 8:
        yield from ({"sampling": {"max_rows": rows // part}} for part in (2, 4, 8))
    if "rewards" in has and config.rewards.max_tokens_per_batch > 2048:
        yield {"rewards": {"max_tokens_per_batch": 2048}}
    if "ppo" in has and not config.ppo.offload:
        yield {"ppo": {"offload": True}}
    if "ppo" in has and config.ppo.share_backbone == "never":
        yield {"ppo": {"share_backbone": "auto"}}
    # Another training:
    if "lora" in has and not config.lora.r:
        yield {"lora": {"r": 16}}
    if "lora" in has and config.lora.r and config.lora.last_layers is None:
        layers = planner.trained(config.model, config.lora, "lm").shape.num_hidden_layers
        yield {"lora": {"last_layers": layers // 2}}
    if "ppo" in has:
        yield {"train": {"minibatch_size": config.train.minibatch_size // 2}}
    # Other rows:
    if "data" in has and (length := config.data.max_length) > 1024:
        yield {"data": {"max_length": length // 2}}
    if "prompts" in has and (length := config.prompts.max_prompt_length) > 256:
        yield {"prompts": {"max_prompt_length": length // 2}}
    if "sampling" in has and (tokens := config.sampling.max_new_tokens) > 64:
        yield {"sampling": {"max_new_tokens": tokens // 2}}


def _other_devices(config: StageConfig, plan: StagePlan, planner: Planner) -> Iterator[str]:
    """FSDP over more devices, for the stages that can be split, and the smallest card that has room."""
    setting = planner.setting
    if "sampling" in type(config).model_fields and config.sampling.engine == "vllm":
        yield "more devices: sampling.vllm.tensor_parallel_size spreads vLLM's model over them, for sampling alone"
    elif is_split_by_fsdp(config) and setting.device.kind == "gpu" and not setting.fsdp:
        for processes in (8, 16, 32):
            split = replace(setting, processes=processes, fsdp=True)
            changed = _replan(config, plan.name, replace(planner, setting=split), {})
            if changed is not None and changed.fits:
                yield f"--fsdp --gpus {processes} (run on CPUs only in this project): {_effect(changed)}"
                break
    elif not is_split_by_fsdp(config):
        yield "more devices do not help: every process holds whole models (FSDP is for sft, rm and ppo in full)"
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


def _shown(changes: Changes) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in _leaves(changes))


def _leaves(changes: Changes, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
