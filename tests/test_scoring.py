"""`align score` and `align rm compare` on a tiny reward model: order, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alignment.cli import scoring
from alignment.cli.main import app
from alignment.errors import DataError, RunError
from reward_models.score import Scorer

Row = dict[str, Any]


def row(number: int, **fields: Any) -> Row:
    return {"prompt": [{"role": "user", "content": f"How are you, number {number}?"}], **fields}


def assistant(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


FINE, AWAY = "I am fine. ", assistant("Go away.")
PAIRS = [row(n, chosen=assistant(FINE * (n + 1)), rejected=AWAY, source="s") for n in range(5)]
RESPONSES = [row(n // 2, response=assistant(f"Answer {n}. " * (n % 3 + 1))) for n in range(10)]


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def align(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def two_prompts_a_write_in_float32(monkeypatch):
    monkeypatch.setattr(scoring, "PROMPTS_PER_WRITE", 2)
    monkeypatch.setattr("reward_models.score.compute_dtype", lambda *_: torch.float32)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def responses(tmp_path):
    return write(tmp_path / "responses.jsonl", RESPONSES)


def test_responses_keep_their_order_and_their_own_scores(reward_folder, responses, tmp_path):
    out = tmp_path / "scored.jsonl"
    assert align("score", reward_folder, responses, "--out", out).exit_code == 0
    found = read(out)
    assert [entry["response"] for entry in found] == [entry["response"] for entry in RESPONSES]
    scorer = Scorer.load(reward_folder)
    for entry in found:
        prompt = scoring._as_response(entry).prompt.messages
        [[alone]] = scorer.score([prompt], [[entry["response"][0]["content"]]])
        assert entry["score"] == pytest.approx(alone, abs=1e-5)
        assert 0 < entry["probability"] < 1
    assert sorted(path.name for path in tmp_path.glob("scored*")) == ["scored.jsonl"]


def test_pairs_are_reported_and_written(reward_folder, pairs, tmp_path):
    out = tmp_path / "scored.jsonl"
    done = align("score", reward_folder, pairs, "--out", out, "--json")
    report = json.loads(done.stdout)
    wins = [entry["score_chosen"] > entry["score_rejected"] for entry in read(out)]
    assert (report["pairs"], report["accuracy"]["value"]) == (5, sum(wins) / 5)


@pytest.mark.parametrize("kind", ["pairs", "responses"])
@pytest.mark.parametrize("half_written", [False, True])
def test_an_interrupted_call_goes_on_and_ends_with_the_same_file(
    kind, half_written, reward_folder, request, tmp_path, monkeypatch
):
    data, whole, cut = request.getfixturevalue(kind), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    align("score", reward_folder, data, "--out", whole)
    calls = []
    score = Scorer.score

    def stops_at_the_second_block(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, *arguments, **options)

    monkeypatch.setattr(Scorer, "score", stops_at_the_second_block)
    align("score", reward_folder, data, "--out", cut)
    assert not cut.exists()
    if half_written:
        with (tmp_path / "cut.jsonl.partial").open("a") as file:
            file.write('{"prompt": [], "score": 1.0}\n{"pro')
    refused = align("score", reward_folder, data, "--out", cut)
    assert isinstance(refused.exception, RunError) and "Add --resume" in str(refused.exception)
    assert align("score", reward_folder, data, "--out", cut, "--resume").exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()
    # Five prompts in blocks of two: the second block once cut off and once scored, then the third.
    assert len(calls) == 4
    assert not list(tmp_path.glob("cut.jsonl.partial*"))


def test_unfinished_rows_of_other_data_are_not_gone_on_with(reward_folder, responses, tmp_path):
    out = tmp_path / "scored.jsonl"
    scoring.PartialFile.open(out, {"model": "another", "data": []}, resume=False)
    result = align("score", reward_folder, responses, "--out", out, "--resume")
    assert isinstance(result.exception, RunError) and "another model or other data" in str(result.exception)


def test_a_file_that_is_there_is_not_written_over(reward_folder, responses, tmp_path):
    out = tmp_path / "thesis.jsonl"
    out.write_text("years of work")
    result = align("score", reward_folder, responses, "--out", out)
    assert isinstance(result.exception, RunError)
    assert out.read_text() == "years of work"


def test_a_bad_row_is_named_before_anything_is_scored(reward_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    data = write(tmp_path / "bad.jsonl", [*RESPONSES, row(7, response=7)])
    for rows in (data, write(tmp_path / "bad-pairs.jsonl", [*PAIRS, row(7, chosen="", rejected="x")])):
        result = align("score", reward_folder, rows, "--out", tmp_path / "out.jsonl")
        assert isinstance(result.exception, DataError)
        assert f"{rows}:{6 if 'pairs' in rows else 11}: " in str(result.exception)
        assert not list(tmp_path.glob("out.jsonl*"))


def test_pairs_and_responses_are_not_mixed(reward_folder, pairs, responses):
    result = align("score", reward_folder, pairs, responses)
    assert "pairs and responses in one call" in str(result.exception)


def test_two_models_are_compared_on_the_same_pairs(reward_folder, pairs, tmp_path):
    same = json.loads(align("rm", "compare", reward_folder, reward_folder, pairs, "--json").stdout)
    assert same["difference"]["value"] == 0 and same["first"] == same["second"]
    # A file of scores stands for its model; with all pairs turned round, what one gets right the other gets wrong.
    scored = tmp_path / "scored.jsonl"
    align("score", reward_folder, pairs, "--out", scored)
    rows = read(scored)
    flipped = [{**r, "score_chosen": r["score_rejected"], "score_rejected": r["score_chosen"]} for r in rows]
    report = json.loads(align("rm", "compare", scored, write(tmp_path / "flipped.jsonl", flipped), "--json").stdout)
    assert report["first"] == same["first"]
    assert report["difference"]["value"] == pytest.approx(1 - 2 * same["first"]["value"])
    shown = align("rm", "compare", reward_folder, scored, pairs)
    assert shown.exit_code == 0 and "pair by pair" in shown.stdout


def test_scores_of_other_pairs_are_refused(reward_folder, pairs, tmp_path):
    others = [{**entry, "score_chosen": 1.0, "score_rejected": 0.0} for entry in PAIRS[:3]]
    result = align("rm", "compare", reward_folder, write(tmp_path / "other.jsonl", others), pairs)
    assert "holds other pairs" in str(result.exception)
    result = align("rm", "compare", reward_folder, pairs, pairs)
    assert "have no scores" in str(result.exception)
    result = align("rm", "compare", reward_folder, reward_folder)
    assert "Name the pairs to compare on" in str(result.exception)


def test_progress_counts_every_prompt(reward_folder):
    prompts = [scoring._as_response(entry).prompt.messages for entry in RESPONSES]
    heard: list[int] = []
    Scorer.load(reward_folder, max_tokens=100).score(prompts, [["ok"]] * len(prompts), on_progress=heard.append)
    assert sum(heard) == len(prompts) and 1 < len(heard) < len(prompts)


def test_the_stage_keeps_its_own_command():
    assert "mix_in" in align("rm", "--help").stdout
