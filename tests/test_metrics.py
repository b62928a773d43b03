"""Confidence intervals against worked values, and the metrics file of a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import RunError
from alignment.metrics import (
    Interval,
    MetricsLog,
    design_effect,
    mean_interval,
    paired_rate_interval,
    show,
    wilson_interval,
)


def test_wilson_interval_of_eight_in_ten_worked_by_hand():
    # z^2 = 3.841459. Centre (0.8 + 3.841459 / 20) / (1 + 3.841459 / 10) = 0.9920729 / 1.3841459 = 0.7167401.
    # Half-width 1.959964 sqrt(0.16 / 10 + 3.841459 / 400) / 1.3841459 = 1.959964 * 0.1600114 / 1.3841459 = 0.2265777.
    interval = wilson_interval(8, 10)
    assert interval.value == 0.8
    assert interval.low == pytest.approx(0.4901624, abs=1e-6)
    assert interval.high == pytest.approx(0.9433178, abs=1e-6)
    assert interval.count == 10


def test_wilson_interval_of_no_success_starts_at_zero_and_is_not_empty():
    # High end z^2 / (n + z^2) = 3.841459 / 23.841459 = 0.1611252.
    interval = wilson_interval(0, 20)
    assert interval.low == 0.0
    assert interval.high == pytest.approx(0.1611252, abs=1e-6)
    mirrored = wilson_interval(20, 20)
    assert mirrored.high == 1.0
    assert mirrored.low == pytest.approx(1 - 0.1611252, abs=1e-6)


def test_wilson_interval_takes_half_a_success_for_a_tie():
    assert wilson_interval(2.5, 5).value == 0.5


@pytest.mark.parametrize(
    ("values", "clusters", "expected"),
    [
        ([1, 1, 0, 0], "abcd", 1.0),
        ([1, 1, 0, 0], "aabb", 4.0),  # two clusters that each say one thing: sums of residuals 1 and -1, 2 * 2 / 1
        ([1, 0, 1, 0], "aabb", 1.0),  # sums 0: less than if independent, which is not claimed
        ([1, 1, 1, 0, 0, 0], "aaabbc", 3.5),  # sums 1.5, -1 and -0.5: 3.5 * 3/2, of 6 * 0.25
        ([1, 1, 1, 1], "aabb", 2.0),
        ([1, 0, 1, 0], "aaaa", 4.0),
        ([], "", 1.0),
    ],
)
def test_the_design_effect_worked_by_hand(values, clusters, expected):
    assert design_effect(values, clusters) == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=20))
def test_the_design_effect_is_that_of_the_clustered_variance(rows):
    """Against the sandwich estimator of a mean, computed with matrices."""
    values, clusters = np.array([float(value) for value, _ in rows]), [cluster for _, cluster in rows]
    names = sorted(set(clusters))
    member = np.array([[cluster == name for name in names] for cluster in clusters], dtype=float)
    residuals = values - values.mean()
    found = design_effect(values.tolist(), clusters)
    if 1 < len(names) < len(rows) and residuals.any():
        robust = len(names) / (len(names) - 1) * residuals @ (member @ member.T) @ residuals
        expected = min(len(rows), max(1.0, robust / (residuals @ residuals)))
        assert found == pytest.approx(expected)
    assert 1 <= found <= len(rows)


def test_wilson_interval_of_nothing_says_nothing():
    interval = wilson_interval(0, 0)
    assert math.isnan(interval.value)
    assert (interval.low, interval.high, interval.count) == (0.0, 1.0, 0)


@given(count=st.integers(1, 500), data=st.data())
def test_wilson_interval_holds_the_rate_and_solves_its_equation(count, data):
    successes = data.draw(st.integers(0, count))
    interval = wilson_interval(successes, count)
    rate = successes / count
    assert 0 <= interval.low <= rate + 1e-12 and rate - 1e-12 <= interval.high <= 1
    # Wilson's ends are the p with |rate - p| = z sqrt(p (1 - p) / n).
    for end in (interval.low, interval.high):
        assert (rate - end) ** 2 == pytest.approx(3.8414588 * end * (1 - end) / count, abs=1e-7)


def test_mean_interval_of_four_values_worked_by_hand():
    # Mean 2.5; sample variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5 / 3; half-width 1.959964 sqrt(5 / 12) = 1.2651513.
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert interval.value == 2.5
    assert interval.low == pytest.approx(2.5 - 1.2651513, abs=1e-6)
    assert interval.high == pytest.approx(2.5 + 1.2651513, abs=1e-6)
    assert interval.count == 4


def test_mean_interval_needs_two_values():
    one, none = mean_interval([3.0]), mean_interval([])
    assert (one.value, one.count) == (3.0, 1)
    assert math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(none.value) and none.count == 0


def test_the_interval_of_a_paired_difference_worked_by_hand():
    # 3 of 10 ours alone, 1 theirs alone: 0.2. Centre 2 / 12; variance ((4 + 1) / 12 - (2 / 12)^2) / 12 = 0.0324074.
    ours, theirs = [True] * 5 + [False] * 5, [True, True, False, False, False] + [True] + [False] * 4
    interval = paired_rate_interval(ours, theirs)
    assert (interval.value, interval.count) == (pytest.approx(0.2), 10)
    assert interval.low == pytest.approx(1 / 6 - 1.959964 * math.sqrt(0.0324074), abs=1e-5)
    assert interval.high == pytest.approx(1 / 6 + 1.959964 * math.sqrt(0.0324074), abs=1e-5)


def test_pairs_that_all_agree_or_all_differ_leave_room_and_nothing_says_nothing():
    same = paired_rate_interval([True] * 20, [True] * 20)
    # 1.959964 sqrt(1 / 22 / 22) = 0.0890893.
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(-0.0890893), pytest.approx(0.0890893))
    apart = paired_rate_interval([True] * 20, [False] * 20)
    assert apart.value == apart.high == 1.0 and 0.7 < apart.low < 0.9
    assert paired_rate_interval([], []).to_json() == {"value": None, "low": -1.0, "high": 1.0, "count": 0}


def test_an_interval_prints_and_saves_itself():
    interval = Interval(0.81234, 0.7, 0.9, 30)
    assert f"{interval}" == "0.812 [0.700, 0.900]"
    assert f"{interval:.1f}" == "0.8 [0.7, 0.9]"
    assert interval.to_json() == {"value": 0.81234, "low": 0.7, "high": 0.9, "count": 30}
    assert (show(interval.to_json()), show(interval.to_json(), ".1%", bounds=True)) == ("0.812", "81.2% [70.0%, 90.0%]")


def test_an_interval_without_numbers_is_null_in_json_and_a_dash_in_tables():
    entry = mean_interval([2.0]).to_json()
    assert entry == {"value": 2.0, "low": None, "high": None, "count": 1}
    assert show(entry, "+.1f", bounds=True) == "+2.0 [-, -]"


def test_each_step_is_one_flat_object_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "rm")
    log.write(1, {"rm/loss": 0.5})
    log.write(2, {"rm/loss": 0.25, "rm/accuracy": 1.0})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "stage": "rm", "rm/loss": 0.5},
        {"step": 2, "stage": "rm", "rm/loss": 0.25, "rm/accuracy": 1.0},
    ]


def test_truncate_after_drops_later_steps_and_a_half_written_last_row(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "rm")
    for step in range(1, 5):
        log.write(step, {"rm/loss": float(step)})
    with log.path.open("a") as file:
        file.write('{"step": 5, "sta')
    log.truncate_after(2)
    log.write(3, {"rm/loss": 30.0})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(row["step"], row["rm/loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_column_holds_one_figure_of_the_rows_that_have_it(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "rm")
    assert log.column("rm/loss") == []
    for step, values in enumerate([{"rm/loss": 3.0}, {"rm/accuracy": 1.0}, {"rm/loss": 1.0}]):
        log.write(step, values)
    assert log.column("rm/loss") == [3.0, 1.0]


def test_a_half_written_last_row_is_in_no_column_and_gone_with_the_next_row(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "rm")
    log.write(1, {"rm/loss": 3.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "rm/loss": 2')
    assert log.column("rm/loss") == [3.0]
    log.write(2, {"rm/loss": 1.0})
    assert log.column("rm/loss") == [3.0, 1.0] and log.path.read_text().count("\n") == 2


@pytest.mark.parametrize("bad", ['{"step": 2, "sta', '{"step": 2, "é": 1}', "[2]"])
def test_a_damaged_row_is_named_and_not_dropped(tmp_path, bad):
    log = MetricsLog(tmp_path / "metrics.jsonl", "rm")
    log.path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n', encoding="latin-1")
    before = log.path.read_bytes()
    for use in (lambda: log.truncate_after(3), lambda: log.column("rm/loss")):
        with pytest.raises(RunError, match=r"metrics\.jsonl:2: damaged"):
            use()
    assert log.path.read_bytes() == before


def test_truncate_after_of_a_file_that_is_not_there_makes_none(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl", "rm").truncate_after(3)
    assert not list(tmp_path.iterdir())
