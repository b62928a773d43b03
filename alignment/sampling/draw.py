"""One token a row from logits: inverse CDF in float32, with temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignment.sampling.protocol import SamplingParams

# Weights are summed in blocks of this many, so that only one block of each row is summed entry by entry.
CDF_BLOCK = 256
# Rows a CPU normalises at once: a few megabytes in float32 stay in its cache.
CPU_ROWS = 16


def draw(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"], params: SamplingParams
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """One token a row by inverse CDF of the tempered distribution, and its log-probability (see Sample).

    Args:
        logits: of any floating-point type; the distribution is computed in float32, from float64 logits in float64.
        uniforms: in [0, 1), one a row.
        params: the temperature (0 takes the likeliest token), top-k and top-p.
    """
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(len(logits), dtype=exact, device=logits.device)
    size = CPU_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        ids[rows], logprobs[rows] = _draw(logits[rows].to(exact), uniforms[rows], params)
    return ids, logprobs


def uniforms_of(prompt: Sequence[int], stream: int, params: SamplingParams) -> Float[Tensor, " T"]:
    """A sample's own random numbers in [0, 1), one a token: a function of seed, prompt and stream alone."""
    seeds = seeds_of(prompt, params.seed, stream)
    return torch.from_numpy(np.random.Generator(np.random.Philox(seeds)).random(params.max_new_tokens))


def seeds_of(prompt: Sequence[int], seed: int, *streams: int) -> np.random.SeedSequence:
    """Where random numbers begin that are a function of seed, prompt and streams alone."""
    digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=8).digest()
    return np.random.SeedSequence([seed, int.from_bytes(digest, "little"), *streams])


def _draw(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    if params.temperature == 0:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    probs = (logits if params.temperature == 1 else logits / params.temperature).softmax(-1)
    ids = inverse_cdf(_truncate(probs, params), uniforms.to(probs))
    return ids, probs.gather(-1, ids[:, None])[:, 0].log()


def inverse_cdf(weights: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The first entry of each row at which the running sum of its weights exceeds the number times their total.

    Weights are not negative and not all zero; an entry without weight is never taken.
    """
    vocabulary = weights.shape[-1]
    if vocabulary <= CDF_BLOCK:
        return _first_beyond(weights.cumsum(-1), uniforms[:, None] * weights.sum(-1, keepdim=True))
    if missing := -vocabulary % CDF_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, missing))
    blocks = weights.unflatten(-1, (-1, CDF_BLOCK))
    sums = blocks.sum(-1)
    edges = sums.cumsum(-1)
    threshold = uniforms[:, None] * edges[:, -1:]
    block = _first_beyond(edges, threshold)[:, None]
    inside = (threshold - (edges - sums).gather(-1, block)).clamp_min(0)
    chosen = blocks.gather(1, block[..., None].expand(-1, 1, CDF_BLOCK))[:, 0]
    return block[:, 0] * CDF_BLOCK + _first_beyond(chosen.cumsum(-1), inside)


def _first_beyond(edges: Tensor, threshold: Tensor) -> Tensor:
    """The first of each row's ascending edges above its threshold; rounding must not lift that to the last edge."""
    last = edges[:, -1:]
    threshold = torch.minimum(threshold, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(edges, threshold, right=True)[:, 0]


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
