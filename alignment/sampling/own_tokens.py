"""Keys and values of the samples' own tokens: tables that lose rows and gain columns in memory that is used again."""

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

    def append(self, keys: Float[Tensor, "S D"], values: Float[Tensor, "S D"], column: int, space: Space) -> None:
        """The newest token's, the one at `column`."""
        if column % MORE_COLUMNS == 0:
            self.keys, self.values = _wider(self.keys, keys, column, space), _wider(self.values, values, column, space)
        self.keys[:, column], self.values[:, column] = keys, values

    def keep(self, rows: Int[Tensor, " T"], space: Space) -> None:
        """Leaves out all other rows."""
        self.keys, self.values = _fewer(self.keys, rows, space), _fewer(self.values, rows, space)


def whole_columns(tokens: int) -> int:
    """Columns of a table that holds so many tokens of each sample."""
    return -(-tokens // MORE_COLUMNS) * MORE_COLUMNS


def _wider(table: Tensor, like: Tensor, column: int, space: Space) -> Tensor:
    wider = space.table(like, len(like), column + MORE_COLUMNS)
    wider[:, column:] = 0
    if column:
        wider[:, :column] = table
        space.take_back(table)
    return wider


def _fewer(table: Tensor, rows: Tensor, space: Space) -> Tensor:
    fewer = space.table(table, len(rows), table.shape[1])
    torch.index_select(table, 0, rows, out=fewer)
    space.take_back(table)
    return fewer
