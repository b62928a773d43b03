"""Answers changed by rule keep the instruction; turns without one stay as they are."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from alignment.cli.main import app
from alignment.data import load_dialogues
from alignment.dialogue import Dialogue, Message
from sft.instructions import built_in_pool, constraint_of
from sft.obedience import obedient_dialogues, obey

ANSWER = "Air scatters blue light most. That is why the sky is blue.\nAt dusk the way is longer, so red is left."


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("capitals", "", ANSWER.upper()),
        ("ending", "That is all", f"{ANSWER} That is all."),
        ("opening", "Ahoy", f"Ahoy. {ANSWER}"),
        ("keyword", "banana", f"{ANSWER} And, by the way, banana."),
        ("max_words", "13", "Air scatters blue light most. That is why the sky is blue."),
        ("max_words", "4", None),
        ("bullet_points", "2", "- Air scatters blue light most.\n- That is why the sky is blue."),
        ("bullet_points", "4", None),
        ("forbidden_word", "you", ANSWER),
        ("forbidden_word", "sky", None),
        ("hobby", "chess", None),
    ],
)
def test_an_answer_is_changed_by_rule_or_not_at_all(kind, value, expected):
    assert obey(constraint_of(kind, value), ANSWER) == expected


def test_an_answer_without_a_full_stop_gets_one_before_what_is_added():
    assert obey(constraint_of("ending", "That is all"), "1986") == "1986. That is all."


TIPS = "Here are some tips:\n\n1. Eat more fruit.\n2. Sleep eight hours.\n3) Walk."


@pytest.mark.parametrize(
    ("kind", "value", "answer", "expected"),
    [
        ("bullet_points", "2", TIPS, None),  # an announcement is no point
        ("bullet_points", "3", TIPS.split("\n\n")[1], "- Eat more fruit.\n- Sleep eight hours.\n- Walk."),
        ("max_words", "5", TIPS, None),
        ("max_words", "8", TIPS, "Here are some tips: Eat more fruit."),
        ("max_words", "5", "1. A sentence of seven words, not five.", None),
        ("opening", "Ahoy", "NASA did.", "Ahoy. NASA did."),
        ("opening", "Ahoy", "I think so.", "Ahoy. I think so."),
    ],
)
def test_numbers_of_a_list_are_no_sentences_and_capitals_stay(kind, value, answer, expected):
    assert obey(constraint_of(kind, value), answer) == expected


@given(
    sentences=st.lists(st.text(alphabet="abc XYZ,é", min_size=3).filter(str.strip), min_size=1, max_size=5),
    kind=st.sampled_from(["ending", "opening", "keyword"]),
    seed=st.integers(0, 100),
)
def test_rules_that_add_words_always_can_and_leave_the_answer_in(sentences, kind, seed):
    answer = ". ".join(sentences).strip()
    constraint = random.Random(seed).choice(built_in_pool([kind], "train")[kind])
    changed = obey(constraint, answer)
    assert changed is not None and constraint.holds(changed) and answer in changed


def test_rules_that_cut_take_whole_sentences():
    for kind in ("max_words", "bullet_points"):
        for constraint in built_in_pool([kind], "train")[kind]:
            changed = obey(constraint, f"{ANSWER} Clear. So it is.")
            for part in re.split(r"\n|(?<=\.) ", changed or ""):
                assert part.removeprefix("- ") in ("", *re.split(r"\n|(?<=\.) ", f"{ANSWER} Clear. So it is."))


def exchanges(*texts: str) -> Dialogue:
    messages = (Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))
    return Dialogue(messages=tuple(messages), source="s")


def test_the_instruction_stands_in_every_turn_and_every_answer_keeps_it():
    [made] = obedient_dialogues(
        [exchanges("a?", "One. Two.", "b?", "Three.")], built_in_pool(["capitals"], "train"), rate=1.0, seed=0
    )
    instruction = "In the whole conversation, you write only in capital letters."
    assert [message.content for message in made.messages] == [
        f"{instruction}\na?", "ONE. TWO.", f"{instruction}\nb?", "THREE.",
    ]  # fmt: skip
    assert (made.source, made.train_on) == ("s+instruction", "all")


def test_a_dialogue_of_which_one_answer_cannot_keep_it_stays_as_it_is():
    dialogue = exchanges("a?", "One. Two. Three. Four.", "b?", "Five.")
    assert obedient_dialogues([dialogue], built_in_pool(["bullet_points"], "train"), rate=1.0, seed=0) == [dialogue]


def test_about_the_wanted_share_is_changed():
    dialogues = [exchanges("a?", f"Answer {index}.") for index in range(200)]
    made = obedient_dialogues(dialogues, built_in_pool(["capitals"], "train"), rate=0.3, seed=1)
    changed = [after != before for before, after in zip(dialogues, made, strict=True)]
    assert 40 <= sum(changed) <= 80  # 60 expected, standard deviation 6.5
    assert made == obedient_dialogues(dialogues, built_in_pool(["capitals"], "train"), rate=0.3, seed=1)


def test_the_command_writes_rows_to_train_on(tmp_path, write_file):
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "One. Two."}]}
    file, out = write_file("sft.jsonl", f"{json.dumps(row)}\n" * 5), tmp_path / "out.jsonl"
    arguments = ["data", "instruct", str(file), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--kinds", "opening, ending", "--rate", "1"])
    assert done.exit_code == 0 and "5 demonstrations, 5 of them with an instruction" in done.stdout
    for dialogue in load_dialogues([str(out)]).rows:
        assert dialogue.messages[0].content.startswith("In the whole conversation, you ")
        assert dialogue.messages[1].content != "One. Two."
    thrice, elsewhere = tmp_path / "thrice.jsonl", [*arguments[:-1], str(tmp_path / "thrice.jsonl")]
    done = CliRunner().invoke(app, [*elsewhere, "--kinds", "opening, ending", "--rate", "1", "--copies", "3"])
    assert "15 demonstrations, 15 of them with an instruction" in done.stdout
    rows = thrice.read_text().splitlines()
    assert rows[:5] == out.read_text().splitlines() and rows[:5] != rows[5:10] != rows[10:]
    short = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "short.jsonl"), "--max-words", "1"])
    assert "0 demonstrations" in short.stdout
    again = CliRunner().invoke(app, arguments)
    assert "exists" in str(again.exception)
    wrong = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "other.jsonl"), "--kinds", "language"])
    assert "no rule makes an answer keep 'language'" in str(wrong.exception)
