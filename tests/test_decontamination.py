"""Prompts that were trained on are left out of an evaluation, whatever the kind of the rows that have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alignment.cli.pipeline import load_pipeline
from alignment.config import PromptSection
from alignment.data import load_prompts
from alignment.decontamination import load_prompts_of, without_seen
from alignment.errors import DataError
from alignment.sampling.prompts import prompts_left_out

RECIPES = Path(__file__).parents[1] / "recipes"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def asked(*texts: str) -> dict[str, object]:
    return {"prompt": turns(*texts)}


TRAINED_ON = {
    "demonstration": {"messages": turns("One", "1")},
    "pair": {**asked("One"), "chosen": turns("", "1")[1:], "rejected": turns("", "2")[1:]},
    "prompt": asked("One"),
    "candidate": {**asked("One"), "response": turns("", "1")[1:]},
    "a later turn": {"messages": turns("Zero", "0", "  one\n", "1")},
}


@pytest.fixture
def write_lines(write_file):
    def write(name: str, *rows: object) -> str:
        return str(write_file(name, "".join(json.dumps(row) + "\n" for row in rows)))

    return write


@pytest.mark.parametrize("kind", TRAINED_ON)
def test_a_prompt_that_stands_in_a_row_of_any_kind_is_left_out_and_counted(write_lines, kind):
    prompts = write_lines("prompts.jsonl", asked("One"), asked("Two"), asked("One more"))
    trained = write_lines("trained.jsonl", TRAINED_ON[kind])
    found = load_prompts_of(PromptSection(prompts=prompts, not_in=trained))
    assert [prompt.messages[0].content for prompt in found.rows] == ["Two", "One more"]
    assert prompts_left_out(None, found.sources) == {"seen": 1}
    first, compared = found.sources
    assert (first.num_rows, first.num_kept) == (3, 2)
    assert (compared.name, compared.num_kept, len(compared.sha256)) == (trained, 0, 64)
    assert list(found.by_source()) == [prompts, trained] and len(found.by_source()[prompts]) == 2


def test_any_of_a_prompts_user_messages_counts_and_no_answer(write_lines):
    prompts = write_lines("prompts.jsonl", asked("Hello", "one", "Two"), asked("Three"))
    for text, left in (("hello", 1), ("TWO", 1), ("One", 2)):
        trained = write_lines("trained.jsonl", asked(text))
        assert len(load_prompts_of(PromptSection(prompts=prompts, not_in=trained)).rows) == left


def test_prompts_of_several_files_are_counted_where_they_stand(write_lines):
    names = [
        write_lines("a.jsonl", asked("One"), asked("Two"), asked("One")),
        write_lines("b.jsonl", asked("Three"), asked("One")),
    ]
    found = without_seen(load_prompts(names), [write_lines("trained.jsonl", asked("One"))])
    assert [source.dropped for source in found.sources] == [{"seen": 2}, {"seen": 1}, {"compared": 1}]
    assert [prompt.messages[0].content for prompt in found.by_source()[names[1]]] == ["Three"]


def test_where_none_is_left_or_a_row_is_bad_the_files_are_named(write_lines):
    prompts, trained = (write_lines(name, asked("One")) for name in ("p.jsonl", "t.jsonl"))
    with pytest.raises(DataError, match=r"prompts: all 1 share a user message with a row of .*t\.jsonl"):
        load_prompts_of(PromptSection(prompts=prompts, not_in=trained))
    bad = write_lines("bad.jsonl", asked("Two"), {"text": "no row of ours"})
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        load_prompts_of(PromptSection(prompts=prompts, not_in=bad))
    skipped = PromptSection(prompts=prompts, not_in=bad, on_error="skip")
    assert len(load_prompts_of(skipped).rows) == 1


@pytest.mark.real
@pytest.mark.skipif("ALIGN_DATA_DIR" not in os.environ, reason="ALIGN_DATA_DIR is not set")
@pytest.mark.parametrize("recipe", ["smollm2/full", "smollm2/small", "smollm2/distil", "llama2-7b/lora"])
def test_no_recipe_ends_with_an_evaluation_on_what_it_was_trained_on(recipe):
    """Of the helpful prompts kept for the end 117 of 293 stand in training files too."""
    stages = load_pipeline(RECIPES / f"{recipe}.yaml", [], check_inputs=False).stages
    names = {name for stage in stages for _, name, kind in stage.config.input_names() if kind == "data"}
    trained = sorted(name for name in names if name.endswith(".train"))
    [last] = [
        stage.config.prompts
        for stage in stages
        if stage.config.stage == "eval" and any(name.endswith(".test") for name in stage.config.prompts.prompts)
    ]
    found = load_prompts_of(last)
    assert len(trained) > 5 and prompts_left_out(None, found.sources)["seen"] > 0
    assert len(without_seen(found, trained).rows) == len(found.rows)
