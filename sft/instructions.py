"""Instructions that are to hold throughout a dialogue: pools of them, how they are drawn, whether an answer keeps one.

Llama 2 Sec. 3.3 has hobbies, languages and public figures. Those that a program can judge are ours: they
tell a dialogue worth training on from one that is not, and measure adherence without human judges.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from alignment.dialogue import RowError
from sft.checkers import CHECKERS, HELPED_BY_A_CUT, value_problem

Kind = Literal[
    "hobby", "language", "figure",
    "capitals", "ending", "opening", "keyword", "forbidden_word", "max_words", "bullet_points",
]  # fmt: skip
VerifiableKind = Literal[
    "language", "capitals", "ending", "opening", "keyword", "forbidden_word", "max_words", "bullet_points"
]
KINDS: tuple[str, ...] = get_args(Kind)
Part = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """One thing the assistant is to keep doing. `kind` names its checker in `CHECKERS`, if it has one."""

    kind: str
    value: str
    full: str
    short: str

    @property
    def is_verifiable(self) -> bool:
        """Whether a program can judge it."""
        return self.kind in CHECKERS

    def holds(self, answer: str, *, is_finished: bool = True) -> bool:
        """Whether an answer keeps it; True where no program can tell, unless there is no answer.

        One that was cut off at the length limit cannot keep what a cut helps with, such as a limit of words.
        """
        if not self.is_verifiable:
            return bool(answer.strip())
        return (is_finished or self.kind not in HELPED_BY_A_CUT) and CHECKERS[self.kind](answer, self.value)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the assistant is to keep doing: the full sentence, and the short form half of the training rows carry."""

    full: str
    short: str
    constraints: tuple[Constraint, ...] = ()

    @property
    def is_verifiable(self) -> bool:
        """Whether a program can judge all of it."""
        return all(constraint.is_verifiable for constraint in self.constraints)

    def holds(self, answer: str, *, is_finished: bool = True) -> bool:
        """Whether an answer keeps all of it that a program can judge."""
        return all(constraint.holds(answer, is_finished=is_finished) for constraint in self.constraints)


@dataclass(frozen=True, slots=True)
class _Template:
    """The two forms of a kind, and its values for training and for measuring, which share none."""

    full: str
    short: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


# fmt: off
TEMPLATES: Mapping[str, _Template] = {
    "hobby": _Template(
        "you love {} and bring it up",
        "Hobby: {}.",
        ("hiking", "painting", "chess", "gardening", "cooking", "astronomy", "fishing", "pottery", "cycling", "poetry"),
        ("sailing", "knitting", "archery", "baking"),
    ),
    "language": _Template(
        "you always answer in {}",
        "Language: {}.",
        ("French", "Spanish", "German", "Portuguese", "Swedish", "Latin"),
        ("Italian", "Dutch"),
    ),
    "figure": _Template(
        "you act as {}",
        "Figure: {}.",
        ("Napoleon", "Marie Curie", "Albert Einstein", "Cleopatra", "William Shakespeare", "Leonardo da Vinci",
         "Ada Lovelace", "Socrates", "Florence Nightingale", "Isaac Newton"),
        ("Galileo Galilei", "Joan of Arc", "Charles Darwin", "Jane Austen"),
    ),
    "capitals": _Template("you write only in capital letters", "Style: capital letters.", ("",), ("",)),
    "ending": _Template(
        'you end every answer with the words "{}"',
        'Last words: "{}".',
        ("Over and out", "Have a nice day", "That is all", "Stay curious", "Yours truly", "Peace be with you",
         "Until next time", "So it goes", "End of message", "Thank you for asking"),
        ("Onwards we go", "Keep smiling", "The end", "See you later"),
    ),
    "opening": _Template(
        'you begin every answer with the word "{}"',
        'First word: "{}".',
        ("Ahoy", "Indeed", "Listen", "Well", "Behold", "Greetings", "Friend", "Certainly", "Look", "Verily"),
        ("Honestly", "Howdy", "Captain", "Wonderful"),
    ),
    "keyword": _Template(
        'you use the word "{}" in every answer',
        'Word to use: "{}".',
        ("banana", "river", "mountain", "candle", "robot", "ocean", "lantern", "tiger", "violin", "cloud"),
        ("pineapple", "castle", "thunder", "bicycle"),
    ),
    "forbidden_word": _Template(
        'you never use the word "{}"',
        'Forbidden word: "{}".',
        ("the", "is", "and", "to", "you"),
        ("a", "of", "it"),
    ),
    "max_words": _Template(
        "you use at most {} words in every answer",
        "At most {} words.",
        ("8", "10", "20", "25", "30"),
        ("12", "15"),
    ),
    "bullet_points": _Template(
        "you give every answer as exactly {} bullet points",
        "Exactly {} bullet points.",
        ("2", "4"),
        ("3",),
    ),
}
# fmt: on

# Pairs of kinds of which one answer can hardly keep both.
CLASHES = frozenset(
    frozenset(pair)
    for pair in (
        ("language", "ending"), ("language", "opening"), ("language", "keyword"), ("language", "forbidden_word"),
        ("language", "capitals"), ("bullet_points", "opening"), ("bullet_points", "ending"),
        ("bullet_points", "max_words"), ("forbidden_word", "ending"),
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRow:
    """A row of a user's own pool: a value for a kind, or both forms of an instruction, judged as a kind or not at all.

    `{"kind": "ending", "value": "Over and out"}`, or `{"full": "you speak like a pirate", "short": "Style: pirate."}`
    with, where a program can judge it, `kind` and `value` as well.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset({"kind", "value", "full", "short"})

    constraint: Constraint
    source: str = ""
    where: str = field(default="", compare=False, repr=False)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PoolRow:
        """Raises RowError where a field is missing, unknown or of the wrong form."""
        if unknown := sorted(set(row) - cls.FIELDS - {"source"}):
            raise RowError(f'"{unknown[0]}" is no field of an instruction. Use {", ".join(sorted(cls.FIELDS))}.')
        row = {name: value for name, value in row.items() if value is not None}
        if wrong := [name for name in sorted(cls.FIELDS) if not isinstance(row.get(name, ""), str)]:
            raise RowError(f'"{wrong[0]}" is {row[wrong[0]]!r}. Write it as text.')
        kind, value = row.get("kind", ""), row.get("value", "")
        if kind not in ("", *KINDS):
            raise RowError(f'"kind" is {kind!r}. Use one of {", ".join(KINDS)}.')
        if problem := value_problem(kind, value):
            raise RowError(f'"value": {problem}')
        if not kind and not (row.get("full") and row.get("short")):
            raise RowError('an instruction needs "kind" and "value", or its two forms "full" and "short".')
        source = str(row.get("source") or "")
        if row.get("short") and not row.get("full"):
            raise RowError('"short" without "full", the form that answers are sampled with. Write both, or neither.')
        if not row.get("full"):
            return cls(constraint=constraint_of(kind, value), source=source)
        short = row.get("short") or constraint_of(kind, value).short
        return cls(constraint=Constraint(kind or "own", value, row["full"], short), source=source)


def constraint_of(kind: str, value: str) -> Constraint:
    """The built-in wording of a kind with a value."""
    template = TEMPLATES[kind]
    return Constraint(kind, value, template.full.format(value), template.short.format(value))


def built_in_pool(kinds: Sequence[str], part: Part) -> dict[str, list[Constraint]]:
    """The constraints of each kind, for training or held out for measuring."""
    return {kind: [constraint_of(kind, value) for value in getattr(TEMPLATES[kind], part)] for kind in kinds}


def own_pool(rows: Sequence[PoolRow]) -> dict[str, list[Constraint]]:
    """A user's constraints by kind."""
    pool: dict[str, list[Constraint]] = {}
    for row in rows:
        pool.setdefault(row.constraint.kind, []).append(row.constraint)
    return pool


def draw_instruction(
    pool: Mapping[str, Sequence[Constraint]], rng: random.Random, *, combine_rate: float = 0.0
) -> Instruction:
    """One constraint of a random kind, or two of kinds that go together (Llama 2 Sec. 3.3)."""
    first = rng.choice(sorted(pool))
    partners = sorted(kind for kind in pool if kind != first and frozenset((first, kind)) not in CLASHES)
    kinds = [first, rng.choice(partners)] if partners and rng.random() < combine_rate else [first]
    parts = tuple(rng.choice(pool[kind]) for kind in sorted(kinds))
    full = "In the whole conversation, " + " and ".join(part.full for part in parts) + "."
    return Instruction(full, " ".join(part.short for part in parts), parts)
