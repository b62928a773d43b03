"""Ghost Attention: dialogues that keep an instruction given once (Llama 2 Sec. 3.3, A.3.5).

For user turns u1..un and an instruction to hold throughout: the instruction is joined to every user turn while the
newest model answers them; for training it stays in the first turn only, and only the last answer carries loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.dialogue import Dialogue, Message, Messages, Prompt
from alignment.errors import DataError
from sft.checkers import HURT_BY_A_CUT
from sft.instructions import Instruction


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled answer.

    `is_finished` where it ended by itself, not at the length limit; `is_refused` where the chat format cannot write it
    as a turn, such as a tag of Llama 2's layout.
    """

    text: str
    is_finished: bool
    is_refused: bool = False


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


# Why a candidate may not stand, in the order in which these are looked at.
REASONS = ("empty", "refused", "cut_off", "instruction_not_kept")


def choose_answer(candidates: Sequence[Answer], instruction: Instruction, *, is_last: bool) -> tuple[str | None, str]:
    """The first candidate that may stand, or None and the reason of the one that came nearest.

    An answer must have text that the chat format can write, and keep the instruction, as far as a program can tell. An
    earlier one that was cut off is context only and may stand; the last one would teach the model to end in
    mid-sentence.
    """
    reasons = [_why_not(candidate, instruction, is_last=is_last) for candidate in candidates]
    for candidate, reason in zip(candidates, reasons, strict=True):
        if not reason:
            return candidate.text, ""
    return None, max(reasons, key=REASONS.index)


def _why_not(answer: Answer, instruction: Instruction, *, is_last: bool) -> str:
    """One of `REASONS`, or nothing where the answer may stand."""
    if not answer.text:
        return "empty"
    if answer.is_refused:
        return "refused"
    if is_last and not answer.is_finished:
        return "cut_off"
    if instruction.holds(answer.text, is_finished=answer.is_finished):
        return ""
    broken = [part for part in instruction.constraints if not part.holds(answer.text)]
    by_the_cut = not answer.is_finished and all(part.kind in HURT_BY_A_CUT for part in broken)
    return "cut_off" if by_the_cut else "instruction_not_kept"


def seed_turns(
    prompts: Sequence[Prompt], lengths: Sequence[int], rng: random.Random, *, spare: Sequence[Prompt] = ()
) -> list[list[str]]:
    """As many user turns as asked for each prompt: its own, filled up with the opening turns of others.

    Where the prompts have too few different openings, those of `spare` are drawn from as well. Raises DataError where
    even these are too few. System messages and answers of the prompts have no part in it.
    """
    own = [_user_turns(prompt) for prompt in prompts]
    openings = dict.fromkeys(turns_of[0] for turns_of in own)
    more = [turn for turn in dict.fromkeys(_user_turns(prompt)[0] for prompt in spare) if turn not in openings]
    filled = []
    for mine, length in zip(own, lengths, strict=True):
        missing = max(0, length - len(mine))
        others = [turn for turn in openings if turn not in mine]
        if len(others) < missing:
            others += [turn for turn in more if turn not in mine]
        if len(others) < missing:
            raise DataError(
                f"prompts.prompts: a dialogue of {length} user turns needs {missing} opening turns of other prompts, "
                f"and there are {len(others)} different ones. Add prompts or lower prompts.turns."
            )
        filled.append((mine + rng.sample(others, missing))[:length])
    return filled


def _user_turns(prompt: Prompt) -> list[str]:
    return [message.content for message in prompt.messages if message.role == "user"]
