"""What the page is made of: sections with figures, sortable tables and answers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.metrics import show
from alignment.report.drawing import Chart
from alignment.report.reading import Row, is_number


@dataclass(frozen=True)
class Cell:
    """A table's cell; `order` is what the column is sorted by where the text is not. `mark` is a CSS class."""

    text: str
    order: float | None = None
    mark: str = ""
    detail: str = ""  # in small type below the text

    @property
    def is_number(self) -> bool:
        """Whether it stands to the right."""
        return self.order is not None


@dataclass(frozen=True)
class Table:
    """A table with a title, whose columns a click on their names sorts; a folded one opens with a click."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    is_folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(row[column].is_number for row in self.rows) for column in range(len(self.columns))]


@dataclass(frozen=True)
class Answer:
    """One policy's answer with its scores in words; `is_best` has the highest reward of those it compares with."""

    policy: str
    text: str
    scores: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Asked:
    """A prompt (its last turn, and the turns before as role and text) and what everybody answered."""

    prompt: str
    earlier: Sequence[tuple[str, str]]
    answers: Sequence[Answer]
    is_safety: bool = False
    source: str = ""


@dataclass(frozen=True)
class Answers:
    """Answers to the same prompts side by side; `total` counts the prompts that the files hold.

    `note` stands above them.
    """

    name: str
    title: str
    asked: Sequence[Asked]
    total: int
    note: str = ""

    @property
    def has_safety(self) -> bool:
        """Whether prompts of both kinds are among them."""
        return len({asked.is_safety for asked in self.asked}) > 1


@dataclass(frozen=True)
class Section:
    """A part of the page with its own entry in the contents."""

    name: str
    title: str
    intro: str = ""
    charts: Sequence[Chart] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)
    answers: Sequence[Answers] = field(default_factory=tuple)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.charts or self.answers or any(table.rows for table in self.tables))


def present(items: Iterable[Any]) -> list[Any]:
    """Those that are there: what a run has no data for is None."""
    return [item for item in items if item is not None]


def text(value: Any, mark: str = "") -> Cell:
    """A cell of words."""
    return Cell(str(value), mark=mark)


def number(value: Any, spec: str = "", suffix: str = "") -> Cell:
    """A cell with one number, or a dash."""
    if not is_number(value):
        return Cell("–")
    return Cell(format(value, spec) + suffix, float(value))


def interval(entry: Row | None, spec: str) -> Cell:
    """A cell with an estimate and its 95 % interval, or a dash."""
    if not entry or not is_number(entry["value"]):
        return Cell("–")
    value, _, bounds = show(entry, spec, bounds=True).partition(" ")
    return Cell(value, float(entry["value"]), detail=bounds if is_number(entry["low"]) else "")
