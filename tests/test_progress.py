"""The remaining time that long steps show."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from alignment import progress
from alignment.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock to set: its only item is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_what_is_left_is_reckoned_by_the_speed_of_this_run(clock, capfd):
    with ProgressBar("answers", 100) as bar:
        bar.skip(60)
        clock[0] += 20
        bar.advance(10)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["answers: 70/100, 1:00 left  ", "answers: 70/100 in 0:20"]


def test_start_counts_as_done_before(clock, capfd):
    with ProgressBar("steps", 100, start=60) as bar:
        clock[0] += 20
        bar.advance(10)
    assert capfd.readouterr().err.startswith("steps: 70/100, 1:00 left")


def test_the_live_bar_does_not_take_skipped_work_for_speed(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar("answers", 100) as bar:
        bar.skip(60)
        [task] = bar._progress.tasks
        assert task.completed == 60 and task.speed is None
