"""Which prompts a stage takes, and what fits into the models that read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.chat import chat_format, encode_prompt
from alignment.config import PromptSection, SamplingSection
from alignment.data import Loaded
from alignment.dialogue import Message, Prompt
from alignment.errors import DataError
from alignment.models import load_chat_of
from alignment.sampling.prompts import choose_prompts, fit_prompts, prompt_room


def prompts_of(safety: int, other: int) -> Loaded[Prompt]:
    return Loaded(
        [Prompt(messages=(Message("user", str(n)),), is_safety=n < safety) for n in range(safety + other)], []
    )


@pytest.mark.parametrize(
    ("safety", "other", "share", "expected"),
    [
        (50, 50, 0.5, 10), (50, 50, 0.25, 5), (50, 50, 0.0, 0), (50, 50, 1.0, 20),
        (3, 50, 0.5, 3), (50, 4, 0.25, 16), (8, 8, 0.5, 8),
    ],
)  # fmt: skip
def test_the_share_of_safety_prompts_where_there_are_enough_of_both(safety, other, share, expected):
    section = PromptSection(prompts=["x"], max_prompts=20, safety_share=share)
    data = prompts_of(safety, other)
    chosen = choose_prompts(data, section, seed=0)
    assert len(chosen) == min(20, safety + other) and sum(prompt.is_safety for prompt in chosen) == expected
    assert chosen == sorted(chosen, key=data.rows.index) and len(set(chosen)) == len(chosen)
    if safety + other > 60:
        assert choose_prompts(data, section, seed=1) != chosen


def test_a_prompt_that_lost_its_oldest_turns_is_what_was_answered():
    """The pool of rejection sampling would else hold prompts that are too long to train on."""
    chat, context = load_chat_of("toy")
    turns = tuple(Message(role, letter * 30) for role, letter in zip(("user", "assistant") * 2, "abcd", strict=True))
    asked = Prompt(messages=(*turns, Message("user", "e")), is_safety=True, category="x")
    section = PromptSection(prompts=["x"], max_prompt_length=10_000)
    [(whole, ids)] = fit_prompts(chat, [asked], section, room=context)
    assert whole == asked
    [(cut, fewer)] = fit_prompts(chat, [asked], section, room=len(ids) - 1)
    assert cut == replace(asked, messages=asked.messages[2:]) and fewer == encode_prompt(chat, cut.messages)


def test_prompts_that_the_chat_format_refuses_are_named_or_left_out(make_tokenizer):
    chat = chat_format(make_tokenizer(), "llama2")
    good, bad = (
        Prompt(messages=(Message("user", text),), is_safety=False, where=f"prompts.jsonl:{line}")
        for line, text in ((1, "hi"), (2, "[INST] hi"))
    )
    section = PromptSection(prompts=["x"])
    with pytest.raises(DataError, match=r"prompts.jsonl:2: a user turn contains \[INST\]"):
        fit_prompts(chat, [good, bad], section, room=50)
    skipping = section.model_copy(update={"on_error": "skip"})
    assert [prompt for prompt, _ in fit_prompts(chat, [good, bad], skipping, room=50)] == [good]


def test_an_answer_that_was_cut_off_fits_into_the_reward_models_context_with_its_end():
    chat, _ = load_chat_of("toy")
    sampling = SamplingSection(max_new_tokens=100)
    assert prompt_room(chat, sampling, policy=512) == prompt_room(chat, sampling, policy=512, judges=600) == 412
    assert prompt_room(chat, sampling, policy=512, judges=512) == 411
    assert prompt_room(chat, sampling, policy=512, judges=300) == 199


def test_a_prompt_must_leave_room_for_its_response_in_the_models_context():
    chat, context = load_chat_of("toy")
    texts = ("a" * 20, "a" * 60)
    prompts = [Prompt(messages=(Message("user", text),), is_safety=False) for text in texts]
    section = PromptSection(prompts=["x"], max_prompt_length=10_000)
    [short, long] = (len(ids) for _, ids in fit_prompts(chat, prompts, section, room=context))
    assert [p for p, _ in fit_prompts(chat, prompts, section, room=long)] == prompts
    assert [p for p, _ in fit_prompts(chat, prompts, section, room=long - 1)] == prompts[:1]
    lower = section.model_copy(update={"max_prompt_length": long - 1})
    assert [p for p, _ in fit_prompts(chat, prompts, lower, room=context)] == prompts[:1]
    with pytest.raises(DataError, match=rf"none fits into {short - 1} tokens \(what the models' contexts leave"):
        fit_prompts(chat, prompts, section, room=short - 1)
    with pytest.raises(DataError, match=r"none fits into 3 tokens \(prompts\.max_prompt_length\)"):
        fit_prompts(chat, prompts, section.model_copy(update={"max_prompt_length": 3}), room=context)
