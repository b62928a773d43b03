"""Samples that are drawn side by side: keys and values of each prompt once, those of its samples' tokens apart.

A cohort's samples all have the same number of tokens, so none of their columns is padding. A decode step multiplies the
queries of all samples of a prompt with the prompt's keys in one product, and reads these once, not once a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignment.sampling.own_tokens import OwnTokens, Space
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

    def keep(self, lanes: Int[Tensor, " M"], longest: int) -> PromptLayer:
        """These prompts alone, without columns beyond their longest."""
        keys, values = (x[:, :, :longest].index_select(0, lanes) for x in (self.keys, self.values))
        return PromptLayer(keys, values, self.key_mean[lanes])


class Prompts:
    """L prompts that were run together, the longest first, with their keys and values in every layer.

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


@dataclass(frozen=True)
class Order:
    """The S = R G pairs of a sample and a group stand by prompt, then by group, then by sample.

    Attributes:
        pairs: (S,) the pair at each place, as sample times G plus group.
        places: (S,) the place of each pair.
        slots: (S,) each place in a table of L prompts, G groups and W samples; None where every prompt has W.
        tables: L times G.
        width: W.
    """

    pairs: Int[Tensor, " S"]
    places: Int[Tensor, " S"]
    slots: Int[Tensor, " S"] | None
    tables: int
    width: int

    def table(self, x: Float[Tensor, "S h X"]) -> Float[Tensor, "LG Q X"]:
        """What the places have, W h rows for each prompt and group; 0 where a prompt has fewer samples than W."""
        if self.slots is not None:
            x = x.new_zeros(self.tables * self.width, *x.shape[1:]).index_copy_(0, self.slots, x)
        return x.reshape(self.tables, -1, x.shape[-1])

    def rows(self, table: Float[Tensor, "LG Q *X"]) -> Float[Tensor, "S h *X"]:
        """The way back."""
        table = table.unflatten(1, (self.width, -1)).flatten(0, 1)
        return table if self.slots is None else table.index_select(0, self.slots)


class Cohort:
    """R samples of L prompts, each sample with as many tokens as the others.

    Attributes:
        prompts: what is kept of the prompts.
        lanes: (R,) the prompt of each sample, ascending.
        own: what each layer keeps of the samples' own tokens.
        columns: how many these are.
    """

    def __init__(self, prompts: Prompts, lanes: Sequence[int], *, most_columns: int) -> None:
        """Every prompt has a sample; `most_columns`: tokens that each may have at the end."""
        self.prompts = prompts
        self.lanes = torch.tensor(lanes, device=prompts.lengths.device)
        self.own = [OwnTokens() for _ in prompts.layers]
        self.columns = 0
        self._space = Space(most_columns)
        self._orders: dict[int, Order] = {}

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def positions(self) -> Int[Tensor, " R"]:
        """The place of every sample's next token in its text."""
        return self.prompts.lengths[self.lanes] + self.columns

    @property
    def most_tokens(self) -> int:
        """Tokens that there are keys and values of, padding included, where every sample goes on to its full length."""
        prompts = len(self.prompts.lengths) * int(self.prompts.lengths.max())
        return prompts + len(self) * self._space.most_columns

    def attend(
        self,
        index: int,
        queries: Float[Tensor, "R H D"],
        keys: Float[Tensor, "R G D"],
        values: Float[Tensor, "R G D"],
    ) -> Float[Tensor, "R H D"]:
        """Attention of every sample's newest token in a layer, which joins the cache; queries are scaled already."""
        prompts, own = self.prompts.layers[index], self.own[index]
        order = self._order(keys.shape[1])
        keys = keys - prompts.key_mean[self.lanes]
        keys, values = (x.flatten(0, 1).index_select(0, order.pairs) for x in (keys, values))  # (S, D)
        own.append(keys, values, self.columns, self._space)
        grouped = queries.reshape(len(keys), -1, keys.shape[1]).index_select(0, order.pairs)  # (S, H/G, D)
        table = order.table(grouped).unflatten(0, prompts.key_mean.shape[:2])  # (L, G, Q, D)
        of_prompts, sums = (order.rows(x.flatten(0, 1)) for x in self.prompts.attend(index, table))
        scores = torch.bmm(grouped, own.keys.transpose(1, 2))  # (S, H/G, C)
        scores[..., self.columns + 1 :] = float("-inf")
        weights = torch.cat([scores, sums[..., None]], dim=-1).softmax(-1)  # the prompt counts as one token more
        weights = weights.to(values.dtype)
        attended = torch.bmm(weights[..., :-1], own.values).addcmul_(of_prompts, weights[..., -1:])
        return attended.index_select(0, order.places).view(queries.shape)

    def keep(self, rows: Int[Tensor, " Q"]) -> None:
        """Leaves out all other samples, and prompts that have none left."""
        groups = [layer.key_mean.shape[1] for layer in self.prompts.layers]
        before = {number: self._order(number).places.view(-1, number)[rows].flatten() for number in set(groups)}
        prompts, self.lanes = self.lanes[rows].unique(return_inverse=True)
        self.prompts.keep(prompts)
        self._orders = {}
        for own, number in zip(self.own, groups, strict=True):
            if self.columns:
                own.keep(before[number][self._order(number).pairs], self._space)

    def _order(self, groups: int) -> Order:
        """For layers with so many groups."""
        if groups not in self._orders:
            counts = torch.bincount(self.lanes)
            first, group = counts.cumsum(0) - counts, torch.arange(groups, device=counts.device)
            number = torch.arange(len(self.lanes), device=counts.device) - first[self.lanes]
            places = (groups * first + group[:, None] * counts).T[self.lanes] + number[:, None]  # (R, G)
            width = int(counts.max())
            is_taken = torch.arange(width, device=counts.device) < counts.repeat_interleave(groups)[:, None]
            slots = None if is_taken.all() else is_taken.flatten().nonzero()[:, 0]
            order = Order(places.flatten().argsort(), places.flatten(), slots, len(counts) * groups, width)
            self._orders[groups] = order
        return self._orders[groups]


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
