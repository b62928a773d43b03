"""PPO's settings reach the maths: what the paper gives a number for makes the difference that it should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scripted import Interrupted
from small_ppo import SMALL, TREES, config_of, models_of, toy_prompts, trainer_of
from torch import nn

from alignment.config import load_config
from alignment.errors import ConfigError
from alignment.models import load_chat_model, load_reward_model
from alignment.sampling.prompts import Asked, choose_prompts
from alignment.tensor_ops import whiten
from rlhf import ppo, ppo_run, updates
from rlhf.advantages import gae
from rlhf.config import PPOConfig
from rlhf.losses import clipped_value_loss
from rlhf.ppo import PPOTrainer
from rlhf.tree_tables import TreeParts
from rlhf.updates import updates_per_iteration

ALL = torch.tensor([True, True, True])


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_judges) -> list[str]:
    """Two minibatches an iteration; with the prompts of `encoded` it is one."""
    return [*save_judges(tmp_path_factory.mktemp("rewards")), *SMALL]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_tuned):
    """Policy and reward models tuned with LoRA from the same weights."""
    folder = tmp_path_factory.mktemp("runs")
    save_tuned(load_chat_model("toy"), folder / "rs", seed=1, rank=2)
    for seed, name in enumerate(("helpfulness", "safety"), start=2):
        save_tuned(load_reward_model("toy", new_head_seed=seed), folder / name, seed=seed, rank=2)
    return folder


def encoded(kinds: tuple[bool, ...] = (False, False, False, False)) -> list[Asked]:
    """Four prompts; `kinds` says which are safety prompts."""
    prompts = [replace(prompt, is_safety=kind) for prompt, kind in zip(toy_prompts(), kinds, strict=True)]
    return [Asked(prompt, [5, 6, number]) for number, prompt in enumerate(prompts, start=7)]


def move(model: nn.Module) -> None:
    """A random step, far enough for a KL divergence that cannot be overlooked."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_kl_penalty_has_the_present_beta_which_a_target_changes(settings):
    trainer = trainer_of(settings)
    move(trainer.policy)
    trainer.beta = 7.0
    found = trainer._measure(TREES, torch.zeros(3), ALL)
    expected = -7.0 * (found.logprobs - found.ref_logprobs) * found.mask
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.rewards, expected, atol=1e-6, rtol=1e-6)


def test_beta_follows_the_divergence_whose_mean_is_exact(settings, monkeypatch):
    trainer = trainer_of(settings, "ppo.target_kl=1.0", "ppo.beta=0.5")
    move(trainer.policy)
    given = []
    monkeypatch.setattr(ppo, "adapted_beta", lambda beta, kl, **_: given.append((beta, kl)) or 0.75)
    metrics = trainer.iterate(encoded(), seed=0)
    assert abs(metrics["kl"] - metrics["kl_k3"]) > 0.01
    assert given == [(0.5, metrics["kl"])] and trainer.beta == 0.75


def test_beta_stays_while_the_critic_learns_alone(settings):
    """The policy cannot move, so that its distance of 0 tells nothing of beta."""
    trainer = trainer_of(settings, "ppo.target_kl=1.0")
    trainer.iterate(encoded(), seed=0, critic_only=True)
    assert trainer.beta == 0.01


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["ppo.target_kl=6", "ppo.beta=0"], r"ppo\.beta = 0 stays 0"),
        (["ppo.target_kl=6", "ppo.kl_horizon=8"], r"ppo\.kl_horizon = 8 counts rollouts, of which an iteration has 8"),
        (["evaluation.patience=2"], r"evaluation\.patience = 2: nothing is evaluated without evaluation\.prompts"),
    ],
)
def test_settings_that_do_nothing_or_harm_are_refused_where_a_run_begins(
    settings, tmp_path, monkeypatch, extra, problem
):
    """One that was begun with them goes on."""
    folder = tmp_path / "run"
    config = load_config(PPOConfig, None, [*settings, *extra, f"run.dir={folder}"])
    for act in (ppo_run.run, ppo_run.check):
        with pytest.raises(ConfigError, match=problem):
            act(config)
    assert not folder.exists()
    folder.mkdir()
    (folder / "manifest.json").write_text('{"stage": "ppo", "status": "running"}')
    assert "prompts, none held out" in ppo_run.check(config)

    def read(_config):
        raise Interrupted

    monkeypatch.setattr(ppo_run, "_read", read)
    with pytest.raises(Interrupted):
        ppo_run.run(config, resume=True)


def test_a_guard_without_held_out_prompts_is_warned_of(settings, tmp_path, caplog):
    guard = next(text for text in settings if text.startswith("rewards.safety=")).removeprefix("rewards.safety=")
    config = load_config(PPOConfig, None, [*settings, f"evaluation.guard={guard}", f"run.dir={tmp_path / 'run'}"])
    ppo_run.check(config)
    assert "evaluation.guard: has nothing to judge without evaluation.prompts" in caplog.text


def test_gamma_and_lambda_reach_returns_and_advantages(settings):
    trainer = trainer_of(settings, "ppo.gamma=0.8", "ppo.lam=0.5")
    nn.init.normal_(trainer.critic.score.weight, generator=torch.Generator().manual_seed(0))
    found = trainer._measure(TREES, torch.tensor([1.0, -1.0, 0.5]), ALL)
    assert found.values[found.mask].std() > 0.1
    advantages, returns = gae(found.rewards, found.values, found.mask, gamma=0.8, lam=0.5)
    torch.testing.assert_close(found.returns, returns)
    torch.testing.assert_close(found.advantages, whiten(advantages, found.mask))


@pytest.mark.parametrize("share", ["always", "never"])
def test_the_gate_has_the_threshold_of_the_settings_however_the_models_are_held(runs, share):
    """P(safe) is 0.525 at a score of 0.1: unsafe below 0.6, although safe by the paper's 0.15."""
    models = models_of(config_of(runs, "rewards.threshold=0.6", f"ppo.share_backbone={share}"))
    assert (models.separate is None) == (share == "always")
    gated = models.rewards.gated_logits(torch.tensor([9.0]), torch.tensor([0.1]), torch.tensor([False]))
    assert gated.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize(("threshold", "rate", "reward"), [(0.5, 0.5, 4.55), (0.6, 1.0, 0.1)])
def test_figures_of_the_gate_have_its_threshold(settings, monkeypatch, threshold, rate, reward):
    """P(safe) is 0.525 everywhere, and two of four prompts are safety prompts: (9 + 9 + 0.1 + 0.1) / 4."""
    trainer = trainer_of(settings, f"rewards.threshold={threshold}")
    monkeypatch.setattr(trainer.rewards, "score_trees", lambda _: (torch.full((4,), 9.0), torch.full((4,), 0.1)))
    metrics = trainer.iterate(encoded((True, False, False, True)), seed=0)
    assert (metrics["gated_rate"], metrics["reward"]) == (rate, pytest.approx(reward))


def test_each_of_a_prompts_answers_is_gated_by_the_kind_of_its_prompt(settings, monkeypatch):
    trainer = trainer_of(settings, "sampling.num_candidates=2")
    gate, given = trainer.rewards.gated_logits, []
    monkeypatch.setattr(
        trainer.rewards, "gated_logits", lambda *scores: given.append(scores[2].tolist()) or gate(*scores)
    )
    trainer.iterate(encoded((True, False, False, True)), seed=0)
    assert given == [[True, True, False, False, False, False, True, True]]


def test_the_policys_clip_is_its_own(settings):
    """All six tokens have a ratio of 1.3, which 0.5 allows and the critic's 0.1 would not."""
    trainer = trainer_of(settings, "ppo.clip_range=0.5", "ppo.value_clip_range=0.1")
    measured = trainer._measure(TREES, torch.zeros(3), ALL)
    older, ones = measured.logprobs - math.log(1.3), torch.ones_like(measured.advantages)
    rollouts = replace(measured, logprobs=older, advantages=ones)
    parts = TreeParts(rollouts.trees, max_tokens=4096)
    [group] = parts.groups()
    loss, figures = trainer.updater.policy_losses(rollouts, *parts.batch(group, torch.device("cpu")))
    assert loss.item() == pytest.approx(-1.3 * 6, rel=1e-5)
    assert figures["clip_fraction"] == 0


@pytest.mark.parametrize(("critic_only", "expected"), [(False, 0.1), (True, math.inf)])
def test_the_critics_clip_is_its_own_and_none_holds_it_back_while_it_learns_alone(
    settings, monkeypatch, critic_only, expected
):
    trainer = trainer_of(settings, "ppo.clip_range=0.5", "ppo.value_clip_range=0.1")
    given = set()

    def noted(*tensors, clip_range):
        given.add(clip_range)
        return clipped_value_loss(*tensors, clip_range=clip_range)

    monkeypatch.setattr(updates, "clipped_value_loss", noted)
    trainer.iterate(encoded(), seed=0, critic_only=critic_only)
    assert given == {expected}


def test_losses_are_means_over_the_trained_tokens_alone(settings):
    """Of six tokens two are masked; a critic that says 0 is wrong by the returns."""
    trainer = trainer_of(settings)
    rollouts = trainer._measure(TREES, torch.tensor([1.0, -1.0, 0.5]), torch.tensor([True, False, True]))
    assert rollouts.trained.sum() == 4 and not rollouts.values.any()
    figures = trainer.updater.update(rollouts, critic_only=False)
    assert figures["value_loss"] == pytest.approx(0.5 * float(rollouts.returns[rollouts.trained].pow(2).mean()))


def test_every_epoch_goes_through_the_minibatches_again(settings):
    trainer = trainer_of(settings, "train.epochs=2")
    trainer.iterate(encoded(), seed=0)
    for learner in trainer.learners.values():
        assert {int(state["step"]) for state in learner.optimizer.state.values()} == {2}
    assert updates_per_iteration(trainer.config.train) == 4  # two epochs of 8 / 4 minibatches


def test_the_optimizers_settings_reach_both_models_and_norms_do_not_decay(settings):
    trainer = trainer_of(settings, "optim.betas=[0.5, 0.6]", "optim.eps=1e-3", "optim.weight_decay=0.3")
    for learner in trainer.learners.values():
        groups = learner.optimizer.param_groups
        assert [(*group["betas"], group["eps"]) for group in groups] == [(0.5, 0.6, 1e-3)] * 2
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        matrices, norms = ({parameter.ndim for parameter in group["params"]} for group in groups)
        assert (matrices, norms) == ({2}, {1})


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_a_step_is_along_a_gradient_of_the_greatest_length_at_most(settings, name):
    trainer = trainer_of(settings, "optim.max_grad_norm=1e-3")
    learner = trainer.learners[name]
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer.learners[name] = replace(learner, optimizer=optimizer, scheduler=constant)
    before = nn.utils.parameters_to_vector(learner.model.parameters())
    metrics = trainer.iterate(encoded(), seed=0)
    assert metrics[f"{name}_grad_norm"] > 0.01, "as it was before it was scaled down"
    step = nn.utils.parameters_to_vector(learner.model.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)  # weights are rounded


@pytest.mark.parametrize("name", ["policy", "helpfulness", "safety"])
def test_the_context_is_that_of_the_model_that_reads_least(settings, name):
    trainer = trainer_of(settings)
    whole = trainer.context
    model = trainer.models.loaded.model if name == "policy" else getattr(trainer.rewards, name).model
    model.config.max_position_embeddings -= 100
    assert trainer.context == whole - 100


def test_the_seed_decides_the_order_of_prompts(settings):
    prompts = [Asked(toy_prompts()[0], [number]) for number in range(16)]
    first, second = (trainer_of(settings, f"run.seed={seed}").prompts_of(0, prompts) for seed in (0, 1))
    assert first != second


def test_the_seed_decides_which_prompts_are_chosen_and_what_is_sampled(settings, tmp_path, monkeypatch):
    """An iteration's seed is 1,000,003 times the run's and its own number."""
    given = []

    def noted(data, section, seed):
        given.append(seed)
        return choose_prompts(data, section, seed)

    def iterate(_trainer, _prompts, *, seed, critic_only):
        given.append(seed)
        raise Interrupted

    monkeypatch.setattr(ppo_run, "choose_prompts", noted)
    monkeypatch.setattr(PPOTrainer, "iterate", iterate)
    config = load_config(PPOConfig, None, [*settings, "run.seed=2", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(Interrupted):
        ppo_run.run(config)
    assert given == [2, 2_000_006]


def test_the_seed_decides_the_first_weights_of_adapters(runs):
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        models = models_of(config_of(runs, f"run.seed={seed}"))
        both = (("policy", models.policy), ("critic", models.critic))
        named = ((f"{of}.{name}", p) for of, model in both for name, p in model.named_parameters())
        return {name: p.detach() for name, p in named if "lora_A" in name and p.requires_grad}

    first, second = drawn(0), drawn(1)
    assert {name.partition(".")[0] for name in first} == {"policy", "critic"}
    assert not any(torch.equal(first[name], second[name]) for name in first)
