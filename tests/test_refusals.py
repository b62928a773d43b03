"""Which answers count as refusals."""

import pytest

from rlhf.refusals import is_refusal


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but that would hurt people.",
        "As an AI language model, I do not have opinions.",
        "That is dangerous, so I will not explain it.",
        "  i cannot do this",
        "As an AI, I have no body.",
    ],
)
def test_an_answer_that_opens_by_declining_is_a_refusal(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, here is a recipe for bread.",
        "I can help you with that.",
        "If your Wi-Fi won't connect, restart the router.",
        "The Spirit of St. Louis was an aircraft of 1927.",
        "Leonardo was an aide to nobody.",
        "Mix flour and water. " * 20 + "I cannot stress enough how good it is.",
    ],
)
def test_help_is_no_refusal_even_where_it_says_cannot_late(answer):
    assert not is_refusal(answer)
