"""Samples that are drawn side by side, of any age: keys and values of each prompt once, those of its samples apart.

New prompts join those that are there, so that every layer has one product each, however many have come and gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignment.sampling.own_tokens import OwnTokens, Space, whole_columns
from alignment.sampling.prompt_cache import Prompts


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


@dataclass(frozen=True)
class Newest:
    """Where the S pairs' newest tokens go in tables with C columns.

    Attributes:
        columns: C.
        at: (S,) the place of each in the flat table.
        bias: 0 up to a pair's newest token and -inf beyond.
    """

    columns: int
    at: Int[Tensor, " S"]
    bias: Float[Tensor, "S 1 C"]


class Cohort:
    """R samples of L prompts, side by side.

    Attributes:
        prompts: what is kept of the prompts.
        lanes: (R,) the prompt of each sample, ascending.
        ages: (R,) how many tokens of its own each sample has here.
        own: what each layer keeps of these.
    """

    def __init__(self, prompts: Prompts, lanes: Sequence[int], *, most_columns: int) -> None:
        """Every prompt has a sample; `most_columns`: tokens that each may have at the end."""
        self.prompts = prompts
        self.lanes = torch.tensor(lanes, device=prompts.lengths.device)
        self.ages = torch.zeros_like(self.lanes)
        self.own = [OwnTokens() for _ in prompts.layers]
        self._most_columns, self._oldest = most_columns, 0
        self._space = Space(most_columns)
        self._orders: dict[int, Order] = {}
        self._newest: dict[int, Newest] = {}

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def positions(self) -> Int[Tensor, " R"]:
        """The place of every sample's next token in its text."""
        return self.prompts.lengths[self.lanes] + self.ages

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.prompts.lengths[0])

    def attend(
        self,
        index: int,
        queries: Float[Tensor, "R H D"],
        keys: Float[Tensor, "R G D"],
        values: Float[Tensor, "R G D"],
    ) -> Float[Tensor, "R H D"]:
        """Attention of every sample's newest token in a layer, which joins the cache; queries are scaled already."""
        prompts, own = self.prompts.layers[index], self.own[index]
        order, newest = self._order(keys.shape[1]), self._newest_of(keys.shape[1], keys.dtype)
        keys = keys - prompts.key_mean[self.lanes]
        keys, values = (x.flatten(0, 1).index_select(0, order.pairs) for x in (keys, values))  # (S, D)
        own.append(keys, values, newest.at, newest.columns, self._space)
        grouped = queries.reshape(len(keys), -1, keys.shape[1]).index_select(0, order.pairs)  # (S, H/G, D)
        table = order.table(grouped).unflatten(0, prompts.key_mean.shape[:2])  # (L, G, Q, D)
        of_prompts, sums = (order.rows(x.flatten(0, 1)) for x in self.prompts.attend(index, table))
        scores = torch.bmm(grouped, own.keys.transpose(1, 2)).add_(newest.bias)  # (S, H/G, C)
        weights = torch.cat([scores, sums[..., None]], dim=-1).softmax(-1)  # the prompt counts as one token more
        of_own = torch.bmm(weights[..., :-1].to(values.dtype), own.values)
        attended = of_own.addcmul_(of_prompts, weights[..., -1:].to(values.dtype))
        return attended.index_select(0, order.places).view(queries.shape)

    def advance(self) -> None:
        """Every layer has seen the newest tokens. A sample that has all it may have writes over its last."""
        self.ages = (self.ages + 1).clamp_(max=self._most_columns - 1)
        self._oldest = min(self._oldest + 1, self._most_columns - 1)
        self._newest = {}

    def join(self, others: Sequence[Cohort]) -> Int[Tensor, " R"]:
        """Takes the samples of others, which have no tokens here yet; those are of no use afterwards.

        Returns the order in which its own samples, and then those of each of the others, stand now.
        """
        everybody = [self, *others]
        assert not any(other._oldest for other in others)
        numbers = {layer.key_mean.shape[1] for layer in self.prompts.layers}
        before = {number: _places_of(everybody, number) for number in numbers}
        places = self.prompts.join([other.prompts for other in others])
        lanes = torch.cat([where[each.lanes] for where, each in zip(places, everybody, strict=True)])
        rows = lanes.argsort(stable=True)
        self.lanes, self.ages = lanes[rows], torch.cat([each.ages for each in everybody])[rows]
        self._orders, self._newest = {}, {}
        after = {n: before[n][rows].flatten()[self._order(n).pairs].argsort() for n in numbers}
        for own, layer in zip(self.own, self.prompts.layers, strict=True):
            own.make_room(after[layer.key_mean.shape[1]], self._space)
        return rows

    def keep(self, rows: Int[Tensor, " Q"]) -> None:
        """Leaves out all other samples, and prompts that have none left."""
        groups = [layer.key_mean.shape[1] for layer in self.prompts.layers]
        before = {number: self._order(number).places.view(-1, number)[rows].flatten() for number in set(groups)}
        prompts, self.lanes = self.lanes[rows].unique(return_inverse=True)
        self.ages = self.ages[rows]
        self._oldest = int(self.ages.max())
        self.prompts.keep(prompts)
        self._orders, self._newest = {}, {}
        for own, number in zip(self.own, groups, strict=True):
            own.keep(before[number][self._order(number).pairs], whole_columns(self._oldest), self._space)

    def _newest_of(self, groups: int, dtype: torch.dtype) -> Newest:
        if groups not in self._newest:
            ages = self.ages[self._order(groups).pairs // groups]
            columns = whole_columns(self._oldest + 1)
            row = torch.arange(columns, device=ages.device)
            bias = torch.zeros(len(ages), columns, dtype=dtype, device=ages.device)
            bias.masked_fill_(row > ages[:, None], float("-inf"))
            at = torch.arange(len(ages), device=ages.device) * columns + ages
            self._newest[groups] = Newest(columns, at, bias[:, None])
        return self._newest[groups]

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


def _places_of(cohorts: Sequence[Cohort], groups: int) -> Int[Tensor, "R G"]:
    """The places of the cohorts' pairs, one cohort behind the other."""
    places = [cohort._order(groups).places.view(-1, groups) for cohort in cohorts]
    starts = accumulate((len(each) * groups for each in cohorts), initial=0)
    return torch.cat([start + one for start, one in zip(starts, places, strict=False)])
