"""Rows of every kind, in and out of JSON, and the safety bins of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.dialogue import RATINGS, Candidate, Dialogue, Message, PreferencePair, Prompt, RowError, safety_bin

Row = dict[str, Any]

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Air scatters blue light most."}
BAD = {"role": "assistant", "content": "It mirrors the sea."}
PAIR: Row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def message_of(parse: Callable[[Mapping[str, Any]], object], row: Row) -> str:
    with pytest.raises(RowError) as caught:
        parse(row)
    return caught.value.problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chosen": [{"role": "assistant", "content": " \n"}]}, '"chosen" is empty'),
        ({"rejected": ""}, '"rejected" is empty'),
        ({"rejected": [GOOD]}, '"chosen" and "rejected" are the same text'),
        ({"rating": "beter"}, "\"rating\" is 'beter'. Use one of significantly_better, better, slightly_better"),
        ({"rating": 3}, '"rating" is 3'),
        ({"margin": -0.5}, '"margin" is -0.5. It must not be negative'),
        ({"margin": math.nan}, '"margin" is nan. It must be a finite number'),
        ({"margin": math.inf}, '"margin" is inf. It must be a finite number'),
        ({"margin": True}, '"margin" is True. It must be a finite number'),
        ({"margin": "1"}, "\"margin\" is '1'. It must be a finite number"),
        ({"chosen_safe": "yes"}, "\"chosen_safe\" is 'yes'. It must be true or false"),
        ({"rejected_safe": 1}, '"rejected_safe" is 1. It must be true or false'),
        ({"is_safety": 0}, '"is_safety" is 0'),
        ({"prompt": [USER, GOOD]}, '"prompt" ends with a assistant turn. The last turn must be user'),
        ({"prompt": [USER, USER]}, '"prompt[1]" is a user turn where a assistant turn must stand'),
        ({"prompt": [GOOD, USER]}, '"prompt[0]" is a assistant turn where a user turn must stand'),
        ({"prompt": [{"role": "human", "content": "x"}]}, "\"prompt[0]\" has role 'human'. Use"),
        ({"prompt": [{"role": "user", "content": None}]}, '"prompt[0]" has content None. It must be text'),
        ({"prompt": [{"role": "user", "content": " "}]}, '"prompt[0]" (user) is empty'),
        ({"prompt": ["Why?"]}, "\"prompt[0]\" is 'Why?'. It must be an object"),
        ({"prompt": []}, '"prompt" is empty'),
        ({"prompt": "Why?"}, "\"prompt\" is 'Why?'. It must be a list"),
        ({"prompt": 7}, '"prompt" is 7. It must be a list'),
        ({"chosen": [GOOD, USER, GOOD]}, "It must be a list with one assistant message"),
        ({"chosen": [USER]}, "It must be one assistant message with text"),
        ({"chosen": [{"role": "assistant", "content": "\ud83d"}]}, r'"chosen" has half a character (\ud83d alone)'),
        ({"prompt": [{"role": "user", "content": "a\udc00"}]}, r'"prompt[0]" has half a character (\udc00 alone)'),
        ({"source": "my\ud83d"}, r'"source" has half a character (\ud83d alone)'),
    ],
)
def test_a_bad_pair_is_refused_with_its_field_and_what_was_found(change: Row, problem: str) -> None:
    assert problem in message_of(PreferencePair.from_json, {**PAIR, **change})


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_missing_field_is_named_with_those_that_are_there(name: str) -> None:
    row = {key: value for key, value in PAIR.items() if key != name} | {"note": 1}
    problem = message_of(PreferencePair.from_json, row)
    assert problem.startswith(f'"{name}" is missing')
    assert "note" in problem or name == "prompt"  # without a prompt, the two conversations are looked at instead


def test_demonstrations_end_with_the_assistant_and_train_on_all_or_last() -> None:
    assert "The last turn must be assistant" in message_of(Dialogue.from_json, {"messages": [USER]})
    assert '"train_on" is \'first\'. Use "all" or "last"' in message_of(
        Dialogue.from_json, {"messages": [USER, GOOD], "train_on": "first"}
    )
    assert Dialogue.from_json({"messages": [USER, GOOD], "train_on": None}).train_on == "all"


def test_a_system_turn_may_be_empty_and_stands_first_only() -> None:
    system = {"role": "system", "content": ""}
    assert len(Prompt.from_json({"prompt": [system, USER]}).messages) == 2
    assert '"prompt[2]" is a system turn where a user turn must stand' in message_of(
        Prompt.from_json, {"prompt": [USER, GOOD, system, USER]}
    )
    assert '"prompt" ends with a system turn' in message_of(Prompt.from_json, {"prompt": [system]})


def test_candidates_from_elsewhere_need_no_index_and_their_scores_are_numbers() -> None:
    row = {"prompt": [USER], "response": "Because."}
    assert Candidate.from_json(row).index == 0
    assert Candidate.from_json({**row, "helpfulness": 1, "safety": None}).helpfulness == 1
    assert "\"reward\" is 'high'. It must be a finite number" in message_of(
        Candidate.from_json, {**row, "reward": "high"}
    )
    assert '"index" is 0.5. It must be a whole number' in message_of(Candidate.from_json, {**row, "index": 0.5})
    assert '"seed" is True' in message_of(Candidate.from_json, {**row, "seed": True})
    assert '"finish_reason" is 1. It must be text' in message_of(Candidate.from_json, {**row, "finish_reason": 1})


@pytest.mark.parametrize("name", ["helpfulness", "safety", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, pytest.param(10**400, id="huge")])
def test_a_score_that_is_no_finite_number_is_refused(name: str, value: Any) -> None:
    problem = message_of(Candidate.from_json, {"prompt": [USER], "response": "Because.", name: value})
    assert problem.startswith(f'"{name}" is ') and problem.endswith("It must be a finite number.")


def test_a_pair_may_state_its_own_margin() -> None:
    assert PreferencePair.from_json({**PAIR, "margin": 1}).margin == 1
    assert PreferencePair.from_json({**PAIR, "margin": 0}).to_json()["margin"] == 0
    for row in (PAIR, {**PAIR, "margin": None}):
        assert PreferencePair.from_json(row).margin is None
        assert "margin" not in PreferencePair.from_json(row).to_json()


@pytest.mark.parametrize(
    ("cls", "row", "name", "guess"),
    [
        (PreferencePair, PAIR, "ratting", "rating"),
        (PreferencePair, PAIR, "Rating", "rating"),
        (PreferencePair, PAIR, "margins", "margin"),
        (PreferencePair, PAIR, "is_chosen_safe", "chosen_safe"),
        (PreferencePair, PAIR, "chosen_is_safe", "chosen_safe"),
        (PreferencePair, PAIR, "rejectedSafe", "rejected_safe"),
        (PreferencePair, PAIR, "is_saftey", "is_safety"),
        (Dialogue, {"messages": [USER, GOOD]}, "train-on", "train_on"),
        (Prompt, {"prompt": [USER]}, "is_safty", "is_safety"),
        (Candidate, {"prompt": [USER], "response": "a"}, "helpfullness", "helpfulness"),
        (Candidate, {"prompt": [USER], "response": "a"}, "is_safty", "is_safety"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_one_that_was_meant(cls: Any, row: Row, name: str, guess: str) -> None:
    value = PreferencePair.from_json(PAIR).to_json()  # whatever it holds
    problem = message_of(cls.from_json, {**row, name: value})
    assert problem == f'unknown field "{name}": did you mean "{guess}"? Rename or remove it.'
    cls.from_json({**row, name: None})


def test_a_near_miss_may_stand_beside_the_field_it_resembles() -> None:
    assert PreferencePair.from_json({**PAIR, "source": "mine", "sources": ["a"]}).source == "mine"


OTHER_FIELDS = (
    "score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen-rating", "rejected-rating",
    "rank_chosen", "rank_rejected", "votes_chosen", "votes_rejected", "votes_tie", "quality_chosen",
    "quality_rejected", "quality_last", "label_conflict", "judge", "license", "n_ranked", "category", "harm_type",
    "risk_area", "model", "chosen_model", "rejected_model", "action", "is_safe", "preference_derived_from", "prompt_id",
    "score", "probability", "id", "language", "completion", "text",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FIELDS)
def test_fields_of_other_meaning_are_allowed_in_every_row(name: str) -> None:
    PreferencePair.from_json({**PAIR, name: 1})
    Dialogue.from_json({"messages": [USER, GOOD], name: 1})
    value = "weapons" if name == "category" else 1  # which is a field of prompts
    Prompt.from_json({"prompt": [USER], name: value})
    Candidate.from_json({"prompt": [USER], "response": "a", name: value})


def test_a_category_is_text_or_a_list_of_texts() -> None:
    kinds = {"weapons": "weapons", None: "", ("hate_speech", "weapons"): "hate_speech,weapons", (): ""}
    for found, expected in kinds.items():
        value = list(found) if isinstance(found, tuple) else found
        assert Prompt.from_json({"prompt": [USER], "category": value}).category == expected
    for wrong in ({"hate_speech": True}, ["a", 1], 3, True, math.nan):
        problem = message_of(Prompt.from_json, {"prompt": [USER], "category": wrong})
        assert problem == f'"category" is {wrong!r}. It must be text.'


def test_a_source_is_text_or_a_number() -> None:
    for found, expected in (("hh", "hh"), (0, "0"), (7, "7"), (None, "")):
        assert PreferencePair.from_json({**PAIR, "source": found}).source == expected
    for wrong in (["hh"], {"hh": 1}, True, math.nan, math.inf):
        problem = message_of(PreferencePair.from_json, {**PAIR, "source": wrong})
        assert problem == f'"source" is {wrong!r}. It must be text.'


@pytest.mark.parametrize(("name", "value"), [("weight", 0), ("weight", 0.5), ("train", False), ("loss", False)])
def test_an_answer_that_is_marked_as_not_to_be_trained_is_not_trained(name: str, value: Any) -> None:
    """As OpenAI's rows mark a wrong answer, with its correction behind it."""
    marked = {**BAD, name: value}
    row: Row = {"messages": [USER, marked, USER, {**GOOD, "weight": 1}]}
    problem = message_of(Dialogue.from_json, row)
    assert problem.startswith(f'"messages[1]" is marked as not to be trained ("{name}" is {value}).')
    assert Dialogue.from_json({**row, "train_on": "last"}).train_on == "last"
    assert Prompt.from_json({"prompt": row["messages"][:3]}).messages[1].content == BAD["content"]
    for last in ({"messages": [USER, marked]}, {"messages": [USER, marked], "train_on": "last"}):
        assert message_of(Dialogue.from_json, last).startswith('"messages[1]" is marked')


@pytest.mark.parametrize("more", [{"weight": 1}, {"weight": None}, {"train": True}, {"loss": 0.7}, {"name": "x"}])
def test_other_notes_of_a_message_are_no_marks(more: Row) -> None:
    assert len(Dialogue.from_json({"messages": [{**USER, "weight": 0}, {**GOOD, **more}]}).messages) == 2


def test_a_message_that_calls_a_tool_is_refused() -> None:
    """Its text alone would be trained as if it had made no call."""
    call = {**GOOD, "tool_calls": [{"id": "1"}]}
    rows: list[tuple[Any, Row, str]] = [
        (Dialogue.from_json, {"messages": [USER, call]}, "messages[1]"),
        (Prompt.from_json, {"prompt": [USER, call, USER]}, "prompt[1]"),
        (PreferencePair.from_json, {**PAIR, "chosen": [call]}, "chosen"),
    ]
    for parse, row, where in rows:
        assert message_of(parse, row).startswith(f'"{where}" has "tool_calls", which no stage reads.')
    older = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
    assert message_of(Dialogue.from_json, {"messages": [USER, older]}).startswith('"messages[1]" has "function_call"')
    assert Dialogue.from_json({"messages": [USER, {**GOOD, "tool_calls": [], "function_call": None}]})


def test_trl_conversational_rows_load_unchanged() -> None:
    explicit = PreferencePair.from_json({**PAIR, "score_chosen": 8.0})
    implicit = PreferencePair.from_json({"chosen": [USER, GOOD], "rejected": [USER, BAD]})
    from_parquet = PreferencePair.from_json({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert explicit == implicit == from_parquet
    assert explicit.prompt == (Message("user", USER["content"]),)
    assert (explicit.chosen, explicit.rejected) == (GOOD["content"], BAD["content"])


def test_an_implicit_prompt_must_be_shared() -> None:
    other = {"role": "user", "content": "Why is grass green?"}
    problem = message_of(PreferencePair.from_json, {"chosen": [USER, GOOD], "rejected": [other, BAD]})
    assert "do not share all turns but the last" in problem


texts = st.text(min_size=1, max_size=12).filter(str.strip)
optional_bools = st.none() | st.booleans()
sources = st.sampled_from(["", "mine", "hh"])


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Message, ...]:
    count = draw(st.integers(0, 2)) * 2 + 1
    turns = [Message(("user", "assistant")[index % 2], draw(texts)) for index in range(count)]
    system = draw(st.none() | st.text(max_size=5))
    return tuple(turns if system is None else [Message("system", system), *turns])


@st.composite
def pairs(draw: st.DrawFn) -> PreferencePair:
    chosen, rejected = draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    return PreferencePair(
        prompt=draw(prompts()),
        chosen=chosen,
        rejected=rejected,
        rating=draw(st.none() | st.sampled_from(RATINGS)),
        margin=draw(st.none() | st.integers(0, 3) | st.floats(0, 10)),
        chosen_safe=draw(optional_bools),
        rejected_safe=draw(optional_bools),
        is_safety=draw(st.booleans()),
        source=draw(sources),
    )


def through_a_line(row: Row) -> Row:
    return json.loads(json.dumps(row, ensure_ascii=False).encode())


@given(pairs())
def test_a_pair_comes_back_from_its_json_line(pair: PreferencePair) -> None:
    assert PreferencePair.from_json(through_a_line(pair.to_json())) == pair


@given(prompts(), texts, st.sampled_from(["all", "last"]), sources)
def test_a_dialogue_comes_back_from_its_json_line(
    prompt: tuple[Message, ...], answer: str, train_on: Any, source: str
) -> None:
    dialogue = Dialogue(messages=(*prompt, Message("assistant", answer)), train_on=train_on, source=source)
    assert Dialogue.from_json(through_a_line(dialogue.to_json())) == dialogue


@given(prompts(), st.text(max_size=5), st.booleans(), st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_prompt_and_a_candidate_come_back_from_their_json_lines(
    messages: tuple[Message, ...], response: str, is_safety: bool, reward: float | None
) -> None:
    prompt = Prompt(messages=messages, is_safety=is_safety)
    candidate = Candidate(prompt=prompt, response=response, index=3, reward=reward, round=2, seed=7)
    assert Prompt.from_json(through_a_line(prompt.to_json())) == prompt
    assert Candidate.from_json(through_a_line(candidate.to_json())) == candidate


@pytest.mark.parametrize(
    ("chosen_safe", "rejected_safe", "name"),
    [
        (True, False, "chosen_safe_other_unsafe"),
        (True, True, "both_safe"),
        (False, False, "both_unsafe"),
        (False, True, "veto"),
        (None, True, "unlabelled"),
        (False, None, "unlabelled"),
    ],
)
def test_pairs_fall_into_the_papers_safety_bins(
    chosen_safe: bool | None, rejected_safe: bool | None, name: str
) -> None:
    labels = {"chosen_safe": chosen_safe, "rejected_safe": rejected_safe}
    assert safety_bin(PreferencePair(prompt=(Message("user", "q"),), chosen="a", rejected="b", **labels)) == name
