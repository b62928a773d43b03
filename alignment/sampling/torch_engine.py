"""The built-in sampling engine: shared prefill, pre-allocated cache, finished rows leave the batch.

Prompts are taken in groups of similar length. Each prompt of a group is run once; its keys and values are then
repeated for its K samples. Prompts are padded on the left, so that all rows of a group write the same cache column in
each step. Every sample draws from its own random stream (seed, prompt, index), so that what else is in the batch
changes nothing but floating-point rounding.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from alignment.sampling.protocol import Sample, SamplingParams

# Below this share of live rows the cache is compacted: copying it costs about as much as a few steps of dead rows.
COMPACT_BELOW = 0.85


class TorchSampler:
    """Samples from a causal language model of transformers."""

    def __init__(self, model: nn.Module, *, stop_ids: Sequence[int], max_rows: int = 64) -> None:
        self.model, self.stop_ids, self.max_rows = model, tuple(stop_ids), max_rows

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """See Sampler."""
        was_training = self.model.training
        self.model.eval()
        results: list[list[Sample]] = [[] for _ in prompts]
        streams = _stream_indices(prompts, params.num_candidates)
        try:
            for group in _groups(prompts, params.num_candidates, self.max_rows):
                rows = [(index, k) for index, first, count in group for k in range(first, first + count)]
                finished = self._sample_group(prompts, rows, streams, params)
                for (index, _), sample in zip(rows, finished, strict=True):
                    results[index].append(sample)
                if on_progress:
                    on_progress(len(rows))
        finally:
            self.model.train(was_training)
        return results

    def _sample_group(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[tuple[int, int]],
        streams: list[int],
        params: SamplingParams,
    ) -> list[Sample]:
        device = next(self.model.parameters()).device
        order = list(dict.fromkeys(index for index, _ in rows))
        tokens, real = _left_pad([prompts[index] for index in order], device)  # (prompts, P)
        prompt_length = tokens.shape[1]
        cache = KeyValueCache(capacity=prompt_length + params.max_new_tokens)
        logits = self._forward(tokens, real, real.long().cumsum(1).sub(1).clamp_min(0), cache)
        repeat = torch.tensor([order.index(index) for index, _ in rows], device=device)
        cache.select(repeat)
        logits, real = logits[repeat], real[repeat]
        lengths = real.sum(1)
        uniforms = torch.stack([_uniforms(params, prompts[index], streams[index] + k) for index, k in rows]).to(
            device
        )  # (rows, max_new_tokens)
        live = list(range(len(rows)))
        out = [_Growing() for _ in rows]
        for step in range(params.max_new_tokens):
            next_ids, logprobs = draw(logits, uniforms[:, step], params)
            stopped = self._record(out, live, next_ids, logprobs)
            if all(stopped) or step + 1 == params.max_new_tokens:
                break
            keep = torch.tensor([not done for done in stopped], device=device)
            # Rows that are done go on harmlessly until enough have gathered to make a copy of the cache worth it.
            if keep.float().mean() < COMPACT_BELOW:
                picked = keep.nonzero()[:, 0]
                cache.select(picked)
                real, lengths, uniforms, next_ids = (x[picked] for x in (real, lengths, uniforms, next_ids))
                live = [row for row, done in zip(live, stopped, strict=True) if not done]
            real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
            logits = self._forward(next_ids[:, None], real, (lengths + step)[:, None], cache)
        return [growing.sample for growing in out]

    def _forward(self, tokens: Tensor, real: Tensor, positions: Tensor, cache: KeyValueCache) -> Float[Tensor, "R V"]:
        """Logits after the last column, for new columns at the end of the cache."""
        new = tokens.shape[1]
        total = real.shape[1]
        columns = torch.arange(total, device=tokens.device)
        causal = columns[None, :] <= columns[total - new :, None]  # (new, total)
        itself = columns[None, :] == columns[total - new :, None]
        mask = (causal & real[:, None, :]) | itself  # (R, new, total); padding sees itself
        output = self.model(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _record(self, out: list[_Growing], live: list[int], ids: Tensor, logprobs: Tensor) -> list[bool]:
        stopped = []
        for row, token, logprob in zip(live, ids.tolist(), logprobs.tolist(), strict=True):
            growing = out[row]
            if not growing.done:
                growing.token_ids.append(token)
                growing.logprobs.append(logprob)
                growing.done = token in self.stop_ids
            stopped.append(growing.done)
        return stopped


class KeyValueCache:
    """Keys and values in tensors of fixed capacity, written in place: transformers' cache interface, no copying."""

    is_compileable = False

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._used: list[int] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Appends (R, heads, new, dim) columns to a layer; returns all columns so far."""
        if layer == len(self._layers):
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._layers.append((keys.new_empty(shape), values.new_empty(shape)))
            self._used.append(0)
        start = self._used[layer]
        end = start + keys.shape[2]
        self._used[layer] = end
        stored_keys, stored_values = self._layers[layer]
        stored_keys[:, :, start:end] = keys
        stored_values[:, :, start:end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Keeps these rows, in this order; a row may be repeated."""
        for layer, (used, tensors) in enumerate(zip(self._used, self._layers, strict=True)):
            self._layers[layer] = tuple(_select_rows(tensor, rows, used) for tensor in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns written so far."""
        return self._used[layer_idx] if self._used else 0


def draw(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"], params: SamplingParams
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """One token a row by inverse CDF of the tempered distribution, and its log-probability (see Sample)."""
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        ids = logits.argmax(-1)
    else:
        logprobs = (logits / params.temperature).log_softmax(-1)
        probs = _truncate(logprobs.exp(), params)
        cumulative = probs.cumsum(-1)
        total = cumulative[:, -1:]
        # Rounding must not lift the threshold to the total: the first larger entry would be past the end.
        threshold = torch.minimum(uniforms.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def _truncate(probs: Float[Tensor, "R V"], params: SamplingParams) -> Float[Tensor, "R V"]:
    """Zeroes what top-k and top-p (nucleus, Holtzman et al. 2020, arXiv:1904.09751) leave out; not renormalised."""
    if params.top_k == 0 and params.top_p == 1:
        return probs
    ranked, order = probs.sort(-1, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if params.top_k:
        keep[:, params.top_k :] = False
    if params.top_p < 1:
        before = (ranked * keep).cumsum(-1) - ranked
        keep &= before < params.top_p * (ranked * keep).sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, ranked * keep)


@dataclass
class _Growing:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def sample(self) -> Sample:
        return Sample(self.token_ids, self.logprobs, "stop" if self.done else "length")


def _groups(prompts: Sequence[Sequence[int]], num_candidates: int, max_rows: int) -> list[list[tuple[int, int, int]]]:
    """(prompt, first sample, samples) in groups of at most `max_rows` samples, prompts of similar length together."""
    groups: list[list[tuple[int, int, int]]] = [[]]
    room = max_rows
    for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        first = 0
        while first < num_candidates:
            if room == 0:
                groups.append([])
                room = max_rows
            count = min(num_candidates - first, room)
            groups[-1].append((index, first, count))
            first, room = first + count, room - count
    return [group for group in groups if group]


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    real = torch.arange(longest, device=device)[None, :] >= longest - lengths[:, None]
    return tokens, real


def _select_rows(tensor: Tensor, rows: Tensor, used: int) -> Tensor:
    picked = tensor.new_empty((len(rows), *tensor.shape[1:]))
    picked[:, :, :used] = tensor[:, :, :used].index_select(0, rows)
    return picked


def _stream_indices(prompts: Sequence[Sequence[int]], num_candidates: int) -> list[int]:
    """The first stream of each prompt: a prompt that occurs again goes on where its last occurrence ended."""
    seen: Counter[tuple[int, ...]] = Counter()
    first = []
    for prompt in map(tuple, prompts):
        first.append(seen[prompt] * num_candidates)
        seen[prompt] += 1
    return first


def _uniforms(params: SamplingParams, prompt: Sequence[int], stream: int) -> Tensor:
    """The sample's own random numbers in [0, 1), one a token."""
    digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=8).digest()
    seeds = np.random.SeedSequence([params.seed, int.from_bytes(digest, "little"), stream])
    return torch.from_numpy(np.random.Generator(np.random.Philox(seeds)).random(params.max_new_tokens))
