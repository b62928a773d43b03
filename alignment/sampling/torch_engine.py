"""The built-in sampling engine: prompts run once for all their samples, finished rows make room for the next prompts.

Prompts enter, the longest first, whenever enough rows are free. A step of the model takes the newest token of every
sample; rows of finished samples leave. Every sample draws from its own random stream (seed, prompt, index), so that
what else is in the batch changes nothing but floating-point rounding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alignment.errors import ModelError
from alignment.logprobs import unwrap
from alignment.low_rank import held_factors
from alignment.model_checks import reach_of
from alignment.sampling.cohort import Cohort
from alignment.sampling.draw import draw, uniforms_of
from alignment.sampling.memory import free_memory, rows_that_fit, tokens_that_fit
from alignment.sampling.own_tokens import whole_columns
from alignment.sampling.prompt_cache import Prompts, attend_and_keep, padded_length
from alignment.sampling.prompt_row import prompt_blocks, prompt_row
from alignment.sampling.protocol import Sample, SamplingParams
from alignment.tree_attention import TREE_ATTENTION

# Below this share of live rows the cache is copied without the others: it costs a few steps of dead rows.
COMPACT_BELOW = 0.93
# Prompts enter when this share of the rows is free: the cache is copied to make room for them.
REFILL_SHARE = 0.25
# Tokens of prompts run at once: memory beyond the cache.
PREFILL_TOKENS = 8192


class TorchSampler:
    """Samples from a causal language model of transformers."""

    def __init__(self, model: nn.Module, *, stop_ids: Sequence[int], max_rows: int | None = None) -> None:
        """With `max_rows` None as many responses are decoded side by side as `rows_that_fit` says at each call."""
        self.model, self.stop_ids, self.max_rows = model, frozenset(stop_ids), max_rows

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
        on_prompt: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """See Sampler.

        Raises ModelError where the model's attention sees fewer tokens back than prompt and response have, or is not
        transformers' own.
        """
        results: list[list[_Row]] = [[] for _ in prompts]
        self._check_window(prompts, params)
        max_rows, room = (self.max_rows, None) if self.max_rows else self._what_fits(prompts, params)
        queue = deque(_units(prompts, params, max_rows, results))
        running: list[_Running] = []  # those behind the first have just been started
        missing = [params.num_candidates for _ in prompts]
        with _evaluation(self.model):
            while queue or running:
                if units := _next_units(queue, running, params, max_rows, room):
                    running.append(self._start(units, params))
                else:
                    running = _joined(running)
                    self._step(running[0], params)
                left = [row for each in running for row in each.finish()]
                running = [each for each in running if each.rows]
                if on_progress and left:
                    on_progress(len(left))
                for row in left:
                    missing[row.index] -= 1
                    if on_prompt and not missing[row.index]:
                        samples = [each.sample for each in results[row.index]]
                        results[row.index].clear()
                        on_prompt(row.index, samples)
        return [[row.sample for row in rows] for rows in results]

    @torch.no_grad()
    def stream(self, prompt: Sequence[int], params: SamplingParams, *, index: int = 0) -> Iterator[int]:
        """The tokens of one response as they are drawn, to its end.

        They are what `sample` draws as this prompt's candidate number `index`, from the same random numbers; for the
        first candidate alone token for token, else as far as rounding in larger batches allows. The model is in
        evaluation mode until the end; a generator that is left before has to be closed.

        Raises as `sample` does.
        """
        row = _Row(0, index)
        self._check_window([prompt], params)
        with _evaluation(self.model):
            running = self._start([_Unit(tuple(prompt), [row])], params)
            yield row.token_ids[-1]
            while not running.finish():
                self._step(running, params)
                yield row.token_ids[-1]

    def _what_fits(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[int, int | None]:
        """Responses side by side, and tokens in the cache, by what is free on the model's device now."""
        first, config = next(self.model.parameters()), unwrap(self.model).config
        free = free_memory(first.device)
        rows = rows_that_fit(
            free,
            config,
            first.dtype,
            candidates=params.num_candidates,
            prompt_tokens=max(map(len, prompts), default=1),
            new_tokens=params.max_new_tokens,
        )
        return rows, tokens_that_fit(free, config, first.dtype)

    def _start(self, units: list[_Unit], params: SamplingParams) -> _Running:
        """New prompts, each run once, with the first token of every sample."""
        device = next(self.model.parameters()).device
        row = prompt_row([unit.prompt for unit in units])
        units = [units[index] for index in row.order]
        prompts = Prompts([len(unit.prompt) for unit in units], device)
        blocks = None

        def attend(_layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            nonlocal blocks
            if blocks is None:
                blocks = prompt_blocks(row, values.dtype, device)
            return attend_and_keep(prompts, row, blocks, queries, keys, values)

        tokens, positions = row.batch.input_ids.to(device), row.batch.position_ids.to(device)
        logits = self._forward(tokens, positions, attend, logits_to_keep=row.last_columns.to(device))
        config, called = unwrap(self.model).config.get_text_config(decoder=True), len(prompts.layers)
        if called != config.num_hidden_layers:
            raise ModelError(
                f"{config.model_type}: {called} of its {config.num_hidden_layers} layers call the attention that is "
                "set for them. Such a model cannot be sampled here."
            )
        rows = [sample for unit in units for sample in unit.rows]
        numbers = [uniforms_of(unit.prompt, sample.stream, params) for unit in units for sample in unit.rows]
        lanes = [lane for lane, unit in enumerate(units) for _ in unit.rows]
        cohort = Cohort(prompts, lanes, most_columns=params.max_new_tokens)
        uniforms = torch.stack(numbers)
        uniforms = (uniforms.float() if device.type == "mps" else uniforms).to(device)  # which has no float64
        started = _Running(cohort, rows, uniforms, self.stop_ids, params.max_new_tokens)
        started.record(*draw(logits[cohort.lanes], uniforms[:, 0], params))
        return started

    def _step(self, running: _Running, params: SamplingParams) -> None:
        """One token more for every sample."""
        cohort = running.cohort

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            inputs = (x.transpose(0, 1).contiguous() for x in (queries, keys, values))
            return cohort.attend(layer, *inputs).transpose(0, 1)

        logits = self._forward(running.newest[None], cohort.positions[None], attend, logits_to_keep=0)
        cohort.advance()
        uniforms = running.uniforms.gather(1, cohort.ages[:, None])[:, 0]
        running.record(*draw(logits, uniforms, params))

    def _forward(
        self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor], *, logits_to_keep: Tensor | int
    ) -> Float[Tensor, "R V"]:
        """Logits of one flat row. A mask of four axes stops transformers' own."""
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
            use_cache=False,
            attend=attend,
            logits_to_keep=logits_to_keep,
        )
        return output.logits[0]

    def _check_window(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        config = unwrap(self.model).config
        longest = max(map(len, prompts), default=0) + params.max_new_tokens
        if (reach := reach_of(config)) and longest > reach.tokens:
            raise ModelError(
                f"{config.model_type}: {reach.why}, and prompt and response may have "
                f"{longest}. That is not supported: lower prompts.max_prompt_length or sampling.max_new_tokens."
            )


@dataclass
class _Row:
    """A sample of the prompt at `index` that grows, from the random numbers of a `stream` of its own."""

    index: int
    stream: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def sample(self) -> Sample:
        return Sample(self.token_ids, self.logprobs, "stop" if self.stopped else "length")


@dataclass(frozen=True)
class _Unit:
    """Samples that share the keys and values of one prompt."""

    prompt: tuple[int, ...]
    rows: list[_Row]


class _Running:
    """A cohort with its samples, its random numbers (R, T) and the newest token of each sample (R,)."""

    def __init__(
        self, cohort: Cohort, rows: list[_Row], uniforms: Tensor, stop_ids: frozenset[int], max_new_tokens: int
    ) -> None:
        self.cohort, self.rows, self.uniforms = cohort, rows, uniforms
        self.stop_ids, self.max_new_tokens = stop_ids, max_new_tokens
        self.newest = torch.empty(0)

    def record(self, ids: Tensor, logprobs: Tensor) -> None:
        """The newest token of every sample; finished ones go on harmlessly until they leave."""
        self.newest = ids
        for row, token, logprob in zip(self.rows, ids.tolist(), logprobs.tolist(), strict=True):
            if not self._is_done(row):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.stopped = token in self.stop_ids

    def join(self, others: Sequence[_Running]) -> _Running:
        """With the samples of others, which have but their first tokens."""
        everybody = [self, *others]
        places = self.cohort.join([other.cohort for other in others])
        rows = [row for each in everybody for row in each.rows]
        self.rows = [rows[place] for place in places.tolist()]
        self.newest = torch.cat([each.newest for each in everybody])[places]
        self.uniforms = torch.cat([each.uniforms for each in everybody])[places]
        return self

    def finish(self) -> list[_Row]:
        """Lets finished samples go, and returns them, where they are enough to make a copy of the cache worth it."""
        alive = [place for place, row in enumerate(self.rows) if not self._is_done(row)]
        if alive and len(alive) >= COMPACT_BELOW * len(self.rows):
            return []
        leaving = [row for row in self.rows if self._is_done(row)]
        self.rows = [self.rows[place] for place in alive]
        if alive and leaving:
            places = torch.tensor(alive, device=self.newest.device)
            self.cohort.keep(places)
            self.newest, self.uniforms = self.newest[places], self.uniforms[places]
        return leaving

    def _is_done(self, row: _Row) -> bool:
        return row.stopped or len(row.token_ids) == self.max_new_tokens


def _units(
    prompts: Sequence[Sequence[int]], params: SamplingParams, max_rows: int, results: list[list[_Row]]
) -> Iterator[_Unit]:
    """The samples of each prompt in lots of at most `max_rows`, the longest prompts first; also put into `results`.

    A prompt that occurs again goes on with the random streams where its last occurrence ended.
    """
    by_prompt: dict[tuple[int, ...], list[_Row]] = {}
    for index, prompt in enumerate(map(tuple, prompts)):
        rows = by_prompt.setdefault(prompt, [])
        for _ in range(params.num_candidates):
            row = _Row(index, len(rows))
            rows.append(row)
            results[index].append(row)
    for prompt in sorted(by_prompt, key=len, reverse=True):
        rows = by_prompt[prompt]
        yield from (_Unit(prompt, rows[start : start + max_rows]) for start in range(0, len(rows), max_rows))


def _joined(running: list[_Running]) -> list[_Running]:
    first, *others = running
    return [first.join(others)] if others else running


def _next_units(
    queue: deque[_Unit], running: Sequence[_Running], params: SamplingParams, max_rows: int, room: int | None
) -> list[_Unit]:
    """The prompts that enter now: none while too few rows, or tokens in `room` (None: any number), are free."""
    free = max_rows - sum(len(each.rows) for each in running)
    if not queue or (running and free < max_rows * REFILL_SHARE):
        return []
    left = math.inf if room is None else room - _most_tokens(running, params)
    longest = max([len(queue[0].prompt), *(each.cohort.longest for each in running)])
    units: list[_Unit] = []
    tokens = 0
    while queue and len(queue[0].rows) <= free and (not units or tokens + len(queue[0].prompt) <= PREFILL_TOKENS):
        unit = queue[0]
        left -= padded_length(len(unit.prompt), longest) + len(unit.rows) * whole_columns(params.max_new_tokens)
        if left < 0 and (running or units):
            break
        units.append(queue.popleft())
        free -= len(unit.rows)
        tokens += len(unit.prompt)
    return units


def _most_tokens(running: Sequence[_Running], params: SamplingParams) -> int:
    """Tokens that there are keys and values of, padding included, where every sample goes on to its full length."""
    lengths = [length for each in running for length in each.cohort.prompts.lengths.tolist()]
    longest = max(lengths, default=0)
    own = sum(len(each.cohort) for each in running) * whole_columns(params.max_new_tokens)
    return sum(padded_length(length, longest) for length in lengths) + own


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with our attention and not compiled, and afterwards as it was."""
    inner = unwrap(model)
    attention, was_training = inner.config._attn_implementation, model.training
    if attention != TREE_ATTENTION:
        inner.set_attn_implementation(TREE_ATTENTION)
    model.eval()
    try:
        with held_factors(model), _uncompiled(model):
            yield
    finally:
        model.train(was_training)
        if attention != TREE_ATTENTION:
            inner.set_attn_implementation(attention)


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Where layers are compiled for training, they run as they are: each number of rows is another shape."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
