"""Mixing of preference sources: counts, the seed, and settings that make no sense."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_models.config import RewardData
from reward_models.mixing import mix_rows

HELPFUL = {"hh": list(range(100, 160)), "graded": list(range(200, 230))}
SAFETY = {"pku": list(range(300, 380)), "harmless": list(range(400, 420))}


def counts(mixed):
    return {name: len(rows) for name, rows in mixed.items()}


def test_all_takes_everything_in_order():
    assert mix_rows(HELPFUL, SAFETY, "all", seed=0) == {**HELPFUL, **SAFETY}


def test_equal_parts_draws_as_many_rows_of_the_other_aim():
    mixed = mix_rows(HELPFUL, SAFETY, "equal_parts", seed=0)
    assert (mixed["hh"], mixed["graded"]) == (HELPFUL["hh"], HELPFUL["graded"])
    assert len(mixed["pku"]) + len(mixed["harmless"]) == 90
    # Uniform over the 100 rows of both sources: 72 and 18 expected; five standard deviations are 6.4.
    assert 65 <= len(mixed["pku"]) <= 79


def test_ninety_to_ten_makes_the_other_aim_a_tenth():
    mixed = mix_rows(SAFETY | {"more": list(range(80))}, HELPFUL, "90/10", seed=0)
    assert counts({name: mixed[name] for name in ("pku", "harmless", "more")}) == {
        "pku": 80,
        "harmless": 20,
        "more": 80,
    }
    assert len(mixed["hh"]) + len(mixed["graded"]) == 20


def test_too_few_rows_of_the_other_aim_are_all_taken():
    mixed = mix_rows(HELPFUL, {"small": [1, 2, 3]}, "equal_parts", seed=0)
    assert mixed["small"] == [1, 2, 3]


def test_weights_give_the_largest_set_with_their_proportions():
    """60 and 30 rows at 1 to 1: 30 each. At 4 to 1: 60 and 15."""
    assert counts(mix_rows(HELPFUL, {}, {"hh": 1, "graded": 1}, seed=0)) == {"hh": 30, "graded": 30}
    assert counts(mix_rows(HELPFUL, {}, {"hh": 0.8, "graded": 0.2}, seed=0)) == {"hh": 60, "graded": 15}


@given(st.integers(0, 5), st.sampled_from(["equal_parts", "90/10", {"hh": 2, "graded": 1, "pku": 1, "harmless": 3}]))
def test_rows_are_drawn_once_in_order_and_by_the_seed(seed, mix):
    mixed = mix_rows(HELPFUL, SAFETY, mix, seed=seed)
    for name, rows in mixed.items():
        assert rows == sorted(set(rows)) and set(rows) <= {*HELPFUL.get(name, []), *SAFETY.get(name, [])}
    assert mixed == mix_rows(HELPFUL, SAFETY, mix, seed=seed)
    assert mixed != mix_rows(HELPFUL, SAFETY, mix, seed=seed + 100)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mix": "equal_parts"}, "mixes in nothing. Name the other aim's pairs in data.mix_in"),
        ({"mix": {"a": 1, "c": 1}}, "one weight to each source of train and mix_in. Look at: b, c."),
        ({"mix": {"a": 1, "b": 0}}, "greater than 0"),
        ({"mix": {"a": 1, "b": math.nan}}, "finite"),
        ({"mix": {"a": 1, "b": math.inf}}, "finite"),
        ({"mix_in": "a"}, "a is in data.train too"),
        ({"mix": "80/20"}, "equal_parts"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(change, problem):
    with pytest.raises(ValidationError) as caught:
        RewardData(**{"train": ["a", "b"], **change})
    assert problem in str(caught.value)
