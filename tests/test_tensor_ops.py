"""Masked reductions: values by hand, plain-Python references, and masked-out entries that never reach a result."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from alignment.tensor_ops import masked_mean, masked_sum, masked_var, whiten

numbers = st.floats(-100, 100, width=32)
entries = st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=20)

VALUES = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -1e30]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_reductions_of_three_counted_entries_worked_by_hand():
    # 1 + 2 + 6 = 9; mean 3; variance (4 + 1 + 9) / 3 = 14 / 3.
    assert masked_sum(VALUES, MASK).item() == 9.0
    assert masked_mean(VALUES, MASK).item() == 3.0
    assert masked_var(VALUES, MASK).item() == pytest.approx(14 / 3, abs=1e-6)


def test_whiten_of_three_counted_entries_worked_by_hand():
    # Deviations -2, -1, 3 over sqrt(14 / 3) = 2.1602469; 0 where masked out.
    expected = [[-0.9258201, -0.4629100, 0.0], [1.3887301, 0.0, 0.0]]
    torch.testing.assert_close(whiten(VALUES, MASK), torch.tensor(expected), atol=1e-6, rtol=0)


def test_whiten_of_equal_entries_is_zero():
    assert whiten(torch.full((4,), 7.0), torch.tensor([True, True, True, False])).tolist() == [0.0] * 4
    assert whiten(torch.tensor([7.0, 3.0]), torch.tensor([True, False])).tolist() == [0.0, 0.0]


def test_whiten_adds_eps_to_the_variance():
    # Variance 1 of (-1, 1): 1 / sqrt(1 + 3) = 0.5.
    both = torch.tensor([True, True])
    assert whiten(torch.tensor([-1.0, 1.0]), both, eps=3.0).tolist() == [-0.5, 0.5]


def test_a_mean_of_nothing_is_nan_and_a_sum_of_nothing_zero():
    nothing = torch.zeros(3, dtype=torch.bool)
    assert masked_sum(torch.ones(3), nothing).item() == 0.0
    assert math.isnan(masked_mean(torch.ones(3), nothing).item())


@given(entries=entries)
def test_reductions_equal_plain_python(entries):
    values = torch.tensor([value for value, _ in entries])
    mask = torch.tensor([counts for _, counts in entries])
    kept = [value for value, counts in entries if counts]
    total = math.fsum(kept)
    assert masked_sum(values, mask).item() == pytest.approx(total, rel=1e-5, abs=1e-3)
    if not kept:
        return
    mean = total / len(kept)
    var = math.fsum((value - mean) ** 2 for value in kept) / len(kept)
    assert masked_mean(values, mask).item() == pytest.approx(mean, rel=1e-5, abs=1e-4)
    assert masked_var(values, mask).item() == pytest.approx(var, rel=1e-4, abs=1e-3)


@given(values=st.lists(numbers, min_size=2, max_size=20, unique=True), scale=st.floats(0.5, 20), shift=numbers)
def test_whitened_values_have_mean_zero_variance_one_and_forget_scale_and_shift(values, scale, shift):
    x = torch.tensor(values, dtype=torch.float64)
    mask = torch.ones(len(values), dtype=torch.bool)
    if x.var(correction=0) < 1e-3:  # there `eps` shows
        return
    white = whiten(x, mask)
    assert white.mean().item() == pytest.approx(0.0, abs=1e-9)
    assert white.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(whiten(x * scale + shift, mask), white, atol=1e-4, rtol=0)
    assert (white[x.argsort()].diff() >= 0).all()


@given(entries=entries, junk=st.sampled_from([math.nan, math.inf, -1e30, 0.0]))
def test_masked_out_entries_do_not_matter(entries, junk):
    values = torch.tensor([value for value, _ in entries])
    mask = torch.tensor([counts for _, counts in entries])
    other = torch.where(mask, values, torch.full_like(values, junk))
    for reduce in (masked_sum, masked_mean, masked_var, whiten):
        torch.testing.assert_close(reduce(values, mask), reduce(other, mask), atol=0, rtol=0, equal_nan=True)


def test_masked_out_entries_get_no_gradient():
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    masked_mean(values, torch.tensor([True, False, True])).backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, whiten])
def test_a_mask_of_another_shape_or_type_is_refused(function):
    """By the shapes in the signatures, which tests check: broadcasting would count entries twice."""
    with pytest.raises(TypeCheckError):
        function(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        function(torch.ones(3), torch.ones(3))
