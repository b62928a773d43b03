"""What PPO holds when: policy, critic, reference and two reward models, apart or on one frozen copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from alignment.cli.plan_stages import Planner, draws_for, file_bytes, fill, judged, prompt_length, repeated, vllm_share
from alignment.errors import ConfigError
from alignment.plan.passes import Rows
from alignment.plan.phases import StagePlan, Work, together
from alignment.plan.sampling import sampling
from alignment.plan.shapes import ModelSpec, weights
from alignment.plan.training import gradients, held, load_phases, optimizer_state, saving_phases, training_pass
from rlhf.config import check_shares


def plan_ppo(config: Any, name: str, planner: Planner) -> StagePlan:
    """The plan of a PPO run: every process holds all models whole (DDP).

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

    models, away = _models(config, planner, policy, critic, judges, shared)
    learned = together(models, optimizer_state(policy, critic))
    per_process = train.batch_size // (draw.num_candidates * setting.processes)
    length = prompt_length(config.prompts.max_prompt_length, draw.max_new_tokens, policy, critic, *judges)
    row = Rows(1, length, (draw.max_new_tokens,) * draw.num_candidates)
    rows = fill(row, train.max_tokens_per_batch, train.minibatch_size // (draw.num_candidates * setting.processes))

    phases = load_phases(setting, models, file_bytes(planner, config.rewards.helpfulness))
    twin = ModelSpec(policy.config, dtype=planner.dtype(config.model))
    is_copied = config.lora.r or twin.dtype != torch.float32
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
        if not config.lora.r:  # the copy is made before it is turned into the smaller type
            phases.append(planner.phase("copy to sample from", learned, held(policy)))
        phases.append(planner.phase("sample", learned, held(twin), beside))
    else:
        phases.append(planner.phase("sample", learned, beside))

    rewarded = judged(draws, draw, config.rewards.max_tokens_per_batch)
    scoring = [planner.forward(judge, rewarded, "scores") for judge in judges]
    is_lent = config.ppo.offload and not shared and setting.device.kind == "gpu"
    lent = held(max(judges, key=lambda judge: weights(judge).base)) if is_lent else {}
    phases.append(planner.phase("score", learned, lent, {"activations": max(each.peak for each in scoring)}))

    measuring = planner.forward(policy, rows, "logprobs")
    phases.append(planner.phase("measure", learned, away, {"activations": measuring.peak}))
    passes = [training_pass(policy, rows, "logprobs", setting), training_pass(critic, rows, "values", setting)]
    in_update = together(learned, gradients(setting, policy, critic))
    phases.append(planner.phase("update", in_update, {"activations": max(each.peak for each in passes)}))
    phases.append(planner.phase("optimizer step", in_update, {"activations": _step_bytes(policy, critic, planner)}))
    if config.lora.r:
        others = together(models, optimizer_state(policy, critic))
        phases += saving_phases(policy, setting, others)

    trees = per_process / rows.count
    work = [
        repeated(samples, per_process / draws.prompts),
        *(Work(each.flops * per_process * draw.num_candidates / (rewarded.count * len(rewarded.branches)))
          for each in scoring),
        Work((measuring.flops * 3 + sum(each.flops for each in passes) * train.epochs) * trees),
    ]  # fmt: skip
    notes = (
        f"rewards and critic share the policy's weights: {why}" if shared else f"models of their own: {why}",
        f"{draws.rows} responses side by side; micro-batches of {rows.count} x {length} + "
        f"{draw.num_candidates} x {draw.max_new_tokens} tokens",
    )
    more = {"units": train.max_steps, "responses": draws.rows, "notes": notes}
    return planner.plan(config, name, phases, "iteration", work, **more)


def _shares(config: Any, planner: Planner) -> tuple[bool, str]:
    """Whether all models stand on the policy's weights, and why."""
    origins = [planner.origin(each.path) for each in (config.model, config.rewards.helpfulness, config.rewards.safety)]
    if not config.lora.r:
        return False, "the policy is trained in full (lora.r=0)"
    if config.ppo.share_backbone == "never":
        return False, "ppo.share_backbone=never"
    if len({origin.base for origin in origins}) > 1 or any(origin.rank is None for origin in origins):
        return False, "they were not all fine-tuned with LoRA from the same weights"
    if all(origin.rank for origin in origins[1:]):
        return True, "all were fine-tuned with LoRA from the same weights"
    return True, "taken to be fine-tuned with LoRA from the same weights (ppo.share_backbone=never plans without)"


def _models(
    config: Any, planner: Planner, policy: ModelSpec, critic: ModelSpec, judges: list[ModelSpec], shared: bool
) -> tuple[dict[str, int], Mapping[str, int]]:
    """Bytes of all models on the device, and of the reference where it is there only to measure."""
    guard = config.evaluation.guard
    others = held(planner.frozen(guard, "score")) if guard is not None and config.evaluation.prompts else {}
    if shared:
        rank = planner.origin(config.model.path).rank or 0
        ranks = [
            (planner.origin(section.path).rank or config.lora.r) + rank
            for section in (config.rewards.helpfulness, config.rewards.safety)
        ]
        frozen = {"adapters": sum(ranks) * weights(policy).linear * policy.dtype.itemsize + weights(critic).lora}
        return together(held(policy), frozen, others), {}
    models = together(held(policy), held(critic), others)
    reference = {} if config.lora.r else held(policy)
    if config.ppo.offload:
        # On a CPU both sides are the same memory: nothing is gained, and nothing counted twice.
        on_cpu = together(models, reference, held(*judges))
        return (on_cpu, {}) if planner.setting.device.kind == "cpu" else (models, reference)
    return together(models, reference, held(*judges)), {}


def _step_bytes(policy: ModelSpec, critic: ModelSpec, planner: Planner) -> int:
    """AdamW makes roots of one model's second moments: on a GPU all at once, on a CPU tensor by tensor."""
    if planner.setting.device.kind == "gpu":
        return 4 * max(weights(spec).trained for spec in (policy, critic))
    return 2 * 4 * max(weights(spec).largest_trained for spec in (policy, critic))
