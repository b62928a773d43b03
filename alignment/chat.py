"""Dialogues as token ids with a loss mask, both built by the same calls, segment by segment.

What a model sees at inference is a prefix of what it is trained on, because a dialogue is encoded as the
concatenation of its segments: template text, message text, template text, ... The trained segments are the assistant
texts, each with the template text that ends its turn. Message text is encoded with control tokens taken as plain
text, so nobody can type a turn border into a message.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from alignment.dialogue import Dialogue, Message, Messages
from alignment.errors import DataError


@dataclass(frozen=True, slots=True)
class EncodedDialogue:
    """Token ids with the mask of those that carry loss.

    Example: user "hi", assistant "yo" in ChatML gives `<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n`
    untrained, `yo<|im_end|>` trained, `\\n` untrained.
    """

    input_ids: list[int]
    loss_mask: list[bool]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.loss_mask)

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True)
class Segment:
    """Ids of a stretch of text; `turn` is the index of the assistant message it trains, or None."""

    ids: list[int]
    turn: int | None = None


class ChatFormat(Protocol):
    """How one model family writes dialogues. Made by `chat_format`."""

    tokenizer: PreTrainedTokenizerBase
    end_of_turn_id: int
    closing: list[int]  # what ends an assistant turn, with `end_of_turn_id` as its last

    def check(self, messages: Sequence[Message]) -> None:
        """Raises DataError where a text cannot be written in this format."""
        ...

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The ids of a whole dialogue or, where the last turn is a user's, of a prompt up to the response.

        Raises DataError where the format cannot write its turns.
        """
        ...

    def encode_response(self, text: str) -> list[int]:
        """Ids of an assistant text with its end of turn, as they follow a prompt."""
        ...


def encode_prompt(chat: ChatFormat, messages: Messages) -> list[int]:
    """Ids of everything before a response: the context a model is asked to continue."""
    assert messages[-1].role == "user", "a prompt ends with a user turn"
    return [token for segment in chat.segments(messages) for token in segment.ids]


def can_be_a_turn(chat: ChatFormat, response: str) -> bool:
    """Whether a response can be written as a turn: a model may write what its format refuses, as a tag of Llama 2's."""
    try:
        chat.check([Message("assistant", response)])
    except DataError:
        return False
    return True


def has_system_turn(chat: ChatFormat) -> bool:
    """Whether the format writes system messages, in dialogues of several turns too.

    Some templates refuse them or leave them out, some write them into the last user turn.
    """
    turns = [Message("system", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]
    try:
        for end in (2, 3, 4):
            chat.segments(turns[:end])
    except DataError:
        return False
    return True


def encode_dialogue(chat: ChatFormat, dialogue: Dialogue) -> EncodedDialogue:
    """Ids and loss mask of a demonstration: all assistant turns are trained, or only the last one.

    Raises DataError where no token would be trained.
    """
    last = len(dialogue.messages) - 1
    ids: list[int] = []
    mask: list[bool] = []
    for segment in chat.segments(dialogue.messages):
        trained = segment.turn is not None and (dialogue.train_on == "all" or segment.turn == last)
        ids += segment.ids
        mask += [trained] * len(segment.ids)
    if not any(mask):
        raise DataError("the dialogue has no trainable token. It needs an assistant turn with text.")
    return EncodedDialogue(ids, mask)


def decode_response(chat: ChatFormat, ids: Sequence[int]) -> str:
    """The text of a sampled response, without its end of turn, special tokens and surrounding space."""
    text = list(ids)
    for ending in (chat.closing, [chat.end_of_turn_id]):  # tokenizers need not know it as special
        if text[-len(ending) :] == ending:
            text = text[: -len(ending)]
            break
    return chat.tokenizer.decode(text, skip_special_tokens=True).strip()


def drop_oldest_turns(messages: Messages, *, keep_first: bool = False) -> Messages | None:
    """The dialogue without its oldest exchange, or None where only one (with `keep_first`, two) is left.

    The system turn stays. With `keep_first` the first exchange stays as well, and the one after it goes.
    """
    start = (1 if messages[0].role == "system" else 0) + (2 if keep_first else 0)
    shorter = messages[:start] + messages[start + 2 :]
    return shorter if len(shorter) > start else None


def fit_prompt(
    chat: ChatFormat, messages: Messages, room: int, *, may_cut: bool = True
) -> tuple[list[int] | None, bool]:
    """Ids of a prompt within `room` tokens, and whether it lost old turns for that; None where nothing fits."""
    fitting = cut_to_fit(chat, messages, room, may_cut=may_cut)
    return (None, False) if fitting is None else (fitting[1], fitting[0] is not messages)


def cut_to_fit(
    chat: ChatFormat, messages: Messages, room: int, *, may_cut: bool = True
) -> tuple[Messages, list[int]] | None:
    """A prompt within `room` tokens, without its oldest turns where need be, and its ids; None where nothing fits."""
    shorter: Messages | None = messages
    while shorter is not None:
        ids = encode_prompt(chat, shorter)
        if len(ids) <= room:
            return shorter, ids
        shorter = drop_oldest_turns(shorter) if may_cut else None
    return None


def preview(chat: ChatFormat, encoded: EncodedDialogue) -> Text:
    """The dialogue token by token: trained tokens green and between [[ and ]], others dim, control tokens bold.

    Tokens that only together make a character stand together.
    """
    special = set(chat.tokenizer.all_special_ids)
    text = Text()
    before = False
    for tokens, trained in _readable_groups(chat.tokenizer, encoded):
        if trained != before:
            text.append("[[" if trained else "]]", style="green bold")
        style = ("green" if trained else "dim") + (" bold" if tokens[0] in special else "")
        text.append(chat.tokenizer.decode(tokens), style=style)
        text.append("|", style="bright_black")
        before = trained
    text.append("]]" if before else "", style="green bold")
    return text


def _readable_groups(tokenizer: PreTrainedTokenizerBase, encoded: EncodedDialogue) -> Iterator[tuple[list[int], bool]]:
    """The tokens one by one, or as many as it takes to end with a whole character; never across a mask's border."""
    special = set(tokenizer.all_special_ids)
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    for (trained, _), stretch in itertools.groupby(pairs, key=lambda pair: (pair[1], pair[0] in special)):
        group: list[int] = []
        for token, _ in stretch:
            group.append(token)
            if not tokenizer.decode(group).endswith("\ufffd"):
                yield group, trained
                group = []
        if group:
            yield group, trained
