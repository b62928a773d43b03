"""What PPO holds when: policy, critic, reference and two reward models, apart or on one frozen copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from alignment.cli.planner import (
    Planner,
    draws_for,
    file_bytes,
    fill,
    heaviest,
    judged,
    one_prompt,
    prompt_length,
    scoring_work,
    vllm_share,
)
from alignment.config import ModelSection
from alignment.errors import ConfigError
from alignment.plan.origins import known_base
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
    reduced,
    saving_phases,
    shards,
    training_pass,
)
from rlhf.config import check_shares
from rlhf.policy import refused_by_settings


def plan_ppo(config: Any, name: str, planner: Planner) -> StagePlan:
    """The plan of a PPO run: every process holds all models whole (DDP), or its parts of policy and critic (FSDP).

    Raises ConfigError where the processes cannot share a minibatch, or models the weights, as the run itself would.
    """
    try:
        check_shares(config, planner.setting.processes)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    setting, train, draw, looks = planner.setting, config.train, config.sampling, config.evaluation
    policy = planner.trained(config.model, config.lora, "lm")
    critic = planner.trained(config.rewards.helpfulness, config.lora, "score")
    critic = replace(critic, checkpointing=policy.checkpointing, dtype=policy.dtype, compute=policy.compute)
    judges = [planner.frozen(config.rewards.helpfulness, "score"), planner.frozen(config.rewards.safety, "score")]
    shared, why = _shares(config, planner)
    if config.ppo.share_backbone == "always" and not shared:
        raise ConfigError(f"{name}: ppo.share_backbone=always: {why}.")
    guard, its_own, guard_lent = _guard(config, planner, policy)

    frozen, away = _frozen(config, planner, policy, critic, judges, shared)
    frozen = together(frozen, its_own)
    if looks.prompts and looks.patience is not None and setting.device.kind == "cpu":  # the best policy so far
        frozen = together(frozen, {"adapters" if config.lora.r else "weights": 4 * weights(policy).trained})
    steps = gradients(setting, policy, critic)
    # DDP's buckets are there from the beginning; gradients come with the update.
    always = together(optimizer_state(policy, critic), {"exchange": steps.pop("exchange", 0)})
    trained = held(policy) if shared else held(policy, critic)
    in_use: Mapping[str, int] = {}
    if setting.fsdp:
        trained, always, steps = (shards(setting, each) for each in (trained, always, steps))
        # One of the two models is at work at a time.
        in_use = max((gathered(spec) for spec in (policy, critic)), key=lambda each: each["weights"])
        steps = together(steps, max((reduced(spec) for spec in (policy, critic)), key=lambda each: each["gradients"]))
    models = together(trained, frozen)
    learned = together(models, always)
    per_process = train.batch_size // (draw.num_candidates * setting.processes)
    length = prompt_length(config.prompts.max_prompt_length, draw.max_new_tokens, policy, critic, *judges)
    row = one_prompt(length, draw.max_new_tokens, draw.num_candidates, train.max_tokens_per_batch)
    parts = math.ceil(draw.num_candidates / len(row.branches))
    share = parts * train.minibatch_size // (draw.num_candidates * setting.processes)
    rows = heaviest(
        row, train.max_tokens_per_batch, share, lambda rows: training_pass(policy, rows, "logprobs", setting).peak
    )

    phases = load_phases(setting, models, file_bytes(planner, config.rewards.helpfulness))
    twin = ModelSpec(policy.config, dtype=planner.dtype(config.model))
    is_copied = not config.lora.r and (setting.fsdp or twin.dtype != torch.float32)
    free = planner.free(learned, held(twin) if is_copied else {})
    draws = draws_for(draw, twin, total_prompts=per_process, prompt_tokens=length, free=free)
    samples = sampling(twin, draws, device=setting.device.kind)
    one = draw.model_copy(update={"num_candidates": 1})  # what held-out prompts are answered with
    if draw.engine == "vllm":
        from rlhf.policy_sampler import VLLM_MEMORY_SHARE

        engine = vllm_share(planner, draw, twin, draws, default=VLLM_MEMORY_SHARE)
        learned, models = together(learned, engine), together(models, engine)
        phases.append(planner.phase("sample", learned))
    else:
        sampled = [samples]
        if looks.prompts:  # one answer to every prompt, of which none shares its prompt with another
            asked = {"total_prompts": math.ceil(looks.max_prompts / setting.processes), "prompt_tokens": length}
            look = draws_for(one, twin, **asked, free=free)
            sampled.append(sampling(twin, look, device=setting.device.kind))
        most = max(sampled, key=lambda each: each.kv_cache + each.working)
        beside = {"kv_cache": most.kv_cache, "activations": most.working}
        phases.append(planner.phase("sample", learned, held(twin) if is_copied else {}, beside))

    rewarded = judged(draws, draw, config.rewards.max_tokens_per_batch)
    scoring = [planner.forward(judge, rewarded, "scores") for judge in judges]
    is_lent = _offloads(config, planner) and not shared
    lent = held(max(judges, key=lambda judge: weights(judge).base)) if is_lent else {}
    phases.append(planner.phase("score", learned, lent, {"activations": max(each.peak for each in scoring)}))
    if guard is not None:
        guarding = planner.forward(guard, judged(draws, one, config.rewards.max_tokens_per_batch), "scores")
        phases.append(planner.phase("guard", learned, guard_lent, {"activations": guarding.peak}))

    measured = fill(row, train.max_tokens_per_batch, parts * per_process)
    measuring = planner.forward(as_computed(policy, setting), measured, "logprobs")
    phases.append(planner.phase("measure", learned, away, in_use, {"activations": measuring.peak}))
    passes = [training_pass(policy, rows, "logprobs", setting), training_pass(critic, rows, "values", setting)]
    in_update = together(learned, steps)
    phases.append(planner.phase("update", in_update, in_use, {"activations": max(each.peak for each in passes)}))
    if config.lora.r:
        phases += saving_phases(policy, setting, together(models, optimizer_state(policy, critic)))

    tokens = per_process * (parts * length + draw.num_candidates * draw.max_new_tokens)
    work = [
        *samples.work(per_process * draw.num_candidates / draws.rows),
        *(scoring_work(each, rewarded, draws, per_process * draw.num_candidates) for each in scoring),
        Work(3 * measuring.flops * tokens / measured.num_tokens),
        Work(sum(each.flops for each in passes) * train.epochs * tokens / rows.num_tokens),
    ]  # fmt: skip
    notes: tuple[str, ...] = (
        f"rewards and critic share the policy's weights: {why}" if shared else f"models of their own: {why}",
        f"{draws.rows} responses side by side; micro-batches of {rows.count} x {rows.trunk} + "
        f"{len(rows.branches)} x {rows.branches[0]} tokens",
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
    if not _same_base({origin.base for origin in origins}):
        return False, "they were not all fine-tuned with LoRA from the same weights"
    if all(origin.rank for origin in origins[1:]):
        return True, "all were fine-tuned with LoRA from the same weights"
    return True, "taken to be fine-tuned with LoRA from the same weights (ppo.share_backbone=never plans without)"


def _guard(
    config: Any, planner: Planner, policy: ModelSpec
) -> tuple[ModelSpec | None, Mapping[str, int], Mapping[str, int]]:
    """The guard of held-out answers, what of it is on the device all the time, and what only while it scores."""
    section = config.evaluation.guard
    if section is None or not config.evaluation.prompts:
        return None, {}, {}
    spec = planner.frozen(section, "score")
    ours, its = planner.origin(config.model.path), planner.origin(section.path)
    is_apart = refused_by_settings(config, planner.dtype(config.model), {"evaluation.guard": section}) is not None
    if not is_apart and _same_base({ours.base, its.base}):
        return spec, {"adapters": _adapter_bytes(config, planner, policy, section)}, {}
    return (spec, {}, held(spec)) if _offloads(config, planner) else (spec, held(spec), {})


def _same_base(bases: set[str]) -> bool:
    """Whether these are the same weights: a name and the fingerprint in a run's files may stand for the same."""
    return len(bases) == 1 or len({known_base(base) for base in bases}) == 1


def _offloads(config: Any, planner: Planner) -> bool:
    """Whether frozen models are on the device only while they compute; on a CPU both sides are the same memory."""
    return config.ppo.offload and planner.setting.device.kind == "gpu"


def _adapter_bytes(config: Any, planner: Planner, policy: ModelSpec, judge: ModelSection) -> int:
    """Of a reward model's adapter on the policy's weights, with the policy's own taken off."""
    ranks = (planner.origin(judge.path).rank or config.lora.r) + planner.origin(config.model.path).rank
    return ranks * weights(policy).linear * policy.dtype.itemsize


def _frozen(
    config: Any, planner: Planner, policy: ModelSpec, critic: ModelSpec, judges: list[ModelSpec], shared: bool
) -> tuple[dict[str, int], Mapping[str, int]]:
    """Bytes beside policy and critic on the device, and of the reference where it is there only to measure."""
    if shared:
        sections = (config.rewards.helpfulness, config.rewards.safety)
        adapters = sum(_adapter_bytes(config, planner, policy, section) for section in sections)
        return {"adapters": adapters + weights(critic).lora}, {}
    # FSDP computes in the type that it gathers the policy's weights in; the reference has them so.
    dtype = planner.dtype(config.model) if planner.setting.fsdp else policy.dtype
    reference = {} if config.lora.r else held(ModelSpec(policy.config, dtype=dtype))
    if _offloads(config, planner):
        return {}, reference
    return together(reference, held(*judges)), {}
