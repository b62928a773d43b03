"""Keys and values of the samples' own tokens: tables whose rows and columns come and go, in memory used again."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Columns by which a table grows. It is multiplied whole, since products of a part of it would copy that first; what is
# not yet written has weight 0.
MORE_COLUMNS = 16
# Columns that there is memory for at the start, where a sample may have as many.
FIRST_COLUMNS = 128
# A table may stand in memory for this many times its rows.
SPARE_ROWS = 1.25


class Space:
    """Memory for tables (S, C, D), each a contiguous part of a longer flat tensor.

    A table moves into the memory that the table before it left: fresh memory takes longer to get than the copy.
    """

    def __init__(self, most_columns: int) -> None:
        """`most_columns`: no table will have more."""
        self.most_columns = whole_columns(most_columns)
        self._spare = torch.empty(0)

    def table(self, like: Tensor, rows: int, columns: int) -> Float[Tensor, "S C D"]:
        """A table with any content, of the type and width of another, whose rows have room for more columns.

        Memory for many more rows (SPARE_ROWS) is given back, so that rows that are gone make room for other tables.
        """
        size = like.shape[-1]
        room = rows * size * min(self.most_columns, max(FIRST_COLUMNS, 2 * columns))
        fits = rows * columns * size <= self._spare.numel() <= SPARE_ROWS * room
        if not fits or self._spare.dtype != like.dtype:
            self._spare = self._spare.new_empty(0)
            self._spare = like.new_empty(room)
        flat, self._spare = self._spare, self._spare.new_empty(0)
        return flat[: rows * columns * size].view(rows, columns, size)

    def take_back(self, table: Tensor) -> None:
        """The memory of a table that nobody reads again."""
        self._spare = table.new_empty(0).set_(table.untyped_storage())


class OwnTokens:
    """Keys (S, C, D) and values (S, C, D) of the samples' own tokens in one layer, a row for each sample and group."""

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(0)

    @property
    def columns(self) -> int:
        """C; 0 before the first token."""
        return self.keys.shape[1] if self.keys.dim() == 3 else 0

    def append(
        self,
        keys: Float[Tensor, "S D"],
        values: Float[Tensor, "S D"],
        at: Int[Tensor, " S"],
        columns: int,
        space: Space,
    ) -> None:
        """The newest tokens, each `at` its place in the flat table, which has `columns` from now on."""
        if columns != self.columns:
            self.keys, self.values = (
                _wider(self.keys, keys, columns, space),
                _wider(self.values, values, columns, space),
            )
        self.keys.flatten(0, 1).index_copy_(0, at, keys)
        self.values.flatten(0, 1).index_copy_(0, at, values)

    def keep(self, rows: Int[Tensor, " T"], columns: int, space: Space) -> None:
        """Leaves out all other rows, and what is beyond so many columns."""
        if self.columns:
            self.keys, self.values = (_fewer(table, rows, columns, space) for table in (self.keys, self.values))

    def make_room(self, places: Int[Tensor, " T"], space: Space) -> None:
        """T rows, of which those that are there move to the first of the places; the others hold 0."""
        if self.columns:
            self.keys, self.values = (_more(table, places, space) for table in (self.keys, self.values))


def whole_columns(tokens: int) -> int:
    """Columns of a table that holds so many tokens of each sample."""
    return -(-tokens // MORE_COLUMNS) * MORE_COLUMNS


def _wider(table: Tensor, like: Tensor, columns: int, space: Space) -> Tensor:
    wider = space.table(like, len(like), columns)
    before = table.shape[1] if table.dim() == 3 else 0
    wider[:, before:] = 0
    if before:
        wider[:, :before] = table
        space.take_back(table)
    return wider


def _fewer(table: Tensor, rows: Tensor, columns: int, space: Space) -> Tensor:
    fewer = space.table(table, len(rows), columns)
    torch.index_select(table[:, :columns], 0, rows, out=fewer)
    space.take_back(table)
    return fewer


def _more(table: Tensor, places: Tensor, space: Space) -> Tensor:
    more = space.table(table, len(places), table.shape[1])
    more.index_copy_(0, places[: len(table)], table)
    more.index_fill_(0, places[len(table) :], 0)
    space.take_back(table)
    return more
