"""Keys and values of prompts, each once for all its samples, and attention to them.

A decode step multiplies the queries of all samples of a prompt with the prompt's keys in one product, and reads these
once, not once a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignment.sampling.prompt_row import PromptRow
from alignment.tree_attention import Block, block_attention

# Prompts of which the shortest has this share of the longest's tokens are attended to in one call; the rest is padding.
LEAST_SHARE = 0.6


@dataclass(frozen=True)
class PromptLayer:
    """What one layer keeps of L prompts; G groups of heads with D numbers, no use beyond each prompt's length.

    Keys are held less the mean of their prompt's. What all keys share adds the same to all scores of a query, so
    softmax does not see it, and without it the scores lose less to rounding (Zhang et al. 2024, arXiv:2410.02367,
    Sec. 4.2).
    """

    keys: Float[Tensor, "L G P D"]
    values: Float[Tensor, "L G P D"]
    key_mean: Float[Tensor, "L G D"]

    def join(
        self, places: Int[Tensor, " L"], other: PromptLayer, others: Int[Tensor, " M"], longest: int
    ) -> PromptLayer:
        """With the prompts of another, each at its new place, in tables for the longest of all."""
        keys = _placed((self.keys, places), (other.keys, others), longest)
        values = _placed((self.values, places), (other.values, others), longest)
        means = torch.cat([self.key_mean, other.key_mean])
        return PromptLayer(keys, values, torch.empty_like(means).index_copy_(0, torch.cat([places, others]), means))

    def keep(self, lanes: Int[Tensor, " M"], longest: int) -> PromptLayer:
        """These prompts alone, without columns beyond their longest."""
        keys, values = (x[:, :, :longest].index_select(0, lanes) for x in (self.keys, self.values))
        return PromptLayer(keys, values, self.key_mean[lanes])


class Prompts:
    """L prompts, the longest first, with their keys and values in every layer.

    Attributes:
        lengths: (L,) tokens of each prompt.
        layers: what each layer keeps.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self.layers: list[PromptLayer] = []
        self._runs: list[tuple[slice, int, Tensor | None]] = []

    def start_layer(self, keys: Float[Tensor, "G N D"], values: Float[Tensor, "G N D"], row: PromptRow) -> None:
        """The keys and values in the next layer, of the flat row that held them."""
        shape = (len(self.lengths), keys.shape[0], int(self.lengths.max()), keys.shape[2])
        stored = keys.new_zeros(shape), values.new_zeros(shape)
        for lane, spans in enumerate(row.spans):
            start = 0
            for first, last in spans:
                for table, source in zip(stored, (keys, values), strict=True):
                    table[lane, :, start : start + last - first] = source[:, first:last]
                start += last - first
        sums = stored[0].sum(2, dtype=torch.promote_types(keys.dtype, torch.float32))
        mean = (sums / self.lengths[:, None, None]).to(keys.dtype)
        self.layers.append(PromptLayer(stored[0] - mean[:, :, None], stored[1], mean))

    def attend(
        self, index: int, queries: Float[Tensor, "L G Q D"]
    ) -> tuple[Float[Tensor, "L G Q D"], Float[Tensor, "L G Q"]]:
        """What the prompts' tokens alone give the queries in a layer, and the logarithm of their weights' sum."""
        layer = self.layers[index]
        self._runs = self._runs or self._of_like_length(queries.dtype)
        parts = []
        for lanes, longest, bias in self._runs:
            keys, values = (x[lanes, :, :longest] for x in (layer.keys, layer.values))
            parts.append(attention_with_lse(queries[lanes], keys, values, bias))
        attended, sums = zip(*parts, strict=True)
        return torch.cat(attended), torch.cat(sums)

    def join(self, other: Prompts) -> tuple[Int[Tensor, " L"], Int[Tensor, " M"]]:
        """Takes the prompts of another, which is of no use afterwards; the new places of its own and of the other's."""
        lengths = torch.cat([self.lengths, other.lengths])
        order = lengths.argsort(descending=True, stable=True)
        places, others = order.argsort().split([len(self.lengths), len(other.lengths)])
        self.lengths, self._runs = lengths[order], []
        longest = int(self.lengths[0])
        for index, layer in enumerate(self.layers):  # one after the other: never two copies of all
            self.layers[index] = layer.join(places, other.layers[index], others, longest)
        other.layers.clear()
        return places, others

    def keep(self, lanes: Int[Tensor, " M"]) -> None:
        """Leaves out all other prompts."""
        if len(lanes) < len(self.lengths):
            self.lengths = self.lengths[lanes]
            longest = int(self.lengths.max())
            for index, layer in enumerate(self.layers):  # one after the other: never two copies of all
                self.layers[index] = layer.keep(lanes, longest)
            self._runs = []

    def _of_like_length(self, dtype: torch.dtype) -> list[tuple[slice, int, Tensor | None]]:
        """Neighbours of like length, their longest's, and what keeps queries from the others' padding."""
        lengths = self.lengths.tolist()
        runs = []
        start = 0
        while start < len(lengths):
            longest = lengths[start]
            stop = next((at for at in range(start, len(lengths)) if lengths[at] < LEAST_SHARE * longest), len(lengths))
            columns = torch.arange(longest, device=self.lengths.device)
            beyond = columns >= self.lengths[start:stop, None]
            bias = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, float("-inf"))
            runs.append((slice(start, stop), longest, bias[:, None, None] if beyond.any() else None))
            start = stop
        return runs


def attend_and_keep(
    prompts: Prompts, row: PromptRow, blocks: Sequence[Block], queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of the prompts' own tokens, (H, N, D) in and out, whose keys and values are kept."""
    prompts.start_layer(keys, values, row)
    return block_attention(queries, keys, values, blocks)


def attention_with_lse(
    queries: Float[Tensor, "L G Q D"],
    keys: Float[Tensor, "L G P D"],
    values: Float[Tensor, "L G P D"],
    bias: Float[Tensor, "L 1 1 P"] | None,
) -> tuple[Float[Tensor, "L G Q D"], Float[Tensor, "L G Q"]]:
    """Attention of scaled queries, and the logarithm of the sum of its scores' exponentials, in float32 at least."""
    if queries.device.type != "cpu":
        return plain_attention_with_lse(queries, keys, values, bias)
    mask = None if bias is None else bias.expand(-1, 1, queries.shape[2], -1)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(queries, keys, values, attn_mask=mask, scale=1.0)


def plain_attention_with_lse(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` by products, for devices whose kernels do not tell the sum of every query."""
    scores = (queries @ keys.mT).to(torch.promote_types(queries.dtype, torch.float32))
    if bias is not None:
        scores += bias
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def _placed(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], longest: int) -> Float[Tensor, "L G P D"]:
    """One table of two, each given with the places of its prompts; 0 beyond what they have."""
    groups, size = one[0].shape[1], one[0].shape[3]
    table = one[0].new_zeros(len(one[0]) + len(two[0]), groups, longest, size)
    for part, places in (one, two):
        table[:, :, : part.shape[2]].index_copy_(0, places, part)
    return table
