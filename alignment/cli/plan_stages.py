"""What each stage holds when, by its settings: the parts of `align plan` that know the stages."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alignment.config import LoraSection, ModelSection, SamplingSection, StageConfig
from alignment.errors import AlignError, ConfigError
from alignment.models import context_length
from alignment.plan.origins import Origin
from alignment.plan.passes import Pass, Rows, run_pass
from alignment.plan.phases import Phase, StagePlan, Work, together
from alignment.plan.sampling import Draws, draws_of, sampling
from alignment.plan.shapes import ModelSpec, spec_of, weights
from alignment.plan.training import Setting, held, load_phases, optimizer_state, training_phases
from alignment.sampling.memory import rows_that_fit
from alignment.sources import find_data
from reward_models.mixing import mix_rows

# Prompts of a stage that takes all there are, where their number is not known.
MANY = 1000


@dataclass(frozen=True)
class Planner:
    """Plans stages; `origins` says what the run directories of earlier ones hold."""

    setting: Setting
    origins: Mapping[str, Origin]

    def origin(self, path: str) -> Origin:
        """Of a model by its name."""
        return self.origins.get(path) or Origin(path, path)

    def dtype(self, section: ModelSection) -> torch.dtype:
        """What a model computes in."""
        return self.setting.device.dtype if section.dtype == "auto" else getattr(torch, section.dtype)

    def trained(self, section: ModelSection, lora: LoraSection, head: str) -> ModelSpec:
        """A model in training: float32, or frozen in its type with adapters."""
        return spec_of(
            self.origin(section.path).shape,
            head=head,
            dtype=self.dtype(section) if lora.r else torch.float32,
            compute=self.dtype(section),
            lora=lora,
            is_trained=True,
            checkpointing=section.gradient_checkpointing,
        )

    def frozen(self, section: ModelSection, head: str) -> ModelSpec:
        """A model that samples or judges."""
        return spec_of(self.origin(section.path).shape, head=head, dtype=self.dtype(section))

    def forward(self, spec: ModelSpec, rows: Rows, reader: str) -> Pass:
        """A pass without gradients."""
        return run_pass(spec, rows, reader, device=self.setting.device.kind)

    def free(self, *parts: Mapping[str, int]) -> int | None:
        """Bytes of a GPU beside these; None on a CPU."""
        device = self.setting.device
        held_there = sum(together(self.setting.program, *parts).values())
        return device.memory - held_there if device.kind == "gpu" else None

    def phase(self, name: str, *parts: Mapping[str, int]) -> Phase:
        """With what is there before any model."""
        return Phase(name, together(self.setting.program, *parts))

    def plan(
        self, config: StageConfig, name: str, phases: Sequence[Phase], unit: str, work: Sequence[Work], **more: Any
    ) -> StagePlan:
        """The stage's plan from its parts."""
        device, share = self.setting.device, self.setting.utilisation
        seconds = sum(each.seconds(device, share) for each in work)
        return StagePlan(name, config.stage, device, tuple(phases), unit, seconds, **more)


def plan_stage(config: StageConfig, name: str, planner: Planner) -> StagePlan:
    """The plan of a stage. Raises ModelError where a model's shape is not known, ConfigError where it cannot run so."""
    kind = f"{config.stage} {config.kind}" if config.stage == "eval" else config.stage
    if not planner.setting.fsdp or is_split_by_fsdp(config):
        return _PLANS[kind](config, name, planner)
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
    row = min(length, train.max_tokens_per_batch) if train.packing else length
    tokens = math.ceil(train.batch_size / setting.processes) * length
    rows = Rows(max(1, min(train.max_tokens_per_batch // row, tokens // row)), 0, (row,))
    phases, learns = training_phases(spec, rows, "logprobs", setting, file_bytes=file_bytes(planner, config.model))
    if config.data.valid and config.evaluation.num_answers and not setting.fsdp:
        phases.append(_answers(config, spec, planner, length))
    count = _num_rows(_sizes(config.data.train, config.data.max_rows_of), config.data.max_rows)
    steps = None if count is None else _steps(count, train)
    work = [Work(learns.flops * tokens / rows.num_tokens)]
    notes = (*note, *_training_notes(spec, rows, setting))
    return planner.plan(config, name, phases, "step", work, units=steps, notes=notes)


def _answers(config: Any, spec: ModelSpec, planner: Planner, length: int) -> Phase:
    """Held-out answers of the model in training; autocast keeps copies of float32 weights meanwhile."""
    new_tokens = config.evaluation.max_new_tokens
    asked = prompt_length(length, new_tokens, spec)
    draws = Draws(config.evaluation.num_answers, 1, asked, new_tokens)
    found = sampling(spec, draws, device=planner.setting.device.kind)
    copies = {} if spec.dtype == spec.arithmetic else held(replace(spec, dtype=spec.arithmetic, is_trained=False))
    beside = {"kv_cache": found.kv_cache, "activations": found.working}
    return planner.phase("answers", held(spec), optimizer_state(spec), copies, beside)


def _rm(config: Any, name: str, planner: Planner) -> StagePlan:
    setting, train = planner.setting, config.train
    spec = planner.trained(config.model, config.lora, "score")
    length, note = _length(config.data.max_length, spec)
    row = Rows(1, length // 2, (length - length // 2,) * 2)
    share = math.ceil(train.batch_size / setting.processes)
    rows = fill(row, train.max_tokens_per_batch, share)
    phases, learns = training_phases(spec, rows, "scores", setting, file_bytes=file_bytes(planner, config.model))
    count = _num_rows(_mixed_sizes(config.data), config.data.max_rows)
    steps = None if count is None else _steps(count, train)
    notes = (*note, *_training_notes(spec, rows, setting))
    work = [Work(learns.flops * share / rows.count)]
    return planner.plan(config, name, phases, "step", work, units=steps, notes=notes)


def _reject(config: Any, name: str, planner: Planner) -> StagePlan:
    policy = planner.frozen(config.model, "lm")
    count, unit, units = _prompt_unit(config.prompts, planner.setting)
    draws, draw, work = _draw(planner, policy, config.sampling, config.prompts, count)
    judges = [planner.frozen(config.rewards.helpfulness, "score"), planner.frozen(config.rewards.safety, "score")]
    score, judging = _score(planner, judges, draws, config.sampling, config.rewards.max_tokens_per_batch, count)
    phases = [*load_phases(planner.setting, held(policy), file_bytes(planner, config.model)), draw, score]
    notes = (f"{draws.rows} responses side by side, prompts of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, [*work, *judging], units=units, responses=draws.rows, notes=notes)


def _gatt(config: Any, name: str, planner: Planner) -> StagePlan:
    policy = planner.frozen(config.model, "lm")
    count, unit, units = _prompt_unit(config.prompts, planner.setting)
    draws, draw, work = _draw(planner, policy, config.sampling, config.prompts, count)
    phases = [*load_phases(planner.setting, held(policy), file_bytes(planner, config.model)), draw]
    work = [replace(each, flops=each.flops * config.prompts.turns, bytes_read=each.bytes_read * config.prompts.turns)
            for each in work]  # fmt: skip
    notes = (f"{draws.rows} responses side by side, dialogues of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, work, units=units, responses=draws.rows, notes=notes)


def _distil(config: Any, name: str, planner: Planner) -> StagePlan:
    policy, judge = planner.frozen(config.model, "lm"), planner.frozen(config.safety, "score")
    count, unit, units = _prompt_unit(config.prompts, planner.setting)
    draws, draw, work = _draw(planner, policy, config.sampling, config.prompts, 2 * count)
    both = config.sampling.model_copy(update={"num_candidates": 2})
    score, judging = _score(planner, [judge], draws, both, config.max_tokens_per_batch, count)
    phases = [*load_phases(planner.setting, held(policy), file_bytes(planner, config.model)), draw, score]
    notes = (f"{draws.rows} responses side by side, prompts of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, [*work, *judging], units=units, responses=draws.rows, notes=notes)


def _eval(config: Any, name: str, planner: Planner) -> StagePlan:
    count, unit, units = _prompt_unit(config.prompts, planner.setting)
    tokens = config.rewards.max_tokens_per_batch
    judges = [planner.frozen(config.rewards.helpfulness, "score"), planner.frozen(config.rewards.safety, "score")]
    phases, work = [], []
    first = None
    for policy_name, section in config.policies.items():
        policy = planner.frozen(section, "lm")
        draws, draw, drawing = _draw(planner, policy, config.sampling, config.prompts, count)
        phases.append(replace(draw, name=f"sample {policy_name}"))
        score, judging = _score(planner, judges, draws, config.sampling, tokens, count)
        work += [*drawing, *judging]
        if first is not None and config.measure_kl and config.sampling.temperature:
            # The policy that has sampled is still there while it is loaded again, or the first beside it.
            rows = judged(draws, config.sampling, tokens)
            other = max((policy, first), key=lambda spec: weights(spec).base)
            passes = planner.forward(other, rows, "logprobs")
            beside = {"activations": passes.peak}
            phases.append(planner.phase(f"KL of {policy_name}", held(policy), held(other), beside))
            work.append(Work(2 * passes.flops * count / rows.count))
        first = first or policy
    phases.append(score)
    if config.guard is not None:
        guard, judging = _score(planner, [planner.frozen(config.guard, "score")], draws, config.sampling, tokens, count)
        phases.append(replace(guard, name="guard"))
        work += [each for each in judging for _ in config.policies]
    notes = (f"{draws.rows} responses side by side, prompts of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, work, units=units, responses=draws.rows, notes=notes)


def _eval_gatt(config: Any, name: str, planner: Planner) -> StagePlan:
    count, unit, units = _prompt_unit(config.prompts, planner.setting)
    phases, work = [], []
    for policy_name, section in config.policies.items():
        policy = planner.frozen(section, "lm")
        draws, draw, drawing = _draw(planner, policy, config.sampling, config.prompts, count)
        phases.append(replace(draw, name=f"sample {policy_name}"))
        work += [replace(each, flops=each.flops * config.prompts.turns) for each in drawing]
        if config.num_attention_dialogues:
            # All probabilities of a layer at a time: scores, their softmax in float32, that in the model's type.
            length, heads = draws.prompt_tokens + draws.new_tokens, policy.shape.num_attention_heads
            beside = {"activations": heads * length**2 * (4 + 2 * policy.dtype.itemsize)}
            phases.append(planner.phase(f"attention of {policy_name}", held(policy), held(policy), beside))
    notes = (f"{draws.rows} responses side by side, dialogues of {draws.prompt_tokens} tokens",)
    return planner.plan(config, name, phases, unit, work, units=units, responses=draws.rows, notes=notes)


def _ppo(config: Any, name: str, planner: Planner) -> StagePlan:
    from alignment.cli.plan_ppo import plan_ppo  # which is built on this module

    return plan_ppo(config, name, planner)


_PLANS: Mapping[str, Callable[[Any, str, Planner], StagePlan]] = {
    "sft": _sft,
    "rm": _rm,
    "gatt": _gatt,
    "distil": _distil,
    "reject": _reject,
    "ppo": _ppo,
    "eval policies": _eval,
    "eval gatt": _eval_gatt,
}


def _draw(
    planner: Planner, policy: ModelSpec, section: SamplingSection, prompts: Any, count: int
) -> tuple[Draws, Phase, list[Work]]:
    """Sampling from a model of its own for `count` prompts of this process."""
    length = prompt_length(prompts.max_prompt_length, section.max_new_tokens, policy)
    free = planner.free(held(policy))
    draws = draws_for(section, policy, total_prompts=count, prompt_tokens=length, free=free)
    found = sampling(policy, draws, device=planner.setting.device.kind)
    work = [repeated(found, count * section.num_candidates / draws.rows)]
    if section.engine == "vllm":
        return draws, planner.phase("sample", vllm_share(planner, section, 0.92)), work
    beside = {"kv_cache": found.kv_cache, "activations": found.working}
    return draws, planner.phase("sample", held(policy), beside), work


def draws_for(
    section: SamplingSection, spec: ModelSpec, *, total_prompts: int, prompt_tokens: int, free: int | None
) -> Draws:
    """What a stage's sampling settings keep side by side of a model, with so many bytes free when it begins."""
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": section.max_new_tokens}
    max_rows = section.max_rows
    if max_rows is None:
        free = None if section.engine == "vllm" else free
        options = {"candidates": section.num_candidates, **sizes}
        max_rows = rows_that_fit(free, spec.shape, spec.arithmetic, **options)
    return draws_of(total_prompts=total_prompts, candidates=section.num_candidates, max_rows=max_rows, **sizes)


def repeated(found: Any, times: float) -> Work:
    """Drawing one set of responses after the other."""
    return Work(found.flops * times, found.bytes_read * times)


def vllm_share(planner: Planner, section: SamplingSection, default: float) -> dict[str, int]:
    """What vLLM takes at its start and keeps: a share of the device's memory for weights, cache and work.

    Raises ConfigError where several processes would each start one.
    """
    if planner.setting.processes > 1:
        raise ConfigError("sampling.engine=vllm runs in one process: plan it with --gpus 1 and tensor_parallel_size.")
    share = section.vllm.get("gpu_memory_utilization", default)
    return {"vllm": int(share * planner.setting.device.memory)}


def _score(
    planner: Planner, judges: Sequence[ModelSpec], draws: Draws, section: SamplingSection, max_tokens: int, count: int
) -> tuple[Phase, list[Work]]:
    rows = judged(draws, section, max_tokens)
    passes = [planner.forward(judge, rows, "scores") for judge in judges]
    responses = count * section.num_candidates
    work = [Work(each.flops * responses / (rows.count * len(rows.branches))) for each in passes]
    beside = {"activations": max(each.peak for each in passes)}
    return planner.phase("score", held(*judges), beside), work


def judged(draws: Draws, section: SamplingSection, max_tokens: int) -> Rows:
    """A micro-batch of a reward model: prompts with all responses, or with some where all are over the budget."""
    room = max(1, (max_tokens - draws.prompt_tokens) // draws.new_tokens)
    branches = (draws.new_tokens,) * min(section.num_candidates, room)
    return fill(Rows(1, draws.prompt_tokens, branches), max_tokens, 10**9)


def fill(row: Rows, max_tokens: int, at_most: int) -> Rows:
    """As many such rows as a micro-batch takes."""
    return replace(row, count=max(1, min(max_tokens // row.num_tokens, at_most)))


def prompt_length(wanted: int, new_tokens: int, *specs: ModelSpec) -> int:
    """Tokens of a prompt at most. Raises ConfigError where a model's context has no room for one."""
    room = min(context_length(spec.shape) for spec in specs) - new_tokens
    if room < 2:
        raise ConfigError(f"sampling.max_new_tokens = {new_tokens} leaves no room for a prompt in the model's context.")
    return min(wanted, room)


def _length(wanted: int, spec: ModelSpec) -> tuple[int, tuple[str, ...]]:
    context = context_length(spec.shape)
    if wanted <= context:
        return wanted, ()
    return context, (f"rows of {context} tokens, the model's context, not {wanted} (data.max_length)",)


def _prompt_unit(prompts: Any, setting: Setting) -> tuple[int, str, float | None]:
    """Prompts that one process takes in a unit of time, the unit, and how many units there are."""
    count = _num_rows(_sizes(prompts.prompts), prompts.max_prompts)
    if count is None:
        return math.ceil(MANY / setting.processes), f"{MANY} prompts", None
    return math.ceil(count / setting.processes), f"{count} prompts", 1


def _num_rows(sizes: Mapping[str, int] | None, at_most: int | None) -> int | None:
    """Rows of all sources, before any is dropped; where a source is not there, as many as the limit."""
    if sizes is None:
        return at_most
    total = sum(sizes.values())
    return min(total, at_most or total)


def _mixed_sizes(data: Any) -> dict[str, int] | None:
    """Pairs of each source that the mix takes; None where a source is not there."""
    train, mix_in = _sizes(data.train), _sizes(data.mix_in)
    if train is None or mix_in is None:
        return None
    rows, others = ({name: range(size) for name, size in sizes.items()} for sizes in (train, mix_in))
    return {name: len(taken) for name, taken in mix_rows(rows, others, data.mix, seed=0).items()}


def _sizes(sources: Sequence[str], at_most: Mapping[str, int] | None = None) -> dict[str, int] | None:
    """Rows of each file, at most as many as are wanted of it; None where one is not there."""
    found = {}
    for name in sources:
        try:
            path = find_data(name)
        except AlignError:
            return None
        if not isinstance(path, Path):
            return None
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
        found[name] = min(count, (at_most or {}).get(name, count))
    return found


def _steps(count: int, train: Any) -> int:
    steps = math.ceil(math.ceil(count * train.epochs) / train.batch_size)
    return min(steps, train.max_steps or steps)


def file_bytes(planner: Planner, section: ModelSection) -> int:
    """Weights on disk: in float32 where a stage of ours wrote them, else taken to be as their config.json says."""
    origin = planner.origin(section.path)
    spec = spec_of(origin.shape)
    stored = torch.float32 if section.path in planner.origins else spec.shape.dtype or torch.float32
    return weights(spec).parameters * stored.itemsize


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
