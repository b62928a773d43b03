"""Ghost Attention: the instruction in every turn while sampling, in the first only for training."""

import random

import pytest

from alignment.dialogue import Message, Prompt, RowError
from alignment.errors import DataError
from sft.checkers import CHECKERS
from sft.ghost_attention import (
    Answer,
    choose_answer,
    context,
    every_turn,
    first_turn,
    seed_turns,
    training_dialogue,
)
from sft.instructions import (
    CLASHES,
    KINDS,
    TEMPLATES,
    Instruction,
    PoolRow,
    built_in_pool,
    constraint_of,
    draw_instruction,
    own_pool,
)

CAPITALS = Instruction("Write in capitals.", "Capitals.", (constraint_of("capitals", ""),))


def test_sampling_joins_the_instruction_to_every_user_turn():
    assert context(every_turn("Act as Ada.", ["hi", "why?", "bye"]), ["hello"]) == (
        Message("user", "Act as Ada.\nhi"),
        Message("assistant", "hello"),
        Message("user", "Act as Ada.\nwhy?"),
    )


def test_measuring_states_it_in_the_first_turn_only():
    assert first_turn("Act as Ada.", ["hi", "why?"]) == ["Act as Ada.\nhi", "why?"]


def test_training_keeps_it_in_the_first_turn_and_trains_the_last_answer_only():
    dialogue = training_dialogue(first_turn("Act as Ada.", ["hi", "why?"]), ["hello", "because"])
    assert [m.content for m in dialogue.messages] == ["Act as Ada.\nhi", "hello", "why?", "because"]
    assert dialogue.train_on == "last"


def test_an_answer_that_does_not_keep_the_instruction_is_passed_over():
    candidates = [Answer("", True), Answer("no", True), Answer("YES", True), Answer("ALSO", True)]
    assert choose_answer(candidates, CAPITALS, is_last=True) == ("YES", "")
    assert choose_answer(candidates[:2], CAPITALS, is_last=True) == (None, "instruction_not_kept")
    assert choose_answer(candidates[:1], CAPITALS, is_last=True) == (None, "empty")


def test_an_answer_that_the_chat_format_cannot_write_is_passed_over_at_every_turn():
    refused = Answer("[INST] YES", True, is_refused=True)
    for is_last in (False, True):
        assert choose_answer([refused, Answer("YES", True)], CAPITALS, is_last=is_last) == ("YES", "")
        assert choose_answer([Answer("", True), refused], CAPITALS, is_last=is_last) == (None, "refused")
        assert choose_answer([refused, Answer("no", True)], CAPITALS, is_last=is_last) == (None, "instruction_not_kept")


def test_only_the_last_answer_must_have_ended_by_itself():
    cut_off = [Answer("YES AND", False)]
    assert choose_answer(cut_off, CAPITALS, is_last=False) == ("YES AND", "")
    assert choose_answer(cut_off, CAPITALS, is_last=True) == (None, "cut_off")


def test_an_answer_that_may_break_its_instruction_for_the_cut_alone_was_cut_off():
    """Last words cannot stand where the answer broke off; a wrong first word is wrong whatever comes after."""
    for kind, value, text, reason in (
        ("ending", "The end", "one two", "cut_off"),
        ("keyword", "banana", "one two", "cut_off"),
        ("bullet_points", "2", "- one", "cut_off"),
        ("max_words", "3", "one two", "cut_off"),  # it may have gone on past the third
        ("forbidden_word", "the", "one two", "cut_off"),
        ("max_words", "3", "one two three four", "instruction_not_kept"),
        ("forbidden_word", "the", "in the", "instruction_not_kept"),
        ("opening", "Ahoy", "one two", "instruction_not_kept"),
        ("capitals", "", "one two", "instruction_not_kept"),
    ):
        instruction = Instruction("", "", (constraint_of(kind, value),))
        assert choose_answer([Answer(text, False)], instruction, is_last=False) == (None, reason), (kind, text)
        assert choose_answer([Answer(text, True)], instruction, is_last=False)[1] in ("", "instruction_not_kept")


def test_what_no_program_can_judge_is_taken_as_kept():
    figure = Instruction("Act as Ada.", "Ada.", (constraint_of("figure", "Ada"),))
    assert not figure.is_verifiable
    assert choose_answer([Answer("hello", True)], figure, is_last=True) == ("hello", "")


def test_a_joined_instruction_must_be_kept_in_all_its_parts():
    both = Instruction("", "", (constraint_of("capitals", ""), constraint_of("ending", "The end")))
    assert both.is_verifiable
    assert both.holds("IT IS. THE END.")
    assert not both.holds("It is. The end.")
    assert not both.holds("IT IS.")


def test_instructions_are_reproducible_and_sometimes_combined():
    pool = built_in_pool(["hobby", "language", "figure"], "train")
    drawn = [draw_instruction(pool, random.Random(seed), combine_rate=0.3) for seed in range(400)]
    assert drawn == [draw_instruction(pool, random.Random(seed), combine_rate=0.3) for seed in range(400)]
    combined = sum(len(instruction.constraints) == 2 for instruction in drawn) / len(drawn)
    assert 0.23 < combined < 0.37  # combine_rate is 0.3, its standard error 0.023
    assert all(len(instruction.short) < len(instruction.full) for instruction in drawn)
    assert {constraint.kind for instruction in drawn for constraint in instruction.constraints} == set(pool)


def test_two_parts_of_an_instruction_never_clash():
    pool = built_in_pool(KINDS, "train")
    drawn = [draw_instruction(pool, random.Random(seed), combine_rate=1.0) for seed in range(500)]
    pairs = {frozenset(part.kind for part in instruction.constraints) for instruction in drawn}
    assert all(len(pair) == 2 for pair in pairs)
    assert not pairs & CLASHES


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_is_not_trained_on(kind):
    train, held_out = (built_in_pool([kind], part)[kind] for part in ("train", "held_out"))
    assert train and held_out
    if kind != "capitals":
        assert not set(train) & set(held_out)
    assert all("{}" not in part.full + part.short for part in (*train, *held_out))


def test_kinds_and_checkers_know_each_other():
    assert set(CHECKERS) < set(KINDS) == set(TEMPLATES)


def test_a_pool_of_ones_own_takes_both_forms():
    rows = [
        PoolRow.from_json({"kind": "ending", "value": "Cheers"}),
        PoolRow.from_json({"full": "you speak like a pirate", "short": "Pirate."}),
        PoolRow.from_json({"full": "you shout", "short": "Shout.", "kind": "capitals"}),
    ]
    nulls = {"kind": "ending", "value": "Cheers", "full": None, "short": None, "source": None}
    assert PoolRow.from_json(nulls) == rows[0]
    pool = own_pool(rows)
    assert set(pool) == {"ending", "own", "capitals"}
    assert pool["ending"][0].holds("Bye. Cheers!") and not pool["ending"][0].holds("Bye.")
    assert pool["own"][0].holds("anything") and not pool["own"][0].holds(" ")
    assert pool["capitals"][0].full == "you shout" and not pool["capitals"][0].holds("quietly")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"kind": "mood", "value": "glad"}, "\"kind\" is 'mood'"),
        ({"kind": "language", "value": "Klingon"}, "no language"),
        ({"kind": "max_words", "value": 12}, "Write it as text"),
        ({"full": "you shout"}, "its two forms"),
        ({"kind": "ending", "value": "Cheers", "short": "Bye: cheers."}, '"short" without "full"'),
        ({"kind": "ending", "vlaue": "x"}, "no field of an instruction"),
    ],
)
def test_a_wrong_row_of_a_pool_is_named(row, problem):
    with pytest.raises(RowError, match=problem):
        PoolRow.from_json(row)


def test_short_dialogues_are_filled_up_with_other_openings():
    prompts = [Prompt(messages=(Message("user", text),)) for text in ("a", "b", "c", "d", "a")]
    turns = seed_turns(prompts, [3, 1, 2, 3, 4], random.Random(0))
    assert [row[0] for row in turns] == ["a", "b", "c", "d", "a"]
    assert [len(row) for row in turns] == [len(set(row)) for row in turns] == [3, 1, 2, 3, 4]


def test_turns_of_prompts_that_were_not_chosen_fill_up_where_those_chosen_are_too_few():
    chosen, spare = ([Prompt(messages=(Message("user", text),)) for text in texts] for texts in ("ab", "abcd"))
    assert seed_turns(chosen, [2, 1], random.Random(0), spare=spare) == [["a", "b"], ["b"]]
    filled = seed_turns(chosen, [4, 4], random.Random(0), spare=spare)
    assert [sorted(turns) for turns in filled] == [["a", "b", "c", "d"]] * 2
    assert [turns[0] for turns in filled] == ["a", "b"]
    with pytest.raises(DataError, match=r"5 user turns needs 4 opening turns of other prompts, and there are 3 differ"):
        seed_turns(chosen, [5, 1], random.Random(0), spare=spare)


def test_of_a_prompt_its_user_turns_alone_are_taken():
    messages = (Message("system", "Be kind."), Message("user", "a"), Message("assistant", "x"), Message("user", "b"))
    assert seed_turns([Prompt(messages=messages)], [2], random.Random(0)) == [["a", "b"]]
