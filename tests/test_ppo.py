"""One iteration of PPO on the toy model: cut-off answers, the KL coefficient, figures, alarms."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from small_ppo import SMALL, TREES, toy_prompts, trainer_of

from alignment.config import load_config
from alignment.errors import ConfigError, DataError
from alignment.headlines import one_line
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling.prompts import Asked, as_candidate
from rlhf import held_out, ppo, ppo_run, tree_tables
from rlhf.config import PPOConfig
from rlhf.rollout import Rollouts, reward_metrics
from rlhf.tree_tables import TreeParts

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "ppo.md"


@pytest.fixture(scope="module")
def settings(tmp_path_factory, save_judges) -> list[str]:
    return [*save_judges(tmp_path_factory.mktemp("rewards")), *SMALL]


def test_nothing_is_learned_from_masked_answers_and_whitening_leaves_them_out(settings):
    trainer = trainer_of(settings)
    rewards = torch.tensor([1.0, -1.0, 0.5])
    rollouts = trainer._measure(TREES, rewards, torch.tensor([True, False, True]))
    assert rollouts.trained.sum(1).tolist() == [3, 0, 1] and rollouts.mask.sum(1).tolist() == [3, 2, 1]
    kept = rollouts.advantages[rollouts.trained]
    assert kept.mean().abs() < 1e-5 and kept.var(correction=0) == pytest.approx(1, abs=1e-3)
    assert (rollouts.advantages[1] == 0).all()
    tables = {name: getattr(rollouts, name) for name in ("logprobs", "values", "advantages", "returns")}
    nowhere = {name: table.masked_fill(~rollouts.trained, math.nan) for name, table in tables.items()}
    rollouts = replace(rollouts, **nowhere)

    updater = trainer.updater

    def gradient(rows: list[int]) -> list[torch.Tensor]:
        trainer.policy.zero_grad()
        trainer.critic.zero_grad()
        tokens = 0
        parts = TreeParts(rollouts.trees, max_tokens=4096)
        for batch, table_rows, columns in (parts.batch(group, torch.device("cpu")) for group in parts.groups(rows)):
            tokens += rollouts.trained[table_rows, columns].sum()
            for losses in (updater.policy_losses, partial(updater.value_losses, clip_range=0.2)):
                loss, figures = losses(rollouts, batch, table_rows, columns)
                assert all(torch.isfinite(figure) for figure in figures.values())
                loss.backward()
        assert tokens == 4
        both = (*trainer.policy.parameters(), *trainer.critic.parameters())
        return [parameter.grad.clone() for parameter in both if parameter.grad is not None]

    for whole, without in zip(gradient([0, 1, 2]), gradient([0, 2]), strict=True):
        torch.testing.assert_close(whole, without, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("truncation", ["keep", "penalise", "mask"])
def test_answers_cut_off_are_treated_as_the_settings_say(settings, truncation, monkeypatch):
    """The first answer ends, the second is cut off; their gated rewards are 3 and 1, the others' 2 and 2."""
    trainer = trainer_of(settings, f"ppo.truncation={truncation}", "ppo.truncation_penalty=0.75")
    prompts = [Asked(prompt=prompt, ids=[5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
    ends = iter(["stop", "length", "stop", "stop"])

    def drawn(_sampler, ids, *_arguments, **_options):
        return [[ppo_sample([9, 10], next(ends))] for _ in ids]

    seen, judged, score = {}, [], trainer.rewards.score_trees

    def measure(trees, rewards, is_trained):
        seen.update(rewards=rewards, is_trained=is_trained)
        raise StopIteration

    monkeypatch.setattr(ppo, "sample_shared", drawn)
    monkeypatch.setattr(trainer.rewards, "gated_logits", lambda *_: torch.tensor([3.0, 1.0, 2.0, 2.0]))
    monkeypatch.setattr(trainer.rewards, "score_trees", lambda trees: judged.extend(trees) or score(trees))
    monkeypatch.setattr(trainer, "_measure", measure)
    with pytest.raises(StopIteration):
        trainer.iterate(prompts, seed=0)
    if truncation == "mask":
        # Over 3, 2 and 2: mean 7/3, deviation sqrt(2)/3.
        expected, trained = [2**0.5, 0.0, -(0.5**0.5), -(0.5**0.5)], [True, False, True, True]
    else:
        # Over all: mean 2, deviation sqrt(1/2).
        expected, trained = [2**0.5, -(2**0.5), 0.0, 0.0], [True] * 4
        expected[1] -= 0.75 if truncation == "penalise" else 0.0
    torch.testing.assert_close(seen["rewards"], torch.tensor(expected), atol=1e-5, rtol=0)
    assert seen["is_trained"].tolist() == trained
    # Reward models read an end of turn behind every answer.
    closing = trainer.models.loaded.chat.closing
    assert closing and [tree.branches[0].ids for tree in judged] == [[9, 10], [9, 10, *closing], [9, 10], [9, 10]]


def ppo_sample(ids, finish):
    from alignment.sampling import Sample

    return Sample(ids, [0.0] * len(ids), finish)


def test_a_whole_batch_of_masked_answers_changes_no_weight(settings):
    """Of the toy model, which never ends within six tokens, all answers are cut off."""
    trainer = trainer_of(settings, "ppo.truncation=keep")
    prompts = [Asked(prompt=prompt, ids=[5, 6]) for prompt in toy_prompts()]
    trainer.iterate(prompts, seed=0)  # so that there are moments, which would move it on
    object.__setattr__(trainer.config.ppo, "truncation", "mask")
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    metrics = trainer.iterate(prompts, seed=0)
    assert metrics["truncated_rate"] == 1 and metrics["policy_loss"] == metrics["explained_variance"] == 0
    for old, new in zip(before, trainer.policy.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    "settings_of_model", [[], ["lora.r=4"], ["sampling.num_candidates=2", "sampling.temperature=0.7"]]
)
def test_a_minibatch_is_one_step_and_the_first_has_ratio_one(settings, settings_of_model):
    """Old, new and reference log-probabilities come from one forward, at the sampling temperature, however batched."""
    trainer = trainer_of(settings, *settings_of_model, "train.max_tokens_per_batch=40")
    prompts = [Asked(prompt=prompt, ids=[5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
    first = trainer.iterate(prompts, seed=0)
    assert first["first_ratio_error"] < 1e-5
    assert abs(first["kl"]) < 1e-4 and abs(first["kl_k3"]) < 1e-4
    second = trainer.iterate(prompts, seed=1)
    assert second["kl_k3"] > 1e-4
    minibatches = len(prompts) * trainer.config.sampling.num_candidates // trainer.config.train.minibatch_size
    for learner in trainer.learners.values():
        assert {int(state["step"]) for state in learner.optimizer.state.values()} == {2 * minibatches}
    assert max(first["sampler_gap"], second["sampler_gap"]) < 1e-5


def test_rollouts_of_a_prompt_that_are_over_the_budget_are_computed_in_parts(settings, monkeypatch):
    """Four of six tokens to prompts of three: in 20 tokens fit two with their prompt. The step stays the same."""
    prompts = [Asked(prompt=prompt, ids=[5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
    weights, largest = [], []
    for budget in (4096, 20):
        sizes = []

        def counted(rows, sizes=sizes):
            batch = collate(rows)
            sizes.append(batch.input_ids.numel())
            return batch

        monkeypatch.setattr(tree_tables, "collate", counted)
        trainer = trainer_of(settings, "sampling.num_candidates=4", f"train.max_tokens_per_batch={budget}")
        trainer.iterate(prompts, seed=0)
        largest.append(max(sizes))
        weights.append([parameter.clone() for parameter in trainer.policy.parameters()])
    assert largest[0] > 20 >= largest[1]
    for whole, parted in zip(*weights, strict=True):
        torch.testing.assert_close(whole, parted, atol=1e-4, rtol=0)


def test_on_a_bandit_the_gradient_is_the_analytic_one(settings):
    """Every token of the vocabulary is an arm; the loss's expectation has at logit a the gradient -pi_a (R_a - E R)."""
    trainer = trainer_of(settings)
    policy = trainer.policy
    logits = policy(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    pi = logits.detach().softmax(-1)
    rewards = torch.randn(len(pi), generator=torch.Generator().manual_seed(0))
    at_logits = -pi * (rewards - (pi * rewards).sum())
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(logits, trained, at_logits)

    table = torch.zeros(len(pi), 1)
    rollouts = Rollouts(
        trees=[Tree([5, 6], [Branch([arm]) for arm in range(len(pi))])],
        mask=table == 0,
        logprobs=pi.log()[:, None],
        ref_logprobs=table,
        entropy=table,
        rewards=table,
        values=table,
        trained=table == 0,
        advantages=(pi * rewards)[:, None],  # each arm as often as it is sampled
        returns=table,
    )
    batch = collate([rollouts.trees])
    loss, _ = trainer.updater.policy_losses(rollouts, batch, batch.target_branches, batch.target_offsets)
    found = torch.autograd.grad(loss, trained)
    assert max(gradient.abs().max() for gradient in expected) > 1e-2
    for mine, analytic in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, analytic, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["helpfulness", "safety"])
def test_a_reward_model_that_gives_no_number_is_named_before_anything_is_learned(settings, name, monkeypatch):
    """Although the gate may let the other one speak."""
    trainer = trainer_of(settings)
    prompts = [Asked(prompt=prompt, ids=[5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
    scores = {"helpfulness": torch.ones(4), "safety": torch.ones(4)}
    scores[name][2] = torch.nan
    monkeypatch.setattr(trainer.rewards, "score_trees", lambda _: tuple(scores.values()))
    monkeypatch.setattr(trainer, "_measure", None)
    with pytest.raises(DataError, match=rf"rewards\.{name}: gave a score that is not a number"):
        trainer.iterate(prompts, seed=0)


def test_prompts_are_pieces_of_shuffles_that_leave_none_out(settings):
    trainer = trainer_of(settings)
    prompts = [Asked(prompt=toy_prompts()[0], ids=[number]) for number in range(5)]  # of which 8 an iteration
    drawn = [prompt.ids[0] for step in range(5) for prompt in trainer.prompts_of(step, prompts)]
    assert len(drawn) == 40
    shuffles = [tuple(drawn[start : start + 5]) for start in range(0, 40, 5)]
    assert all(sorted(shuffle) == [0, 1, 2, 3, 4] for shuffle in shuffles) and len(set(shuffles)) > 3


def test_the_scale_of_scores_changes_nothing_that_is_learned(settings, monkeypatch):
    """Rewards are whitened before the KL term is added, which keeps its weight: here a hundred times the paper's."""

    def policy_after(change) -> tuple[list[torch.Tensor], float]:
        trainer = trainer_of(settings, "ppo.beta=1.0")
        gate = trainer.rewards.gated_logits
        monkeypatch.setattr(trainer.rewards, "gated_logits", lambda *scores: change(gate(*scores)))
        prompts = [Asked(prompt, [5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
        metrics = [trainer.iterate(prompts, seed=seed) for seed in range(3)]
        return [parameter.detach().clone() for parameter in trainer.policy.parameters()], metrics[-1]["kl_k3"]

    weights, divergence = policy_after(lambda gated: gated)
    scaled, _ = policy_after(lambda gated: 100.0 * gated - 7.0)
    assert divergence > 1e-3  # so that the KL term has something to say
    for expected, found in zip(weights, scaled, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("kind", "version", "lora", "message"), [
    ("DEEPSPEED", 0, "lora.r=0", "DEEPSPEED is not supported.*multi_gpu"),
    ("FSDP", 1, "lora.r=0", "Add --fsdp_version 2"),
    ("FSDP", 2, "lora.r=2", "ppo: with LoRA.*multi_gpu"),
])  # fmt: skip
def test_splits_that_are_not_supported_are_refused_before_a_model_is_loaded(
    settings, tmp_path, monkeypatch, kind, version, lora, message
):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType[kind]))
    monkeypatch.setattr(
        AcceleratorState,
        "fsdp_plugin",
        SimpleNamespace(fsdp_version=version, activation_checkpointing=False),
        raising=False,
    )
    monkeypatch.setattr(ppo_run, "PPOTrainer", None)
    config = load_config(PPOConfig, None, [*settings, f"run.dir={tmp_path / 'run'}", lora])
    with pytest.raises(ConfigError, match=message):
        ppo_run.run(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def after_bfloat16() -> Iterator[None]:
    """As in a pipeline or a notebook: transformers' Trainer has told accelerate its type of arithmetic, which stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("after_bfloat16")
def test_ppo_follows_a_training_in_bfloat16_in_the_same_process(settings, tmp_path):
    extra = ["model.dtype=bfloat16", "train.max_steps=1", f"run.dir={tmp_path / 'run'}"]
    assert ppo_run.run(load_config(PPOConfig, None, [*settings, *extra]))["iterations"] == 1


@pytest.mark.usefixtures("after_bfloat16")
def test_ppo_in_float32_stays_so_after_a_training_in_bfloat16_in_the_same_process(settings):
    trainer = trainer_of(settings)
    ids = torch.tensor([[5, 6, 7]])
    found = trainer.policy(input_ids=ids).logits
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(found, trainer_of(settings).policy(input_ids=ids).logits, atol=0, rtol=0)


def test_what_drops_out_is_decided_by_the_iterations_seed_alone(settings, monkeypatch):
    trainer = trainer_of(settings)
    monkeypatch.setattr(trainer.updater, "update", lambda *_, **__: {"drawn": float(torch.rand(()))})

    def drawn(before: int, *, seed: int) -> float:
        torch.manual_seed(before)
        expected = torch.get_rng_state()
        prompts = [Asked(prompt, [5, 6, 7]) for prompt in toy_prompts()]
        found = trainer.iterate(prompts, seed=seed)["drawn"]
        assert torch.get_rng_state().equal(expected)
        return found

    first = drawn(1, seed=4)
    assert first == drawn(2, seed=4) != drawn(1, seed=5)
    monkeypatch.setattr(Accelerator, "process_index", 1)
    assert drawn(1, seed=4) != first  # another process


def test_reward_figures_by_hand():
    scores = {
        "helpfulness": torch.tensor([1.0, 3.0, 0.0, 0.0]),
        "safety": torch.tensor([0.0, 0.0, 2.0, 2.0]),
        "gate": torch.tensor([False, False, True, True]),
        "lengths": torch.tensor([10.0, 30.0, 20.0, 20.0]),
    }
    gated = torch.tensor([1.0, 3.0, 2.0, 2.0])
    found = reward_metrics(gated, is_safety=torch.tensor([False, False, False, True]), **scores)
    assert {name: round(value.item(), 4) for name, value in found.items()} == {
        "reward": 2.0,
        "reward_std": 0.7071,
        "helpfulness": 1.0,
        "safety": 1.0,
        "gated_rate": 0.5,
        "gated_unsafe_rate": 0.3333,  # one of the three ordinary prompts' responses
        "reward_length_correlation": 1.0,
    }
    # Without ordinary prompts there is nothing to be gated: no figure, and not a good one.
    assert "gated_unsafe_rate" not in reward_metrics(gated, is_safety=torch.ones(4, dtype=torch.bool), **scores)


def test_a_target_makes_beta_follow_the_divergence(settings, tmp_path):
    extra = ["ppo.target_kl=1000", "ppo.kl_horizon=16", f"run.dir={tmp_path / 'run'}"]
    result = ppo_run.run(load_config(PPOConfig, None, [*settings, *extra]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Far below the target: 0.01 (1 - 0.2 x 8 / 16).
    assert [row["ppo/beta"] for row in rows] == pytest.approx([0.01, 0.009])
    assert result["iterations"] == 2 and result["stopped"] is None and result["alarms"] == {}


def test_every_figure_is_explained_and_an_alarm_can_end_the_run(settings, tmp_path, capsys):
    """The sampling engine computes in another order than the trainer, and so rounds otherwise."""
    extra = ["alarms.action=stop", "alarms.max_sampler_gap=1e-12", "train.max_steps=5", f"run.dir={tmp_path / 'run'}"]
    result = ppo_run.run(load_config(PPOConfig, None, [*settings, *extra]))
    assert result["iterations"] == 1 and result["stopped"] == "sampler" and result["alarms"] == {"sampler": 1}
    assert "ppo: iteration 1: sampler_gap is" in capsys.readouterr().err
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    explained = DOCUMENTATION.read_text(encoding="utf-8")
    [row] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    for name in row.keys() - {"step", "stage"}:
        assert f"| `{name}` |" in explained, name


@pytest.fixture
def evaluated(settings, tmp_path):
    """A run of four iterations with a look at eight held-out prompts after every second one, and a guard."""
    guard = next(text for text in settings if text.startswith("rewards.safety=")).removeprefix("rewards.safety=")
    looks = ["evaluation.prompts=toy:prompts.heldout", "evaluation.max_prompts=8", "evaluation.every=2"]

    def run(*extra: str) -> tuple[dict, list[dict], Path]:
        folder = tmp_path / "run"
        arguments = [*settings, *looks, f"evaluation.guard={guard}", "train.max_steps=4", *extra, f"run.dir={folder}"]
        result = ppo_run.run(load_config(PPOConfig, None, arguments))
        return result, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], folder

    return run


def answers(folder: Path, iteration: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"answers-{iteration}.jsonl").read_text().splitlines()]


def test_held_out_prompts_are_answered_before_now_and_then_and_after(evaluated, monkeypatch):
    """And trackers are told of all looks, the first one too."""
    told, count = [], itertools.count()
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step=None, **__: told.append((step, values)))

    def two_of_three_end(*arguments, **options):  # of the toy model's answers none would
        return replace(as_candidate(*arguments, **options), finish_reason="stop" if next(count) % 3 else "length")

    monkeypatch.setattr(held_out, "as_candidate", two_of_three_end)
    result, rows, folder = evaluated()
    assert [step for step, values in told if "ppo/held_out_reward" in values] == [0, 2, 4]
    with_look = {row["step"]: row for row in rows if "ppo/held_out_reward" in row}
    assert list(with_look) == [0, 2, 4] and [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for iteration, row in with_look.items():
        found = answers(folder, iteration)
        assert len(found) == 8
        assert row["ppo/held_out_reward"] == pytest.approx(sum(each["reward"] for each in found) / 8)
        assert row["ppo/held_out_guard"] == pytest.approx(sum(each["guard"] for each in found) / 8)
        unsafe = [each["safety"] < 0 for each in found if each.get("is_safety")]
        assert row["ppo/held_out_violation_rate"] == pytest.approx(sum(unsafe) / len(unsafe))
        assert {each["temperature"] for each in found} == {1.0}
    history = result["held_out"]["history"]
    assert [entry["iteration"] for entry in history] == [0, 2, 4]
    first, last = (answers(folder, iteration) for iteration in (0, 4))
    assert [each["prompt"] for each in first] == [each["prompt"] for each in last]
    gain = sum(new["reward"] - old["reward"] for new, old in zip(last, first, strict=True)) / 8
    assert result["held_out"]["reward_gain"]["value"] == pytest.approx(gain)
    ended = [
        new["guard"] - old["guard"]
        for new, old in zip(last, first, strict=True)
        if new["finish_reason"] == old["finish_reason"] == "stop"
    ]
    assert result["held_out"]["guard_gain_ended"]["count"] == len(ended) == 3
    assert result["held_out"]["guard_gain_ended"]["value"] == pytest.approx(sum(ended) / 3)
    assert result["saved_iteration"] == 4 and result["stopped"] is None
    explained = DOCUMENTATION.read_text(encoding="utf-8")
    for name in with_look[4].keys() - {"step", "stage"}:
        assert f"| `{name}` |" in explained, name


def test_prompts_that_are_lost_are_counted_in_the_result_and_told(settings, tmp_path, write_file):
    """Of the training prompts two are too long and one is cut, of the held-out ones one is too long."""

    def rows(*texts: str) -> str:
        return "".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in texts)

    turns = [("user", "x" * 200), ("assistant", "y"), ("user", "b")]
    cut = json.dumps({"prompt": [{"role": role, "content": text} for role, text in turns]}) + "\n"
    files = (
        write_file("train.jsonl", rows("a", "x" * 200, "y" * 200) + cut),
        write_file("held.jsonl", rows("c", "x" * 200)),
    )
    extra = [f"prompts.prompts={files[0]}", f"evaluation.prompts={files[1]}", "prompts.max_prompt_length=100"]
    run = load_config(PPOConfig, None, [*settings, *extra, "train.max_steps=1", f"run.dir={tmp_path / 'run'}"])
    result = ppo_run.run(run)
    assert result["left_out"] == {"prompts": {"history_cut": 1, "too_long": 2}, "evaluation": {"too_long": 1}}
    assert one_line(result).endswith(
        "; prompts left out 2 too long, cut the history of 1; evaluation left out 1 too long"
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["prompts"]["used"], manifest["evaluation_prompts"]["used"]) == (2, 1)


def test_a_run_that_an_alarm_ends_looks_at_the_policy_that_it_saves(evaluated, tmp_path):
    """Nothing is said of unsafe answers to safety prompts where the held-out prompts have none of these."""
    harmless = tmp_path / "harmless.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"give {letter}"}]} for letter in "abcdefgh"]
    harmless.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alarm = ["alarms.action=stop", "alarms.max_sampler_gap=1e-12", "train.max_steps=9"]
    result, rows, folder = evaluated(*alarm, f"evaluation.prompts={harmless}")
    assert not any("ppo/held_out_violation_rate" in row for row in rows)
    assert result["iterations"] == 1 and result["stopped"] == "sampler"
    assert [entry["iteration"] for entry in result["held_out"]["history"]] == [0, 1]
    assert "ppo/held_out_reward" in rows[1] and len(answers(folder, 1)) == 8


@pytest.mark.parametrize(("critic_warmup", "iterations"), [(0, 4), (3, 6)])
def test_a_run_whose_held_out_reward_does_not_rise_stops_and_saves_the_best_policy(
    evaluated, monkeypatch, critic_warmup, iterations
):
    """Scores fall with every look, so the best policy is the one it started from; looks that come before the policy
    learns do not count."""
    falling = iter(range(0, -100, -1))
    score = ppo_run.HeldOut.look

    def look(self, iteration, sampler, rewards, policy, run_dir):
        level = next(falling)
        monkeypatch.setattr(rewards, "gated_logits", lambda *scores: torch.full_like(scores[0], level))
        figures = score(self, iteration, sampler, rewards, policy, run_dir)
        monkeypatch.undo()
        monkeypatch.setattr(ppo_run.HeldOut, "look", look)
        return figures

    monkeypatch.setattr(ppo_run.HeldOut, "look", look)
    warmup = f"ppo.critic_warmup={critic_warmup}"
    result, _, folder = evaluated("evaluation.patience=2", "train.max_steps=20", "optim.lr=0.01", warmup)
    assert result["stopped"] == "held_out" and result["iterations"] == iterations
    assert result["held_out"]["best_iteration"] == result["saved_iteration"] == 0
    from alignment.models import load_chat_model

    start, saved = (load_chat_model(path).model.state_dict() for path in ("toy", str(folder)))
    assert all(torch.equal(start[name], saved[name]) for name in start)


def test_the_critic_starts_at_zero_and_learns_alone_at_first(settings):
    """Its error falls below that of a constant although nothing of the policy changes, and no clip holds it back."""
    extra = ("ppo.critic_warmup=1", "ppo.critic_lr=1e-3", "ppo.value_clip_range=1e-6", "optim.weight_decay=0")
    trainer = trainer_of(settings, *extra)
    prompts = [Asked(prompt=prompt, ids=[5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
    policy = [parameter.clone() for parameter in trainer.policy.parameters()]
    score = trainer.rewards.helpfulness.model.score.weight
    alone = [trainer.iterate(prompts, seed=0, critic_only=True) for _ in range(8)]
    assert alone[0]["explained_variance"] == pytest.approx(0, abs=1e-4) and score.any()
    assert all(torch.equal(old, new) for old, new in zip(policy, trainer.policy.parameters(), strict=True))
    assert not {"policy_loss", "policy_grad_norm", "clip_fraction", "first_ratio_error"} & alone[0].keys()
    assert alone[7]["value_loss"] < 0.8 * alone[0]["value_loss"] and alone[7]["explained_variance"] > 0.2
    both = trainer.iterate(prompts, seed=0)
    assert not all(torch.equal(old, new) for old, new in zip(policy, trainer.policy.parameters(), strict=True))
    assert both["policy_grad_norm"] > 0 and both["first_ratio_error"] < 1e-5


def test_a_run_counts_the_iterations_of_the_critic_alone(settings, tmp_path):
    extra = ["ppo.critic_warmup=2", "train.max_steps=4", f"run.dir={tmp_path / 'run'}"]
    ppo_run.run(load_config(PPOConfig, None, [*settings, *extra]))
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert ["ppo/policy_loss" in row for row in rows] == [False, False, True, True]


def test_an_iteration_is_left_for_the_policy(settings):
    with pytest.raises(ConfigError, match=r"critic_warmup = 2 leaves none of train\.max_steps = 2"):
        trainer_of(settings, "ppo.critic_warmup=2")


def test_the_policys_schedule_counts_its_own_updates_only(settings):
    trainer = trainer_of(settings, "ppo.critic_warmup=1", "optim.schedule=cosine", "optim.final_lr_fraction=0.25")
    prompts = [Asked(prompt=prompt, ids=[5, 6, number]) for number, prompt in enumerate(toy_prompts(), start=7)]
    prompts = prompts * 2  # two minibatches an iteration
    for critic_only in (True, False):
        trainer.iterate(prompts, seed=0, critic_only=critic_only)
    rates = {name: learner.scheduler.get_last_lr()[0] for name, learner in trainer.learners.items()}
    assert rates == pytest.approx({"policy": 0.25 * 1e-3, "critic": 0.25 * 1e-5})
