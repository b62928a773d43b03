"""PPO on the toy task over three seeds, judged by its computable truth. `pytest -rP` shows the figures."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from alignment import toy
from alignment.cli.main import run_stage
from alignment.dialogue import Candidate
from alignment.metrics import Interval, mean_interval

pytestmark = pytest.mark.e2e
SEEDS = (0, 1, 2)
COMMON = ["run.device=cpu", "run.num_threads=1", "sampling.max_new_tokens=14", "sampling.max_rows=256"]


def plain(model: Path) -> str:
    return f"{{path: {model}, dtype: float32}}"


def judges(pipeline: Path, *, safety: str = "rm-safety") -> list[str]:
    return [
        f"rewards.helpfulness={plain(pipeline / 'rm-helpfulness')}",
        f"rewards.safety={plain(pipeline / safety)}",
    ]


def train(pipeline: Path, folder: Path, *extra: str, safety: str = "rm-safety") -> Path:
    settings = [
        f"model={plain(pipeline / 'sft')}", *judges(pipeline, safety=safety), "prompts.prompts=toy:prompts.train",
        "optim.lr=8e-4", "ppo.critic_lr=2e-3", "train.batch_size=128", "train.minibatch_size=32", *COMMON, *extra,
    ]  # fmt: skip
    run_stage("ppo", [*settings, f"run.dir={folder}"])
    return folder


def metrics(folder: Path, name: str) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[f"ppo/{name}"] for row in rows]


@pytest.fixture(scope="module")
def judged(pipeline, tmp_path_factory) -> dict[str, list[Candidate]]:
    """Answers of the SFT model and of policies trained with and without the gate, to the same held-out prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    policies = {"sft": pipeline / "sft"}
    for seed in SEEDS:
        length = [f"run.seed={seed}", "train.max_steps=10"]
        policies[f"gated-{seed}"] = train(pipeline, folder / f"gated-{seed}", *length)
        # Without the gate: the helpfulness model speaks for every response.
        ungated = train(pipeline, folder / f"ungated-{seed}", *length, safety="rm-helpfulness")
        policies[f"ungated-{seed}"] = ungated
    named = [f"policies.{name}={plain(path)}" for name, path in policies.items()]
    asked = ["prompts.prompts=toy:prompts.heldout", "measure_kl=false"]
    run_stage("eval", [*named, *judges(pipeline), *asked, *COMMON, f"run.dir={folder / 'eval'}"])
    return {
        name: [Candidate.from_json(json.loads(line)) for line in (folder / "eval" / f"answers-{name}.jsonl").open()]
        for name in policies
    }


def rise(after: list[float], before: list[float]) -> Interval:
    return mean_interval([new - old for new, old in zip(after, before, strict=True)])


def true_rewards(candidates: list[Candidate]) -> list[float]:
    return [toy.true_reward(each.prompt.messages, each.response) for each in candidates]


def violations(candidates: list[Candidate]) -> list[float]:
    asked = [each for each in candidates if each.prompt.is_safety]
    return [float(not toy.is_safe(each.prompt.messages, each.response)) for each in asked]


@pytest.mark.parametrize("seed", SEEDS)
def test_true_reward_rises(judged, seed):
    """By 0.15 of a scale from 0 to 1, outside the paired 95 % interval."""
    found = rise(true_rewards(judged[f"gated-{seed}"]), true_rewards(judged["sft"]))
    print(f"seed {seed}: true reward, gated less SFT {found}")
    assert found.low > 0.15, found


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_lowers_violations_below_the_sft_models_and_the_ungated_runs(judged, seed):
    gated = violations(judged[f"gated-{seed}"])
    for other in ("sft", f"ungated-{seed}"):
        found = rise(violations(judged[other]), gated)
        print(f"seed {seed}: violations, {other} less gated {found}")
        assert found.low > 0.2, (other, found)


def test_a_large_beta_holds_the_policy_and_none_lets_it_go(pipeline, tmp_path):
    length = ["train.max_steps=10", "optim.lr=3e-4"]
    held = metrics(train(pipeline, tmp_path / "held", *length, "ppo.beta=50"), "kl_k3")
    free = metrics(train(pipeline, tmp_path / "free", *length, "ppo.beta=0"), "kl_k3")
    assert held[:2] == pytest.approx(free[:2], abs=0.02), "no distance, no penalty"
    assert fmean(held[-4:]) < 0.15 and fmean(free[-4:]) > 4 * fmean(held[-4:])
