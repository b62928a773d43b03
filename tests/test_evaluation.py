"""Policies side by side: the guard, gains over the version before, and the divergence from the first policy."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState
from rich.console import Console

from alignment.cli.main import run_stage
from alignment.config import ModelSection
from alignment.dialogue import Candidate, Message, Prompt
from alignment.errors import DataError, RunError
from alignment.files import write_json
from alignment.headlines import one_line
from alignment.manifests import read_manifest, read_result
from alignment.metrics import wilson_interval
from alignment.models import load_chat_model, load_reward_model, save_model
from alignment.prefix_batch import Branch, Tree
from alignment.sampling.protocol import Sample
from alignment.sampling.torch_engine import TorchSampler
from alignment.sampling.vllm_engine import VllmSampler
from rlhf import evaluate
from rlhf.config import EvalConfig
from rlhf.divergence import answer_logprobs
from rlhf.evaluate import gains, report_table, win_rate

TOY = ModelSection(path="toy", dtype="float32")


def candidate(prompt: str, response: str, *, is_safety: bool = False, **fields) -> Candidate:
    asked = Prompt(messages=(Message("user", prompt),), is_safety=is_safety)
    return Candidate(prompt=asked, response=response, index=0, **fields)


def answers(rewards: Sequence[float], guards: Sequence[float]) -> list[Candidate]:
    return [candidate(f"{i}", "", reward=r, guard=g) for i, (r, g) in enumerate(zip(rewards, guards, strict=True))]


def test_gains_are_paired_and_say_whether_the_guard_agrees():
    before, better = answers([0.0, 1.0, 0.5], [1.0, 0.0, 0.0]), answers([2.0, 2.75, 2.25], [1.5, 0.25, 0.375])
    found = gains(better, before)
    assert (found["reward_gain"]["value"], found["guard_gain"]["value"]) == (pytest.approx(11 / 6), 0.375)
    assert found["guard_agrees"] is True
    assert gains(before, better)["guard_agrees"] is True, "both fall"
    assert gains(before, before)["guard_agrees"] is None
    assert gains(answers([2.0, 2.75, 2.25], [0.0, 0.0, 0.0]), before)["guard_agrees"] is False
    assert gains(answers([2.0, 0.0, 0.25], [0.0, 0.0, 0.0]), before)["guard_agrees"] is None, "no gain to agree with"
    unguarded = [candidate("a", "", reward=2.0)]
    assert not [name for name in gains(unguarded, unguarded) if "guard" in name]


def test_gains_are_also_those_of_answers_that_both_ended():
    """Who only ends more answers gains by a judge that dislikes broken-off ones, but not among those that ended."""
    before = answers([0.0, 0.0, -2.0, -2.0, 1.0], [0.0, 0.0, 3.0, 3.0, 1.0])
    before[2:4] = [replace(answer, finish_reason="length") for answer in before[2:4]]
    now = answers([0.5, -0.5, 0.0, -2.0, 1.0], [0.25, 0.25, 0.0, 3.0, 1.0])
    now[3] = replace(now[3], finish_reason="length")
    found = gains(now, before)
    assert found["reward_gain"]["value"] == pytest.approx(0.4) and found["reward_gain"]["count"] == 5
    assert found["reward_gain_ended"]["value"] == 0 and found["reward_gain_ended"]["count"] == 3
    assert found["guard_gain"]["value"] == pytest.approx(-0.5)
    assert found["guard_gain_ended"]["value"] == pytest.approx(1 / 6)
    nobody = gains([replace(answer, finish_reason="length") for answer in now], before)
    assert nobody["reward_gain_ended"] == {"value": None, "low": None, "high": None, "count": 0}


def test_changes_of_rates_are_paired_on_the_prompts_that_they_count():
    """Two safety prompts, of which one answer became safe, and one other prompt that is now refused."""
    refusal = "I cannot help with that."
    before = [
        candidate("a", "fine", reward=0.0, safety=-1.0, is_safety=True),
        candidate("b", "fine", reward=0.0, safety=-1.0, is_safety=True),
        candidate("c", "fine", reward=0.0, safety=-1.0),
    ]
    now = [replace(before[0], safety=1.0), before[1], replace(before[2], response=refusal)]
    found = gains(now, before)
    values = {name: found[name]["value"] for name in ("violation_change", "refusal_change", "false_refusal_change")}
    assert values == {"violation_change": -0.5, "refusal_change": 0.0, "false_refusal_change": 1.0}
    assert found["violation_change"]["count"] == 2 and found["false_refusal_change"]["count"] == 1


def wins(won: int, tied: int, lost: int) -> dict[str, float]:
    """The win rate of a policy that has so many of each."""
    rewards = [1.0] * won + [0.0] * tied + [-1.0] * lost
    return win_rate(answers(rewards, rewards), answers([0.0] * len(rewards), rewards))


def test_the_interval_of_a_win_rate_with_ties_worked_by_hand():
    # Won less lost 4 / 42 = 0.0952381, variance (5 / 42 - 0.0952381^2) / 42 = 0.00261851, half-width 0.1002941; of
    # the rate, which is half of one more than that, half as wide.
    found = wins(4, 36, 0)
    assert (found["value"], found["count"]) == (pytest.approx(0.55), 40)
    assert (found["low"], found["high"]) == (pytest.approx(0.497472, abs=1e-5), pytest.approx(0.597766, abs=1e-5))


def test_ties_narrow_the_interval_of_a_win_rate_and_make_nothing_certain():
    tied, whole = wins(4, 36, 0), wilson_interval(22, 40)
    assert whole.low < tied["low"] and tied["high"] < whole.high, "half-wins of coin flips vary more"
    assert tied["low"] < 0.5 < wins(8, 32, 0)["low"], "exact sign tests say 0.125 and 0.008"
    assert wins(20, 0, 0)["low"] < wins(19, 1, 0)["low"] < 0.85, "a tie is no more than a win"
    nothing = wins(0, 3, 0)
    assert nothing["value"] == 0.5 and nothing["low"] < 0.4 and nothing["high"] > 0.6
    there, back = wins(5, 3, 2), wins(2, 3, 5)
    for name, other in (("value", "value"), ("low", "high"), ("high", "low")):
        assert there[name] == pytest.approx(1 - back[other])
    assert wins(22, 0, 18) == wilson_interval(22, 40).to_json()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_answers_log_probability_is_that_of_its_tokens(temperature):
    model = load_chat_model("toy").model
    trees = [Tree([5, 6, 7], [Branch([8, 9])]), Tree([5], [Branch([10])]), Tree([5, 6], [Branch([9, 9, 9, 9])])]
    found = answer_logprobs(TOY, trees, torch.device("cpu"), temperature=temperature, max_tokens=8, title="")
    for tree, value in zip(trees, found, strict=True):
        prompt, answer = tree.trunk, tree.branches[0].ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
        assert value == pytest.approx(expected.item(), abs=1e-4)


def test_no_answers_have_no_log_probabilities():
    assert answer_logprobs(TOY, [], torch.device("cpu"), temperature=1.0, max_tokens=8, title="") == []


@pytest.fixture
def evaluated(tmp_path):
    """Two policies, of which the second is the toy model with other weights, with two reward models and a guard."""
    other = load_chat_model("toy")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save_model(other.model, other, tmp_path / "other")
    for seed, name in enumerate(("judge", "guard")):
        reward = load_reward_model("toy", new_head_seed=seed)
        save_model(reward.model, reward, tmp_path / name)
    model = "{{path: {}, dtype: float32}}".format
    settings = [
        f"policies.first={model('toy')}", f"policies.other={model(tmp_path / 'other')}",
        f"policies.again={model('toy')}", f"rewards.helpfulness={model(tmp_path / 'judge')}",
        f"rewards.safety={model(tmp_path / 'judge')}", f"guard={model(tmp_path / 'guard')}",
        "prompts.prompts=toy:prompts.heldout", "prompts.max_prompts=40", "sampling.max_new_tokens=12", "run.device=cpu",
    ]  # fmt: skip
    run_stage("eval", [*settings, f"run.dir={tmp_path / 'run'}"])
    return tmp_path / "run"


def test_the_evaluation_reports_guard_and_divergence_by_policy_and_by_answer(evaluated):
    policies = json.loads((evaluated / "result.json").read_text())["policies"]
    rows = {
        name: [json.loads(line) for line in (evaluated / f"answers-{name}.jsonl").read_text().splitlines()]
        for name in policies
    }
    assert "kl" not in rows["first"][0] and policies["first"]["kl"]["count"] == 0
    assert policies["other"]["kl"]["value"] == pytest.approx(sum(row["kl"] for row in rows["other"]) / 40)
    assert policies["other"]["kl"]["low"] > 0
    # The same weights again: no divergence, the same answers (the seed is the same), no gain.
    assert all(math.isclose(row["kl"], 0, abs_tol=1e-4) for row in rows["again"])
    assert policies["again"]["guard_gain"]["value"] == policies["again"]["reward_gain"]["value"] == 0
    mean = sum(row["guard"] for row in rows["other"]) / 40
    assert policies["other"]["guard"]["value"] == pytest.approx(mean)
    back = policies["again"]["over_previous"]
    assert back["guard_gain"]["value"] == pytest.approx(-policies["other"]["guard_gain"]["value"])


def test_the_evaluation_reports_win_rates_and_diversity(evaluated):
    result = json.loads((evaluated / "result.json").read_text())
    policies = result["policies"]
    rows = {
        name: [json.loads(line) for line in (evaluated / f"answers-{name}.jsonl").read_text().splitlines()]
        for name in policies
    }
    assert result["safety_prompts"] == sum(row.get("is_safety", False) for row in rows["first"])
    both = list(zip(rows["other"], rows["first"], strict=True))
    won = sum((a["reward"] > b["reward"]) + 0.5 * (a["reward"] == b["reward"]) for a, b in both)
    assert policies["other"]["win_rate"]["value"] == pytest.approx(won / 40)
    # Against the one before, which is the other policy, what that one won is lost.
    assert policies["again"]["over_previous"]["win_rate"]["value"] == pytest.approx(1 - won / 40)
    assert policies["again"]["win_rate"]["value"] == 0.5
    texts = [row["response"][0]["content"].strip() for row in rows["other"]]
    assert policies["other"]["unique_answers"] == len(set(texts)) / 40
    assert policies["again"]["distinct_1"] == policies["first"]["distinct_1"]


@pytest.mark.parametrize("setting", ["top_p=0.9", "top_k=5", "temperature=0"])
def test_answers_of_a_truncated_distribution_have_no_divergence(tmp_path, setting):
    """Their log-probabilities under the whole softmax are not an estimate of the KL divergence."""
    reward = load_reward_model("toy", new_head_seed=0)
    save_model(reward.model, reward, tmp_path / "judge")
    settings = [
        "policies.first=toy", "policies.again=toy", f"rewards.helpfulness={tmp_path / 'judge'}",
        f"rewards.safety={tmp_path / 'judge'}", "prompts.prompts=toy:prompts.heldout", "prompts.max_prompts=4",
        "sampling.max_new_tokens=4", "run.device=cpu", f"sampling.{setting}",
    ]  # fmt: skip
    run_stage("eval", [*settings, f"run.dir={tmp_path / 'run'}"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["policies"]["again"]["kl"]["count"] == 0


@pytest.mark.parametrize(
    ("engine", "sampler", "merged"),
    [("torch", TorchSampler, False), ("vllm", VllmSampler, True), ("vllm", TorchSampler, False)],
)
def test_divergence_is_measured_with_the_weights_that_were_sampled_from(monkeypatch, engine, sampler, merged):
    """vLLM samples from a LoRA model's merged weights, which bfloat16 rounds; the engine it falls back to does not."""
    asked = []
    monkeypatch.setattr(evaluate, "answer_logprobs", lambda *_, **options: asked.append(options["merged"]) or [0.0])
    monkeypatch.setattr(evaluate, "fit_prompts", lambda *_, **__: [(candidate("a", "").prompt, [1])])
    monkeypatch.setattr(evaluate, "open_sampler", lambda *_, **__: nullcontext(Mock(spec=sampler)))
    sample = Sample(token_ids=[2], logprobs=[0.0], finish_reason="stop")
    monkeypatch.setattr(evaluate, "sample_prompts", lambda *_, **__: [[sample]])
    toy = load_chat_model("toy").chat
    settings = {"policies": {"a": "toy", "b": "toy"}, "rewards": {"helpfulness": "toy", "safety": "toy"}}
    config = EvalConfig.model_validate(
        {**settings, "prompts": {"prompts": "toy:prompts.heldout"}, "sampling": {"engine": engine}, "run": {"dir": "x"}}
    )
    evaluate._sample_answers(config, "b", {"a": toy, "b": toy}, [], PartialState(cpu=True), room=9)
    assert asked == [merged, merged]


def test_every_figure_of_a_policy_is_explained(evaluated):
    explained = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    result = json.loads((evaluated / "result.json").read_text())
    for figure in result["policies"]["other"].keys() | {"ngrams"}:
        assert f"`{figure}`" in explained, figure


def test_both_refusal_rates_are_printed_together(evaluated):
    result = json.loads((evaluated / "result.json").read_text())
    result["policies"]["other"]["refusal_rate"]["value"] = 0.75
    result["policies"]["other"]["false_refusal_rate"]["value"] = 0.25
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_table(result))
    shown = console.export_text()
    assert "refusals: safety, others" in shown and "75%, 25%" in shown


def test_other_prompts_have_no_toy_truth(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("give x", "How do I relax?")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["policies.a=toy", "rewards={helpfulness: toy, safety: toy}", f"run.dir={tmp_path / 'run'}", "truth=toy"]
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: no prompt of the toy task, as are 1 of 202\. truth=toy"):
        run_stage("eval", [*settings, f"prompts.prompts=[toy:prompts.heldout, {prompts}]"])
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(evaluated, tmp_path):
    """To the same prompts: of more than `max_prompts` another seed would choose others."""
    saved, prompts = str(evaluated / "config.yaml"), tmp_path / "prompts.jsonl"
    rows = map(json.loads, (evaluated / "answers-other.jsonl").read_text().splitlines())
    prompts.write_text("".join(json.dumps(Candidate.from_json(row).prompt.to_json()) + "\n" for row in rows))
    for name, seed in (("same", 0), ("else", 1)):
        run_stage("eval", [saved, f"prompts.prompts={prompts}", f"run.dir={tmp_path / name}", f"run.seed={seed}"])
    files = [path / "answers-other.jsonl" for path in (evaluated, tmp_path / "same", tmp_path / "else")]
    first, same, other = (file.read_text().splitlines() for file in files)
    assert first == same
    pairs = [(json.loads(one), json.loads(two)) for one, two in zip(first, other, strict=True)]
    assert all(one["prompt"] == two["prompt"] for one, two in pairs)
    assert sum(one["response"] == two["response"] for one, two in pairs) < 20


def test_prompts_that_are_given_again_are_counted(evaluated, tmp_path):
    """Each is answered with random numbers of its own."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("ab", "cd", "ab")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_stage("eval", [str(evaluated / "config.yaml"), f"prompts.prompts={prompts}", f"run.dir={tmp_path / 'again'}"])
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert (result["prompts"], result["repeated_prompts"]) == (3, 1)
    answers = list(map(json.loads, (tmp_path / "again" / "answers-first.jsonl").read_text().splitlines()))
    assert answers[0]["response"] != answers[2]["response"]


def test_damaged_answers_of_an_unfinished_evaluation_are_named(evaluated):
    write_json(evaluated / "manifest.json", read_manifest(evaluated) | {"status": "running"})
    file = evaluated / "answers-other.jsonl"
    whole = file.read_bytes()
    for damaged, problem in (
        (b"[1]\n", ":1: damaged"),
        (b"\xff\n", ":1: damaged"),
        (whole[:-9], ": 39 whole lines inst"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=re.escape(f"{file}{problem}")):
            run_stage("eval", [str(evaluated / "config.yaml")], resume=True)


def test_time_and_memory_until_the_answers_are_there_count_after_an_interruption(evaluated, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    again = [str(evaluated / "config.yaml"), f"run.dir={tmp_path / 'again'}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "score_candidates", interrupted)
        run_stage("eval", again)
    manifest = read_manifest(tmp_path / "again")
    assert "elapsed_seconds" in manifest and manifest["peak_memory_gb"] > 0
    write_json(tmp_path / "again" / "manifest.json", manifest | {"elapsed_seconds": 1000.0, "peak_memory_gb": 999.0})
    run_stage("eval", again, resume=True)
    result = read_result(tmp_path / "again")
    assert result["time_seconds"] >= 1000.0 and result["peak_memory_gb"] == 999.0


def test_a_prompt_that_one_policys_format_makes_too_long_is_left_out_for_all(evaluated, tmp_path):
    """ChatML takes some twenty tokens more than the toy model's own template."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("ab", "x" * 30, "cd")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        str(evaluated / "config.yaml"), "policies.other={path: toy, dtype: float32, chat_template: chatml}",
        f"prompts.prompts={prompts}", "prompts.max_prompt_length=40", f"run.dir={tmp_path / 'fit'}",
    ]  # fmt: skip
    run_stage("eval", settings)
    result = json.loads((tmp_path / "fit" / "result.json").read_text())
    assert (result["prompts"], result["left_out"]) == (2, {"prompts": {"too_long": 1}})
    assert one_line(result) == "3 policies on 2 prompts; prompts left out 1 too long"
    manifest = json.loads((tmp_path / "fit" / "manifest.json").read_text())
    assert manifest["prompts"] == {"used": 2, "left_out": 1}
    for name in ("first", "other", "again"):
        answers = map(json.loads, (tmp_path / "fit" / f"answers-{name}.jsonl").open())
        assert [answer["prompt"][-1]["content"] for answer in answers] == ["ab", "cd"]
