"""Prompts side by side in one flat row, in which those that begin alike are run with their common beginning once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from alignment.prefix_batch import Branch, PrefixBatch, Tree, collate
from alignment.tree_attention import Block, tree_blocks

# Prompts are run with a common beginning once where it is at least this long.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class PromptRow:
    """Prompts as one flat row, common beginnings once.

    Attributes:
        batch: one row of trees, a branch for every prompt's end, on the CPU.
        order: the prompts, the longest first.
        spans: of each of them, the ranges of the row that make it up.
    """

    batch: PrefixBatch
    order: list[int]
    spans: list[list[tuple[int, int]]]

    @property
    def last_columns(self) -> Int[Tensor, " L"]:
        """Where in the row each prompt ends."""
        return torch.tensor([of_prompt[-1][1] - 1 for of_prompt in self.spans])


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
    by_length = sorted(zip(order, spans, strict=True), key=lambda one: -len(prompts[one[0]]))
    return PromptRow(collate([trees]), *map(list, zip(*by_length, strict=True)))


def prompt_blocks(row: PromptRow, dtype: torch.dtype, device: torch.device) -> list[Block]:
    """The blocks in which the prompts' tokens attend."""
    return [replace(block, bias=block.bias.to(device)) for block in tree_blocks(row.batch, dtype)]


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
