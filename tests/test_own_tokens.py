"""Tables of the samples' own keys and values: what they hold as they grow and shrink, and in how much memory."""

import pytest
import torch

from alignment.sampling.own_tokens import FIRST_COLUMNS, MORE_COLUMNS, OwnTokens, Space, whole_columns


def append(layer: OwnTokens, keys: torch.Tensor, ages: torch.Tensor, space: Space) -> None:
    """Keys, and their negatives as values, of rows of these ages."""
    columns = whole_columns(int(ages.max()) + 1)
    layer.append(keys, -keys, torch.arange(len(ages)) * columns + ages, columns, space)


@pytest.mark.parametrize("most", [40, 3 * FIRST_COLUMNS])
def test_tables_hold_what_was_appended_of_the_rows_that_are_left(most):
    torch.manual_seed(0)
    space, layers = Space(most), [OwnTokens(), OwnTokens()]
    wanted: list[list[torch.Tensor]] = [[], []]
    rows, size = 12, 4
    for column in range(most):
        if column in (15, 16, 39, FIRST_COLUMNS, 2 * FIRST_COLUMNS + 1):
            kept = torch.randperm(rows)[: rows - 2].sort().values
            rows -= 2
            for number, layer in enumerate(layers):
                layer.keep(kept, whole_columns(column), space)
                wanted[number] = [x[kept] for x in wanted[number]]
        for number, layer in enumerate(layers):
            keys = torch.randn(rows, size)
            append(layer, keys, torch.full((rows,), column), space)
            wanted[number].append(keys)
        for found, expected in zip(layers, wanted, strict=True):
            assert torch.equal(found.keys[:, : column + 1], torch.stack(expected, dim=1))
            assert torch.equal(found.values[:, : column + 1], -torch.stack(expected, dim=1))
            # What is multiplied beyond the newest column is finite, and at most a step of growth wide.
            assert found.keys[:, column + 1 :].eq(0).all() and found.keys.shape[1] - column <= MORE_COLUMNS
            assert found.keys.is_contiguous() and found.values.is_contiguous()


def bytes_held(layers: list[OwnTokens]) -> int:
    storages = [table.untyped_storage() for layer in layers for table in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_growing_takes_no_memory_beyond_one_table_more():
    space, layers = Space(4 * MORE_COLUMNS), [OwnTokens() for _ in range(3)]
    seen = set()
    for column in range(4 * MORE_COLUMNS):
        if column == 20:
            for layer in layers:
                layer.keep(torch.arange(5), whole_columns(column), space)
        rows = 5 if column >= 20 else 6
        for layer in layers:
            append(layer, torch.ones(rows, 8), torch.full((rows,), column), space)
            seen |= {table.untyped_storage().data_ptr() for table in (layer.keys, layer.values)}
    assert len(seen) == 2 * len(layers) + 1


def test_rows_that_leave_give_their_memory_back():
    space, layers = Space(128), [OwnTokens() for _ in range(4)]
    for layer in layers:
        append(layer, torch.ones(64, 8), torch.zeros(64, dtype=torch.long), space)
    whole = bytes_held(layers)
    for rows in (40, 20, 6, 2):
        for layer in layers:
            layer.keep(torch.arange(rows), MORE_COLUMNS, space)
        assert bytes_held(layers) <= 1.25 * whole * rows / 64


def test_rows_of_any_age_stand_in_one_table():
    """Rows come and go; each still holds its own tokens, and 0 beyond them, in as few columns as the oldest needs."""
    torch.manual_seed(0)
    space, layer = Space(64), OwnTokens()
    wanted: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for step in range(60):
        if step in (10, 25, 50):  # the oldest leave
            kept = sorted(sorted(range(len(wanted)), key=lambda row: len(wanted[row]))[: len(wanted) - 3])
            wanted = [wanted[row] for row in kept]
            layer.keep(torch.tensor(kept), whole_columns(max(map(len, wanted))), space)
        if step in (10, 17, 50):  # new ones between those that are there
            places = torch.randperm(len(wanted) + 4)
            moved: list[list[torch.Tensor]] = [[] for _ in places]
            for place, tokens in zip(places.tolist(), wanted, strict=False):
                moved[place] = tokens
            wanted = moved
            layer.make_room(places, space)
        ages = torch.tensor([len(tokens) for tokens in wanted])
        keys = torch.randn(len(wanted), 4)
        append(layer, keys, ages, space)
        for tokens, key in zip(wanted, keys, strict=True):
            tokens.append(key)
        assert layer.columns == whole_columns(max(map(len, wanted)))
        for found, tokens in zip(layer.keys, wanted, strict=True):
            assert torch.equal(found[: len(tokens)], torch.stack(tokens))
            assert not found[len(tokens) :].any()
        assert torch.equal(layer.values, -layer.keys)
