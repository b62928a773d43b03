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

# Prompts of which the shortest has this share of the longest's tokens share a table; the rest of it is padding.
LEAST_SHARE = 0.6


@dataclass(frozen=True)
class Table:
    """Prompts of like length that stand in one table: lanes `start` to `stop`, the longest with `columns` tokens."""

    start: int
    stop: int
    columns: int


@dataclass(frozen=True)
class Move:
    """Rows of an old table that go to places of a new one."""

    table: int
    rows: Int[Tensor, " N"]
    places: Int[Tensor, " N"]


@dataclass(frozen=True)
class PromptLayer:
    """What one layer keeps of L prompts; G groups of heads with D numbers, no use beyond each prompt's length.

    Keys are held less the mean of their prompt's. What all keys share adds the same to all scores of a query, so
    softmax does not see it, and without it the scores lose less to rounding (Zhang et al. 2024, arXiv:2410.02367,
    Sec. 4.2).

    Attributes:
        keys, values: for each of the tables (N, G, P, D).
        key_mean: what the keys are held less.
    """

    keys: list[Tensor]
    values: list[Tensor]
    key_mean: Float[Tensor, "L G D"]


class Prompts:
    """L prompts, the longest first, with their keys and values in every layer.

    Attributes:
        lengths: (L,) tokens of each prompt.
        layers: what each layer keeps.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.layers: list[PromptLayer] = []
        self._set_lengths(torch.tensor(lengths, device=device))

    def start_layer(self, keys: Float[Tensor, "G N D"], values: Float[Tensor, "G N D"], row: PromptRow) -> None:
        """The keys and values in the next layer, of the flat row that held them."""
        means = keys.new_empty(len(self.lengths), keys.shape[0], keys.shape[2])
        stored: tuple[list[Tensor], list[Tensor]] = ([], [])
        for table in self.tables:
            shape = (table.stop - table.start, keys.shape[0], table.columns, keys.shape[2])
            own_keys, own_values = keys.new_zeros(shape), values.new_zeros(shape)
            for place, spans in enumerate(row.spans[table.start : table.stop]):
                start = 0
                for first, last in spans:
                    own_keys[place, :, start : start + last - first] = keys[:, first:last]
                    own_values[place, :, start : start + last - first] = values[:, first:last]
                    start += last - first
            lanes = slice(table.start, table.stop)
            sums = own_keys.sum(2, dtype=torch.promote_types(keys.dtype, torch.float32))
            means[lanes] = (sums / self.lengths[lanes, None, None]).to(keys.dtype)
            stored[0].append(own_keys - means[lanes, :, None])
            stored[1].append(own_values)
        self.layers.append(PromptLayer(*stored, means))

    def attend(
        self, index: int, queries: Float[Tensor, "L G Q D"]
    ) -> tuple[Float[Tensor, "L G Q D"], Float[Tensor, "L G Q"]]:
        """What the prompts' tokens alone give the queries in a layer, and the logarithm of their weights' sum."""
        layer = self.layers[index]
        tables = zip(self.tables, layer.keys, layer.values, self._biases_of(queries.dtype), strict=True)
        parts = [
            attention_with_lse(queries[table.start : table.stop], keys, values, bias)
            for table, keys, values, bias in tables
        ]
        attended, sums = zip(*parts, strict=True)
        return torch.cat(attended), torch.cat(sums)

    def join(self, others: Sequence[Prompts]) -> Sequence[Int[Tensor, " _"]]:
        """Takes the prompts of others, which are of no use afterwards.

        Returns the new places of its own prompts, then those of each other's.
        """
        everybody = [self, *others]
        order = torch.cat([each.lengths for each in everybody]).argsort(descending=True, stable=True)
        sizes = [len(each.lengths) for each in everybody]
        self._take(everybody, order)
        return order.argsort().split(sizes)

    def keep(self, lanes: Int[Tensor, " M"]) -> None:
        """Leaves out all other prompts."""
        if len(lanes) < len(self.lengths):
            self._take([self], lanes)

    def _take(self, everybody: Sequence[Prompts], lanes: Int[Tensor, " M"]) -> None:
        """Its prompts are those at `lanes` of all together, in that order; nobody else has use for theirs any more."""
        before = [table for each in everybody for table in each.tables]
        self._set_lengths(torch.cat([each.lengths for each in everybody])[lanes])
        moves = _moves(before, self.tables, lanes)
        for index in range(len(self.layers)):  # one after the other: never two copies of all
            layers = [each.layers[index] for each in everybody]
            keys = _moved([table for layer in layers for table in layer.keys], self.tables, moves)
            values = _moved([table for layer in layers for table in layer.values], self.tables, moves)
            taken = PromptLayer(keys, values, torch.cat([layer.key_mean for layer in layers])[lanes])
            for each in everybody:
                each.layers[index] = taken

    def _set_lengths(self, lengths: Int[Tensor, " L"]) -> None:
        self.lengths = lengths
        self.tables = tables_of(lengths.tolist())
        self._biases: dict[torch.dtype, list[Tensor | None]] = {}

    def _biases_of(self, dtype: torch.dtype) -> list[Tensor | None]:
        """For each table what keeps queries from its padding; None where it has none."""
        if dtype not in self._biases:
            self._biases[dtype] = []
            for table in self.tables:
                columns = torch.arange(table.columns, device=self.lengths.device)
                beyond = columns >= self.lengths[table.start : table.stop, None]
                bias = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, float("-inf"))
                self._biases[dtype].append(bias[:, None, None] if beyond.any() else None)
        return self._biases[dtype]


def tables_of(lengths: Sequence[int]) -> list[Table]:
    """Tables for prompts of these lengths, the longest first."""
    tables = []
    start = 0
    while start < len(lengths):
        least = LEAST_SHARE * lengths[start]
        stop = next((lane for lane in range(start, len(lengths)) if lengths[lane] < least), len(lengths))
        tables.append(Table(start, stop, lengths[start]))
        start = stop
    return tables


def padded_length(tokens: int, longest: int) -> int:
    """Columns at most for a prompt among others, of which one may be the longest."""
    return min(longest, int(tokens / LEAST_SHARE))


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


def _moves(before: Sequence[Table], after: Sequence[Table], lanes: Int[Tensor, " M"]) -> list[list[Move]]:
    """What goes into each of the new tables, of which lane `m` was number `lanes[m]` of all the old ones."""
    origins = [(number, row) for number, table in enumerate(before) for row in range(table.stop - table.start)]
    found = []
    for table in after:
        rows: dict[int, list[tuple[int, int]]] = {}
        for place, lane in enumerate(lanes[table.start : table.stop].tolist()):
            number, row = origins[lane]
            rows.setdefault(number, []).append((row, place))
        found.append([Move(number, *torch.tensor(pairs, device=lanes.device).T) for number, pairs in rows.items()])
    return found


def _moved(old: Sequence[Tensor], tables: Sequence[Table], moves: Sequence[Sequence[Move]]) -> list[Tensor]:
    """The new tables; 0 where an old one had fewer columns."""
    new = []
    for table, into in zip(tables, moves, strict=True):
        groups, size = old[0].shape[1], old[0].shape[3]
        filled = old[0].new_zeros(table.stop - table.start, groups, table.columns, size)
        for move in into:
            part = old[move.table][:, :, : table.columns].index_select(0, move.rows)
            filled[:, :, : part.shape[2]].index_copy_(0, move.places, part)
        new.append(filled)
    return new
