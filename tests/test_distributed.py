"""Reductions over processes, with one process here; tests/test_resume.py runs two."""

import pytest
import torch
from accelerate import Accelerator

from alignment.distributed import map_over_processes, mean_over_processes, shares, whiten_over_processes
from alignment.tensor_ops import whiten


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_whitening_over_one_process_is_plain_whitening(accelerator):
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, -3.0, 1e30]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    torch.testing.assert_close(whiten_over_processes(values, mask, accelerator), whiten(values, mask))


def test_equal_values_whiten_to_zero(accelerator):
    values = torch.full((3,), 2.5)
    assert whiten_over_processes(values, torch.ones(3, dtype=torch.bool), accelerator).tolist() == [0.0] * 3


def test_means_keep_their_names(accelerator):
    found = mean_over_processes({"reward": torch.tensor(0.5), "length": 3}, accelerator)
    assert found == {"reward": 0.5, "length": 3.0}


def test_shares_hold_every_item_once_and_keep_equal_ones_together_in_order():
    items = ["a", "b", "a", "c", "d", "b", "a"]
    parts = shares(items, 3, together=str)
    assert parts == [[0, 2, 4, 6], [1, 5], [3]]
    assert shares(items, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares(items[:1], 3) == [[0], [], []]


def test_one_process_does_all_of_the_work_itself():
    assert map_over_processes(lambda items: [2 * item for item in items], [3, 1]) == [6, 2]
