"""Ghost Attention: dialogues that keep an instruction given once (Llama 2 Sec. 3.3, A.3.5).

For user turns u1..un and an instruction to hold throughout: the instruction is joined to every user turn while the
newest model answers them; for training it stays in the first turn only, and only the last answer carries loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.dialogue import Dialogue, Message, Messages, Prompt
from sft.instructions import Instruction


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled answer; `is_finished` where it ended by itself, not at the length limit."""

    text: str
    is_finished: bool


def join(instruction: str, turn: str) -> str:
    """The instruction and a user turn as one user turn."""
    return f"{instruction}\n{turn}"


def every_turn(instruction: str, user_turns: Sequence[str]) -> list[str]:
    """User turns as they are while answers are sampled: the instruction is joined to each."""
    return [join(instruction, turn) for turn in user_turns]


def first_turn(instruction: str, user_turns: Sequence[str]) -> list[str]:
    """User turns as they are in training and measuring: the instruction is in the first only."""
    first, *later = user_turns
    return [join(instruction, first), *later]


def context(user_turns: Sequence[str], answers: Sequence[str]) -> Messages:
    """The prompt for the answer that comes next."""
    messages = []
    for turn, answer in zip(user_turns, answers, strict=False):
        messages += [Message("user", turn), Message("assistant", answer)]
    return (*messages, Message("user", user_turns[len(answers)]))


def training_dialogue(user_turns: Sequence[str], answers: Sequence[str], source: str = "ghost_attention") -> Dialogue:
    """The row to train on, loss on the last answer only; Ghost Attention gives it the turns of `first_turn`.

    Llama 2 Sec. 3.3 sets the loss to zero on all tokens of earlier turns, their answers included.
    """
    *earlier, last = answers
    messages = (*context(user_turns, earlier), Message("assistant", last))
    return Dialogue(messages=messages, train_on="last", source=source)


def choose_answer(candidates: Sequence[Answer], instruction: Instruction, *, is_last: bool) -> tuple[str | None, str]:
    """The first candidate that may stand, or None and why there is none.

    An answer must have text and keep the instruction, as far as a program can tell. An earlier one that was cut off is
    context only and may stand; the last one would teach the model not to stop.
    """
    reason = "empty"
    for candidate in candidates:
        if not candidate.text:
            continue
        if not candidate.is_finished and is_last:
            reason = "cut_off" if reason == "empty" else reason
        elif instruction.holds(candidate.text, is_finished=candidate.is_finished):
            return candidate.text, ""
        else:
            reason = "instruction_not_kept"
    return None, reason


def seed_turns(prompts: Sequence[Prompt], lengths: Sequence[int], rng: random.Random) -> list[list[str]]:
    """As many user turns as asked for each prompt: its own, filled up with the opening turns of others."""
    own = [[message.content for message in prompt.messages if message.role == "user"] for prompt in prompts]
    openings = list(dict.fromkeys(turns_of[0] for turns_of in own))
    filled = []
    for mine, length in zip(own, lengths, strict=True):
        others = [turn for turn in openings if turn not in mine]
        missing = max(0, length - len(mine))
        filled.append((mine + rng.sample(others, min(missing, len(others))))[:length])
    return filled
