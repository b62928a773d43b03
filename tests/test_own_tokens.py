"""Tables of the samples' own keys and values: what they hold as they grow and shrink, and in how much memory."""

import pytest
import torch

from alignment.sampling.own_tokens import FIRST_COLUMNS, MORE_COLUMNS, OwnTokens, Space


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
                layer.keep(kept, space)
                wanted[number] = [x[kept] for x in wanted[number]]
        for number, layer in enumerate(layers):
            keys = torch.randn(rows, size)
            layer.append(keys, -keys, column, space)
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
                layer.keep(torch.arange(5), space)
        rows = 5 if column >= 20 else 6
        for layer in layers:
            layer.append(torch.ones(rows, 8), torch.ones(rows, 8), column, space)
            seen |= {table.untyped_storage().data_ptr() for table in (layer.keys, layer.values)}
    assert len(seen) == 2 * len(layers) + 1


def test_rows_that_leave_give_their_memory_back():
    space, layers = Space(128), [OwnTokens() for _ in range(4)]
    for layer in layers:
        layer.append(torch.ones(64, 8), torch.ones(64, 8), 0, space)
    whole = bytes_held(layers)
    for rows in (40, 20, 6, 2):
        for layer in layers:
            layer.keep(torch.arange(rows), space)
        assert bytes_held(layers) <= 1.25 * whole * rows / 64
