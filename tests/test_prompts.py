"""Which prompts a stage takes, and what fits into the models that read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.chat import encode_prompt
from alignment.chat_formats import chat_format
from alignment.config import PromptSection, SamplingSection
from alignment.data import Loaded, SourceReport
from alignment.dialogue import Message, Prompt
from alignment.errors import ConfigError, DataError
from alignment.model_folders import load_chat_of
from alignment.sampling.prompts import (
    Judge,
    choose_prompts,
    fit_all_formats,
    fit_prompts,
    prompt_room,
    prompts_left_out,
)


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


def test_prompts_are_counted_by_why_they_are_out_of_one_format_or_several(make_tokenizer):
    """Of four one is refused by Llama 2's format, one is too long, and one loses its first turns."""
    llama2, chatml = (chat_format(make_tokenizer(), name) for name in ("llama2", "chatml"))
    opening = (Message("user", "x" * 30), Message("assistant", "y" * 30))
    texts = ((Message("user", "hi"),), (Message("user", "[INST] hi"),), (*opening, Message("user", "a")))
    prompts = [Prompt(messages=messages) for messages in (*texts, (Message("user", "z" * 300),))]
    section = PromptSection(prompts=["x"], on_error="skip")
    found, counts = fit_all_formats([llama2, chatml], prompts, section, room=90)
    assert [prompt.messages[-1].content for prompt in found] == ["hi", "a"] and len(found[1].messages) == 1
    assert counts == {"history_cut": 1, "too_long": 1, "refused_by_chat_format": 1}
    files = [SourceReport("a", "", 6, 4, {"unreadable": 2}), SourceReport("b", "", 1, 1)]
    assert prompts_left_out({"used": 2, **counts}, files) == {"unreadable": 2, **counts}
    assert prompts_left_out({"used": 4, "too_long": 0}, files[1:]) == prompts_left_out(None, []) == {}


def test_a_prompt_that_a_second_format_makes_shorter_still_is_cut_once(make_tokenizer):
    chats = [chat_format(make_tokenizer(), name) for name in ("llama2", "chatml")]
    asked = Prompt(messages=(*(Message(role, "aaaaa") for role in ("user", "assistant") * 2), Message("user", "b")))
    room, more = (len(encode_prompt(chat, asked.messages[2:])) for chat in chats)
    assert room < more, "one exchange goes for the first, two go for the second"
    [found], counts = fit_all_formats(chats, [asked], PromptSection(prompts=["x"]), room=room)
    assert (found.messages, counts["history_cut"]) == (asked.messages[4:], 1)


def test_prompts_are_fitted_to_reward_models_by_their_own_formats_and_contexts(make_tokenizer):
    """ChatML takes more tokens than Llama 2's layout: a length that is set for the policy's is no limit of it."""
    llama2, chatml = (chat_format(make_tokenizer(), name) for name in ("llama2", "chatml"))
    asked = Prompt(messages=(Message("user", "aaaaa"), Message("assistant", "aaaaa"), Message("user", "b")))
    length, more = (len(encode_prompt(chat, asked.messages)) for chat in (llama2, chatml))
    assert length < more
    section = PromptSection(prompts=["x"], max_prompt_length=length)

    def fitted(room: int) -> tuple[list[Prompt], dict[str, int]]:
        judges = {"guard": Judge(chatml, context=room, room=room)}
        return fit_all_formats([llama2], [asked], section, room=length, judges=judges)

    assert fitted(more) == ([asked], {"history_cut": 0, "too_long": 0, "refused_by_chat_format": 0})
    [cut], counts = fitted(more - 1)
    assert (cut.messages, counts["history_cut"]) == (asked.messages[2:], 1)
    with pytest.raises(DataError, match=r"^guard: prompts: none fits into 3 tokens \(what the models' contexts leave"):
        fitted(3)


def test_an_answer_that_was_cut_off_fits_into_the_reward_models_context_with_its_end():
    chat, _ = load_chat_of("toy")
    sampling = SamplingSection(max_new_tokens=100)
    assert prompt_room(chat, sampling, policy_context=512) == 412
    assert prompt_room(chat, sampling, policy_context=512, judge_context=600) == 412
    assert prompt_room(chat, sampling, policy_context=512, judge_context=512) == 411
    assert prompt_room(chat, sampling, policy_context=512, judge_context=300) == 199
    assert prompt_room(chat, sampling, policy_context=512, judge_context=102) == 1
    for contexts in ({"policy_context": 100}, {"policy_context": 512, "judge_context": 101}):
        with pytest.raises(ConfigError, match=r"max_new_tokens=100 leaves no room .* hold 100 tokens with it\. Lower"):
            prompt_room(chat, sampling, **contexts)


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
