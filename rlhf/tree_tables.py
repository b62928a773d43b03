"""Sampled trees in micro-batches, and tables over the tokens of their branches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from alignment.distributed import most_over_processes
from alignment.prefix_batch import PrefixBatch, Tree, collate, micro_batches, split_tree


class TreeParts:
    """Trees, those over a token budget in several parts that repeat the trunk.

    The parts' branches are those of the trees in the same order: rows of a table, whose columns are their tokens.
    """

    def __init__(self, trees: Sequence[Tree], *, max_tokens: int) -> None:
        split = [(tree, *part) for tree, whole in enumerate(trees) for part in split_tree(whole, max_tokens)]
        self.max_tokens = max_tokens
        self.parts = [part for _, _, part in split]
        self._tree_of = [tree for tree, _, _ in split]
        self._begins = [start == 0 for _, start, _ in split]
        self._first_row = list(accumulate((len(part.branches) for part in self.parts), initial=0))

    @property
    def shape(self) -> tuple[int, int]:
        """Branches, and the tokens of the longest."""
        return self._first_row[-1], max(len(branch.ids) for part in self.parts for branch in part.branches)

    def groups(self, trees: Collection[int] | None = None) -> list[list[int]]:
        """Parts that make a micro-batch each: of all trees, or of some, by their indices."""
        places = [place for place, tree in enumerate(self._tree_of) if trees is None or tree in trees]
        chosen = micro_batches(places, lambda place: self.parts[place].num_tokens, max_tokens=self.max_tokens)
        return [[places[index] for index in group] for group in chosen]

    def batch(
        self, group: Sequence[int], device: torch.device
    ) -> tuple[PrefixBatch, Int[Tensor, " M"], Int[Tensor, " M"]]:
        """A micro-batch, with the table's row and column of each of its M counted tokens."""
        batch = collate([[self.parts[place]] for place in group]).to(device)
        rows = [row for place in group for row in range(self._first_row[place], self._first_row[place + 1])]
        return batch, torch.tensor(rows, device=device)[batch.target_branches], batch.target_offsets

    def num_trees(self, group: Sequence[int]) -> int:
        """Trees whose first part is in a micro-batch: over all of them every tree counts once."""
        return sum(self._begins[place] for place in group)


def tabulate(
    trees: Sequence[Tree],
    measure: Callable[[PrefixBatch], Sequence[Tensor]],
    *,
    max_tokens: int,
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
    collective: Accelerator | None = None,
) -> list[Float[Tensor, "N T"]]:
    """Token measurements of all branches as tables, computed in micro-batches without gradients.

    `measure` maps a batch with M counted tokens to tensors of shape (M,); a tree over `max_tokens` comes in parts.
    `on_progress` hears of trees that are done. `collective` is given where FSDP has split the model: all processes run
    as many passes as the one that has most.
    """
    parts = TreeParts(trees, max_tokens=max_tokens)
    groups = parts.groups()
    count = len(groups) if collective is None else most_over_processes(len(groups), collective)
    tables: list[Tensor] = []
    for group in groups + groups[-1:] * (count - len(groups)):  # what is measured again is the same
        batch, rows, columns = parts.batch(group, device)
        with torch.no_grad():
            measured = measure(batch)
        if not tables:
            tables = [torch.zeros(parts.shape, device=device) for _ in measured]
        for table, values in zip(tables, measured, strict=True):
            table[rows, columns] = values.float()
        if on_progress:
            on_progress(parts.num_trees(group))
    return tables
