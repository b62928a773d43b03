"""Does an answer keep an instruction? Values worked by hand, and what each kind must not be fooled by."""

import pytest

from sft.checkers import CHECKERS, value_problem

HOLDS = [
    ("capitals", "", "HELLO, 3 TIMES!"),
    ("capitals", "", "ÜBER ÖL"),
    ("ending", "Over and out", "All is well. OVER AND OUT!"),
    ("ending", "That is all", "that is all"),
    ("opening", "Ahoy", '"Ahoy", said he.'),
    ("opening", "Well", "  Well... yes"),
    ("keyword", "banana", "A Banana, please."),
    ("keyword", "post office", "The post office is shut."),
    ("forbidden_word", "the", "A theatre; then."),
    ("ending", "That's all", "Fine. That’s all."),
    ("keyword", "café", "The cafe\u0301 is shut."),
    ("max_words", "3", "one two three"),
    ("bullet_points", "2", "Here:\n- one\n* two"),
    ("bullet_points", "1", "• only\nThat is it."),
    ("language", "French", "Bonjour, comment puis-je vous aider aujourd'hui ?"),
    ("language", "German", "Guten Tag! Ich helfe Ihnen gern weiter."),
    ("language", "English", "Good morning, how can I help you today?"),
]
BREAKS = [
    ("capitals", "", "HELLO, friend"),
    ("capitals", "", "123!"),
    ("ending", "Over and out", "Over and out, as they say"),
    ("ending", "Over and out", "and out"),
    ("opening", "Ahoy", "He said ahoy"),
    ("opening", "Well", "Wellness first"),
    ("keyword", "banana", "bananas"),
    ("keyword", "post office", "office post"),
    ("forbidden_word", "the", "So, THE end."),
    ("forbidden_word", "the", "..."),
    ("forbidden_word", "you", "You're welcome."),
    ("forbidden_word", "it", "It’s late."),
    ("forbidden_word", "don't", "I don’t know."),
    ("forbidden_word", "to do", "A to-do list."),
    ("max_words", "3", "one two three four"),
    ("max_words", "3", "   "),
    ("bullet_points", "2", "- one\n- two\n- three"),
    ("bullet_points", "1", "a - b\n-x"),
    ("language", "French", "Good morning, how can I help you today?"),
    ("language", "French", "???"),
    ("capitals", "", "你好"),
    ("bullet_points", "2", "- a\n-\nfoo"),
]


@pytest.mark.parametrize(("kind", "value", "answer"), HOLDS)
def test_an_answer_keeps_the_instruction(kind, value, answer):
    assert CHECKERS[kind](answer, value)


@pytest.mark.parametrize(("kind", "value", "answer"), BREAKS)
def test_an_answer_breaks_the_instruction(kind, value, answer):
    assert not CHECKERS[kind](answer, value)


@pytest.mark.parametrize("kind", CHECKERS)
def test_no_answer_keeps_nothing(kind):
    value = {"max_words": "5", "bullet_points": "1", "language": "French"}.get(kind, "word")
    assert not CHECKERS[kind]("", value)


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("language", "Klingon", "no language that can be told"),
        ("max_words", "few", "no number of words"),
        ("bullet_points", "0", "no number of bullet points"),
        ("ending", "...", "no word in it"),
        ("capitals", "", None),
        ("max_words", "12", None),
        ("hobby", "chess", None),
        ("figure", "", "no word in it"),
        ("keyword", "香蕉", "without blanks between its words"),
        ("ending", "до свидания", None),
        ("hobby", "囲碁", None),
    ],
)
def test_a_value_that_no_answer_could_keep_is_named(kind, value, problem):
    found = value_problem(kind, value)
    assert found is None if problem is None else problem in found
