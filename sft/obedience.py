"""Demonstrations that obey: an instruction joined to a turn, and the answer changed by rule so that it keeps it.

Our addition. Ghost Attention samples answers with the instruction in every turn (Llama 2 Sec. 3.3), which takes a model
that keeps an instruction it has just read. Large chat models do; a small one learns it from rows like these, which
state the instruction in every turn as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from alignment.dialogue import Dialogue, Message
from sft.ghost_attention import join
from sft.instructions import Constraint, Instruction, draw_instruction

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_LIST_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+", re.MULTILINE)


def obey(constraint: Constraint, answer: str) -> str | None:
    """The answer changed so that it keeps the constraint, or None where no rule can do that."""
    rule = _RULES.get(constraint.kind)
    changed = rule(answer.strip(), constraint.value) if rule else None
    return changed if changed and constraint.holds(changed) else None


def obedient_dialogue(dialogue: Dialogue, instruction: Instruction) -> Dialogue | None:
    """The dialogue with the instruction joined to every user turn and answers that keep it; None where one cannot."""
    messages = []
    for message in dialogue.messages:
        text: str | None = message.content
        if message.role == "user":
            text = join(instruction.full, message.content)
        elif message.role == "assistant":
            text = _obey_all(instruction, message.content)
        if text is None:
            return None
        messages.append(Message(message.role, text))
    return replace(dialogue, messages=tuple(messages), source=f"{dialogue.source}+instruction")


def obedient_dialogues(
    dialogues: Sequence[Dialogue], pool: Mapping[str, Sequence[Constraint]], *, rate: float, seed: int
) -> list[Dialogue]:
    """About `rate` of the dialogues with an instruction each; the others, and those that fit to none, as they are."""
    rng = random.Random(seed)
    made = []
    for dialogue in dialogues:
        changed = obedient_dialogue(dialogue, draw_instruction(pool, rng)) if rng.random() < rate else None
        made.append(changed or dialogue)
    return made


def _obey_all(instruction: Instruction, answer: str) -> str | None:
    for constraint in instruction.constraints:
        changed = obey(constraint, answer)
        if changed is None:
            return None
        answer = changed
    return answer if instruction.holds(answer) else None


def _begin(answer: str, word: str) -> str:
    return f"{word}. {answer}"


def _end(answer: str, phrase: str) -> str:
    return f"{_closed(answer)} {phrase}."


def _mention(answer: str, word: str) -> str:
    return f"{_closed(answer)} And, by the way, {word}."


def _closed(answer: str) -> str:
    return answer if answer.endswith((".", "!", "?", '"')) else f"{answer}."


def _shorten(answer: str, count: str) -> str | None:
    """As many of its first sentences as keep within the number of words; None where the first alone does not."""
    kept: list[str] = []
    for sentence in _sentences(answer):
        if sum(len(part.split()) for part in (*kept, sentence)) > int(count):
            break
        kept.append(sentence)
    return " ".join(kept) if kept and not kept[-1].endswith(":") else None


def _list(answer: str, count: str) -> str | None:
    """Its first sentences as bullet points; None where there are fewer, or one only announces what follows."""
    sentences = _sentences(answer)[: int(count)]
    if len(sentences) < int(count) or any(sentence.endswith(":") for sentence in sentences):
        return None
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _sentences(text: str) -> list[str]:
    """Without the marks and numbers of a list."""
    parts = _SENTENCE_END.split(_LIST_NUMBER.sub("", text))
    return [sentence for part in parts if (sentence := part.strip(" -*•\t"))]


_RULES: Mapping[str, Callable[[str, str], str | None]] = {
    "capitals": lambda answer, _: answer.upper(),
    "ending": _end,
    "opening": _begin,
    "keyword": _mention,
    "forbidden_word": lambda answer, _: answer,  # only answers that lack it anyway
    "max_words": _shorten,
    "bullet_points": _list,
}
RULED_KINDS = tuple(_RULES)
