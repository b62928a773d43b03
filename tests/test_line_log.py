"""Logs of JSON lines: what a kill leaves is read and gone on with, and damage that no kill does is named."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import RunError
from alignment.line_log import all_lines, append_lines, whole_lines

VALUES = [{"answer": "日本 and\u2028 a separator"}, [1, None], {"answer": "two\nlines"}, "text"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def values_of(path: Path) -> list:
    return [value for value, _ in whole_lines(path, any_value)]


def any_value(value: Any) -> Any:
    return value


def test_lines_are_added_to_those_that_are_there(path):
    append_lines(path, VALUES[:1])
    append_lines(path, [])
    append_lines(path, VALUES[1:])
    assert values_of(path) == VALUES
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == VALUES


def test_a_log_cut_anywhere_by_a_kill_goes_on(path):
    append_lines(path, VALUES)
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        num_whole = whole[:end].count(b"\n")
        assert values_of(path) == VALUES[:num_whole]
        assert path.read_bytes() == whole[:end], "reading changes nothing"
        append_lines(path, VALUES[num_whole:])
        assert path.read_bytes() == whole


def test_a_file_can_be_cut_behind_any_line(path):
    append_lines(path, VALUES)
    ends = [end for _, end in whole_lines(path, any_value)]
    for count in (3, 2, 1):
        os.truncate(path, ends[count - 1])
        assert values_of(path) == VALUES[:count]


def test_lines_are_synced_before_the_call_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    append_lines(path, VALUES)
    assert synced == [path.read_bytes()] and values_of(path) == VALUES


def test_a_file_that_is_not_there_has_no_lines(path):
    assert values_of(path) == []
    assert not path.exists()


@pytest.mark.parametrize("bad", [b'{"cut', b"", b"\x00\x00", b'"\xe9"', b"[1]", b"[" * 100_000])
def test_a_line_that_is_whole_and_no_object_is_named(path, bad):
    path.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 3}\n')
    lines = whole_lines(path)
    assert next(lines) == ({"a": 1}, 9)
    with pytest.raises(
        RunError, match=r"log\.jsonl:2: damaged, on a line that is whole \(.+\)\. Remove the file, or start anew"
    ):
        next(lines)


def test_a_file_that_was_written_at_once_and_was_cut_off_since_is_named(path):
    append_lines(path, VALUES)
    assert all_lines(path, len(VALUES), any_value) == VALUES
    for cut in (1, len('"text"')):
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(RunError, match=r"log\.jsonl: 3 whole lines instead of 4\. The file is damaged: remove it"):
            all_lines(path, len(VALUES), any_value)


def test_values_that_json_cannot_hold_leave_the_log_as_it_was(path):
    append_lines(path, [1])
    date = datetime.date(2023, 7, 18)
    with pytest.raises(TypeError):
        append_lines(path, [2, date])
    assert values_of(path) == [1]
    append_lines(path, [2, date], default=str)
    assert values_of(path) == [1, 2, "2023-07-18"]


def test_half_a_character_is_written_as_its_number(path):
    """JSON can spell it, UTF-8 cannot; other lines stay as they were."""
    values = [{"cut": "\ud83d"}, {"whole": "日"}]
    append_lines(path, values)
    assert values_of(path) == values
    assert path.read_text(encoding="utf-8") == '{"cut": "\\ud83d"}\n{"whole": "日"}\n'
