"""Llama 2's layout as ids and masks worked out by hand, on a vocabulary of single characters."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaTokenizer

from alignment.chat import encode_dialogue, encode_prompt, preview
from alignment.chat_formats import Llama2Format, chat_format
from alignment.dialogue import Dialogue, Message
from sft.examples import make_examples
from sft.ghost_attention import first_turn, training_dialogue

# <unk>, <s> and </s> are 0, 1, 2; byte b is 3 + b (Llama 2 writes characters it does not know as bytes); then these
# characters from 259 on, "▁" standing for a space. Without merges every character is a token.
CHARACTERS = "▁[]/INST<>Yabcdefghiklmnoprstuvwyz.!?BAHW"
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def chat() -> Llama2Format:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
    return chat_format(LlamaTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[]), "llama2")


def ids(text: str) -> list[int]:
    """One id a character, by the table above; a newline is byte 0x0A."""
    return [13 if character == "\n" else 259 + CHARACTERS.index(character) for character in text]


def user(text: str) -> list[int]:
    """A user turn's ids: SentencePiece puts a space in front of a text."""
    return [BOS, *ids(f"▁[INST]▁{text}▁[/INST]")]


def answer(text: str) -> list[int]:
    """An answer's ids: the space before it and the one before the end token are its own."""
    return [*ids(f"▁{text}▁"), EOS]


def dialogue(*texts: str, system: str | None = None, train_on: Any = "all") -> Dialogue:
    head = [] if system is None else [Message("system", system)]
    turns = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    return Dialogue(messages=(*head, *turns), train_on=train_on)


def check(chat: Llama2Format, found: Dialogue, *parts: tuple[list[int], bool]) -> None:
    """The dialogue is these stretches of ids, each trained or not."""
    encoded = encode_dialogue(chat, found)
    assert encoded.input_ids == [token for tokens, _ in parts for token in tokens]
    assert encoded.loss_mask == [trained for tokens, trained in parts for _ in tokens]


def test_one_exchange_has_these_ids(chat):
    # "▁" 259, "[" 260, "]" 261, "/" 262, I 263, N 264, S 265, T 266, <, >, Y, a 270 to i 278, k 279 to o 283, y 291.
    encoded = encode_dialogue(chat, dialogue("hi", "yo"))
    opening = [1, 259, 260, 263, 264, 265, 266, 261, 259]  # <s> ▁ [ I N S T ] ▁
    closing = [259, 260, 262, 263, 264, 265, 266, 261]  # ▁ [ / I N S T ]
    assert encoded.input_ids == [*opening, 277, 278, *closing, 259, 291, 283, 259, 2]  # h i ... ▁ y o ▁ </s>
    assert encoded.loss_mask == [False] * 19 + [True] * 5
    assert chat.end_of_turn_id == 2
    assert encode_prompt(chat, dialogue("hi", "yo").messages[:1]) == encoded.input_ids[:19]
    assert chat.encode_response("yo") == encoded.input_ids[19:]


def test_every_answer_of_a_dialogue_is_trained_and_opens_with_its_own_bos(chat):
    check(
        chat,
        dialogue("hi", "yo", " so?\n", "  no. "),
        (user("hi"), False),
        (answer("yo"), True),
        (user("so?"), False),  # white space around a turn goes
        (answer("no."), True),
    )


def test_train_on_last_trains_the_last_answer_alone(chat):
    check(
        chat,
        dialogue("hi", "yo", "so?", "no.", train_on="last"),
        (user("hi") + answer("yo") + user("so?"), False),
        (answer("no."), True),
    )


def test_a_system_message_stands_in_the_first_user_turn(chat):
    check(
        chat,
        dialogue("hi", "yo", "so?", "no.", system="Be kind."),
        (user("<<SYS>>\nBe▁kind.\n<</SYS>>\n\nhi"), False),
        (answer("yo"), True),
        (user("so?"), False),
        (answer("no."), True),
    )


def test_an_empty_system_message_keeps_its_tags(chat):
    check(
        chat,
        dialogue("hi", "yo", system=""),
        (user("<<SYS>>\n\n<</SYS>>\n\nhi"), False),
        (answer("yo"), True),
    )


def test_characters_that_the_vocabulary_lacks_are_their_bytes(chat):
    # U+65E5 is E6 97 A5, U+1F642 is F0 9F 99 82, U+00E9 is C3 A9.
    sun, smile, e_acute = (
        [3 + byte for byte in found] for found in (b"\xe6\x97\xa5", b"\xf0\x9f\x99\x82", b"\xc3\xa9")
    )
    opening, closing = [BOS, *ids("▁[INST]▁")], ids("▁[/INST]")
    check(
        chat,
        dialogue("日 é", "🙂"),
        ([*opening, *sun, *ids("▁"), *e_acute, *closing], False),
        ([*ids("▁"), *smile, *ids("▁"), EOS], True),
    )


def test_control_tokens_in_a_text_are_its_characters(chat):
    check(
        chat,
        dialogue("hi</s><s>a<unk>", "</s>yo"),
        (user("hi</s><s>a<unk>"), False),
        (answer("</s>yo"), True),
    )


def test_history_is_cut_from_the_left_at_turn_borders_and_the_system_message_stays(chat):
    long = dialogue("hi", "yo", "so?", "no.", "Who?", "me.", system="Be kind.")
    # 1 + 8 for <s>▁[INST]▁, 8 for ▁[/INST], the text; an answer has its text, two spaces and </s>. The system text in
    # its tags has 8 + 8 + 11 characters: <<SYS>>\n, Be kind., \n<</SYS>>\n\n.
    lengths = {3: (17 + 27 + 2) + 5 + (17 + 3) + 6 + (17 + 4) + 6, 2: (17 + 27 + 3) + 6 + (17 + 4) + 6}
    lengths[1] = (17 + 27 + 4) + 6
    kept = {
        3: (user("<<SYS>>\nBe▁kind.\n<</SYS>>\n\nhi"), answer("yo"), user("so?"), answer("no."), user("Who?")),
        2: (user("<<SYS>>\nBe▁kind.\n<</SYS>>\n\nso?"), answer("no."), user("Who?")),
        1: (user("<<SYS>>\nBe▁kind.\n<</SYS>>\n\nWho?"),),
    }
    for exchanges, room in (
        (3, lengths[3]),
        (2, lengths[3] - 1),
        (2, lengths[2]),
        (1, lengths[2] - 1),
        (1, lengths[1]),
    ):
        found = make_examples(chat, [long], max_length=room, overlong="truncate")
        [encoded] = found.encoded
        parts = [*kept[exchanges], answer("me.")]
        assert len(encoded.input_ids) == lengths[exchanges]
        assert encoded.input_ids == [token for part in parts for token in part]
        assert encoded.loss_mask == [index % 2 == 1 for index, part in enumerate(parts) for _ in part]
        assert (found.cut, found.answers_cut) == (int(exchanges < 3), 3 - exchanges)
    found = make_examples(chat, [long], max_length=lengths[1] - 1, overlong="truncate")
    assert (found.encoded, found.dropped) == ([], {"too_long": 1}), "an answer is never cut"


def test_the_instruction_of_a_ghost_attention_row_survives_a_cut(chat):
    row = training_dialogue(first_turn("Be kind.", ["hi", "so?", "Who?"]), ["yo", "no.", "me."])
    first, last = [*user("Be▁kind.\nhi"), *answer("yo")], [*user("Who?"), *answer("me.")]
    whole = [*first, *user("so?"), *answer("no."), *last]
    for room, expected in ((len(whole), whole), (len(whole) - 1, first + last), (len(first + last), first + last)):
        [encoded] = make_examples(chat, [row], max_length=room, overlong="truncate").encoded
        assert encoded.input_ids == expected
        assert encoded.loss_mask == [False] * (len(expected) - 6) + [True] * 6  # ▁ m e . ▁ </s>
    found = make_examples(chat, [row], max_length=len(first + last) - 1, overlong="truncate")
    assert (found.encoded, found.dropped, found.answers_cut) == ([], {"too_long": 1}, 0)


def test_the_preview_shows_characters_of_several_tokens_whole(chat):
    text = preview(chat, encode_dialogue(chat, dialogue("日é", "🙂"))).plain
    assert "|日|é|" in text and "|🙂|" in text and "\ufffd" not in text
