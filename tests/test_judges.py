"""Reward models that a stage samples for: found wanting before anything is sampled, and their contexts kept to."""

from __future__ import annotations

import json
import math
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignment.cli import distil
from alignment.cli.main import run_stage
from alignment.config import StageConfig, load_config
from alignment.data import write_rows
from alignment.dialogue import Candidate, Message, Prompt
from alignment.errors import ConfigError, DataError, ModelError
from alignment.hardware import process_state
from alignment.headlines import one_line
from alignment.models import load_reward_model, save_model
from alignment.sampling.prompts import Judge
from alignment.toy_model import TOY_TEMPLATE
from reward_models.score import Scorer
from rlhf import evaluate, ppo_run, rejection_sampling
from rlhf.config import EvalConfig, PPOConfig, RejectionSamplingConfig
from rlhf.judges import RewardModels, judges_context, judges_of, load_scorer, score_candidates
from rlhf.ppo import PPOTrainer
from sft.config import DistilConfig

# A prompt of more than a hundred tokens, and one that a reward model of 60 tokens can read with an answer of 30.
LONG, SHORT = "x" * 100, "hi"


def save_judge(folder: Path, *, seed: int, context: int | None = None, chat_template: str = "auto") -> Path:
    """A reward model of the toy's shape; with `context` it reads no more tokens than these."""
    loaded = load_reward_model("toy", new_head_seed=seed, chat_template=chat_template)
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


def configured(
    stage: str, folder: Path, judge: str, small: Path, whole: Path, *more: str, **prompts: Path
) -> StageConfig:
    """A stage whose setting `judge` is the small reward model; the others are the whole one."""
    _, config, settings = STAGES[stage]
    names = ["safety"] if stage == "distil" else ["rewards.helpfulness", "rewards.safety"]
    models = {**dict.fromkeys(names, whole), judge: small}
    given = [f"{name}={{path: {path}, dtype: float32}}" for name, path in models.items()]
    given += [f"{name.replace('_', '.')}={path}" for name, path in prompts.items()]
    place = ["sampling.max_new_tokens=30", f"run.dir={folder}", "run.device=cpu"]
    return load_config(config, None, [*settings, *given, *place, *more])


def run_with(stage: str, *given: str | Path, **prompts: Path) -> dict:
    """Runs what `configured` makes of these."""
    return STAGES[stage][0](configured(stage, *given, **prompts))


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
    ("stage", "judge"), [("reject", "rewards.safety"), ("eval", "rewards.helpfulness"), ("eval", "guard")]
)
def test_a_prompt_that_a_judges_format_refuses_is_found_before_anything_is_sampled(
    tmp_path, judges, monkeypatch, stage, judge
):
    """And is left out where bad rows are to be skipped."""
    llama2, prompts = save_judge(tmp_path / "llama2", seed=1, chat_template="llama2"), tmp_path / "prompts.jsonl"
    write_rows(prompts, ({"prompt": [{"role": "user", "content": text}]} for text in (SHORT, "[INST] hi")))
    models, module = (judge, llama2, judges["whole"]), {"reject": rejection_sampling, "eval": evaluate}[stage]
    problem = rf"^{judge}: .*prompts\.jsonl:2: a user turn contains \[INST\]"
    with monkeypatch.context() as patch:
        patch.setattr(rejection_sampling, "sample_candidates", lambda *_: pytest.fail("sampled"))
        patch.setattr(evaluate, "_sample_answers", lambda *_, **__: pytest.fail("sampled"))
        config = configured(stage, tmp_path / "stop", *models, prompts_prompts=prompts)
        for act in (module.run, module.check):
            with pytest.raises(DataError, match=problem):
                act(config)
    config = configured(stage, tmp_path / "skip", *models, "prompts.on_error=skip", prompts_prompts=prompts)
    assert module.check(config).endswith("prompts: 1 refused_by_chat_format.")
    result = module.run(config)
    assert (result["prompts"], result["left_out"]) == (1, {"prompts": {"refused_by_chat_format": 1}})


@pytest.mark.parametrize(
    ("stage", "more"), [("reject", []), ("reject", ["sampling.temperature_grid=[0.5,1.0]"]), ("eval", [])]
)
def test_prompts_whose_answers_are_too_many_tokens_to_a_judge_are_left_out(tmp_path, judges, monkeypatch, stage, more):
    """The thirty that were sampled are no text: written down they make a hundred replacement characters, of three each.

    The second prompt does not fit beside these, nor does the third with its history.
    """
    monkeypatch.setattr("alignment.sampling.prompts.decode_response", lambda *_: "\ufffd" * 100)
    prompts, whole = tmp_path / "prompts.jsonl", judges["whole"]
    dialogues = ([SHORT], ["x" * 250], ["y" * 250, "a", "b"])
    turns = [
        [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
        for texts in dialogues
    ]
    write_rows(prompts, ({"prompt": each} for each in turns))
    result = run_with(stage, tmp_path / "run", "rewards.safety", whole, whole, *more, prompts_prompts=prompts)
    assert (result["prompts"], result["left_out"]) == (1, {"prompts": {"too_long_with_answer": 2}})
    assert one_line(result).endswith("; prompts left out 2 too long with answer")
    if stage == "eval":  # a run that goes on finds all answers in their places
        rows = list(map(json.loads, (tmp_path / "run" / "answers-toy.jsonl").read_text().splitlines()))
        assert [(row["prompt"], "reward" in row) for row in rows] == list(zip(turns, (True, False, False), strict=True))
    write_rows(prompts, ({"prompt": each} for each in turns[1:]))
    with pytest.raises(DataError, match="none fits into the reward models' contexts beside its answers"):
        run_with(stage, tmp_path / "none", "rewards.safety", whole, whole, *more, prompts_prompts=prompts)


def held_out_of(folder: Path, *texts: str) -> dict[str, Path]:
    """A prompt to train on and others to look at."""
    held = folder / "held.jsonl"
    write_rows(held, ({"prompt": [{"role": "user", "content": text}]} for text in texts))
    return {"prompts_prompts": prompts_of(folder, SHORT), "evaluation_prompts": held}


def test_a_held_out_prompt_that_a_guards_format_refuses_is_found_before_ppo_trains(tmp_path, judges, monkeypatch):
    """And is left out where bad rows are to be skipped."""
    llama2 = save_judge(tmp_path / "llama2", seed=1, chat_template="llama2")
    prompts, models = held_out_of(tmp_path, SHORT, "[INST] hi"), ("evaluation.guard", llama2, judges["whole"])
    config = configured("ppo", tmp_path / "run", *models, **prompts)
    monkeypatch.setattr(PPOTrainer, "iterate", lambda *_, **__: pytest.fail("trained"))
    for act in (ppo_run.check, ppo_run.run):
        with pytest.raises(DataError, match=r"^evaluation\.guard: .*held\.jsonl:2: a user turn contains \[INST\]"):
            act(config)
    config = configured("ppo", tmp_path / "skip", *models, "prompts.on_error=skip", **prompts)
    assert ppo_run.check(config).endswith("1 prompts held out. evaluation: 1 refused_by_chat_format.")


def test_a_look_of_ppo_leaves_out_prompts_whose_answers_are_too_many_tokens_to_a_judge(
    tmp_path, judges, monkeypatch, caplog
):
    """What was sampled makes a hundred replacement characters, of three tokens each; the second prompt is too long."""
    monkeypatch.setattr("alignment.sampling.prompts.decode_response", lambda *_: "\ufffd" * 100)
    whole, more = judges["whole"], ("model.dtype=float32", "train.batch_size=4", "train.minibatch_size=4")
    prompts = held_out_of(tmp_path, SHORT, "x" * 250)
    result = run_with("ppo", tmp_path / "run", "rewards.safety", whole, whole, *more, **prompts)
    assert [entry["iteration"] for entry in result["held_out"]["history"]] == [0, 1]
    assert result["held_out"]["reward_gain"]["count"] == 1
    assert "ppo: iteration 1: 1 of 2 held-out prompts do not fit" in caplog.text
    for iteration, row in enumerate(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())):
        lines = (tmp_path / "run" / f"answers-{iteration}.jsonl").read_text().splitlines()
        first, second = map(json.loads, lines)
        assert "reward" not in second and row["ppo/held_out_reward"] == pytest.approx(first["reward"])
        assert row["ppo/held_out_unread"] == 1
    result = run_with(
        "ppo", tmp_path / "none", "rewards.safety", whole, whole, *more, **held_out_of(tmp_path, "x" * 250)
    )
    assert result["held_out"] is None and result["iterations"] == 1


def test_a_checkpoint_of_an_earlier_version_keeps_its_held_out_prompts(tmp_path, judges):
    """Which were fitted to the policy alone: a guard of 60 tokens has room for one of the two."""
    prompts = held_out_of(tmp_path, SHORT, LONG)
    config = configured("ppo", tmp_path / "run", "rewards.safety", judges["whole"], judges["whole"], **prompts)
    _, data, chat, readers, (_, room) = ppo_run._read(config)
    options = {"judges": {**readers, "evaluation.guard": Judge(chat, 60, 29)}, "room": room}
    state, run_dir = process_state("cpu"), SimpleNamespace(note=lambda **_: None)
    looks = ppo_run.HeldOut(config, data, chat, state, guard=None, run_dir=run_dir, **options)
    saved = looks.state_dict()
    assert "best_rewards" in saved and looks._is_best([1.0, None])
    looks.load_state_dict({**saved, "best_rewards": [1.0, -5.0]})
    # The mean of what was judged is higher, but only for the worst answer is not among it now.
    assert not looks._is_best([0.9, None]) and looks._is_best([1.1, None]) and looks._is_best([1.0, -4.0])
    assert not looks._is_best([1.0, -5.0]), "of equals the earliest stays"
    # Of a checkpoint that does not have them: the mean of the looks before counts.
    looks.load_state_dict({**saved, "best_rewards": [], "history": [{"iteration": 0, "reward": 2.0}]})
    assert not looks._is_best([1.9, None]) and looks._is_best([2.1, None])
    looks.load_state_dict(saved)
    assert len(looks._asked) == 1
    looks.load_state_dict({name: value for name, value in saved.items() if name != "fits_judges"})
    assert len(looks._asked) == 2


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
    (judges["small"] / "manifest.json").write_text(json.dumps({"stage": "rm", "settings": {"kind": "helpfulness"}}))
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


def test_equal_answers_of_different_policies_have_equal_scores(judges, monkeypatch):
    """However they are batched, each is read once: by rounding one of two that say the same would win."""
    config, read, score_trees = judges_config(judges).rewards, [], Scorer.score_trees

    def noted(self, trees, **options):
        read.extend((tuple(tree.trunk), tuple(branch.ids)) for tree in trees for branch in tree.branches)
        return [[score + len(read) * 1e-3 for score in scores] for scores in score_trees(self, trees, **options)]

    monkeypatch.setattr(Scorer, "score_trees", noted)
    prompts = [Prompt(messages=(Message("user", text),), is_safety=False) for text in "abc"]
    texts = {"first": ["no", "yes", "no"], "second": ["no", "no", "no"], "third": ["yes", "yes", "no"]}
    candidates = [
        Candidate(prompt=prompt, response=response, index=0)
        for answers in texts.values()
        for prompt, response in zip(prompts, answers, strict=True)
    ]
    found = RewardModels.load(config, torch.device("cpu")).score(candidates)
    assert [(each.prompt, each.response) for each in found] == [(each.prompt, each.response) for each in candidates]
    by_answer: dict[tuple, set[float]] = {}
    for each in found:
        by_answer.setdefault((each.prompt.messages, each.response), set()).add(each.reward)
    assert len(by_answer) == 5 and all(len(rewards) == 1 for rewards in by_answer.values())
    assert len(set.union(*by_answer.values())) == 5
    assert len(read) == 10 and len(set(read)) == 5, "once by each of two reward models"


def test_a_judge_whose_scores_are_no_numbers_is_named(judges, monkeypatch):
    """The second of two, of safety."""
    values = iter((0.0, math.nan))

    def score_trees(self, trees, **_):
        value = next(values)
        return [[value] * len(tree.branches) for tree in trees]

    monkeypatch.setattr(Scorer, "score_trees", score_trees)
    candidates = [Candidate(prompt=Prompt(messages=(Message("user", "a"),)), response="b", index=0)]
    with pytest.raises(
        ModelError, match=rf"^{re.escape(str(judges['small']))} gave 1 scores that are no finite numbers"
    ):
        score_candidates(judges_config(judges).rewards, candidates, torch.device("cpu"), title="")
