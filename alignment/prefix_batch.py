"""Prompt once, responses many: rows that hold a trunk of tokens once, followed by branches that do not see each other.

Every expensive step of RLHF looks at several responses to one prompt: chosen and rejected, K candidates, several
rollouts. A `Tree` is one prompt (the trunk) with its responses (the branches); a row of a `PrefixBatch` holds one or
more trees side by side. A branch token attends to its own tree's trunk and to the earlier tokens of its own branch,
and its position goes on from the trunk's end, so that results equal those of separate rows.

Example: a trunk `[1, 2]` with branches `[3, 4]` and `[5]` is one row

    input_ids     1 2 3 4 5
    position_ids  0 1 2 3 2
    attends to    1 | 1 2 | 1 2 3 | 1 2 3 4 | 1 2 5
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Branch:
    """Token ids of a response with the mask of those that count (loss, log-probability). No mask: all count."""

    ids: Sequence[int]
    mask: Sequence[bool] | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """One prompt with its responses. The trunk may be empty, as for a packed dialogue that is all branch."""

    trunk: Sequence[int]
    branches: Sequence[Branch]

    @property
    def num_tokens(self) -> int:
        """Tokens the tree takes in a row."""
        return len(self.trunk) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class PrefixBatch:
    """Rows of trees as tensors: R rows of length L, N branches and M counted tokens in order, S sources.

    Attributes:
        input_ids: (R, L) tokens, 0 where padded.
        position_ids: (R, L) positions, restarting with every tree and continuing the trunk in every branch.
        tree_ids: (R, L) index of the tree in its row, -1 where padded.
        branch_ids: (R, L) 0 in a trunk, 1, 2, ... in its branches.
        target_ids: (M,) the counted tokens.
        target_sources: (M,) which of the S sources predicts it.
        source_rows: (S,) the row of each token that predicts a counted one. No token is named twice: the trunk's last
            token predicts the first of every branch, and others the token after them in their branch.
        source_columns: (S,) its column.
        target_branches: (M,) the branch of each, 0..N-1.
        target_offsets: (M,) its place within its branch, counted in tokens of the branch.
        last_rows: (N,) the row of each branch.
        last_columns: (N,) the column of each branch's last token, where a reward model reads its score.
        branch_lengths: (N,) tokens in each branch.
    """

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    tree_ids: Int[Tensor, "R L"]
    branch_ids: Int[Tensor, "R L"]
    target_ids: Int[Tensor, " M"]
    target_sources: Int[Tensor, " M"]
    source_rows: Int[Tensor, " S"]
    source_columns: Int[Tensor, " S"]
    target_branches: Int[Tensor, " M"]
    target_offsets: Int[Tensor, " M"]
    last_rows: Int[Tensor, " N"]
    last_columns: Int[Tensor, " N"]
    branch_lengths: Int[Tensor, " N"]

    @property
    def num_branches(self) -> int:
        """N."""
        return len(self.last_rows)

    @property
    def num_targets(self) -> int:
        """M, the counted tokens."""
        return len(self.target_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes, padding included."""
        return self.input_ids.numel()

    @property
    def attention_mask(self) -> Bool[Tensor, "R 1 L L"]:
        """True where a query (row of the last two axes) sees a key. Padding sees itself only, so no row is empty."""
        return tree_attention_mask(self.tree_ids, self.branch_ids)

    def to(self, device: torch.device | str) -> PrefixBatch:
        """The same batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def by_branch(self, values: Float[Tensor, " M"], fill: float = 0.0) -> Float[Tensor, "N T"]:
        """Values of the counted tokens as one row a branch, `fill` elsewhere; T is the longest branch."""
        length = int(self.branch_lengths.max()) if self.num_branches else 0
        table = values.new_full((self.num_branches, length), fill)
        return table.index_put((self.target_branches, self.target_offsets), values)

    def target_mask(self) -> Bool[Tensor, "N T"]:
        """True where `by_branch` holds a counted token."""
        ones = torch.ones_like(self.target_ids, dtype=torch.bool)
        length = int(self.branch_lengths.max()) if self.num_branches else 0
        table = ones.new_zeros((self.num_branches, length))
        return table.index_put((self.target_branches, self.target_offsets), ones)


def tree_attention_mask(tree_ids: Int[Tensor, "R L"], branch_ids: Int[Tensor, "R L"]) -> Bool[Tensor, "R 1 L L"]:
    """True where key j may be seen by query i: not later, the same tree, and in the trunk or the same branch."""
    length = tree_ids.shape[1]
    column = torch.arange(length, device=tree_ids.device)
    same_tree = (tree_ids[:, :, None] == tree_ids[:, None, :]) & (tree_ids >= 0)[:, :, None]
    visible = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    causal = column[:, None] >= column[None, :]
    itself = column[:, None] == column[None, :]
    return ((same_tree & visible & causal) | itself)[:, None]


def collate(rows: Sequence[Sequence[Tree]]) -> PrefixBatch:
    """Rows of trees as one padded batch. Branches keep the order of rows, trees and branches given.

    A counted token with nothing before it (the first of a branch below an empty trunk) cannot be predicted and is
    not counted. Raises ValueError where a branch is empty or there are no rows.
    """
    if not rows:
        raise ValueError("no rows to collate")
    length = max(sum(tree.num_tokens for tree in row) for row in rows)
    shape = (len(rows), length)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    tree_ids, branch_ids = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    target_ids: list[int] = []
    target_sources: list[int] = []
    sources: dict[tuple[int, int], int] = {}
    target_branches: list[int] = []
    target_offsets: list[int] = []
    last_rows: list[int] = []
    last_columns: list[int] = []
    branch_lengths: list[int] = []
    for row_index, row in enumerate(rows):
        ids: list[int] = []
        positions: list[int] = []
        trees: list[int] = []
        branches: list[int] = []
        for tree_index, tree in enumerate(row):
            trunk_length = len(tree.trunk)
            trunk_end = len(ids) + trunk_length - 1
            ids += tree.trunk
            positions += range(trunk_length)
            branches += [0] * trunk_length
            for branch_index, branch in enumerate(tree.branches):
                if not branch.ids:
                    raise ValueError(f"branch {branch_index} of tree {tree_index} in row {row_index} is empty")
                start = len(ids)
                mask = branch.mask if branch.mask is not None else [True] * len(branch.ids)
                for offset, (token, counts) in enumerate(zip(branch.ids, mask, strict=True)):
                    if counts and (offset or trunk_length):
                        target_ids.append(token)
                        source = (row_index, start + offset - 1 if offset else trunk_end)
                        target_sources.append(sources.setdefault(source, len(sources)))
                        target_branches.append(len(last_rows))
                        target_offsets.append(offset)
                last_rows.append(row_index)
                last_columns.append(start + len(branch.ids) - 1)
                branch_lengths.append(len(branch.ids))
                ids += branch.ids
                positions += range(trunk_length, trunk_length + len(branch.ids))
                branches += [branch_index + 1] * len(branch.ids)
            trees += [tree_index] * tree.num_tokens
        for table, values in zip(
            (input_ids, position_ids, tree_ids, branch_ids), (ids, positions, trees, branches), strict=True
        ):
            table[row_index, : len(values)] = torch.tensor(values, dtype=torch.long)
    lists = (
        target_ids, target_sources, [row for row, _ in sources], [column for _, column in sources],
        target_branches, target_offsets, last_rows, last_columns, branch_lengths,
    )  # fmt: skip
    tensors = (torch.tensor(values, dtype=torch.long) for values in lists)
    return PrefixBatch(input_ids, position_ids, tree_ids, branch_ids, *tensors)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items packed into as few rows of `capacity` tokens as first-fit-decreasing finds.

    An item longer than the capacity gets a row of its own.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row, space in enumerate(free):
            if lengths[index] <= space:
                rows[row].append(index)
                free[row] -= lengths[index]
                break
        else:
            rows.append([index])
            free.append(capacity - lengths[index])
    return rows


def even_groups(lengths: Sequence[int], *, workers: int, max_tokens: int) -> list[list[int]]:
    """Indices of items in groups of about the same size, as few for each worker as keep within `max_tokens`.

    Every item goes, the longest first, to the group that is smallest so far (Graham 1969). Where one item is longer
    than `max_tokens`, groups may be as large as it.
    """
    limit = max(max_tokens, *lengths) if lengths else max_tokens
    rounds = max(1, math.ceil(sum(lengths) / (workers * limit)))
    while True:
        groups: list[list[int]] = [[] for _ in range(min(workers * rounds, len(lengths)))]
        smallest = [(0, place) for place in range(len(groups))]
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            size, place = smallest[0]
            groups[place].append(index)
            heapq.heapreplace(smallest, (size + lengths[index], place))
        if all(size <= limit for size, _ in smallest):
            return groups
        rounds += 1


def split_tree(tree: Tree, max_tokens: int) -> list[tuple[int, Tree]]:
    """A tree over `max_tokens` as several that repeat its trunk, each with the index of its first branch.

    A trunk with one branch is not split, however long.
    """
    parts: list[tuple[int, Tree]] = []
    start, size = 0, len(tree.trunk)
    for index, branch in enumerate(tree.branches):
        if index > start and size + len(branch.ids) > max_tokens:
            parts.append((start, Tree(tree.trunk, tree.branches[start:index])))
            start, size = index, len(tree.trunk)
        size += len(branch.ids)
    return [*parts, (start, Tree(tree.trunk, tree.branches[start:]))]


def micro_batches(items: Sequence[Item], length: Callable[[Item], int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices of items in groups of similar length whose padded size (count x longest) stays within `max_tokens`.

    The longest come first, so that a run that does not fit into memory fails at once. An item longer than
    `max_tokens` is a group by itself.
    """
    group: list[int] = []
    longest = 0
    for index in sorted(range(len(items)), key=lambda i: (-length(items[i]), i)):
        if group and (len(group) + 1) * longest > max_tokens:
            yield group
            group = []
        longest = longest if group else length(items[index])
        group.append(index)
    if group:
        yield group
