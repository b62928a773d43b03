"""Reward models that a stage samples for: found wanting before anything is sampled, and their contexts kept to."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from alignment.cli import distil
from alignment.cli.main import run_stage
from alignment.config import load_config
from alignment.dialogue import Candidate, Message, Prompt
from alignment.errors import ConfigError, DataError, ModelError
from alignment.models import load_reward_model, save_model
from alignment.toy_model import TOY_TEMPLATE
from rlhf import evaluate, ppo_run, rejection_sampling
from rlhf.config import EvalConfig, PPOConfig, RejectionSamplingConfig
from rlhf.judges import RewardModels, judges_context, judges_of, load_scorer, score_candidates
from sft.config import DistilConfig

# A prompt of more than a hundred tokens, and one that a reward model of 60 tokens can read with an answer of 30.
LONG, SHORT = "x" * 100, "hi"


def save_judge(folder: Path, *, seed: int, context: int | None = None) -> Path:
    """A reward model of the toy's shape; with `context` it reads no more tokens than these."""
    loaded = load_reward_model("toy", new_head_seed=seed)
    save_model(loaded.model, loaded, folder)
    if context is not None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": context}))
    return folder


@pytest.fixture
def judges(tmp_path) -> dict[str, Path]:
    return {
        "whole": save_judge(tmp_path / "whole", seed=0),
        "small": save_judge(tmp_path / "small", seed=1, context=60),
    }


def prompts_of(folder: Path, text: str) -> Path:
    path = folder / f"{text[:3]}.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n")
    return path


# Stage, its run function and configuration, the setting of a judge, other settings.
STAGES = {
    "reject": (rejection_sampling.run, RejectionSamplingConfig, ["model=toy"]),
    "eval": (evaluate.run, EvalConfig, ["policies.toy=toy"]),
    "ppo": (ppo_run.run, PPOConfig, ["model=toy", "train.batch_size=1", "train.minibatch_size=1", "train.max_steps=1"]),
    "distil": (distil.run, DistilConfig, ["model=toy"]),
}


def run_with(stage: str, folder: Path, judge: str, small: Path, whole: Path, **prompts: Path) -> dict:
    """Runs a stage whose setting `judge` is the small reward model; the others are the whole one."""
    function, config, settings = STAGES[stage]
    names = ["safety"] if stage == "distil" else ["rewards.helpfulness", "rewards.safety"]
    models = {**dict.fromkeys(names, whole), judge: small}
    given = [f"{name}={{path: {path}, dtype: float32}}" for name, path in models.items()]
    given += [f"{name.replace('_', '.')}={path}" for name, path in prompts.items()]
    place = ["sampling.max_new_tokens=30", f"run.dir={folder}", "run.device=cpu"]
    return function(load_config(config, None, [*settings, *given, *place]))


@pytest.mark.parametrize(
    ("stage", "judge", "room"),
    [
        ("reject", "rewards.safety", 29), ("eval", "rewards.helpfulness", 29), ("eval", "guard", 29),
        ("ppo", "rewards.safety", 29), ("distil", "safety", 29),
    ],
)  # fmt: skip
def test_prompts_are_kept_to_what_every_judge_can_read(tmp_path, judges, stage, judge, room):
    """With an answer of full length and its end."""
    prompts = prompts_of(tmp_path, LONG)
    with pytest.raises(DataError, match=f"none fits into {room} tokens"):
        run_with(stage, tmp_path / "run", judge, judges["small"], judges["whole"], prompts_prompts=prompts)


def test_held_out_prompts_of_ppo_are_kept_to_what_its_guard_can_read(tmp_path, judges):
    prompts = {"prompts_prompts": prompts_of(tmp_path, SHORT), "evaluation_prompts": prompts_of(tmp_path, LONG)}
    with pytest.raises(DataError, match="none fits into 29 tokens"):
        run_with("ppo", tmp_path / "run", "evaluation.guard", judges["small"], judges["whole"], **prompts)


@pytest.mark.parametrize(
    ("stage", "judge"),
    [("reject", "rewards.safety"), ("eval", "guard"), ("ppo", "evaluation.guard"), ("distil", "safety")],
)
def test_a_chat_model_for_a_judge_is_named_before_the_run_begins(tmp_path, judges, stage, judge):
    prompts = prompts_of(tmp_path, SHORT)
    with pytest.raises(ModelError, match=f"^{judge}: toy: not a reward model"):
        run_with(stage, tmp_path / "run", judge, Path("toy"), judges["whole"], prompts_prompts=prompts)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_cannot_be_read_is_named(tmp_path, judges):
    (tmp_path / "small" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^guard: .*small: its config.json cannot be read"):
        judges_context({"guard": judges_config(judges).rewards.safety})


def judges_config(judges: dict[str, Path]) -> EvalConfig:
    models = [f"rewards.helpfulness={judges['whole']}", f"rewards.safety={judges['small']}"]
    settings = ["policies.toy=toy", "prompts.prompts=toy:prompts.heldout", "run.dir=r", *models]
    return load_config(EvalConfig, None, settings)


def test_swapped_judges_are_remarked_upon(judges, caplog):
    """Not refused: where the helpfulness model speaks for every response it stands in both places."""
    config = judges_config(judges)
    assert judges_context(judges_of(config.rewards)) == 60 and not caplog.records
    (judges["small"] / "manifest.json").write_text(json.dumps({"settings": {"kind": "helpfulness"}}))
    judges_context(judges_of(config.rewards))
    [record] = caplog.records
    assert "rewards.safety is" in record.getMessage() and "a reward model of helpfulness" in record.getMessage()


def test_a_dry_run_of_context_distillation_encodes_the_prompts_behind_their_preprompts(tmp_path, judges, capsys):
    prompts = tmp_path / "both.jsonl"
    prompts.write_text(prompts_of(tmp_path, SHORT).read_text() + prompts_of(tmp_path, LONG).read_text())
    words = ["model=toy", f"safety={judges['whole']}", f"prompts.prompts={prompts}", f"run.dir={tmp_path / 'run'}"]
    words += ["preprompts=[Be safe.]", "sampling.max_new_tokens=8"]
    run_stage("distil", [*words, "prompts.max_prompt_length=60"], dry_run=True)
    assert "in order: 1 prompts. prompts: 1 too_long." in capsys.readouterr().err
    with pytest.raises(DataError, match=r"prompts: none fits into 12 tokens \(prompts\.max_prompt_length\)"):
        run_stage("distil", [*words, "prompts.max_prompt_length=12"], dry_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        ("reject", "1 prompts, 0 candidates of earlier rounds, 0 baseline responses."),
        ("eval", "1 prompts, 1 policies."),
        ("ppo", "1 prompts, none held out."),
    ],
)
def test_a_dry_run_reads_rows_and_judges(tmp_path, judges, capsys, stage, found):
    """What the run would refuse is refused, and nothing is written."""
    _, _, settings = STAGES[stage]
    prompts = prompts_of(tmp_path, SHORT)
    words = [*settings, f"prompts.prompts={prompts}", f"run.dir={tmp_path / 'run'}"]
    rewards = [f"rewards.{name}={judges['whole']}" for name in ("helpfulness", "safety")]
    run_stage(stage, [*words, *rewards], dry_run=True)
    assert f"{stage}: settings and rows are in order: {found}" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"rewards\.safety: toy: not a reward model"):
        run_stage(stage, [*words, rewards[0], "rewards.safety=toy"], dry_run=True)
    policy = "policies.toy" if stage == "eval" else "model"
    with pytest.raises(ModelError, match="is a reward model"):
        run_stage(stage, [*words, *rewards, f"{policy}={judges['small']}"], dry_run=True)
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens=600 leaves no room for a prompt"):
        run_stage(stage, [*words, *rewards, "sampling.max_new_tokens=600"], dry_run=True)
    with pytest.raises(DataError, match=r"prompts: none fits into 2 tokens \(prompts\.max_prompt_length\)"):
        run_stage(stage, [*words, *rewards, "prompts.max_prompt_length=2"], dry_run=True)
    prompts.write_text('{"prompt": 1}\n')
    with pytest.raises(DataError, match=r"hi\.jsonl:1"):
        run_stage(stage, [*words, *rewards], dry_run=True)
    assert not (tmp_path / "run").exists()


def test_ppo_refuses_judges_of_another_chat_format_before_it_begins(tmp_path, judges):
    template = tmp_path / "own.jinja"
    template.write_text("{{ '<|system|>be good<|im_end|>' }}" + TOY_TEMPLATE)
    settings = [f"prompts.prompts={prompts_of(tmp_path, SHORT)}", f"run.dir={tmp_path / 'run'}"]
    settings += [f"rewards.{name}={judges['whole']}" for name in ("helpfulness", "safety")]
    config = load_config(PPOConfig, None, [f"model={{path: toy, chat_template: {template}}}", *settings])
    with pytest.raises(ModelError, match=r"rewards\.helpfulness: writes dialogues in another format than the policy"):
        ppo_run.run(config)
    assert not (tmp_path / "run").exists()


def test_candidates_are_scored_with_one_reward_model_in_memory_at_a_time(judges, monkeypatch):
    config, cpu, loaded = judges_config(judges).rewards, torch.device("cpu"), []

    def load(model, *args, **options):
        assert all(before() is None for before in loaded)
        scorer = load_scorer(model, *args, **options)
        loaded.append(weakref.ref(scorer.model))
        return scorer

    prompts = [Prompt(messages=(Message("user", text),), is_safety=text == "b") for text in "aab"]
    candidates = [Candidate(prompt=prompt, response="x" * i, index=i) for i, prompt in enumerate(prompts)]
    expected = RewardModels.load(config, cpu).score(candidates)
    monkeypatch.setattr("rlhf.judges.load_scorer", load)
    assert score_candidates(config, candidates, cpu, title="") == expected and len(loaded) == 2
    assert len({each.reward for each in expected}) == 3 and expected[2].reward == expected[2].safety
    assert score_candidates(config, [], cpu, title="") == [] and len(loaded) == 2
