"""Ghost Attention: the instruction in every turn while sampling, in the first only for training."""

import random

from alignment.dialogue import Message, Prompt
from sft.config import GattInstructions
from sft.ghost_attention import draw_instruction, sampling_context, seed_turns, training_dialogue


def test_sampling_joins_the_instruction_to_every_user_turn():
    context = sampling_context("Act as Ada.", ["hi", "why?"], ["hello"])
    assert context == (
        Message("user", "Act as Ada.\nhi"),
        Message("assistant", "hello"),
        Message("user", "Act as Ada.\nwhy?"),
    )


def test_training_keeps_it_in_the_first_turn_and_trains_the_last_answer_only():
    dialogue = training_dialogue("Act as Ada.", ["hi", "why?"], ["hello", "because"])
    assert [m.content for m in dialogue.messages] == ["Act as Ada.\nhi", "hello", "why?", "because"]
    assert dialogue.train_on == "last"


def test_instructions_are_reproducible_and_sometimes_combined():
    settings = GattInstructions()
    drawn = [draw_instruction(settings, random.Random(seed)) for seed in range(200)]
    assert drawn == [draw_instruction(settings, random.Random(seed)) for seed in range(200)]
    combined = sum(" and you " in instruction.full for instruction in drawn) / len(drawn)
    assert 0.15 < combined < 0.45  # combine_rate is 0.3; "bring it up" has an "and" of its own, so "and you" is counted
    assert all(len(instruction.short) < len(instruction.full) for instruction in drawn)


def test_only_the_asked_kinds_are_drawn():
    settings = GattInstructions(kinds=["language"])
    assert all("always answer in" in draw_instruction(settings, random.Random(seed)).full for seed in range(20))


def test_short_dialogues_are_filled_up_with_other_openings():
    prompts = [Prompt(messages=(Message("user", text),)) for text in ("a", "b", "c", "d")]
    turns = seed_turns(prompts, 3, random.Random(0))
    assert [row[0] for row in turns] == ["a", "b", "c", "d"]
    assert all(len(row) == len(set(row)) == 3 for row in turns)
