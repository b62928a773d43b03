"""What plans of all stages are made of: models by their settings, passes and phases, rows that fit a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignment.config import LoraSection, ModelSection, SamplingSection, StageConfig
from alignment.errors import ConfigError
from alignment.model_folders import context_length
from alignment.plan.origins import Origin
from alignment.plan.passes import Pass, Rows, run_pass
from alignment.plan.phases import Phase, StagePlan, Work, together
from alignment.plan.sampling import Draws, draws_of
from alignment.plan.shapes import ModelSpec, spec_of, weights
from alignment.plan.training import Setting, held
from alignment.sampling.memory import kv_bytes, rows_that_fit
from alignment.sampling.vllm_engine import CPU_CACHE_BYTES


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


def vllm_share(
    planner: Planner, section: SamplingSection, spec: ModelSpec, draws: Draws, *, default: float
) -> dict[str, int]:
    """What vLLM takes of each device at its start and keeps, for weights, cache and work.

    On a GPU that is a share of its memory, on a CPU the weights and a cache of fixed size, as the engine has it.

    Raises ConfigError where several processes would each start one, or the share is too small for the weights and one
    response with its prompt.
    """
    if planner.setting.processes > 1:
        raise ConfigError("sampling.engine=vllm runs in one process: plan it with --gpus 1 and tensor_parallel_size.")
    parts = section.vllm.get("tensor_parallel_size", 1)
    loaded = sum(held(spec).values()) // parts
    sizes = {"prompt_tokens": draws.prompt_tokens, "new_tokens": draws.new_tokens}
    one = kv_bytes(spec.shape, spec.arithmetic, prompts=1, rows=1, **sizes) // parts
    fixed = section.vllm.get("kv_cache_memory_bytes")
    if fixed or planner.setting.device.kind == "cpu":
        return {"vllm": loaded + (fixed or CPU_CACHE_BYTES)}
    share = section.vllm.get("gpu_memory_utilization", default)
    taken = int(share * planner.setting.device.memory)
    if taken < loaded + one:
        raise ConfigError(
            f"sampling.engine=vllm: its share of a device, {share:g} or {taken / 1e9:.1f} GB, is too small for the "
            f"weights and one response with its prompt, {(loaded + one) / 1e9:.1f} GB. Raise "
            "sampling.vllm.tensor_parallel_size, which spreads the model over devices, or "
            "sampling.vllm.gpu_memory_utilization."
        )
    return {"vllm": taken}


def one_prompt(prompt_tokens: int, new_tokens: int, responses: int, max_tokens: int) -> Rows:
    """A prompt with its responses, or with some where all are over the budget: `split_tree` parts them."""
    room = max(1, (max_tokens - prompt_tokens) // new_tokens)
    return Rows(1, prompt_tokens, (new_tokens,) * min(responses, room))


def judged(draws: Draws, section: SamplingSection, max_tokens: int) -> Rows:
    """A micro-batch of a reward model."""
    row = one_prompt(draws.prompt_tokens, draws.new_tokens, section.num_candidates, max_tokens)
    return fill(row, max_tokens, 10**9)


def scoring_work(found: Pass, rows: Rows, draws: Draws, responses: float) -> Work:
    """Scoring so many responses to prompts of full length, by the pass of a micro-batch."""
    tokens = draws.prompt_tokens / len(rows.branches) + draws.new_tokens
    return Work(found.flops * responses * tokens / rows.num_tokens)


def heaviest(row: Rows, max_tokens: int, at_most: int, peak: Callable[[Rows], int]) -> Rows:
    """The micro-batch with the highest `peak`: of the longest rows as many as fit, or one more that are shorter."""
    longest = replace(row, count=max(1, min(max_tokens // row.num_tokens, at_most)))
    return max(longest, fill(row, max_tokens, at_most), key=peak)


def fill(row: Rows, max_tokens: int, at_most: int) -> Rows:
    """The largest micro-batch of rows that are at most so long: one more than fit of the longest, with shorter prompts
    and, where that is not enough, responses. A row that is longer than the micro-batch is one by itself.
    """
    count = max(1, min(math.ceil(max_tokens / row.num_tokens), at_most))
    less = math.ceil(max(0, row.num_tokens - max_tokens / count)) if count > 1 else 0
    of_prompt = min(less, max(0, row.trunk - 2))
    of_response = math.ceil((less - of_prompt) / len(row.branches))
    branches = tuple(length - of_response for length in row.branches)
    return replace(row, count=count, trunk=row.trunk - of_prompt, branches=branches)


def prompt_length(wanted: int, new_tokens: int, *specs: ModelSpec) -> int:
    """Tokens of a prompt at most that all models can read. Raises ConfigError where a context has no room for one."""
    room = min(context_length(spec.shape) for spec in specs) - new_tokens
    if room < 2:
        raise ConfigError(f"sampling.max_new_tokens = {new_tokens} leaves no room for a prompt in the model's context.")
    return min(wanted, room)


def file_bytes(planner: Planner, section: ModelSection) -> int:
    """Weights on disk: in float32 where a stage of ours wrote them, else taken to be as their config.json says."""
    origin = planner.origin(section.path)
    spec = spec_of(origin.shape)
    stored = torch.float32 if section.path in planner.origins else spec.shape.dtype or torch.float32
    return weights(spec).parameters * stored.itemsize
