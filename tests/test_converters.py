"""Public layouts into our rows, by hand: what is kept, what is left out and why, and the command around it."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignment.cli.data import app
from alignment.converters import convert_file
from alignment.data import load_dialogues, load_pairs, write_rows
from alignment.data_report import parse_row
from alignment.dialogue import Dialogue, Message, RowError
from alignment.errors import DataError, RunError
from alignment.layouts import CONVERTERS, Options, guess_layout, layout_hint

Row = dict[str, Any]
WriteFile = Callable[[str, str], Path]


def rows_of(layout: str, raw: Row, **options: Any) -> list[Row]:
    """What the converter yields, through the typed loader."""
    return [parse_row(row).to_json() for row in CONVERTERS[layout](raw, Options(**options))]


def problem_of(layout: str, raw: Row) -> str:
    with pytest.raises(RowError) as caught:
        rows_of(layout, raw)
    return caught.value.problem


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


HH: Row = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Which bird\ntalks?\n\nAssistant: A parrot.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Which bird\ntalks?\n\nAssistant: A hen. ",
}


def test_an_hh_transcript_becomes_its_shared_turns_and_two_responses() -> None:
    assert rows_of("hh-rlhf", HH) == [
        {
            "prompt": [user("Hi"), assistant("Hello."), user("Which bird\ntalks?")],
            "chosen": [assistant("A parrot.")],
            "rejected": [assistant("A hen.")],
        }
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "problem"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: A\n\nAssistant: c", "differ before their last turn"),
        (
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: d",
            '"prompt[1]" is a user',
        ),
        ("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a\n\nAssistant: c", '"chosen" is empty'),
        ("\n\nHuman:\n\nAssistant: b", "\n\nHuman:\n\nAssistant: c", '"prompt[0]" (user) is empty'),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b ", "are the same text"),
        ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b", '"chosen" ends with a user turn'),
        ("a talk", "\n\nHuman: a\n\nAssistant: b", '"chosen" does not open with "Human:"'),
        ("a\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", '"chosen" does not open with "Human:"'),
        (None, "\n\nHuman: a\n\nAssistant: c", '"chosen" is missing'),
        (["a"], "\n\nHuman: a\n\nAssistant: c", '"chosen" is a list, not text'),
    ],
)
def test_an_hh_pair_that_says_nothing_is_refused_with_the_reason(chosen: Any, rejected: str, problem: str) -> None:
    assert problem in problem_of("hh-rlhf", {"chosen": chosen, "rejected": rejected})


SKY = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    "raw",
    [
        SKY,
        {"prompt": "q", "chosen": " a", "rejected": " b"},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {
            "prompt": [user("q")],
            "chosen": "a",
            "rejected": "b",
            "score_chosen": 9,
            "messages": [user("q"), assistant("a")],
        },
    ],
)
def test_every_form_of_a_trl_pair_gives_the_same_row(raw: Row) -> None:
    assert rows_of("trl", raw) == [SKY]


def test_turns_that_follow_a_trl_prompt_in_both_conversations_join_it() -> None:
    more = [assistant("x"), user("y")]
    raw = {"prompt": [user("q")], "chosen": [*more, assistant("a")], "rejected": [*more, assistant("b")]}
    assert rows_of("trl", raw)[0]["prompt"] == [user("q"), *more]


HH_PROMPT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def test_a_transcript_in_a_prompt_becomes_its_turns() -> None:
    prompt = [user("a"), assistant("b"), user("c")]
    pair = {"prompt": HH_PROMPT, "response": " x", "chosen": " x", "rejected": " y"}
    assert guess_layout(pair) == "trl"
    [row] = rows_of("trl", pair)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, [assistant("x")], [assistant("y")])
    assert rows_of("trl", {"prompt": HH_PROMPT})[0]["prompt"] == prompt
    assert rows_of("trl", {"prompt": HH_PROMPT, "completion": " x"})[0]["messages"] == [*prompt, assistant("x")]
    assert rows_of("trl", {"prompt": "\nHuman: a\n\nAssistant:"})[0]["prompt"] == [user("a")]
    assert rows_of("trl", {"prompt": "Human: is a species."})[0]["prompt"] == [user("Human: is a species.")]
    answered = {"prompt": "\n\nHuman: a\n\nAssistant: b"}
    assert "ends with an assistant turn, and a response is to follow" in problem_of("trl", answered)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "q", "completion": "a"},
        {"messages": [user("q"), assistant("a")]},
        {"prompt": "q"},
    ],
)
def test_a_system_message_beside_the_turns_opens_them(raw: Row, name: str) -> None:
    """In a pair it may be what makes one response the better one."""
    system = {"role": "system", "content": "Be honest."}
    [row] = rows_of("trl", {**raw, name: "Be honest."})
    assert row.get("prompt", row.get("messages"))[:2] == [system, user("q")]
    [row] = rows_of("trl", {**raw, name: ""})
    assert row.get("prompt", row.get("messages"))[0] == user("q")


def test_a_prompt_that_opens_with_a_system_message_keeps_its_own() -> None:
    own = [{"role": "system", "content": "mine"}, user("q")]
    spoken = [{"from": "system", "value": "mine"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    [row] = rows_of("sharegpt", {"conversations": spoken, "system_prompt": "other"})
    assert row["messages"] == [*own, assistant("a")]
    assert rows_of("trl", {"prompt": own, "system": "other"})[0]["prompt"] == own


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("verdict", [True, False])
def test_an_answer_with_a_verdict_is_no_demonstration(name: str, verdict: bool) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert f'unpaired preference ("{name}" says' in problem_of("sharegpt", {"conversations": turns, name: verdict})
    with pytest.raises(RowError, match=rf'unpaired preference \("{name}" says whether it is good or bad\)'):
        Dialogue.from_json({"messages": [user("q"), assistant("a")], name: verdict})
    assert Dialogue.from_json({"messages": [user("q"), assistant("a")], name: 3})


def test_our_own_fields_of_a_trl_row_survive_and_are_checked() -> None:
    assert rows_of("trl", {**SKY, "rating": "better", "chosen_safe": True})[0]["rating"] == "better"
    assert '"rating" is 4' in problem_of("trl", {**SKY, "rating": 4})
    text = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}
    assert rows_of("trl", text) == rows_of("trl", {**SKY, "margin": 0.5}) == [{**SKY, "margin": 0.5}]
    assert '"margin" is -1' in problem_of("trl", {**text, "margin": -1})


def test_a_trl_completion_is_trained_and_its_prompt_is_not() -> None:
    assert rows_of("trl", {"prompt": "The sky is", "completion": " blue."}) == [
        {"messages": [user("The sky is"), assistant("blue.")], "train_on": "last"}
    ]
    conversation = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert rows_of("trl", conversation) == [
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "train_on": "last"}
    ]


def test_trl_messages_and_prompts_pass() -> None:
    assert rows_of("trl", {"messages": [user("q"), assistant("a")]}) == [{"messages": [user("q"), assistant("a")]}]
    assert rows_of("trl", {"prompt": "q"}) == rows_of("trl", {"prompt": [user("q")]}) == [{"prompt": [user("q")]}]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, 'unpaired or stepwise row (it has "label")'),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "unpaired or stepwise"),
        ({"messages": [user("q"), assistant("a")], "label": False}, "unpaired or stepwise"),
        ({"prompt": [user("q")], "completion": [assistant("a"), user("b"), assistant("c")]}, "several turns"),
        ({"prompt": "q", "response": "a"}, 'Rename it to "completion"'),
        ({"chosen": "q a", "rejected": "q b"}, '"prompt" is missing'),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "differ before"),
        ({"text": "q a"}, '"prompt" is missing'),
        ({**SKY, "rejected": []}, "It must be a list with one assistant message"),
    ],
)
def test_trl_rows_without_a_use_here_are_refused(raw: Row, problem: str) -> None:
    assert problem in problem_of("trl", raw)


def test_a_label_that_judges_no_completion_is_a_column_like_others() -> None:
    assert rows_of("trl", {"prompt": "q", "label": "harmful"}) == [{"prompt": [user("q")]}]
    dialogue = [user("q"), assistant("a")]
    assert rows_of("trl", {"messages": dialogue, "label": 3}) == [{"messages": dialogue}]
    of_a_hub = {"prompt": "q", "completion": "a", "label": None, "labels": None}
    assert rows_of("trl", of_a_hub) == [{"messages": dialogue, "train_on": "last"}]


PKU: Row = {
    "prompt": "q",
    "response_0": "harmful help",
    "response_1": "no",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}


def test_the_aim_decides_which_pku_response_is_chosen() -> None:
    helpful = {
        "prompt": [user("q")],
        "chosen": [assistant("harmful help")],
        "rejected": [assistant("no")],
        "chosen_safe": False,
        "rejected_safe": True,
    }
    safe = {
        "prompt": [user("q")],
        "chosen": [assistant("no")],
        "rejected": [assistant("harmful help")],
        "chosen_safe": True,
        "rejected_safe": False,
        "is_safety": True,
    }
    assert rows_of("pku-saferlhf", PKU) == rows_of("pku-saferlhf", PKU, aim="helpfulness") == [helpful]
    assert rows_of("pku-saferlhf", PKU, aim="safety") == [safe]


def test_a_pku_row_without_a_judgement_is_refused() -> None:
    assert '"better_response_id" is -1. It must be 0 or 1' in problem_of(
        "pku-saferlhf", {**PKU, "better_response_id": -1}
    )
    assert '"response_1" is missing' in problem_of("pku-saferlhf", {**PKU, "response_1": None})


ULTRA: Row = {
    "prompt": "q",
    "chosen": [user("q"), assistant("a")],
    "rejected": [user("q"), assistant("b")],
    "messages": [user("q"), assistant("a")],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}


def test_ultrafeedback_pairs_are_unrated_unless_bins_are_given() -> None:
    assert rows_of("ultrafeedback", ULTRA) == [SKY]
    older = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 5, "rejected-rating": 4}
    assert rows_of("ultrafeedback", older) == [SKY]


@pytest.mark.parametrize(
    ("score", "rating"),
    [
        (6.5, "negligibly_better"),  # 0.5 above 6.0, below 1
        (7.0, "slightly_better"),  # 1.0: a threshold belongs to the stronger side
        (8.5, "better"),
        (9.0, "significantly_better"),
        (10.0, "significantly_better"),
    ],
)
def test_a_score_difference_falls_into_its_bin(score: float, rating: str) -> None:
    raw = {**ULTRA, "score_chosen": score}
    assert rows_of("ultrafeedback", raw, rating_bins={"scores": (1.0, 2.0, 3.0)})[0]["rating"] == rating


def test_a_difference_of_scores_is_what_their_digits_say() -> None:
    """8.2 - 7.2 is 0.9999999999999991 in floats."""
    raw = {**ULTRA, "score_chosen": 8.2, "score_rejected": 7.2}
    assert rows_of("ultrafeedback", raw, rating_bins={"scores": (1.0, 2.0, 3.0)})[0]["rating"] == "slightly_better"


def test_ultrafeedback_scores_must_prefer_the_chosen_response() -> None:
    assert "ties with" in problem_of("ultrafeedback", {**ULTRA, "score_chosen": 6})
    assert "is below" in problem_of("ultrafeedback", {**ULTRA, "score_chosen": 1})
    assert '"score_chosen" is missing. It must be a finite number' in problem_of(
        "ultrafeedback", {**ULTRA, "score_chosen": None}
    )


@pytest.mark.parametrize("grade", [math.nan, math.inf, -math.inf, True, "9", pytest.param(10**400, id="huge")])
def test_a_grade_that_is_no_finite_number_is_refused_by_every_layout(grade: Any) -> None:
    """NaN would fall into the strongest bin."""
    root = reply("q", None, reply("a", 0), {**reply("b", 1), "rank": grade}, role="prompter")
    graded: list[tuple[str, Row, str]] = [
        ("ultrafeedback", ULTRA, "score_chosen"),
        ("ultrafeedback", ULTRA, "score_rejected"),
        ("ultrafeedback", {**SKY, "rejected-rating": 1}, "chosen-rating"),
        ("graded", GRADED, "rank_chosen"),
        ("graded", GRADED, "rank_rejected"),
        ("graded", {**SKY, "votes_rejected": 0}, "votes_chosen"),
        ("graded", {**SKY, "score_chosen": 8}, "score_rejected"),
        ("pandalm", PANDA, "annotator1"),
        ("pku-saferlhf", PKU, "better_response_id"),
    ]
    found = [(name, problem_of(layout, {**row, name: grade})) for layout, row, name in graded]
    for name, problem in [*found, ("rank", problem_of("oasst", {"prompt": root}))]:
        assert problem.startswith(f'"{name}" is ') and problem.endswith("It must be a finite number.")


def reply(text: str, rank: int | None, *replies: Row, role: str = "assistant", **extra: Any) -> Row:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **extra}


TREE: Row = {
    "message_tree_id": "1",
    "prompt": reply(
        "q",
        None,
        reply("worst", 2),
        reply("best", 0, reply("more?", None, reply("x", 1), reply("y", 0), reply("z", 0), role="prompter")),
        reply("middle", 1),
        reply("spam", 3, deleted=True),
        reply("rude", 4, review_result=False),
        reply("unranked", None),
        role="prompter",
    ),
}


def test_every_two_replies_of_different_rank_make_a_pair() -> None:
    found = [
        (row["prompt"][-1]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in rows_of("oasst", TREE)
    ]
    # Three ranked replies to "q" make three pairs; ranks 0, 0, 1 to "more?" make two, for the two zeros tie.
    assert found == [
        ("q", "best", "middle"),
        ("q", "best", "worst"),
        ("q", "middle", "worst"),
        ("more?", "y", "x"),
        ("more?", "z", "x"),
    ]


def test_ranked_user_turns_make_no_pair() -> None:
    answer = reply("a", 0, reply("x", 0, role="prompter"), reply("y", 1, role="prompter"))
    raw = {"prompt": reply("q", None, answer, reply("b", 1), role="prompter")}
    assert [row["chosen"] for row in rows_of("oasst", raw)] == [[assistant("a")]]


def test_the_prompt_of_a_reply_is_its_path_from_the_root() -> None:
    assert rows_of("oasst", TREE)[-1]["prompt"] == [user("q"), assistant("best"), user("more?")]


def test_rank_differences_fall_into_bins() -> None:
    ratings = [row["rating"] for row in rows_of("oasst", TREE, rating_bins={"ranks": (2, 3, 4)})]
    assert ratings == ["negligibly_better", "slightly_better", "negligibly_better"] + ["negligibly_better"] * 2


def test_a_tree_without_a_ranking_is_refused() -> None:
    assert "no two replies" in problem_of("oasst", {"prompt": reply("q", None, reply("a", 0), role="prompter")})
    assert "root of a message tree" in problem_of("oasst", {"message_id": "1", "text": "q", "parent_id": None})
    assert '"replies" must be a list' in problem_of(
        "oasst", {"prompt": {"text": "q", "role": "prompter", "replies": 3}}
    )


def test_sharegpt_speakers_get_our_roles() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": " b\n"}]
    assert rows_of("sharegpt", {"conversations": turns}) == [{"messages": [user("a"), assistant("b")]}]
    with_system = {"conversations": [{"from": "system", "value": "s"}, *turns]}
    beside = {"conversations": turns, "system": "s"}
    assert rows_of("sharegpt", with_system) == rows_of("sharegpt", beside)
    assert rows_of("sharegpt", beside) == [{"messages": [system("s"), user("a"), assistant("b")]}]


def test_sharegpt_turns_may_have_a_role_and_a_content() -> None:
    turns = [user("a"), {"role": "assistant", "content": "b", "from": None, "value": None}]
    assert rows_of("sharegpt", {"conversations": turns}) == [{"messages": [user("a"), assistant("b")]}]


def test_sharegpt_answers_that_are_not_to_be_trained_are_left_out() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    assert "is marked as not to be trained" in problem_of("sharegpt", {"conversations": turns})


def test_sharegpt_conversations_in_another_order_are_refused() -> None:
    human, gpt = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    assert "ends with a user turn" in problem_of("sharegpt", {"conversations": [human]})
    assert "where a user turn must stand" in problem_of("sharegpt", {"conversations": [gpt, human, gpt]})
    assert "has role 'observation'" in problem_of(
        "sharegpt", {"conversations": [human, {"from": "observation", "value": "b"}]}
    )
    assert '"conversations" must be a list' in problem_of("sharegpt", {"conversations": ["a", "b"]})


def test_alpaca_instruction_and_input_are_one_turn() -> None:
    assert rows_of("alpaca", {"instruction": "Sum up.", "input": "A text.", "output": "Text."}) == [
        {"messages": [user("Sum up.\n\nA text."), assistant("Text.")]}
    ]
    assert rows_of("alpaca", {"instruction": "Say hi.", "input": "", "output": "Hi."}) == [
        {"messages": [user("Say hi."), assistant("Hi.")]}
    ]


def test_alpaca_history_and_system_stand_before_the_instruction() -> None:
    raw = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    assert rows_of("alpaca", raw) == [{"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]}]


def test_alpaca_rows_without_text_are_refused() -> None:
    assert "(assistant) is empty" in problem_of("alpaca", {"instruction": "a", "input": "", "output": " "})
    assert '"output" is missing' in problem_of("alpaca", {"instruction": "a"})
    assert '"instruction" is a int, not text' in problem_of("alpaca", {"instruction": 1, "output": "a"})
    assert '"history" must be a list' in problem_of("alpaca", {"instruction": "a", "output": "b", "history": "c"})
    loose = {"instruction": "c", "output": "d", "history": [["a"], ["b"]]}
    assert '"history" must be a list of [user, assistant] texts' in problem_of("alpaca", loose)
    assert "has content 3" in problem_of("alpaca", {"instruction": "a", "output": "b", "history": [["c", 3]]})


PANDA: Row = {
    "instruction": "Name a bird.", "input": "One that talks.", "response1": "A hen.", "response2": "A parrot.",
    "annotator1": 2, "annotator2": 2, "annotator3": 0,
}  # fmt: skip


def test_pandalm_takes_the_response_that_more_annotators_picked() -> None:
    assert rows_of("pandalm", PANDA) == [
        {
            "prompt": [user("Name a bird.\n\nOne that talks.")],
            "chosen": [assistant("A parrot.")],
            "rejected": [assistant("A hen.")],
        }
    ]
    assert rows_of("pandalm", {**PANDA, "annotator2": 1, "annotator3": 1})[0]["chosen"] == [assistant("A hen.")]
    assert "prefer neither" in problem_of("pandalm", {**PANDA, "annotator2": 1})
    assert "must be 0, 1 or 2" in problem_of("pandalm", {**PANDA, "annotator2": 3})


@pytest.mark.parametrize(
    ("votes", "rating"),
    [((2, 2, 2), "significantly_better"), ((2, 2, 0), "better"), ((2, 2, 1), "slightly_better")],
)
def test_pandalm_votes_fall_into_their_bin(votes: tuple[int, int, int], rating: str) -> None:
    raw = PANDA | {f"annotator{number}": vote for number, vote in enumerate(votes, start=1)}
    assert rows_of("pandalm", raw, rating_bins={"votes": (1, 2, 3)})[0]["rating"] == rating


GRADED: Row = {
    "prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "source": "oasst",
    "rank_chosen": 0, "rank_rejected": 2, "votes_chosen": None, "votes_rejected": None,
}  # fmt: skip
BINS = {"ranks": (2, 3, 4), "votes": (1, 2, 3), "scores": (0.5, 1, 2)}


@pytest.mark.parametrize(
    ("change", "rating"),
    [
        ({}, "slightly_better"),
        ({"rank_rejected": 1}, "negligibly_better"),
        ({"rank_chosen": None, "votes_chosen": 2, "votes_rejected": 0}, "better"),
        ({"rank_rejected": None, "score_chosen": 8.0, "score_rejected": 5.5}, "significantly_better"),
    ],
)
def test_graded_pairs_are_rated_by_the_measure_they_have(change: Row, rating: str) -> None:
    [row] = rows_of("graded", {**GRADED, **change}, rating_bins=BINS)
    assert (row["rating"], row["source"], row["chosen"]) == (rating, "oasst", [assistant("a")])


def test_graded_pairs_of_a_measure_without_bins_stay_unrated() -> None:
    assert "rating" not in rows_of("graded", GRADED, rating_bins={"votes": (1, 2, 3)})[0]


def test_graded_pairs_must_have_a_measure_that_prefers_the_chosen_response() -> None:
    assert "no measure of strength" in problem_of("graded", {**GRADED, "rank_chosen": None})
    assert '"rank_chosen" is not better' in problem_of("graded", {**GRADED, "rank_chosen": 2})


EXAMPLES: dict[str, Row] = {
    "hh-rlhf": HH,
    "trl": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "pku-saferlhf": PKU,
    "ultrafeedback": ULTRA,
    "oasst": TREE,
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "pandalm": PANDA,
    "graded": GRADED,
}


def test_every_layout_is_recognised_by_its_example() -> None:
    assert set(EXAMPLES) == set(CONVERTERS)
    foreign = CONVERTERS.keys() - {"graded"}  # whose rows are ours already
    assert {layout: guess_layout(EXAMPLES[layout]) for layout in foreign} == {layout: layout for layout in foreign}
    assert guess_layout(SKY) is None
    told = layout_hint(HH, "mine.jsonl")
    assert told == 'It looks like hh-rlhf: "align data convert mine.jsonl --from hh-rlhf --out NEW.jsonl".'
    assert "docs/data-formats.md" in layout_hint({"question": "q"}, "mine.jsonl")


@pytest.mark.parametrize("layout", list(CONVERTERS))
@pytest.mark.parametrize("odd", [None, 3, "text", [], [1], {}, [[]], {"replies": [1]}])
def test_a_field_of_any_wrong_type_is_a_row_error_and_nothing_else(layout: str, odd: Any) -> None:
    for name in EXAMPLES[layout]:
        try:
            rows_of(layout, {**EXAMPLES[layout], name: odd})
        except RowError as error:
            assert error.problem


def lines(*rows: Row) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_file_is_converted_and_what_is_left_out_is_counted_by_reason(write_file: WriteFile, tmp_path: Path) -> None:
    same = {**HH, "rejected": HH["chosen"]}
    double = {side: HH[side].replace("Assistant: Hello.", "Human: Hello.") for side in HH}
    longer = {side: "\n\nHuman: x\n\nAssistant: y" + double[side] for side in HH}
    source = write_file("hh.jsonl", lines(HH, same, double, longer, same) + "nonsense\n" + lines(HH))
    summary = convert_file(str(source), "hh-rlhf", tmp_path / "out.jsonl.gz")
    assert (summary.num_read, summary.num_written) == (7, 2)
    assert list(summary.dropped.values()) == [2, 2, 1]
    same_text, alternation, nonsense = summary.dropped
    assert "are the same text" in same_text
    assert '"prompt[i]" is a user turn where a assistant turn must stand' in alternation  # turns 1 and 3: one reason
    assert "not JSON" in nonsense
    assert summary.first_dropped[alternation] == f"{source}:3"
    assert [pair.chosen for pair in load_pairs([str(tmp_path / "out.jsonl.gz")]).rows] == ["A parrot."] * 2


def test_rows_of_a_tree_are_left_out_one_by_one(write_file: WriteFile, tmp_path: Path) -> None:
    tree = {"prompt": reply("q", None, reply("a", 0), reply("a", 1), reply("b", 2), role="prompter")}
    summary = convert_file(str(write_file("t.jsonl", lines(tree))), "oasst", tmp_path / "out.jsonl")
    assert (summary.num_read, summary.num_written, sum(summary.dropped.values())) == (1, 2, 1)


def test_nothing_is_written_where_no_row_fits(write_file: WriteFile, tmp_path: Path) -> None:
    source = write_file("hh.jsonl", lines(HH, HH))
    with pytest.raises(DataError, match=r'as alpaca\.\n.*hh\.jsonl:1: "instruction" is missing'):
        convert_file(str(source), "alpaca", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


def test_a_damaged_archive_is_not_converted_in_part(tmp_path: Path) -> None:
    source = tmp_path / "hh.jsonl.gz"
    write_rows(source, [HH] * 50)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"hh\.jsonl\.gz:\d+: the archive is damaged or cut off"):
        convert_file(str(source), "hh-rlhf", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("layout", "out", "bins", "problem"),
    [
        ("hh", "out.jsonl", None, '"hh": no such layout. Known: hh-rlhf, trl'),
        ("hh-rlhf", "out.json", None, "must end with .jsonl or .jsonl.gz"),
        ("hh-rlhf", "out.jsonl", {"scores": (1, 2, 3)}, "hh-rlhf has no scores. These have: oasst (ranks)"),
        ("oasst", "out.jsonl", {"ranks": (1, 3, 2)}, "not three increasing positive numbers"),
        ("oasst", "out.jsonl", {"ranks": (0, 1, 2)}, "not three increasing positive numbers"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_reading(
    write_file: WriteFile, layout: str, out: str, bins: Any, problem: str
) -> None:
    source = write_file("hh.jsonl", lines(HH))
    with pytest.raises(DataError) as caught:
        convert_file(str(source), layout, source.parent / out, rating_bins=bins)
    assert problem in str(caught.value)
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(
    ("out", "problem"),
    [("nowhere/out.jsonl", "there is no folder"), ("hh.jsonl", r"exists\. Name another file, or remove it\.")],
)
def test_a_file_that_cannot_be_made_is_refused_before_reading(write_file: WriteFile, out: str, problem: str) -> None:
    source = write_file("hh.jsonl", lines(HH))
    before = source.read_bytes()
    with pytest.raises(RunError, match=problem):
        convert_file(str(source), "hh-rlhf", source.parent / out)
    assert list(source.parent.iterdir()) == [source] and source.read_bytes() == before


def test_the_command_converts_and_reports(write_file: WriteFile, tmp_path: Path) -> None:
    source, out = write_file("uf.jsonl", lines(ULTRA, {**ULTRA, "score_chosen": 6})), tmp_path / "out.jsonl.gz"
    arguments = ["convert", str(source), "--from", "ultrafeedback", "--out", str(out), "--rating-bins", "1,2,4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "1 rows from 2; 1 left out" in result.stdout
    assert (
        f"1 x the score of the chosen response ties with that of the rejected one. (first: {source}:2)" in result.stdout
    )
    assert json.loads(gzip.decompress(out.read_bytes()))["rating"] == "better"


def test_the_command_takes_bins_by_measure(write_file: WriteFile, tmp_path: Path) -> None:
    source, out = write_file("graded.jsonl", lines(GRADED)), tmp_path / "out.jsonl"
    arguments = ["convert", str(source), "--from", "graded", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--rating-bins", "1,2,3"])
    assert "Say for which measure, e.g. ranks=1,2,3." in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--rating-bins", "ranks=1,2,3", "--rating-bins", "votes=1,2,3"])
    assert result.exit_code == 0
    assert load_pairs([str(out)]).rows[0].rating == "better"


def test_the_command_takes_an_aim(write_file: WriteFile, tmp_path: Path) -> None:
    source, out = write_file("pku.jsonl", lines(PKU)), tmp_path / "out.jsonl"
    CliRunner().invoke(app, ["convert", str(source), "--from", "pku-saferlhf", "--out", str(out), "--aim", "safety"])
    assert load_pairs([str(out)]).rows[0].chosen == "no"


@pytest.mark.parametrize(
    ("layout", "raw"), [("hh-rlhf", HH), ("trl", {"prompt": "q"}), ("graded", GRADED), ("pku-saferlhf", PKU)]
)
def test_the_aim_of_safety_marks_pairs_and_prompts_of_every_layout(
    write_file: WriteFile, tmp_path: Path, layout: str, raw: Row
) -> None:
    """Unmarked, the red-team prompts of HH-RLHF would be taken for harmless ones."""
    source = write_file("raw.jsonl", lines(raw))
    for aim in ("safety", "helpfulness"):
        out = tmp_path / f"{aim}.jsonl"
        convert_file(str(source), layout, out, aim=aim)
        assert json.loads(out.read_text()).get("is_safety", False) == (aim == "safety")


def test_demonstrations_cannot_be_marked(write_file: WriteFile, tmp_path: Path) -> None:
    source = write_file("alpaca.jsonl", lines(EXAMPLES["alpaca"]))
    with pytest.raises(DataError, match=r'only pairs and prompts have "is_safety"\. Leave --aim safety out'):
        convert_file(str(source), "alpaca", tmp_path / "out.jsonl", aim="safety")
    assert list(tmp_path.iterdir()) == [source]


def test_the_command_raises_a_data_error_for_bins_that_are_no_numbers(write_file: WriteFile, tmp_path: Path) -> None:
    source = write_file("uf.jsonl", lines(ULTRA))
    arguments = ["convert", str(source), "--from", "ultrafeedback", "--out", str(tmp_path / "o.jsonl")]
    for bins in ("1,2", "a,b,c"):
        result = CliRunner().invoke(app, [*arguments, "--rating-bins", bins])
        assert isinstance(result.exception, DataError)
        assert "Give three numbers, e.g. 1,2,3." in str(result.exception)


def test_a_json_list_is_converted_too(write_file: WriteFile, tmp_path: Path) -> None:
    source = write_file("alpaca.json", json.dumps([EXAMPLES["alpaca"]] * 2))
    assert convert_file(str(source), "alpaca", tmp_path / "out.jsonl").num_written == 2
    assert load_dialogues([str(tmp_path / "out.jsonl")]).rows[0].messages[0] == Message("user", "a")


@pytest.mark.parametrize(
    ("layout", "raw", "bins"),
    [("pandalm", PANDA, "votes"), ("oasst", TREE, "ranks"), ("ultrafeedback", ULTRA, "scores")],
)
def test_what_a_pair_was_judged_by_stays_so_that_it_can_be_rated_later(write_file, tmp_path, layout, raw, bins) -> None:
    """As the graded pairs of the recipes: converted and split first, rated by `graded` afterwards."""
    source = write_file("raw.jsonl", lines(raw))
    plain, later, at_once = (tmp_path / f"{name}.jsonl" for name in ("plain", "later", "at-once"))
    convert_file(str(source), layout, plain)
    convert_file(str(plain), "graded", later, rating_bins={bins: (1, 2, 3)})
    convert_file(str(source), layout, at_once, rating_bins={bins: (1, 2, 3)})
    assert later.read_text() == at_once.read_text() and '"rating"' in later.read_text()
