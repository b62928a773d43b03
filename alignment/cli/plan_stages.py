"""What each stage holds when, by its settings: the parts of `align plan` that know the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.cli.plan_ppo import plan_ppo
from alignment.cli.plan_rows import mixed_sizes, num_rows, prompt_unit, row_counts
from alignment.cli.planner import (
    Planner,
    draws_for,
    file_bytes,
    heaviest,
    judged,
    prompt_length,
    scoring_work,
    vllm_share,
)
from alignment.config import ModelSection, SamplingSection, StageConfig
from alignment.errors import ConfigError
from alignment.model_folders import context_length
from alignment.plan.passes import Rows
from alignment.plan.phases import Phase, StagePlan, Work, together
from alignment.plan.sampling import Draws, sampling
from alignment.plan.shapes import ModelSpec, weights
from alignment.plan.training import (
    Setting,
    gathered,
    gradients,
    held,
    load_phases,
    optimizer_state,
    shards,
    training_pass,
    training_phases,
)
from alignment.sampling.memory import CPU_MAX_ROWS
from alignment.training import num_steps

# Tokens of a short prompt, whose responses may be long.
SHORT_PROMPT = 16
# Of a GPU's memory for vLLM, its own default (of version 0.32): only PPO, which trains beside it, gives it another.
VLLM_DEFAULT_SHARE = 0.92


def plan_stage(config: StageConfig, name: str, planner: Planner) -> StagePlan:
    """The plan of a stage. Raises ModelError where a model's shape is not known, ConfigError where it cannot run so."""
    kind = f"{config.stage} {config.kind}" if config.stage == "eval" else config.stage
    if not planner.setting.fsdp or is_split_by_fsdp(config):
        return _PLANS[kind](config, name, planner)
    if config.stage == "ppo":
        raise ConfigError(
            f"{name}: with LoRA all models stand on one copy of the weights, which FSDP would split for the policy "
            "alone. Plan it without --fsdp, or in full (lora.r=0)."
        )
    whole = replace(planner, setting=replace(planner.setting, fsdp=False))
    found = _PLANS[kind](config, name, whole)
    return replace(
        found, notes=(*found.notes, "whole models in every process, with or without FSDP: launch --multi_gpu")
    )


def is_split_by_fsdp(config: StageConfig) -> bool:
    """Whether the stage trains models that FSDP may split: SFT, reward models, and PPO in full."""
    return config.stage in ("sft", "rm") or (config.stage == "ppo" and not config.lora.r)


def _sft(config: Any, name: str, planner: Planner) -> StagePlan:
    setting, train = planner.setting, config.train
    spec = planner.trained(config.model, config.lora, "lm")
    length, note = _length(config.data.max_length, spec)
    share = math.ceil(train.batch_size / setting.processes)
    rows = heaviest(
        Rows(1, 0, (length,)),
        train.max_tokens_per_batch,
        share,
        lambda rows: training_pass(spec, rows, "logprobs", setting).peak,
    )
    phases, learns = training_phases(spec, rows, "logprobs", setting, file_bytes=file_bytes(planner, config.model))
    if config.data.valid and config.evaluation.num_answers:
        phases += _answers(config, spec, planner, length)
    count = num_rows(row_counts(config.data.train, config.data.max_rows_of), config.data.max_rows)
    steps = None if count is None else num_steps(count, train)
    work = [Work(learns.flops * share * length / rows.num_tokens)]
    notes = (*note, *_training_notes(spec, rows, setting))
    return planner.plan(config, name, phases, "step", work, units=steps, notes=notes)


def _answers(config: Any, spec: ModelSpec, planner: Planner, length: int) -> list[Phase]:
    """Held-out answers of the model in training, where its context has room for them; every process samples them all.

    Autocast keeps copies of float32 weights meanwhile, which FSDP gathers in the arithmetic's type anyway.
    """
    setting, new_tokens = planner.setting, config.evaluation.max_new_tokens
    asked = min(length, context_length(spec.shape) - new_tokens)
    if asked < 2:
        return []
    draws = Draws(min(config.evaluation.num_answers, CPU_MAX_ROWS), 1, asked, new_tokens)
    plain = ModelSpec(spec.config, dtype=spec.arithmetic)
    found = sampling(plain, draws, device=setting.device.kind)
    beside = {"kv_cache": found.kv_cache, "activations": found.working}
    if setting.fsdp:
        models = together(shards(setting, held(spec), optimizer_state(spec)), gathered(spec))
    else:
        copies = {} if spec.dtype == spec.arithmetic else held(plain)
        exchange = {"exchange": gradients(setting, spec)["exchange"]}
        models = together(held(spec), optimizer_state(spec), copies, exchange)
    return [planner.phase("answers", models, beside)]


def _rm(config: Any, name: str, planner: Planner) -> StagePlan:
    setting, train = planner.setting, config.train
    spec = planner.trained(config.model, config.lora, "score")
    length, note = _length(config.data.max_length, spec)
    prompt = min(SHORT_PROMPT, length // 2)  # each response fits with the prompt: a short one leaves most to both
    row = Rows(1, prompt, (length - prompt,) * 2)
    share = math.ceil(train.batch_size / setting.processes)
    rows = heaviest(
        row, train.max_tokens_per_batch, share, lambda rows: training_pass(spec, rows, "scores", setting).peak
    )
    phases, learns = training_phases(spec, rows, "scores", setting, file_bytes=file_bytes(planner, config.model))
    count = num_rows(mixed_sizes(config.data), config.data.max_rows)
    steps = None if count is None else num_steps(count, train)
    notes = (*note, *_training_notes(spec, rows, setting))
    work = [Work(learns.flops * share * row.num_tokens / rows.num_tokens)]
    return planner.plan(config, name, phases, "step", work, units=steps, notes=notes)


def _reject(config: Any, name: str, planner: Planner) -> StagePlan:
    policy = planner.frozen(config.model, "lm")
    count, unit, units = prompt_unit(config.prompts, planner.setting)
    judges = [config.rewards.helpfulness, config.rewards.safety]
    draws, draw, work = _draw(planner, policy, config.sampling, config.prompts, count, judges)
    score, judging = _score(planner, judges, draws, config.sampling, config.rewards.max_tokens_per_batch, count)
    phases = [*load_phases(planner.setting, held(policy), file_bytes(planner, config.model)), draw, score]
    # Temperatures are tried on a few prompts more, and what earlier rounds drew is scored again.
    section, processes = config.sampling, planner.setting.processes
    drawn = count * section.num_candidates
    again = config.earlier_rounds if config.rescore_earlier and config.accumulate != "last" else []
    responses = sum(
        drawn * len(files) if (sizes := row_counts(files)) is None else sum(sizes.values()) / processes
        for files in (again, config.baseline)
    )  # files that are still to be made are taken to be of this size
    # What the chosen temperature's trial drew is not drawn again.
    others = max(0, len(section.temperature_grid) - 1)
    trials = others * min(count, section.temperature_prompts / processes) / max(1, count)
    work = [each.times(1 + trials) for each in work]
    judging = [each.times(1 + trials + responses / max(1, drawn)) for each in judging]
    notes = (f"{draws.rows} responses side by side, prompts of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, [*work, *judging], units=units, responses=draws.rows, notes=notes)


def _gatt(config: Any, name: str, planner: Planner) -> StagePlan:
    policy = planner.frozen(config.model, "lm")
    count, unit, units = prompt_unit(config.prompts, planner.setting)
    draws, draw, work = _draw(planner, policy, config.sampling, config.prompts, count)
    phases = [*load_phases(planner.setting, held(policy), file_bytes(planner, config.model)), draw]
    work = [each.times(config.prompts.turns) for each in work]
    notes = (f"{draws.rows} responses side by side, dialogues of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, work, units=units, responses=draws.rows, notes=notes)


def _distil(config: Any, name: str, planner: Planner) -> StagePlan:
    policy = planner.frozen(config.model, "lm")
    count, unit, units = prompt_unit(config.prompts, planner.setting)
    draws, draw, work = _draw(planner, policy, config.sampling, config.prompts, 2 * count, [config.safety])
    both = config.sampling.model_copy(update={"num_candidates": 2})
    score, judging = _score(planner, [config.safety], draws, both, config.max_tokens_per_batch, count)
    phases = [*load_phases(planner.setting, held(policy), file_bytes(planner, config.model)), draw, score]
    notes = (f"{draws.rows} responses side by side, prompts of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, [*work, *judging], units=units, responses=draws.rows, notes=notes)


def _eval(config: Any, name: str, planner: Planner) -> StagePlan:
    count, unit, units = prompt_unit(config.prompts, planner.setting)
    tokens = config.rewards.max_tokens_per_batch
    judges = [config.rewards.helpfulness, config.rewards.safety]
    readers = [*judges, *([] if config.guard is None else [config.guard])]
    phases, work = [], []
    first = None
    for policy_name, section in config.policies.items():
        policy = planner.frozen(section, "lm")
        draws, draw, drawing = _draw(planner, policy, config.sampling, config.prompts, count, readers)
        phases += load_phases(planner.setting, held(policy), file_bytes(planner, section))
        phases.append(replace(draw, name=f"sample {policy_name}"))
        score, judging = _score(planner, judges, draws, config.sampling, tokens, count)
        work += [*drawing, *judging]
        if first is not None and config.measure_kl and config.sampling.is_whole:
            rows = judged(draws, config.sampling, tokens)
            larger = max((policy, first), key=lambda spec: weights(spec).base)  # one is loaded after the other
            passes = planner.forward(larger, rows, "logprobs")
            phases.append(planner.phase(f"KL of {policy_name}", held(larger), {"activations": passes.peak}))
            work.append(scoring_work(passes, rows, draws, count).times(2))
        first = first or policy
    phases.append(score)
    if config.guard is not None:
        guard, judging = _score(planner, [config.guard], draws, config.sampling, tokens, count)
        phases.append(replace(guard, name="guard"))
        work += [each for each in judging for _ in config.policies]
    notes = (f"{draws.rows} responses side by side, prompts of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, work, units=units, responses=draws.rows, notes=notes)


def _eval_gatt(config: Any, name: str, planner: Planner) -> StagePlan:
    count, unit, units = prompt_unit(config.prompts, planner.setting)
    phases, work = [], []
    for policy_name, section in config.policies.items():
        policy = planner.frozen(section, "lm")
        draws, draw, drawing = _draw(planner, policy, config.sampling, config.prompts, count)
        phases += load_phases(planner.setting, held(policy), file_bytes(planner, section))
        phases.append(replace(draw, name=f"sample {policy_name}"))
        work += [each.times(config.prompts.turns) for each in drawing]
        if config.num_attention_dialogues:
            # All probabilities of a layer at a time: scores, their softmax in float32, that in the model's type.
            length, heads = draws.prompt_tokens + draws.new_tokens, policy.shape.num_attention_heads
            beside = {"activations": heads * length**2 * (4 + 2 * policy.dtype.itemsize)}
            phases.append(planner.phase(f"attention of {policy_name}", held(policy), beside))
    notes = (f"{draws.rows} responses side by side, dialogues of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, work, units=units, responses=draws.rows, notes=notes)


_PLANS: Mapping[str, Callable[[Any, str, Planner], StagePlan]] = {
    "sft": _sft,
    "rm": _rm,
    "gatt": _gatt,
    "distil": _distil,
    "reject": _reject,
    "ppo": plan_ppo,
    "eval policies": _eval,
    "eval gatt": _eval_gatt,
}


def _draw(
    planner: Planner,
    policy: ModelSpec,
    section: SamplingSection,
    prompts: Any,
    count: int,
    readers: Sequence[ModelSection] = (),
) -> tuple[Draws, Phase, list[Work]]:
    """Sampling from a model of its own for `count` prompts of this process, which the reward models read, too."""
    read_by = [planner.frozen(reader, "score") for reader in readers]
    length = prompt_length(prompts.max_prompt_length, section.max_new_tokens, policy, *read_by)
    free = planner.free(held(policy))
    draws = draws_for(section, policy, total_prompts=count, prompt_tokens=length, free=free)
    found = sampling(policy, draws, device=planner.setting.device.kind)
    work = found.work(count * section.num_candidates / draws.rows)
    if section.engine == "vllm":
        engine = vllm_share(planner, section, policy, draws, default=VLLM_DEFAULT_SHARE)
        return draws, planner.phase("sample", engine), work
    beside = {"kv_cache": found.kv_cache, "activations": found.working}
    return draws, planner.phase("sample", held(policy), beside), work


def _score(
    planner: Planner,
    judges: Sequence[ModelSection],
    draws: Draws,
    section: SamplingSection,
    max_tokens: int,
    count: int,
) -> tuple[Phase, list[Work]]:
    """The phase that holds most, of reward models that score in turn, and the work of all."""
    rows = judged(draws, section, max_tokens)
    specs = [planner.frozen(judge, "score") for judge in judges]
    passes = [planner.forward(spec, rows, "scores") for spec in specs]
    responses = count * section.num_candidates
    work = [scoring_work(each, rows, draws, responses) for each in passes]
    phases = []
    for judge, spec, each in zip(judges, specs, passes, strict=True):
        phases += load_phases(planner.setting, held(spec), file_bytes(planner, judge))
        phases.append(planner.phase("score", held(spec), {"activations": each.peak}))
    return replace(max(phases, key=lambda phase: phase.total), name="score"), work


def _length(wanted: int, spec: ModelSpec) -> tuple[int, tuple[str, ...]]:
    context = context_length(spec.shape)
    if wanted <= context:
        return wanted, ()
    return context, (f"rows of {context} tokens, the model's context, not {wanted} (data.max_length)",)


def _shown(rows: Rows) -> str:
    lengths = " + ".join(map(str, (*([rows.trunk] if rows.trunk else []), *rows.branches)))
    return f"{rows.count} x {lengths} tokens"


def _training_notes(spec: ModelSpec, rows: Rows, setting: Setting) -> tuple[str, ...]:
    found = [f"micro-batches of {_shown(rows)}"]
    if setting.device.kind == "gpu":
        loaded = sum(held(spec).values()) / 1e9
        alone = f", or {loaded:.1f} GB with --fsdp_cpu_ram_efficient_loading true" if setting.fsdp else ""
        found.append(f"while it loads, host memory has {setting.processes} x {loaded:.1f} GB, over all machines{alone}")
        saved = 4 * weights(spec).parameters / 1e9
        found.append(f"when it saves, the main process has {saved:.1f} GB of host memory for weights in float32")
    if setting.fsdp:
        found.append("FSDP has been run on CPUs only in this project")
    return tuple(found)
