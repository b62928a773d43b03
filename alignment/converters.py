"""Files in a public layout -> files of our rows, with a count of what had to be left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.data import read_lines, write_rows
from alignment.data_report import TypedRow, parse_row
from alignment.dialogue import PreferencePair, Prompt, RowError
from alignment.errors import DataError
from alignment.files import check_new_file
from alignment.layouts import CONVERTERS, Aim, Options, RatingBins, Strength, measures_of
from alignment.sources import find_data

# The measures of strength that a layout's rows can have.
STRENGTHS: dict[str, tuple[Strength, ...]] = {
    "oasst": ("ranks",),
    "pandalm": ("votes",),
    "ultrafeedback": ("scores",),
    "graded": ("ranks", "votes", "scores"),
}


@dataclass(frozen=True)
class ConversionSummary:
    """Objects read, rows written, and what was left out: rows by reason, with the place of each reason's first."""

    num_read: int
    num_written: int
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)


def convert_file(
    source: str,
    layout: str,
    out: Path,
    *,
    aim: Aim = "helpfulness",
    rating_bins: Mapping[Strength, RatingBins] | None = None,
) -> ConversionSummary:
    """Writes our rows of a file or Hub data set in a public layout; every row has passed the typed loader.

    With the aim of safety, pairs and prompts are marked as of the safety set. Rows that cannot be used are left out and
    counted. Raises DataError where none is left or the archive is damaged, in which case `out` is not written, and
    where the name of `out` or the options make no sense; RunError where `out` exists or its folder does not.
    """
    options, counts = Options(aim, rating_bins or {}), Counter()
    _check_request(layout, out, options.rating_bins)
    found = find_data(source)
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, str] = {}

    def drop(error: RowError, where: str) -> None:
        reason = re.sub(r"\[\d+\]", "[i]", error.problem)
        dropped[reason] += 1
        first_dropped.setdefault(reason, where)

    def rows() -> Iterator[dict[str, Any]]:
        for line in read_lines(found):
            counts["read"] += 1
            if line.rest_is_lost:
                raise DataError(f"{line.where}: {line.problem}")
            try:
                if line.row is None:
                    raise RowError(line.problem or "unreadable")
                for row in CONVERTERS[layout](line.row, options):
                    try:
                        typed = parse_row(row)
                        if aim == "safety":
                            typed = _of_safety_set(typed)
                    except RowError as error:
                        drop(error, line.where)
                    else:
                        counts["written"] += 1
                        yield typed.to_json() | measures_of(row)
            except RowError as error:
                drop(error, line.where)
        if not counts["written"]:
            reasons = "".join(f"\n{first_dropped[reason]}: {reason}" for reason, _ in dropped.most_common(5))
            raise DataError(f"{source}: none of {counts['read']} rows can be read as {layout}.{reasons}")

    write_rows(out, rows())
    return ConversionSummary(counts["read"], counts["written"], dict(dropped.most_common()), first_dropped)


def _of_safety_set(row: TypedRow) -> TypedRow:
    """The row with the mark of the safety set. Raises RowError for a demonstration, which has none."""
    if not isinstance(row, PreferencePair | Prompt):
        raise RowError('only pairs and prompts have "is_safety". Leave --aim safety out.')
    return replace(row, is_safety=True)


def _check_request(layout: str, out: Path, rating_bins: Mapping[Strength, RatingBins]) -> None:
    if layout not in CONVERTERS:
        raise DataError(f'"{layout}": no such layout. Known: {", ".join(CONVERTERS)}.')
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{out}: the file to write must end with .jsonl or .jsonl.gz.")
    check_new_file(out)
    measures = STRENGTHS.get(layout, ())
    for strength, bins in rating_bins.items():
        if strength not in measures:
            known = ", ".join(f"{name} ({' or '.join(found)})" for name, found in STRENGTHS.items())
            raise DataError(f"rating bins: {layout} has no {strength}. These have: {known}.")
        if not (len(bins) == 3 and 0 < bins[0] < bins[1] < bins[2]):
            raise DataError(f"rating bins: {tuple(bins)} are not three increasing positive numbers, e.g. 1,2,3.")
