"""Alarms of PPO: each rings beyond its limit and not before, says what to do, once; the KL controller."""

import math

import pytest

from alignment.errors import TrainingError
from rlhf.alarms import Watch, alarms_of
from rlhf.config import AlarmSection
from rlhf.kl_control import adapted_beta

HEALTHY = {
    "kl_k3": 3.0, "first_ratio_error": 0.0, "sampler_gap": 0.05, "entropy": 2.0, "length": 40.0,
    "gated_unsafe_rate": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "figure", "within", "beyond", "advice"),
    [
        ("kl", "kl_k3", 50.0, 50.1, "ppo.beta"),
        ("ratio", "first_ratio_error", 0.1, 0.101, "lora.dropout=0"),
        ("sampler", "sampler_gap", 0.2, 0.201, "sampling.engine=torch"),
        ("entropy", "entropy", 0.4, 0.39, "Lower optim.lr"),
        ("length", "length", 80.0, 80.1, "reward_length_correlation"),
        ("length", "length", 20.0, 19.9, "reward_length_correlation"),
        ("gated", "gated_unsafe_rate", 0.95, 0.96, "calibration"),
    ],
)
def test_an_alarm_rings_beyond_its_limit_and_says_what_to_do(name, figure, within, beyond, advice):
    section = AlarmSection()
    assert alarms_of({**HEALTHY, figure: within}, HEALTHY, section) == {}
    found = alarms_of({**HEALTHY, figure: beyond}, HEALTHY, section)
    assert list(found) == [name] and advice in found[name]


def test_a_watch_warns_once_and_goes_on():
    watch = Watch(AlarmSection())
    assert watch.look(1, HEALTHY) == []
    assert len(watch.look(2, {**HEALTHY, "kl_k3": 60.0})) == 1
    assert watch.look(3, {**HEALTHY, "kl_k3": 70.0}) == []
    assert watch.rung == {"kl": 2} and watch.stopped is None


def test_a_watch_stops_where_it_is_told_to_and_keeps_that_over_a_resume():
    watch = Watch(AlarmSection(action="stop"))
    watch.look(1, HEALTHY)
    watch.look(2, {**HEALTHY, "entropy": 0.1, "length": 1000.0})
    assert watch.stopped == "entropy" and set(watch.rung) == {"entropy", "length"}
    again = Watch(AlarmSection(action="stop"), **watch.state())
    assert again.stopped == "entropy" and again.look(3, {**HEALTHY, "length": 1000.0}) == []
    assert again.first == HEALTHY


def test_alarms_can_be_off_but_a_figure_that_is_no_number_ends_the_run():
    watch = Watch(AlarmSection(action="off"))
    assert watch.look(1, HEALTHY) == [] == watch.look(2, {**HEALTHY, "kl_k3": 1e9}) and watch.rung == {}
    for value in (math.nan, math.inf):
        with pytest.raises(TrainingError, match=r"iteration 3: policy_loss: not a number. Lower optim.lr"):
            watch.look(3, {**HEALTHY, "policy_loss": value})


def test_beta_follows_the_error_clipped_to_a_fifth():
    options = {"target": 6.0, "num_rollouts": 500, "horizon": 10_000}
    assert adapted_beta(0.01, 6.0, **options) == 0.01
    # A tenth too high: 0.01 (1 + 0.1 x 500 / 10000).
    assert adapted_beta(0.01, 6.6, **options) == pytest.approx(0.01 * 1.005)
    assert adapted_beta(0.01, 60.0, **options) == pytest.approx(0.01 * 1.01)
    assert adapted_beta(0.01, -5.0, **options) == pytest.approx(0.01 * 0.99)
