"""Logs with one JSON value a line that outlive a kill of their writer: a line counts once its newline is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from alignment.errors import RunError

Value = TypeVar("Value")


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """A value as a line of UTF-8. Half a character, which JSON can spell and UTF-8 cannot, is written as its number.

    `default` makes something of a value that JSON cannot hold, as in `json.dumps`.
    """
    line = json.dumps(value, ensure_ascii=False, default=default)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(value, default=default)
    return f"{line}\n"


def append_lines(path: Path, values: Iterable[Any], *, default: Callable[[Any], Any] | None = None) -> None:
    """Adds a line a value. When it returns, they outlive a kill and a loss of power.

    Killed before that, it leaves some of the lines, in order, of which the last may be cut off: `whole_lines` leaves
    it out, and the next call removes it. Lines of earlier calls are never touched. One process at a time writes.

    Args:
        path: the file, made where there is none.
        values: what JSON can hold. Where one is not, nothing is written.
        default: see `json_line`.
    """
    data = "".join(json_line(value, default) for value in values).encode()
    with path.open("ab+") as file:
        _remove_cut_line(file)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def as_object(value: Any) -> dict[str, Any]:
    """The value of a line in a log of objects. Raises ValueError where it is none."""
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def whole_lines(path: Path, parse: Callable[[Any], Value] = as_object) -> Iterator[tuple[Value, int]]:
    """The value of every whole line with the place in the file behind it, to which the file can be cut.

    A last line without a newline, which a killed process was writing, is left out. A file that is not there has no
    lines. One line at a time is in memory.

    Raises:
        RunError: a whole line is no JSON, or `parse` raises ValueError, which is not a kill's doing. Names the file and
            the line.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = parse(json.loads(line))
            except (ValueError, RecursionError) as error:
                problem = f"damaged, on a line that is whole ({error}). Remove the file, or start anew."
                raise RunError(f"{path}:{number}: {problem}") from error
            end += len(line)
            yield value, end


def all_lines(path: Path, count: int, parse: Callable[[Any], Value] = as_object) -> list[Value]:
    """The values of a file that was written at once.

    Raises RunError as `whole_lines` does, and where there are not `count` of them.
    """
    values = [value for value, _ in whole_lines(path, parse)]
    if len(values) != count:
        problem = f"{len(values)} whole lines instead of {count}. The file is damaged: remove it, or start anew."
        raise RunError(f"{path}: {problem}")
    return values


def _remove_cut_line(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
