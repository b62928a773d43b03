"""Dialogues as training examples: token ids with a loss mask, cut at turn borders where they are too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alignment.chat import ChatFormat, EncodedDialogue, drop_oldest_turns, encode_dialogue
from alignment.data import OnError, SourceReport, raise_together
from alignment.dialogue import Dialogue
from alignment.errors import DataError
from alignment.prefix_batch import Branch, Tree, collate, micro_batches, pack
from alignment.training import MicroBatch


@dataclass(frozen=True)
class Examples:
    """Encoded dialogues in order, as they are trained, and what did not fit.

    `cut` dialogues lost old turns, with `answers_cut` answers that would have been trained; `dropped` ones are out.
    """

    encoded: list[EncodedDialogue]
    dialogues: list[Dialogue]
    cut: int
    dropped: dict[str, int]
    answers_cut: int = 0

    def left_out(self, sources: Sequence[SourceReport] = ()) -> dict[str, int]:
        """Rows left out by reason, those already unreadable in their files included, and what was cut; no zeros."""
        reasons = {
            "unreadable": sum(sum(source.dropped.values()) for source in sources),
            **self.dropped,
            "history_cut": self.cut,
            "answers_cut": self.answers_cut,
        }
        return {name: count for name, count in reasons.items() if count}


def make_examples(
    chat: ChatFormat,
    dialogues: Sequence[Dialogue],
    *,
    max_length: int,
    overlong: Literal["truncate", "drop"],
    on_error: OnError = "stop",
) -> Examples:
    """Encodes dialogues. Over `max_length` tokens, the oldest exchanges go first; a response is never cut.

    A dialogue trained on its last answer only (Ghost Attention) keeps its first exchange, which holds the instruction,
    and loses those after it. Raises DataError with all dialogues that the chat format refuses, or drops and counts
    them.
    """
    encoded, kept, refused = [], [], []
    cut = answers_cut = 0
    dropped: Counter[str] = Counter()
    for dialogue in dialogues:
        shorter: Dialogue | None = dialogue
        try:
            example = encode_dialogue(chat, dialogue)
        except DataError as error:
            refused.append(f"{dialogue.where}: {error}")
            continue
        keep_first = dialogue.train_on == "last"
        while shorter is not None and len(example.input_ids) > max_length:
            may_cut = overlong == "truncate"
            messages = drop_oldest_turns(shorter.messages, keep_first=keep_first) if may_cut else None
            shorter = replace(shorter, messages=messages) if messages else None
            if shorter is not None:
                example = encode_dialogue(chat, shorter)
        if shorter is None:
            dropped["too_long"] += 1
            continue
        cut += shorter is not dialogue
        if dialogue.train_on == "all":
            answers_cut += _num_answers(dialogue) - _num_answers(shorter)
        encoded.append(example)
        kept.append(shorter)
    if on_error == "stop":
        raise_together(refused)
    elif refused:
        dropped["refused_by_chat_format"] = len(refused)
    return Examples(encoded, kept, cut, dict(dropped), answers_cut)


def dialogue_batches(
    examples: Sequence[EncodedDialogue], indices: Sequence[int], *, max_tokens: int, row_tokens: int | None = None
) -> Iterator[MicroBatch]:
    """Micro-batches of the dialogues at `indices`; the weight counts trained tokens.

    A row holds one dialogue, or as many as fit into `row_tokens` (Llama 2 Sec. 3.1 fills its sequences); none sees
    another, and positions begin anew with each.
    """
    lengths = [len(examples[index].input_ids) for index in indices]
    packed = pack(lengths, row_tokens) if row_tokens else [[place] for place in range(len(indices))]
    rows = [[examples[indices[place]] for place in row] for row in packed]
    for group in micro_batches(rows, _num_tokens, max_tokens=max_tokens):
        batch = collate([[Tree([], [Branch(e.input_ids, e.loss_mask)]) for e in rows[index]] for index in group])
        yield MicroBatch(batch, {}, weight=float(batch.num_targets))


def _num_tokens(row: Sequence[EncodedDialogue]) -> int:
    return sum(len(example.input_ids) for example in row)


def _num_answers(dialogue: Dialogue) -> int:
    return sum(message.role == "assistant" for message in dialogue.messages)
