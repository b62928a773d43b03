"""JSON-lines files and Hub data sets as typed rows, with errors that name file, line, field and remedy."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from alignment.dialogue import Candidate, Dialogue, LayoutError, Messages, PreferencePair, Prompt, RowError
from alignment.errors import DataError
from alignment.files import file_sha256, replacing
from alignment.layouts import layout_hint
from alignment.line_log import json_line
from alignment.sources import find_data

MAX_LINE_BYTES = 4 * 2**20
MAX_ERRORS_SHOWN = 20
MANIFEST_ERRORS = 200

Row = TypeVar("Row")  # a dataclass of this package or of a stage, with a `from_json`
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class SourceReport:
    """What was read from one source: `dropped` counts rows by reason, `errors` holds the messages of bad rows."""

    name: str
    sha256: str
    num_rows: int
    num_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For the manifest, which is written and read again and again: not every message of a file full of bad rows."""
        errors = self.errors[:MANIFEST_ERRORS]
        if more := len(self.errors) - len(errors):
            errors.append(f"and {more} more: align data check {self.name} lists them all.")
        return {
            "name": self.name,
            "sha256": self.sha256,
            "rows": self.num_rows,
            "kept": self.num_kept,
            "dropped": dict(self.dropped),
            **({"errors": errors} if errors else {}),
        }


@dataclass(frozen=True)
class Loaded(Generic[Row]):
    """Typed rows in file order, with a report for each source."""

    rows: list[Row]
    sources: list[SourceReport]

    def by_source(self) -> dict[str, list[Row]]:
        """The rows of each source, by the name it was given."""
        found: dict[str, list[Row]] = {}
        start = 0
        for report in self.sources:
            found.setdefault(report.name, []).extend(self.rows[start : start + report.num_kept])
            start += report.num_kept
        return found


@dataclass(frozen=True)
class Line:
    """One line of a file: where it is ("pairs.jsonl:17"), and either its object or what is wrong with it.

    `rest_is_lost`: the archive is damaged here, so that nobody knows how many rows are missing.
    """

    where: str
    row: Mapping[str, Any] | None = None
    problem: str | None = None
    rest_is_lost: bool = False


def load_dialogues(sources: Sequence[str], *, on_error: OnError = "stop") -> Loaded[Dialogue]:
    """Demonstrations from all sources. Raises DataError with every bad row (the first 20 in full)."""
    return load_rows(sources, Dialogue.from_json, on_error=on_error)


def load_pairs(sources: Sequence[str], *, on_error: OnError = "stop") -> Loaded[PreferencePair]:
    """Preference pairs from all sources. Raises DataError with every bad row (the first 20 in full)."""
    return load_rows(sources, PreferencePair.from_json, on_error=on_error)


def load_prompts(sources: Sequence[str], *, on_error: OnError = "stop") -> Loaded[Prompt]:
    """Prompts from all sources; one that any row marks as a safety prompt is one wherever it stands.

    Raises DataError with every bad row (the first 20 in full).
    """
    data = load_rows(sources, Prompt.from_json, on_error=on_error)
    marked = {prompt.messages for prompt in data.rows if prompt.is_safety}
    rows = [replace(row, is_safety=True) if row.messages in marked and not row.is_safety else row for row in data.rows]
    return replace(data, rows=rows)


def load_rows(
    sources: Sequence[str], parse: Callable[[Mapping[str, Any]], Row], *, on_error: OnError = "stop"
) -> Loaded[Row]:
    """Rows of all sources through `parse`; a row without `source` gets the name of its file.

    With `on_error="skip"` bad rows are left out, counted and listed in the report. Raises DataError otherwise,
    and where a source has no usable row or is a damaged archive.
    """
    rows: list[Row] = []
    reports: list[SourceReport] = []
    errors: list[str] = []
    for name in sources:
        found = find_data(name)
        kept, source_errors, num_rows, is_damaged = [], [], 0, False
        for row in _typed_rows(name, found, parse):
            num_rows += 1
            if isinstance(row, _BadRow):
                source_errors.append(row.message)
                is_damaged = row.rest_is_lost
            else:
                kept.append(row)
        if not num_rows:
            errors.append(f"{name}: has no rows. Give a file with one JSON object a line.")
        elif is_damaged and on_error == "skip":
            errors.append(source_errors[-1])
        elif not kept and on_error == "skip":
            errors.append(f"{name}: none of its {num_rows} rows can be used. The first: {source_errors[0]}")
        dropped = {"unreadable": len(source_errors)} if source_errors else {}
        reports.append(SourceReport(str(name), _digest(found), num_rows, len(kept), dropped, source_errors))
        rows.extend(kept)
        if on_error == "stop":
            errors.extend(source_errors)
    raise_together(errors)
    return Loaded(rows, reports)


def raise_together(problems: Sequence[str]) -> None:
    """Raises DataError with the problems of many rows (the first 20 in full), if there are any."""
    if problems:
        raise DataError(_summary(list(problems)))


def stream_rows(sources: Sequence[str], parse: Callable[[Mapping[str, Any]], Row]) -> Iterator[Row]:
    """`load_rows` one by one, for sources that do not fit into memory. Raises DataError at a bad row."""
    for name in sources:
        for row in _typed_rows(name, find_data(name), parse):
            if isinstance(row, _BadRow):
                raise DataError(row.message)
            yield row


def read_lines(source: Path | str) -> Iterator[Line]:
    """Every non-empty line of a file (or row of a Hub data set) as a Line; damage is reported, not raised.

    A `.json` file may hold one list of objects. A truncated archive ends the file with one bad Line, and of a file of
    another format that is all there is.
    """
    if isinstance(source, str):
        yield from _read_hub(source)
        return
    if problem := _other_format(source):
        yield Line(str(source), problem=problem, rest_is_lost=True)
        return
    if source.name.endswith((".json", ".json.gz")):
        yield from _read_json_list(source)
        return
    opener = gzip.open if source.suffix == ".gz" else open
    number = 0
    with opener(source, "rb") as file:
        while True:
            number += 1
            where = f"{source}:{number}"
            try:
                raw = file.readline(MAX_LINE_BYTES + 1)
                if is_long := len(raw) > MAX_LINE_BYTES:
                    rest = raw
                    while rest and not rest.endswith(b"\n"):
                        rest = file.readline(MAX_LINE_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                problem = (
                    f"the archive is damaged or cut off ({error}). The rest of the file is lost, so on_error=skip does "
                    "not help: fetch or write the file again."
                )
                yield Line(where, problem=problem, rest_is_lost=True)
                return
            if not raw:
                return
            if is_long:
                yield Line(where, problem=f"the line is longer than {MAX_LINE_BYTES >> 20} MiB. Split or drop it.")
            elif raw.strip():
                yield _parse_line(where, raw)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, default: Callable[[Any], Any] | None = None) -> int:
    """Writes JSON lines (gzip where the name ends in .gz) atomically; returns the number of rows.

    `default` makes something of a value that JSON cannot hold, as in `json.dumps`.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    count = 0
    with replacing(path) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json_line(row, default))
            count += 1
    return count


def conversation_of(row: Row) -> Messages:
    """The turns of a demonstration or prompt, and of a pair or candidate those before the response."""
    messages = row.prompt if isinstance(row, PreferencePair | Candidate) else row.messages
    return messages.messages if isinstance(messages, Prompt) else messages


def first_user_message(messages: Messages) -> str:
    """The text by which a conversation is told from others when data is split."""
    return next(message.content for message in messages if message.role == "user")


def split_by_prompt(rows: Sequence[Row], *, valid_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and validation rows; all rows that share their first user message fall on the same side."""
    train, valid = [], []
    for row in rows:
        (valid if split_point(row, seed) < valid_fraction else train).append(row)
    return train, valid


def split_point(row: Row, seed: int) -> float:
    """In [0, 1), by the row's first user message: larger fractions hold it out."""
    key = f"{seed}:{first_user_message(conversation_of(row))}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64


def pick(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows, chosen by the seed, in file order."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


@dataclass(frozen=True)
class _BadRow:
    """Where a row is and what is wrong with it."""

    message: str
    rest_is_lost: bool


def _typed_rows(name: str, found: Path | str, parse: Callable[[Mapping[str, Any]], Row]) -> Iterator[Row | _BadRow]:
    stem = str(name).split("/")[-1].split(".jsonl")[0]
    is_hinted = False
    for line in read_lines(found):
        try:
            if line.row is None:
                raise RowError(line.problem or "unreadable")
            row = parse(line.row)
        except RowError as error:
            message = f"{line.where}: {error.problem}"
            if isinstance(error, LayoutError) and not is_hinted:
                message, is_hinted = f"{message} {layout_hint(line.row, name)}", True
            yield _BadRow(message, line.rest_is_lost)
        else:
            if hasattr(row, "where"):
                row = replace(row, source=row.source or stem, where=line.where)
            yield row


def _digest(source: Path | str) -> str:
    return file_sha256(source) if isinstance(source, Path) else ""


def _parse_line(where: str, raw: bytes) -> Line:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return Line(where, problem=f"not UTF-8 at byte {error.start} ({byte:#04x}). Save it as UTF-8.")
    except json.JSONDecodeError as error:
        return Line(where, problem=f"not JSON: {error.msg} at column {error.colno}. One object a line.")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        return Line(where, problem=f"not usable JSON: {error}. One object a line.")
    if not isinstance(value, dict):
        return Line(where, problem=f"a {type(value).__name__}, not an object. One object a line.")
    return Line(where, row=value)


def _other_format(path: Path) -> str | None:
    """What a file is, by its first bytes or its name, where it is not JSON, with what to do; else None."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return (
            "a Parquet file. Write its rows as JSON lines: python -c 'from datasets import Dataset; "
            f'Dataset.from_parquet("{path}").to_json("{path.stem}.jsonl")\''
        )
    if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return "a table. Write its rows as JSON lines: docs/data-formats.md, Your own layout."
    if head[:2] == b"\x1f\x8b" and path.suffix != ".gz":
        return "packed with gzip, which its name must say. Rename it so that it ends with .jsonl.gz, or unpack it."
    return None


def _read_json_list(path: Path) -> Iterator[Line]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            values = json.load(file)
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
        yield Line(str(path), problem=f"not a JSON list: {error}. A file with one object a line ends with .jsonl.")
        return
    for index, value in enumerate(values if isinstance(values, list) else [values]):
        where = f"{path}[{index}]"
        if isinstance(value, dict):
            yield Line(where, row=value)
        else:
            yield Line(where, problem=f"a {type(value).__name__}, not an object.")


def _read_hub(name: str) -> Iterator[Line]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # the Hub client raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"{name}: not a file here, and not loaded from the Hub ({type(error).__name__}: {error}). "
            "Check the spelling, the network and HF_HUB_OFFLINE, or set ALIGN_DATA_DIR."
        ) from error
    for index, row in enumerate(rows):
        yield Line(f"{name}[{index}]", row=row)


def _summary(errors: list[str]) -> str:
    shown = "\n".join(errors[:MAX_ERRORS_SHOWN])
    more = len(errors) - MAX_ERRORS_SHOWN
    return shown + (f"\n... and {more} more. `align data check FILE` lists all." if more > 0 else "")
