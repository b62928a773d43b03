"""Prompts that are answered side by side: keys and values of each prompt once, those of its samples' tokens apart.

A cohort's samples all have the same number of tokens, so none of their columns is padding. A decode step multiplies the
queries of all samples of a prompt with the prompt's keys in one product, and reads these once, not once a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignment.prefix_batch import Branch, PrefixBatch, Tree, collate
from alignment.tree_attention import Block, block_attention, tree_blocks

# Prompts are run with a common beginning once where it is at least this long.
MIN_SHARED_TOKENS = 16
# Columns by which the space for samples' own keys and values grows. It is multiplied whole, since products of a part of
# it would copy that first; what is not yet written has weight 0.
MORE_COLUMNS = 16


@dataclass(frozen=True)
class PromptRow:
    """Prompts as one flat row, common beginnings once.

    Attributes:
        batch: one row of trees, a branch for every prompt's end, on the CPU.
        order: the prompts in the order of the branches.
        spans: of each branch, the ranges of the row that make up its prompt.
    """

    batch: PrefixBatch
    order: list[int]
    spans: list[list[tuple[int, int]]]


class Layer:
    """Keys and values of one decoder layer, (G, D) for every token, in tables of L prompts with W samples each.

    Keys are held less the mean of their prompt's. What all keys share adds the same to all scores of a query, so
    softmax does not see it, and without it the scores lose less to rounding (Zhang et al. 2024, arXiv:2410.02367,
    Sec. 4.2).
    """

    def __init__(self, keys: Float[Tensor, "L G P D"], values: Float[Tensor, "L G P D"], lengths: Tensor) -> None:
        """Keys and values are 0 beyond each prompt's length (L,)."""
        sums = keys.sum(2, keepdim=True, dtype=torch.promote_types(keys.dtype, torch.float32))
        self.key_mean = (sums / lengths[:, None, None, None]).to(keys.dtype)  # (L, G, 1, D)
        self.prompt_keys, self.prompt_values = keys - self.key_mean, values
        self.own_keys = self.own_values = keys.new_empty(0)  # (L, G, W, C, D)

    def append(self, keys: Float[Tensor, "L G W D"], values: Float[Tensor, "L G W D"], column: int) -> None:
        """The keys and values of every sample's newest token."""
        if column % MORE_COLUMNS == 0:
            more = keys.new_zeros(*keys.shape[:3], MORE_COLUMNS, keys.shape[3])
            self.own_keys, self.own_values = (
                torch.cat([x, more], dim=3) if column else more.clone() for x in (self.own_keys, self.own_values)
            )
        self.own_keys[:, :, :, column] = keys - self.key_mean
        self.own_values[:, :, :, column] = values

    def keep(self, lanes: Tensor, longest: int) -> None:
        """Leaves out all other prompts, and columns beyond the longest of these."""
        self.key_mean = self.key_mean[lanes]
        self.prompt_keys, self.prompt_values = (
            x[:, :, :longest].index_select(0, lanes) for x in (self.prompt_keys, self.prompt_values)
        )


class Cohort:
    """R samples of L prompts, each sample with as many tokens as the others.

    Attributes:
        lanes: (R,) the prompt of each sample, ascending.
        lengths: (L,) tokens of each prompt.
        columns: tokens that the samples have in the cache.
    """

    def __init__(self, lengths: Sequence[int], lanes: Sequence[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self.lanes = torch.tensor(lanes, device=device)
        self.columns = 0
        self._layers: list[Layer] = []
        self._arrange()

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def num_layers(self) -> int:
        """Layers that have started."""
        return len(self._layers)

    @property
    def positions(self) -> Int[Tensor, " R"]:
        """The place of every sample's next token in its text."""
        return self.lengths[self.lanes] + self.columns

    def start_layer(self, keys: Float[Tensor, "G N D"], values: Float[Tensor, "G N D"], row: PromptRow) -> None:
        """The prompts' keys and values in the next layer, of the flat row that held them."""
        shape = (len(self.lengths), keys.shape[0], int(self.lengths.max()), keys.shape[2])
        stored = keys.new_zeros(shape), values.new_zeros(shape)
        for lane, spans in enumerate(row.spans):
            start = 0
            for first, last in spans:
                for table, source in zip(stored, (keys, values), strict=True):
                    table[lane, :, start : start + last - first] = source[:, first:last]
                start += last - first
        self._layers.append(Layer(*stored, self.lengths))

    def attend(
        self,
        index: int,
        queries: Float[Tensor, "R H D"],
        keys: Float[Tensor, "R G D"],
        values: Float[Tensor, "R G D"],
    ) -> Float[Tensor, "R H D"]:
        """Attention of every sample's newest token in a layer, which joins the cache; queries are scaled already."""
        layer = self._layers[index]
        num_rows, num_heads, size = queries.shape
        groups = keys.shape[1]
        layer.append(self._table(keys), self._table(values), self.columns)
        table = self._table(queries.view(num_rows, groups, -1))  # (L, G, W, H/G D)
        slots = table.shape[0] * groups * self._width
        prompt_keys, prompt_values = layer.prompt_keys.flatten(0, 1), layer.prompt_values.flatten(0, 1)
        own_keys, own_values = layer.own_keys.flatten(0, 2), layer.own_values.flatten(0, 2)  # (L G W, C, D)
        together = table.reshape(len(prompt_keys), -1, size)  # (L G, W H/G, D)
        scores = torch.bmm(together, prompt_keys.transpose(1, 2))  # (L G, W H/G, P)
        own = torch.bmm(together.view(slots, -1, size), own_keys.transpose(1, 2))
        scores = torch.cat([scores, own.view(*scores.shape[:2], -1)], dim=-1)  # (L G, W H/G, P + C)
        longest = prompt_keys.shape[1]
        if self._shortest < longest:
            beyond = scores.unflatten(0, (-1, groups))[..., self._shortest : longest]
            beyond += self._bias.to(scores.dtype)[:, None, None]
        scores[..., longest + self.columns + 1 :] = float("-inf")
        weights = scores.softmax(-1)
        attended = torch.bmm(weights[..., :longest], prompt_values).view(slots, -1, size)
        attended = attended + torch.bmm(weights[..., longest:].reshape(slots, -1, own_keys.shape[1]), own_values)
        return self._rows(attended.view(*table.shape[:3], -1)).reshape(num_rows, num_heads, size)

    def keep(self, rows: Int[Tensor, " S"]) -> None:
        """Leaves out all other samples, and prompts that have none left."""
        lanes, places = self.lanes[rows], self._places[rows] % self._width
        prompts, self.lanes = lanes.unique(return_inverse=True)
        fewer = len(prompts) < len(self.lengths)
        self.lengths = self.lengths[prompts]
        self._arrange()
        for layer in self._layers:
            if fewer:
                layer.keep(prompts, int(self.lengths.max()))
            if self.columns:
                layer.own_keys, layer.own_values = (
                    self._table(x[lanes, :, places].flatten(2)).unflatten(3, x.shape[3:]).contiguous()
                    for x in (layer.own_keys, layer.own_values)
                )

    def _arrange(self) -> None:
        """Where every sample stands in a table of prompts with their samples, and which columns end a prompt."""
        counts = torch.bincount(self.lanes, minlength=len(self.lengths))
        first = counts.cumsum(0) - counts
        self._width = int(counts.max())
        place = torch.arange(len(self.lanes), device=self.lanes.device) - first[self.lanes]
        self._is_full = len(self.lanes) == len(self.lengths) * self._width
        self._places = self.lanes * self._width + place
        self._shortest = int(self.lengths.min())
        columns = torch.arange(self._shortest, int(self.lengths.max()), device=self.lengths.device)
        beyond = columns >= self.lengths[:, None]
        self._bias = torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, float("-inf"))

    def _table(self, rows: Float[Tensor, "R G X"]) -> Float[Tensor, "L G W X"]:
        """What the samples have, by prompt; 0 where a prompt has fewer samples than others."""
        if not self._is_full:
            everywhere = rows.new_zeros(len(self.lengths) * self._width, *rows.shape[1:])
            rows = everywhere.index_copy(0, self._places, rows)
        return rows.unflatten(0, (-1, self._width)).transpose(1, 2)

    def _rows(self, table: Float[Tensor, "L G W X"]) -> Float[Tensor, "R G X"]:
        """The way back."""
        rows = table.transpose(1, 2).flatten(0, 1)
        return rows if self._is_full else rows[self._places]


def prompt_row(prompts: Sequence[Sequence[int]]) -> PromptRow:
    """The prompts side by side, those that begin alike as branches of one trunk."""
    trees: list[Tree] = []
    order: list[int] = []
    spans: list[list[tuple[int, int]]] = []
    start = 0
    for members, shared in _families(prompts):
        trunk = prompts[members[0]][:shared]
        branches = [Branch(prompts[index][shared:], [False] * (len(prompts[index]) - shared)) for index in members]
        trees.append(Tree(trunk, branches))
        end = start + shared
        for branch in branches:
            spans.append([(start, start + shared)] * bool(shared) + [(end, end + len(branch.ids))])
            end += len(branch.ids)
        order += members
        start = end
    return PromptRow(collate([trees]), order, spans)


def prompt_blocks(row: PromptRow, dtype: torch.dtype, device: torch.device) -> list[Block]:
    """The blocks in which the prompts' tokens attend."""
    return [replace(block, bias=block.bias.to(device)) for block in tree_blocks(row.batch, dtype)]


def attend_and_keep(
    cohort: Cohort, row: PromptRow, blocks: Sequence[Block], queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of the prompts' own tokens, (H, N, D) in and out, whose keys and values the cohort keeps."""
    cohort.start_layer(keys, values, row)
    return block_attention(queries, keys, values, blocks)


def _families(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Prompts in groups with the number of tokens that all of a group begin with; at least one token stays apart.

    Of all ways to cut the sorted prompts where they have least in common, one that leaves the fewest tokens to run.
    """
    order = sorted(range(len(prompts)), key=lambda index: (list(prompts[index]), index))
    common = [_common(prompts[one], prompts[other]) for one, other in pairwise(order)]

    def best(first: int, last: int) -> tuple[int, list[tuple[list[int], int]]]:
        """Tokens saved and groups of `order[first:last]`."""
        if last - first == 1:
            return 0, [([order[first]], 0)]
        middle = (first + last) / 2  # of equal places the one in the middle, which keeps the recursion flat
        cut = min(range(first, last - 1), key=lambda place: (common[place], abs(place + 1 - middle)))
        shared = common[cut]
        parts = best(first, cut + 1), best(cut + 1, last)
        apart = sum(saved for saved, _ in parts)
        together = (last - first - 1) * shared
        if shared >= MIN_SHARED_TOKENS and together >= apart:
            return together, [(order[first:last], shared)]
        return apart, [family for _, families in parts for family in families]

    return best(0, len(order))[1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, less than either has."""
    length = min(len(one), len(other)) - 1
    return next((place for place in range(length) if one[place] != other[place]), length)
