"""Sampled dialogues on disk as they come: rows in lots, and the turns of the lot that is being sampled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from alignment.dialogue import Messages
from alignment.line_log import append_lines, whole_lines
from alignment.progress import ProgressBar
from alignment.sampling.memory import CPU_MAX_ROWS
from sft.ghost_attention import Answer

NoAnswer = Literal["too_long", "refused"]

# The sampler decodes prompts of like length side by side, so a lot has more than go side by side.
GROUPS_IN_A_LOT = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """What was answered to one turn of many dialogues.

    Attributes:
        candidates: answers to each context by its key.
        missing: why the others have none, by key.
    """

    candidates: dict[int, list[Answer]]
    missing: dict[int, NoAnswer]


class Answering(Protocol):
    """Who answers the next turn of many dialogues: `sft.conversation.Speaker`, or its answers read from a log."""

    def answer(self, contexts: Mapping[int, Messages], *, turn: int, bar: ProgressBar) -> Turn:
        """Candidates for every context by its key, and why there are none."""
        ...


class RowLog:
    """`total` rows on disk as they come, in lots: an interrupted run goes on after the last whole one.

    A lot is what is sampled together: some groups of as many rows as are decoded side by side, `answers_a_row` each.
    It does not depend on the machine, even where the number of these does. Within a lot, `recorded` keeps whole turns
    in a file beside, which goes when the lot's rows are written. Only the main process writes. `on_append` is called
    whenever rows or a turn have come.
    """

    def __init__(
        self,
        path: Path,
        *,
        total: int,
        max_rows: int | None,
        answers_a_row: int = 1,
        writes: bool,
        resume: bool,
        on_append: Callable[[], None],
    ) -> None:
        self.path, self.total, self.writes, self.on_append = path, total, writes, on_append
        self.size = max(1, GROUPS_IN_A_LOT * (max_rows or CPU_MAX_ROWS) // answers_a_row)
        self.rows: list[dict[str, Any]] = []
        self._turns_path = path.with_suffix(".turns.jsonl")
        self._turns: dict[tuple[int, int], Turn] = {}
        if resume and path.exists():
            self.rows = _whole_lots(path, self.total, self.size)
        if resume:
            self._turns = _whole_turns(self._turns_path)
        if writes and len(self.rows) == total:  # killed between the two
            self._turns_path.unlink(missing_ok=True)

    def missing(self) -> list[range]:
        """The lots of rows that are not there yet."""
        starts = range(len(self.rows), self.total, self.size)
        return [range(start, min(start + self.size, self.total)) for start in starts]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds the rows of a lot."""
        rows = [dict(row) for row in rows]
        self.rows += rows
        self._turns.clear()
        if self.writes:
            append_lines(self.path, rows)
            self._turns_path.unlink(missing_ok=True)
        self.on_append()

    def recorded(self, speaker: Answering, lot: range) -> Answering:
        """The speaker, but what it answered to a turn of this lot before an interruption is not asked again."""
        return _RecordedSpeaker(speaker, self, lot.start)

    def turn(self, lot: int, turn: int) -> Turn | None:
        """What was answered to a turn of a lot (known by its first row), or None where that is not on disk."""
        return self._turns.get((lot, turn))

    def append_turn(self, lot: int, turn: int, answered: Turn) -> None:
        """Adds the answers to a turn of a lot."""
        if self.writes:
            answers = {key: [astuple(one) for one in found] for key, found in answered.candidates.items()}
            row = {"lot": lot, "turn": turn, "answers": answers, "missing": answered.missing}
            append_lines(self._turns_path, [row])
        self.on_append()


@dataclass(frozen=True, slots=True)
class _RecordedSpeaker:
    speaker: Answering
    log: RowLog
    lot: int

    def answer(self, contexts: Mapping[int, Messages], *, turn: int, bar: ProgressBar) -> Turn:
        """See Answering."""
        answered = self.log.turn(self.lot, turn)
        if answered is None:
            answered = self.speaker.answer(contexts, turn=turn, bar=bar)
            self.log.append_turn(self.lot, turn, answered)
        else:
            bar.skip(sum(map(len, answered.candidates.values())))
        assert {*answered.candidates, *answered.missing} == set(contexts), "the log is of the same dialogues"
        return answered


def _whole_lots(path: Path, total: int, size: int) -> list[dict[str, Any]]:
    """The rows of whole lots, of which the last may be smaller; the file is cut off behind them.

    What else is asked in a lot decides the random streams of repeated prompts, so a lot is sampled whole or not at all.
    """
    lines = list(whole_lines(path))
    lines = lines[: total if len(lines) == total else len(lines) - len(lines) % size]
    os.truncate(path, lines[-1][1] if lines else 0)
    return [row for row, _ in lines]


def _whole_turns(path: Path) -> dict[tuple[int, int], Turn]:
    """The turns by lot and turn."""
    return {
        (row["lot"], row["turn"]): Turn(
            {int(key): [Answer(*values) for values in found] for key, found in row["answers"].items()},
            {int(key): reason for key, reason in row["missing"].items()},
        )
        for row, _ in whole_lines(path)
    }
