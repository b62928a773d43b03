"""What PPO holds when: policy, critic, reference and two reward models, apart or on one frozen copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from alignment.cli.planner import Planner, draws_for, file_bytes, fill, judged, prompt_length, repeated, vllm_share
from alignment.errors import ConfigError
from alignment.plan.origins import known_base
from alignment.plan.passes import Rows
from alignment.plan.phases import StagePlan, Work, together
from alignment.plan.sampling import sampling
from alignment.plan.shapes import ModelSpec, weights
from alignment.plan.training import (
    as_computed,
    gathered,
    gradients,
    held,
    load_phases,
    optimizer_state,
    saving_phases,
    shards,
    training_pass,
)
from rlhf.config import check_shares
from rlhf.policy import refused_by_settings


def plan_ppo(config: Any, name: str, planner: Planner) -> StagePlan:
    """The plan of a PPO run: every process holds all models whole (DDP), or its parts of policy and critic (FSDP).

    Raises ConfigError where the processes cannot share a minibatch, as the run itself would.
    """
    try:
        check_shares(config, planner.setting.processes)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    setting, train, draw = planner.setting, config.train, config.sampling
    policy = planner.trained(config.model, config.lora, "lm")
    critic = planner.trained(config.rewards.helpfulness, config.lora, "score")
    critic = replace(critic, checkpointing=policy.checkpointing, dtype=policy.dtype, compute=policy.compute)
    judges = [planner.frozen(config.rewards.helpfulness, "score"), planner.frozen(config.rewards.safety, "score")]
    shared, why = _shares(config, planner)

    frozen, away = _frozen(config, planner, policy, critic, judges, shared)
    steps = gradients(setting, policy, critic)
    # DDP's buckets are there from the beginning; gradients come with the update.
    always = together(optimizer_state(policy, critic), {"exchange": steps.pop("exchange", 0)})
    trained = held(policy) if shared else held(policy, critic)
    in_use: Mapping[str, int] = {}
    if setting.fsdp:
        trained, always, steps = (shards(setting, each) for each in (trained, always, steps))
        # One of the two models is at work at a time.
        in_use = max((gathered(spec) for spec in (policy, critic)), key=lambda each: each["weights"])
    models = together(trained, frozen)
    learned = together(models, always)
    per_process = train.batch_size // (draw.num_candidates * setting.processes)
    length = prompt_length(config.prompts.max_prompt_length, draw.max_new_tokens, policy, critic, *judges)
    row = Rows(1, length, (draw.max_new_tokens,) * draw.num_candidates)
    rows = fill(row, train.max_tokens_per_batch, train.minibatch_size // (draw.num_candidates * setting.processes))

    phases = load_phases(setting, models, file_bytes(planner, config.rewards.helpfulness))
    twin = ModelSpec(policy.config, dtype=planner.dtype(config.model))
    is_copied = not config.lora.r and (setting.fsdp or twin.dtype != torch.float32)
    free = planner.free(learned, held(twin) if is_copied else {})
    draws = draws_for(draw, twin, total_prompts=per_process, prompt_tokens=length, free=free)
    samples = sampling(twin, draws, device=setting.device.kind)
    beside = {"kv_cache": samples.kv_cache, "activations": samples.working}
    if draw.engine == "vllm":
        from rlhf.policy_sampler import VLLM_MEMORY_SHARE

        engine = vllm_share(planner, draw, VLLM_MEMORY_SHARE)
        learned, models = together(learned, engine), together(models, engine)
        phases.append(planner.phase("sample", learned))
    elif is_copied:
        phases.append(planner.phase("sample", learned, held(twin), beside))
    else:
        phases.append(planner.phase("sample", learned, beside))

    rewarded = judged(draws, draw, config.rewards.max_tokens_per_batch)
    scoring = [planner.forward(judge, rewarded, "scores") for judge in judges]
    is_lent = config.ppo.offload and not shared and setting.device.kind == "gpu"
    lent = held(max(judges, key=lambda judge: weights(judge).base)) if is_lent else {}
    phases.append(planner.phase("score", learned, lent, {"activations": max(each.peak for each in scoring)}))

    measuring = planner.forward(as_computed(policy, setting), rows, "logprobs")
    phases.append(planner.phase("measure", learned, away, in_use, {"activations": measuring.peak}))
    passes = [training_pass(policy, rows, "logprobs", setting), training_pass(critic, rows, "values", setting)]
    in_update = together(learned, steps)
    phases.append(planner.phase("update", in_update, in_use, {"activations": max(each.peak for each in passes)}))
    if config.lora.r:
        phases += saving_phases(policy, setting, together(models, optimizer_state(policy, critic)))

    trees = per_process / rows.count
    work = [
        repeated(samples, per_process * draw.num_candidates / draws.rows),
        *(Work(each.flops * per_process * draw.num_candidates / (rewarded.count * len(rewarded.branches)))
          for each in scoring),
        Work((measuring.flops * 3 + sum(each.flops for each in passes) * train.epochs) * trees),
    ]  # fmt: skip
    notes: tuple[str, ...] = (
        f"rewards and critic share the policy's weights: {why}" if shared else f"models of their own: {why}",
        f"{draws.rows} responses side by side; micro-batches of {rows.count} x {length} + "
        f"{draw.num_candidates} x {draw.max_new_tokens} tokens",
    )
    if setting.fsdp:
        notes = (*notes, "policy and critic split, the others whole", "FSDP has been run on CPUs only in this project")
    more = {"units": train.max_steps, "responses": draws.rows, "notes": notes}
    return planner.plan(config, name, phases, "iteration", work, **more)


def _shares(config: Any, planner: Planner) -> tuple[bool, str]:
    """Whether all models stand on the policy's weights, and why."""
    if reason := refused_by_settings(config, planner.dtype(config.model)):
        return False, reason.removesuffix(".")
    origins = [planner.origin(each.path) for each in (config.model, config.rewards.helpfulness, config.rewards.safety)]
    bases = {origin.base for origin in origins}
    if len(bases) > 1:  # a name and the fingerprint in a run's files may stand for the same weights
        bases = {known_base(base) for base in bases}
    if len(bases) > 1 or any(origin.rank is None for origin in origins):
        return False, "they were not all fine-tuned with LoRA from the same weights"
    if all(origin.rank for origin in origins[1:]):
        return True, "all were fine-tuned with LoRA from the same weights"
    return True, "taken to be fine-tuned with LoRA from the same weights (ppo.share_backbone=never plans without)"


def _frozen(
    config: Any, planner: Planner, policy: ModelSpec, critic: ModelSpec, judges: list[ModelSpec], shared: bool
) -> tuple[dict[str, int], Mapping[str, int]]:
    """Bytes beside policy and critic on the device, and of the reference where it is there only to measure."""
    guard = config.evaluation.guard
    # On a CPU both sides are the same memory: nothing is gained, and nothing counted twice.
    offloads = config.ppo.offload and planner.setting.device.kind == "gpu"
    stays = guard is not None and config.evaluation.prompts and not offloads
    others = held(planner.frozen(guard, "score")) if stays else {}
    if shared:
        rank = planner.origin(config.model.path).rank or 0
        ranks = [
            (planner.origin(section.path).rank or config.lora.r) + rank
            for section in (config.rewards.helpfulness, config.rewards.safety)
        ]
        adapters = sum(ranks) * weights(policy).linear * policy.dtype.itemsize + weights(critic).lora
        return together({"adapters": adapters}, others), {}
    # FSDP computes in the type that it gathers the policy's weights in; the reference has them so.
    dtype = planner.dtype(config.model) if planner.setting.fsdp else policy.dtype
    reference = {} if config.lora.r else held(ModelSpec(policy.config, dtype=dtype))
    if offloads:
        return others, reference
    return together(reference, held(*judges), others), {}
