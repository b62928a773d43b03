"""Progress with remaining time: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


class ProgressBar:
    """`with ProgressBar("sft", total=40) as bar: bar.advance(1, "loss 2.31")`. Silent where `shown` is false."""

    def __init__(self, title: str, total: int, *, shown: bool = True, start: int = 0) -> None:
        self.title, self.total, self.shown, self.done = title, total, shown, start
        self._started, self._last_line = time.monotonic(), 0.0
        self._start = start  # the part of `done` that took no time here
        self._live = shown and sys.stderr.isatty()

    def __enter__(self) -> Self:
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description:<28}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()
        elif self.shown and kind is None:
            console.print(f"{self.title}: {self.done}/{self.total} in {_clock(time.monotonic() - self._started)}")

    def skip(self, count: int) -> None:
        """Counts work that an interrupted run had finished: what is left is not reckoned by its speed."""
        self.done += count
        self._start += count
        if self._live:
            self._progress.reset(self._task, completed=self.done)  # `update` would take it for speed

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts finished work; `note` stands at the end of the line."""
        self.done += count
        if self._live:
            self._progress.update(self._task, advance=count, note=note)
        elif self.shown and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            elapsed = self._last_line - self._started
            left = elapsed / max(1, self.done - self._start) * (self.total - self.done)
            console.print(f"{self.title}: {self.done}/{self.total}, {_clock(left)} left  {note}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
