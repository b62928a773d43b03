"""What data files hold: counts, lengths, ratings, safety bins, repeats, overlaps, and every bad row."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from alignment.data import first_user_message, read_lines
from alignment.dialogue import (
    MESSAGE_FIELDS,
    RATINGS,
    Candidate,
    Dialogue,
    LayoutError,
    Messages,
    PreferencePair,
    Prompt,
    RowError,
    safety_bin,
)
from alignment.layouts import guess_layout
from alignment.sources import find_data

TypedRow = Dialogue | PreferencePair | Prompt | Candidate

KINDS: dict[str, type[TypedRow]] = {
    "pairs": PreferencePair,
    "demonstrations": Dialogue,
    "candidates": Candidate,
    "prompts": Prompt,
}
LENGTH_BIAS_RATE = 0.6  # from here on the longer response being the better one is worth a warning


@dataclass(frozen=True)
class Lengths:
    """Words of one kind of text; `histogram` maps the least words of a bin to its texts, bins doubling in width."""

    min: int
    median: int
    p95: int
    max: int
    histogram: dict[int, int]


@dataclass(frozen=True)
class FileReport:
    """One file. Everything but `num_rows`, `num_bad` and `problems` is about its good rows.

    Attributes:
        kind: a key of KINDS, decided by the first row that shows one; "" where none does.
        problems: "file:line: what is wrong", one for each bad row.
        looks_like: the public layout of the first bad row, where it looks like one.
        user_turns: rows by their number of user turns.
        lengths: by `prompt` (all turns before the response) and `response`, or `chosen` and `rejected`.
        ratings, safety_bins, chosen_longer_rate: pairs only; longer by words.
        unread_fields: fields that no stage reads, with their rows; `messages[].name` is one of a message.
        duplicates: where rows are that equal an earlier one in all texts, "file:line".
        num_shared_prompts: rows whose whole prompt another row has as well.
        contradictions: where pairs are that also occur the other way round.
        warnings: what deserves a look, though the rows can be used.
    """

    name: str
    kind: str
    num_rows: int
    num_bad: int
    problems: list[str]
    looks_like: str | None
    user_turns: dict[int, int]
    num_with_system: int
    num_safety: int
    lengths: dict[str, Lengths]
    ratings: dict[str, int]
    safety_bins: dict[str, int]
    chosen_longer_rate: float | None
    sources: dict[str, int]
    unread_fields: dict[str, int]
    duplicates: list[str]
    num_shared_prompts: int
    contradictions: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Overlap:
    """Where rows of `second` are ("file:line") whose prompt, or only its first user message, occurs in `first`."""

    first: str
    second: str
    same_prompt: list[str]
    same_first_message: list[str]


@dataclass(frozen=True)
class DataReport:
    """All files, and the prompts that any two of them share."""

    files: list[FileReport]
    overlaps: list[Overlap]

    @property
    def is_good(self) -> bool:
        """Whether every file has rows, and all of them can be used."""
        return not any(file.problems for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The whole report, ready for `json.dumps`."""
        return {"is_good": self.is_good, **asdict(self)}


def check_files(names: Sequence[str]) -> DataReport:
    """Reads every row of every file. Bad rows are reported, not raised; a missing file raises DataError."""
    found = [find_data(name) for name in names]
    tallies = [_Tally(name) for name in names]
    for tally, source in zip(tallies, found, strict=True):
        for line in read_lines(source):
            tally.add(line.where, line.row, line.problem)
    overlaps = [
        Overlap(
            one.name,
            other.name,
            [row.where for row in other.rows if row.prompt in one.prompts],
            [row.where for row in other.rows if row.opening in one.openings],
        )
        for one, other in combinations(tallies, 2)
    ]
    return DataReport([tally.report() for tally in tallies], overlaps)


def parse_row(row: Mapping[str, Any]) -> TypedRow:
    """The typed row of whichever kind it is. Raises RowError where it is none, or a bad one."""
    return KINDS[row_kind(row)].from_json(row)


def row_kind(row: Mapping[str, Any]) -> str:
    """Which of our rows this is, by its fields: a key of KINDS. Raises LayoutError where it is none."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return "pairs"
    for name, kind in (("messages", "demonstrations"), ("response", "candidates"), ("prompt", "prompts")):
        if row.get(name) is not None:
            return kind
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise LayoutError(
        f'not one of our rows, which have "messages", or "prompt" with or without "chosen" and "rejected" or '
        f'"response"; the row has: {found}.'
    )


def lengths(counts: Sequence[int]) -> Lengths:
    """Of at least one text. Percentiles are values that occur: the lower median, and nearest rank."""
    ordered = sorted(counts)
    bins = Counter(_bin_start(count) for count in ordered)
    starts = [0, *(2**power for power in range(2, max(ordered).bit_length()))]
    p95 = ordered[-(-95 * len(ordered) // 100) - 1]
    histogram = {start: bins[start] for start in starts if start >= min(bins)}
    return Lengths(ordered[0], statistics.median_low(ordered), p95, ordered[-1], histogram)


def _bin_start(count: int) -> int:
    return 0 if count < 4 else 2 ** (count.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a good row is, and hashes of its texts, so that memory does not grow with their length.

    `exchanged` is the `texts` of the pair the other way round, None where the row is no pair.
    """

    where: str
    texts: int
    prompt: int
    opening: int
    exchanged: int | None


@dataclass
class _Tally:
    """Running counts of one file."""

    name: str
    kind: str = ""
    looks_like: str | None = None
    num_rows: int = 0
    problems: list[str] = field(default_factory=list)
    words: dict[str, list[int]] = field(default_factory=dict)
    rows: list[_Row] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    duplicates: list[str] = field(default_factory=list)
    prompts: Counter[int] = field(default_factory=Counter)
    openings: set[int] = field(default_factory=set)
    user_turns: Counter[int] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    ratings: Counter[str] = field(default_factory=Counter)
    safety_bins: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    field_rows: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, row: Mapping[str, Any] | None, problem: str | None) -> None:
        self.num_rows += 1
        try:
            if row is None:
                raise RowError(problem or "unreadable")
            kind = row_kind(row)
            self.kind = self.kind or kind
            if kind != self.kind:
                raise RowError(f"one of {kind} among {self.kind}. Keep one kind of row in a file.")
            typed = KINDS[kind].from_json(row)
        except RowError as error:
            self.problems.append(f"{where}: {error.problem}")
            if row is not None and self.looks_like is None:
                self.looks_like = guess_layout(row)
            return
        self.field_rows.update(_names(row, KINDS[kind].FIELDS))
        self._add_typed(where, typed)

    def _add_typed(self, where: str, row: TypedRow) -> None:
        prompt, responses = _texts(row)
        self._add_words("prompt", sum(len(message.content.split()) for message in prompt))
        for name, text in responses.items():
            self._add_words(name, len(text.split()))
        is_pair = isinstance(row, PreferencePair)
        keys = _Row(
            where,
            texts=hash((prompt, *responses.values())),
            prompt=hash(prompt),
            opening=hash(first_user_message(prompt)),
            exchanged=hash((prompt, row.rejected, row.chosen)) if is_pair else None,
        )
        if keys.texts in self.seen:
            self.duplicates.append(where)
        self.rows.append(keys)
        self.seen.add(keys.texts)
        self.prompts[keys.prompt] += 1
        self.openings.add(keys.opening)
        self.user_turns[sum(message.role == "user" for message in prompt)] += 1
        about = row.prompt if isinstance(row, Candidate) else row
        self.sources[about.source] += 1
        self.flags["system"] += prompt[0].role == "system"
        self.flags["safety"] += getattr(about, "is_safety", False)
        if is_pair:
            self.ratings[row.rating or "unrated"] += 1
            self.safety_bins[safety_bin(row)] += 1
            self.flags["half_labelled"] += (row.chosen_safe is None) != (row.rejected_safe is None)
            self.flags["chosen_longer"] += self.words["chosen"][-1] > self.words["rejected"][-1]

    def _add_words(self, name: str, count: int) -> None:
        self.words.setdefault(name, []).append(count)

    @property
    def contradictions(self) -> list[str]:
        return [row.where for row in self.rows if row.exchanged in self.seen]

    @property
    def chosen_longer_rate(self) -> float | None:
        return self.flags["chosen_longer"] / len(self.rows) if self.ratings else None

    def report(self) -> FileReport:
        known = KINDS[self.kind].FIELDS if self.kind else frozenset()
        unread = {name: rows for name, rows in self.field_rows.items() if name not in known}
        return FileReport(
            name=self.name,
            kind=self.kind,
            num_rows=self.num_rows,
            num_bad=self.num_rows - len(self.rows),
            problems=self.problems if self.num_rows else [f"{self.name}: has no rows."],
            looks_like=self.looks_like,
            user_turns=dict(sorted(self.user_turns.items())),
            num_with_system=self.flags["system"],
            num_safety=self.flags["safety"],
            lengths={name: lengths(counts) for name, counts in self.words.items()},
            ratings={name: self.ratings[name] for name in (*RATINGS, "unrated") if self.ratings[name]},
            safety_bins=dict(self.safety_bins.most_common()),
            chosen_longer_rate=self.chosen_longer_rate,
            sources=dict(self.sources.most_common()),
            unread_fields=unread,
            duplicates=self.duplicates,
            num_shared_prompts=sum(rows for rows in self.prompts.values() if rows > 1),
            contradictions=self.contradictions,
            warnings=self._warnings(),
        )

    def _warnings(self) -> list[str]:
        longer, unrated = self.chosen_longer_rate or 0.0, self.ratings["unrated"]
        repeated, exchanged = self.duplicates, self.contradictions
        findings = (
            (len(repeated), "{} rows repeat an earlier row, so their texts count twice", some(repeated)),
            (len(exchanged), "{} pairs also occur with chosen and rejected exchanged", some(exchanged)),
            (
                self.safety_bins["veto"],
                "{} pairs prefer an unsafe response to a safe one; the safety label has the veto (align rm veto=...)",
                ".",
            ),
            (self.flags["half_labelled"], "{} pairs have a safety label on one response only", "."),
            (unrated if len(self.ratings) > 1 else 0, "{} pairs have no rating, though others have one", "."),
            (
                longer if longer >= LENGTH_BIAS_RATE else 0,
                "The chosen response is the longer one in {:.0%} of the pairs: a reward model may learn length",
                ".",
            ),
        )
        return [text.format(found) + end for found, text, end in findings if found]


def _names(row: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """Names of what a row holds, `messages[].name` of what its messages hold beside their text; null is nothing."""
    names = [str(name) for name, value in row.items() if value is not None]
    for name in ("messages", "prompt", "chosen", "rejected", "response"):
        turns = row.get(name) if name in known else None
        for turn in turns if isinstance(turns, list) else ():
            others = (str(key) for key, value in turn.items() if value is not None and key not in MESSAGE_FIELDS)
            names += [f"{name}[].{key}" for key in others]
    return list(dict.fromkeys(names))


def _texts(row: TypedRow) -> tuple[Messages, dict[str, str]]:
    """The prompt of a row and its responses by name; a demonstration's response is its last turn."""
    if isinstance(row, PreferencePair):
        return row.prompt, {"chosen": row.chosen, "rejected": row.rejected}
    if isinstance(row, Candidate):
        return row.prompt.messages, {"response": row.response}
    if isinstance(row, Dialogue):
        return row.messages[:-1], {"response": row.messages[-1].content}
    return row.messages, {}


def some(places: Sequence[str], most: int = 5) -> str:
    """The end of a sentence that names the first of them: ": a.jsonl:3, a.jsonl:9 and 7 more."."""
    rest = f" and {len(places) - most:,} more" if len(places) > most else ""
    return f": {', '.join(places[:most])}{rest}."
