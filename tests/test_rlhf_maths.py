"""The gate, per-token rewards, advantages and clipped losses against hand-worked values and plain-Python references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from alignment.tensor_ops import whiten
from rlhf.advantages import gae
from rlhf.gating import combined_reward, gated_logits, safety_gate
from rlhf.losses import clipped_policy_loss, clipped_value_loss, is_clipped
from rlhf.rewards import kl_k1, kl_k3, last_token, per_token_rewards

scores = st.floats(-30, 30, allow_nan=False, width=32)


# --- gate ---------------------------------------------------------------------------------------------------------


def test_gate_takes_the_safety_score_on_safety_prompts_and_below_the_threshold():
    helpfulness = torch.tensor([2.0, 2.0, 2.0])
    # P(safe) = 0.5, 0.5, and sigmoid(-2) = 0.119 < 0.15.
    safety = torch.tensor([0.0, 0.0, -2.0])
    is_safety = torch.tensor([False, True, False])
    assert gated_logits(helpfulness, safety, is_safety).tolist() == [2.0, 0.0, -2.0]


def test_safety_veto_overrides_high_helpfulness():
    reward = gated_logits(torch.tensor([50.0]), torch.tensor([-9.0]), torch.tensor([False]))
    assert reward.item() == -9.0


def test_threshold_is_exclusive_as_in_the_paper():
    # logit(0.5) = 0: a score of exactly 0 is not below P(safe) = 0.5.
    gate = safety_gate(torch.tensor([0.0, -1e-6]), torch.tensor([False, False]), threshold=0.5)
    assert gate.tolist() == [False, True]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5])
def test_a_threshold_outside_the_unit_interval_is_refused(threshold):
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        safety_gate(torch.zeros(1), torch.tensor([False]), threshold=threshold)


@given(st.lists(st.tuples(scores, scores, st.booleans()), min_size=1, max_size=8))
def test_gate_equals_the_papers_sentence_in_plain_python(rows):
    helpfulness, safety = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    is_safety = torch.tensor([row[2] for row in rows])
    expected = []
    for r_h, r_s, flag in zip(helpfulness.double().tolist(), safety.double().tolist(), is_safety.tolist(), strict=True):
        safe_prob = 1 / (1 + math.exp(-r_s))
        expected.append(r_s if flag or safe_prob < 0.15 else r_h)
    assert_close(gated_logits(helpfulness, safety, is_safety), torch.tensor(expected, dtype=torch.float32))


def test_logit_form_does_not_saturate_where_the_probability_does():
    extreme = torch.tensor([60.0, 90.0, -60.0])
    safe = torch.tensor([1.0, 1.0, 1.0])
    ordinary = torch.tensor([False, False, False])
    assert combined_reward(extreme, safe, ordinary)[0] == combined_reward(extreme, safe, ordinary)[1] == 1.0
    assert gated_logits(extreme, safe, ordinary).tolist() == [60.0, 90.0, -60.0]


def test_combined_reward_is_the_sigmoid_of_the_gated_score():
    # sigmoid(ln 3) = 3 / 4.
    reward = combined_reward(torch.tensor([math.log(3)]), torch.tensor([0.0]), torch.tensor([False]))
    assert_close(reward, torch.tensor([0.75]))


# --- per-token rewards ----------------------------------------------------------------------------------------------


def test_reward_stands_at_the_last_token_and_kl_at_every_token():
    # beta 0.1, log-ratios 1, -2, (3): -0.1, 0.2 + 5 for the first row; -0.3, and nothing outside the mask.
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logprobs = torch.tensor([[-1.0, -3.0, 7.0], [-1.0, math.nan, math.nan]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, -7.0], [-4.0, math.nan, math.nan]])
    rewards = per_token_rewards(torch.tensor([5.0, -1.0]), logprobs, ref_logprobs, mask, beta=0.1)
    assert_close(rewards, torch.tensor([[-0.1, 5.2, 0.0], [-1.3, 0.0, 0.0]]))


def test_summed_rewards_are_equation_4():
    torch.manual_seed(0)
    logprobs, ref_logprobs = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.arange(6)[None, :] < torch.tensor([[1], [6], [3], [4]])
    rewards = torch.randn(4)
    summed = per_token_rewards(rewards, logprobs, ref_logprobs, mask, beta=0.01).sum(1)
    for row in range(4):
        kl = sum((logprobs[row, t] - ref_logprobs[row, t]).item() for t in range(6) if mask[row, t])
        assert summed[row].item() == pytest.approx(rewards[row].item() - 0.01 * kl, abs=1e-6)


def test_whitening_before_the_penalty_is_whitening_after_it_with_a_coefficient_in_standard_deviations():
    """With reward r of deviation s: whiten(r - b KL) = whiten(whiten(r) - b / s KL), so the order matters unless s = 1.

    Whitened first, as the paper has it, a penalty weighs the same whatever the scale of the reward model's scores.
    """
    torch.manual_seed(1)
    logprobs, ref_logprobs = torch.randn(2, 16, 5, dtype=torch.float64)
    mask = torch.arange(5)[None, :] < torch.randint(1, 6, (16, 1))
    scores, everywhere = 4.0 * torch.randn(16, dtype=torch.float64) + 3.0, torch.ones(16, dtype=torch.bool)
    deviation = scores.std(correction=0).item()

    def returned(rewards: torch.Tensor, beta: float) -> torch.Tensor:
        return per_token_rewards(rewards, logprobs, ref_logprobs, mask, beta=beta).sum(1)

    def white(values: torch.Tensor) -> torch.Tensor:
        return whiten(values, everywhere)

    after = white(returned(scores, 0.5))
    assert_close(after, white(returned(white(scores), 0.5 / deviation)), atol=1e-6, rtol=1e-6)
    assert (after - white(returned(white(scores), 0.5))).abs().max() > 0.1
    before = returned(white(scores), 0.5)
    assert_close(before, returned(white(100.0 * scores - 7.0), 0.5), atol=1e-6, rtol=1e-6)
    assert (white(returned(100.0 * scores - 7.0, 0.5)) - after).abs().max() > 0.1


def test_last_token_finds_the_end_of_each_response():
    mask = torch.tensor([[True, False, False], [True, True, True], [False, True, False]])
    assert last_token(mask).tolist() == [0, 2, 1]


def test_kl_estimators_agree_in_mean_and_k3_is_never_negative():
    probs, ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = (probs * (probs / ref).log()).sum()
    k1, k3 = kl_k1(probs.log()[None], ref.log()[None])[0], kl_k3(probs.log()[None], ref.log()[None])[0]
    assert_close((probs * k1).sum(), exact)
    assert_close((probs * k3).sum(), exact)
    assert (k3 >= 0).all() and (k1 < 0).any()


# --- advantages -----------------------------------------------------------------------------------------------------


def test_gae_hand_worked():
    # gamma 0.5, lam 0.5, rewards 1, 2, values 3, 4:
    #   delta_1 = 2 - 4 = -2                    A_1 = -2
    #   delta_0 = 1 + 0.5 * 4 - 3 = 0           A_0 = 0 + 0.25 * -2 = -0.5
    # returns A + V: 2.5, 2
    result = gae(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[True, True]]), gamma=0.5, lam=0.5
    )
    assert_close(result.advantages, torch.tensor([[-0.5, -2.0]]))
    assert_close(result.returns, torch.tensor([[2.5, 2.0]]))


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_double_sum_of_its_definition(seed, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (3, 1), generator=generator)
    mask = torch.arange(5)[None, :] < lengths
    rewards = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    values = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    result = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths[:, 0].tolist()):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert result.advantages[row, t].item() == pytest.approx(expected, abs=1e-9)
    assert (result.advantages[~mask] == 0).all() and (result.returns[~mask] == 0).all()


def test_lambda_one_gives_the_monte_carlo_return():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.randn(1, 3)
    result = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert_close(result.returns, torch.tensor([[7.0, 6.0, 4.0]]))


def test_values_beyond_the_end_do_not_reach_the_advantages():
    mask = torch.tensor([[True, True, False]])
    rewards, values = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[0.5, 0.5, math.nan]])
    padded = gae(rewards, values, mask)
    cut = gae(rewards[:, :2], values[:, :2], mask[:, :2])
    assert_close(padded.advantages[:, :2], cut.advantages)


# --- clipped losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),  # unclipped
        (1.5, 2.0, -2.4),  # cut at 1.2: -2 * 1.2
        (0.5, 2.0, -1.0),  # the pessimistic side is not cut
        (1.5, -2.0, 3.0),  # nor here
        (0.5, -2.0, 1.6),  # cut at 0.8: 2 * 0.8
    ],
)
def test_policy_loss_is_the_pessimistic_of_clipped_and_unclipped(ratio, advantage, expected):
    logprobs = torch.tensor([math.log(ratio)])
    loss = clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), clip_range=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_clipped_tokens_have_no_gradient_and_are_counted():
    logprobs = torch.tensor([math.log(1.5), math.log(1.1), math.log(0.5), math.log(0.5)], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0])
    clipped_policy_loss(logprobs, torch.zeros(4), advantages, clip_range=0.2).sum().backward()
    assert (logprobs.grad == 0).tolist() == [True, False, False, True]
    clipped = is_clipped(logprobs.detach(), torch.zeros(4), advantages, clip_range=0.2)
    assert clipped.tolist() == [True, False, False, True]


def test_at_the_sampling_policy_the_gradient_is_the_policy_gradient():
    # d/dlogp of -A rho at rho = 1 is -A.
    logprobs = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([0.5, -1.0, 2.0])
    clipped_policy_loss(logprobs, torch.zeros(3), advantages, clip_range=0.2).sum().backward()
    assert_close(logprobs.grad, -advantages)


def test_value_loss_takes_the_larger_of_clipped_and_unclipped():
    # old 0, clip 0.2: values 1 and 0.1, returns 1 and 1.
    #   value 1: error 0, clipped value 0.2, error 0.8 -> 0.32; value 0.1: error 0.9 both -> 0.405
    loss = clipped_value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.ones(2), clip_range=0.2)
    assert_close(loss, torch.tensor([0.32, 0.405]))


small = st.floats(-2, 2, width=32)


@given(st.lists(st.tuples(small, small, small), min_size=1, max_size=8), st.floats(0.05, 0.5))
def test_policy_loss_equals_the_papers_equation_in_plain_python(rows, eps):
    """PPO Eq. 7: min(rho A, clip(rho) A), negated, token by token."""
    logprobs, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    found = clipped_policy_loss(logprobs, old, advantages, clip_range=eps)
    for value, clipped, new, before, advantage in zip(
        found,
        is_clipped(logprobs, old, advantages, clip_range=eps),
        *map(torch.Tensor.tolist, (logprobs, old, advantages)),
        strict=True,
    ):
        ratio = math.exp(new - before)
        kept = min(max(ratio, 1 - eps), 1 + eps)
        assert value.item() == pytest.approx(-min(ratio * advantage, kept * advantage), abs=1e-9)
        assert value.item() >= -ratio * advantage - 1e-9  # never better than without the clip
        assert clipped.item() == (kept * advantage < ratio * advantage)


@given(st.lists(st.tuples(small, small, small), min_size=1, max_size=8), st.floats(0.05, 0.5))
def test_value_loss_equals_its_definition_in_plain_python(rows, eps):
    values, old, returns = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    for found, (value, before, target) in zip(
        clipped_value_loss(values, old, returns, clip_range=eps), rows, strict=True
    ):
        kept = before + min(max(value - before, -eps), eps)
        assert found.item() == pytest.approx(max((value - target) ** 2, (kept - target) ** 2) / 2, abs=1e-9)
        assert found.item() >= (value - target) ** 2 / 2 - 1e-9


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_per_token_rewards_equal_equation_4_in_plain_python(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (3,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    logprobs, reference = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(3, generator=generator, dtype=torch.float64)
    found = per_token_rewards(rewards, logprobs, reference, mask, beta=beta)
    for row, length in enumerate(lengths.tolist()):
        for place in range(5):
            expected = 0.0
            if place < length:
                expected = -beta * (logprobs[row, place] - reference[row, place]).item()
            if place == length - 1:
                expected += rewards[row].item()
            assert found[row, place].item() == pytest.approx(expected, abs=1e-9)


def test_kl_estimators_of_a_worked_example():
    """log pi = log 0.5, log pi_0 = log 0.25: k1 is log 2; k3 is 0.25 / 0.5 - 1 + log 2."""
    logprobs, reference = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert kl_k1(logprobs, reference).item() == pytest.approx(math.log(2))
    assert kl_k3(logprobs, reference).item() == pytest.approx(math.log(2) - 0.5)
