"""Candidates on disk: whole lines count, files of several processes together, and what is left out is counted."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace

import pytest

from alignment.dialogue import Candidate, Message, Prompt
from alignment.errors import RunError
from alignment.hardware import process_state
from alignment.model_folders import load_chat_of
from alignment.runs import open_run
from rlhf.candidates import distinct_prompts, read_candidates, remove_candidates, round_seed, sample_candidates
from rlhf.config import RejectionSamplingConfig


def prompt(text: str) -> Prompt:
    return Prompt(messages=(Message("user", text),))


def line(text: str, *responses: str) -> str:
    rows = [Candidate(prompt=prompt(text), response=response, index=0).to_json() for response in responses]
    return json.dumps(rows) + "\n"


def settings(folder, round_number: int = 1, **sampling) -> RejectionSamplingConfig:
    model = {"path": "toy", "dtype": "float32"}
    return RejectionSamplingConfig.model_validate(
        {
            "model": model,
            "round": round_number,
            "rewards": {"helpfulness": model, "safety": model},
            "prompts": {"prompts": "toy:prompts.train", "max_prompt_length": 60},
            "sampling": {"num_candidates": 2, "max_new_tokens": 6, **sampling},
            "run": {"dir": str(folder), "device": "cpu", "seed": 5},
        },
    )


def drawn(
    folder, prompts: list[Prompt], *, resume: bool = False, temperature: float = 1.0, **sampling
) -> list[Candidate]:
    config, state = settings(folder, **sampling), process_state("cpu")
    run_dir = open_run(config, resume=resume, state=state)
    asked = distinct_prompts(load_chat_of("toy")[0], prompts, config.prompts, room=400, run_dir=run_dir)
    return sample_candidates(config, {temperature: asked}, run_dir, state)[temperature]


def test_a_half_written_line_is_not_there(tmp_path):
    (tmp_path / "sampled.0.jsonl").write_text(line("a", "1", "2") + line("b", "3")[:-9])
    (tmp_path / "sampled.1.jsonl").write_text(line("c", "4"))
    found = read_candidates(tmp_path)
    assert {messages[0].content: [c.response for c in rows] for (messages, _), rows in found.items()} == {
        "a": ["1", "2"],
        "c": ["4"],
    }
    remove_candidates(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["{}", "[]", "[1]", '[{"prompt": "a"}]'])
def test_a_line_that_holds_no_candidates_is_named(tmp_path, bad):
    (tmp_path / "sampled.0.jsonl").write_text(line("a", "1") + f"{bad}\n")
    with pytest.raises(RunError, match=r"sampled\.0\.jsonl:2: damaged, on a line that is whole"):
        read_candidates(tmp_path)


def test_a_prompt_whose_candidates_are_on_disk_is_not_sampled_again(tmp_path):
    prompts = [prompt(f"question {number}") for number in range(5)]
    whole = drawn(tmp_path / "whole", prompts)
    drawn(tmp_path / "killed", prompts)
    part = tmp_path / "killed" / "sampled.0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    marked = lines[0].replace('"finish_reason": "length"', '"finish_reason": "stop"')
    assert marked != lines[0]
    part.write_text(marked + lines[1] + lines[2][:20])
    again = drawn(tmp_path / "killed", prompts, resume=True)
    kept = {candidate.prompt for candidate in whole} & {Candidate.from_json(row).prompt for row in json.loads(marked)}
    assert len(kept) == 1
    for one, two in zip(whole, again, strict=True):
        assert one.response == two.response
        assert (one.finish_reason != two.finish_reason) == (one.prompt in kept and one.finish_reason == "length")
    assert part.read_text().startswith(marked + lines[1])
    assert len(part.read_text().splitlines()) == 5


def test_equal_prompts_count_once_and_those_too_long_not_at_all(tmp_path):
    prompts = [prompt("b"), prompt("a"), prompt("x" * 200), prompt("b")]
    found = drawn(tmp_path / "run", prompts)
    assert [(c.prompt.messages[0].content, c.index, c.round, c.seed) for c in found] == [
        ("b", 0, 1, 5), ("b", 1, 1, 5), ("a", 0, 1, 5), ("a", 1, 1, 5),
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["duplicate_prompts"] == 1
    assert manifest["prompts"] == {"used": 3, "history_cut": 0, "too_long": 1, "refused_by_chat_format": 0}


@pytest.mark.parametrize("order", [1, -1])
def test_prompts_that_are_equal_when_cut_are_a_safety_prompt_where_one_of_them_is(tmp_path, order):
    last = Message("user", "b")

    def asked(letter: str, *, is_safety: bool) -> Prompt:
        history = (Message("user", letter * 60), Message("assistant", "y"))
        return Prompt(messages=(*history, last), is_safety=is_safety)

    prompts = [asked("x", is_safety=False), asked("z", is_safety=True)][::order]
    found = drawn(tmp_path / "run", prompts)
    assert [(each.prompt.messages, each.prompt.is_safety) for each in found] == [((last,), True)] * 2


def test_one_candidate_a_prompt_is_allowed(tmp_path):
    found = drawn(tmp_path / "run", [prompt("a")], num_candidates=1)
    assert [candidate.index for candidate in found] == [0]


def test_candidates_of_every_temperature_are_apart_and_drawn_with_the_same_random_numbers(tmp_path):
    cold = drawn(tmp_path / "run", [prompt("a"), prompt("b")], temperature=0.5)
    warm = drawn(tmp_path / "run", [prompt("a"), prompt("b")], temperature=1.0, resume=True)
    assert {c.temperature for c in cold} == {0.5} and {c.temperature for c in warm} == {1.0}
    assert [c.response for c in cold] != [c.response for c in warm]
    assert len(read_candidates(tmp_path / "run")) == 4
    assert warm == drawn(tmp_path / "alone", [prompt("a"), prompt("b")], temperature=1.0)
    # A temperature so near that float32 does not tell it from 1 gives the same answers from the same numbers.
    near = drawn(tmp_path / "near", [prompt("a"), prompt("b")], temperature=1.0 + 1e-9)
    assert [c.response for c in near] == [c.response for c in warm] and near != warm


def test_every_round_draws_with_random_numbers_of_its_own(tmp_path):
    """The same policy, prompts and seed. In round 1 they are those of the run's seed."""
    rounds = [drawn(tmp_path / f"{number}", [prompt("a"), prompt("b")], round_number=number) for number in range(4)]
    answers = {tuple(candidate.response for candidate in found) for found in rounds}
    assert len(answers) == 4
    assert [found[0].seed for found in rounds] == [round_seed(5, number) for number in range(4)]
    assert round_seed(5, 1) == 5 and round_seed(0, 0) >= 0
    assert rounds[2] == drawn(tmp_path / "again", [prompt("a"), prompt("b")], round_number=2)


def test_time_and_memory_are_noted_as_candidates_come(tmp_path, monkeypatch):
    """So that an interrupted run knows them. Each look at the clock is 100 seconds later than the last."""
    clock = itertools.count(step=100)
    slow = SimpleNamespace(monotonic=lambda: next(clock), strftime=time.strftime)
    monkeypatch.setattr("alignment.runs.time", slow)
    drawn(tmp_path / "run", [prompt("a"), prompt("b")])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["elapsed_seconds"] >= 200 and manifest["peak_memory_gb"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_run_with_all_candidates_on_disk_loads_no_model(tmp_path, monkeypatch, temperature):
    prompts = [prompt("a"), prompt("b")]
    first = drawn(tmp_path / "run", prompts, temperature=temperature)
    monkeypatch.setattr("rlhf.candidates.open_sampler", lambda *_a, **_k: pytest.fail("the model was loaded"))
    assert drawn(tmp_path / "run", prompts, resume=True, temperature=temperature) == first
