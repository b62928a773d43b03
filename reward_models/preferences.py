"""Preference pairs on their way to training: veto, margins, token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from alignment.chat import ChatFormat, fit_prompt
from alignment.data import OnError, raise_together
from alignment.dialogue import Message, PreferencePair
from alignment.errors import DataError
from alignment.prefix_batch import Branch, Tree, collate, micro_batches
from alignment.training import MicroBatch


@dataclass(frozen=True)
class EncodedPair:
    """A pair as one tree, prompt and two responses, with what the losses need."""

    tree: Tree
    margin: float
    chosen_safe: bool | None
    rejected_safe: bool | None
    pair: PreferencePair


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs in order, and what did not fit: `cut` lost old turns of the prompt, `dropped` counts pairs left out."""

    encoded: list[EncodedPair]
    cut: int
    dropped: dict[str, int]


def apply_veto(
    pairs: Sequence[PreferencePair], action: Literal["drop", "flip", "keep"]
) -> tuple[list[PreferencePair], int]:
    """Treats pairs whose chosen response is labelled unsafe while the other is safe; returns how many there were.

    Llama 2 Sec. 3.2.1 leaves them out: the safety label has the veto. `flip` exchanges the two responses and forgets
    the rating and the margin, which were given for the other order.
    """
    kept, vetoed = [], 0
    for pair in pairs:
        if not (pair.chosen_safe is False and pair.rejected_safe is True):
            kept.append(pair)
            continue
        vetoed += 1
        if action == "keep":
            kept.append(pair)
        elif action == "flip":
            swapped = {"chosen": pair.rejected, "rejected": pair.chosen, "chosen_safe": True, "rejected_safe": False}
            kept.append(replace(pair, rating=None, margin=None, **swapped))
    return kept, vetoed


def encode_pairs(
    chat: ChatFormat,
    pairs: Sequence[PreferencePair],
    *,
    margins: Mapping[str, float],
    unrated_margin: float,
    max_length: int,
    overlong: Literal["truncate", "drop"],
    on_error: OnError = "stop",
) -> EncodedPairs:
    """Token ids and margins. A prompt that leaves no room for its longer response loses its oldest turns first.

    A pair's own margin goes before that of its rating. Without `margins` every margin is 0 (Llama 2 Eq. 1).

    Raises DataError with all pairs that the chat format refuses, or drops and counts them.
    """
    encoded, refused = [], []
    dropped: Counter[str] = Counter()
    cut = 0
    for pair in pairs:
        try:
            chat.check((*pair.prompt, Message("assistant", pair.chosen), Message("assistant", pair.rejected)))
            responses = [chat.encode_response(text) for text in (pair.chosen, pair.rejected)]
            room = max_length - max(map(len, responses))
            prompt, was_cut = fit_prompt(chat, pair.prompt, room, may_cut=overlong == "truncate")
        except DataError as error:
            refused.append(f"{pair.where}: {error}")
            continue
        if prompt is None:
            dropped["too_long"] += 1
            continue
        cut += was_cut
        tree = Tree(prompt, [Branch(ids) for ids in responses])
        margin = _margin(pair, margins, unrated_margin)
        encoded.append(EncodedPair(tree, margin, pair.chosen_safe, pair.rejected_safe, pair))
    if on_error == "stop":
        raise_together(refused)
    elif refused:
        dropped["refused_by_chat_format"] = len(refused)
    return EncodedPairs(encoded, cut, dict(dropped))


def _margin(pair: PreferencePair, margins: Mapping[str, float], unrated_margin: float) -> float:
    if not margins:
        return 0.0
    if pair.margin is not None:
        return float(pair.margin)
    return margins[pair.rating] if pair.rating else unrated_margin


def pair_batches(pairs: Sequence[EncodedPair], indices: Sequence[int], *, max_tokens: int) -> Iterator[MicroBatch]:
    """Micro-batches of the pairs at `indices`, one pair a row; the weight counts pairs.

    Branches stand in the order chosen, rejected, chosen, rejected, ...
    """
    chosen = [pairs[index] for index in indices]
    for group in micro_batches(chosen, lambda pair: pair.tree.num_tokens, max_tokens=max_tokens):
        batch = collate([[chosen[i].tree] for i in group])
        labels = [label for i in group for label in (chosen[i].chosen_safe, chosen[i].rejected_safe)]
        targets = {
            "margin": torch.tensor([chosen[i].margin for i in group]),
            "is_safe": torch.tensor([bool(label) for label in labels]),
            "labelled": torch.tensor([label is not None for label in labels]),
        }
        yield MicroBatch(batch, targets, weight=float(len(group)))
