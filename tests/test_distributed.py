"""Reductions over processes, with one process here; tests/test_resume.py runs two."""

import pytest
import torch
from accelerate import Accelerator

from alignment.distributed import mean_over_processes, whiten_over_processes
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
