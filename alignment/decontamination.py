"""Prompts that no row of other files has: what a model was trained on measures its memory, not what it has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from alignment.config import PromptSection
from alignment.data import Loaded, OnError, SourceReport, conversation_of, load_prompts, load_rows
from alignment.data_report import parse_row
from alignment.dialogue import Messages, Prompt
from alignment.errors import DataError


def load_prompts_of(section: PromptSection) -> Loaded[Prompt]:
    """The prompts of a section's files, without those that share a user message with its `not_in`.

    Raises DataError with every bad row of either, and where none is left.
    """
    data = load_prompts(section.prompts, on_error=section.on_error)
    return without_seen(data, section.not_in, on_error=section.on_error)


def without_seen(data: Loaded[Prompt], not_in: Sequence[str], *, on_error: OnError = "stop") -> Loaded[Prompt]:
    """The prompts of which no user message is one of a row in these files, but for case and spaces.

    The others are counted as `seen` in their sources' reports; the files have reports behind them. Raises DataError
    with every bad row of the files, and where no prompt is left.
    """
    if not not_in or not data.rows:
        return data
    others = load_rows(not_in, parse_row, on_error=on_error)
    seen: set[str] = set()
    for row in others.rows:
        seen |= _user_messages(conversation_of(row))
    is_seen = [not seen.isdisjoint(_user_messages(prompt.messages)) for prompt in data.rows]
    if all(is_seen):
        raise DataError(f"prompts: all {len(data.rows):,} share a user message with a row of {', '.join(not_in)}.")
    rows = [prompt for prompt, seen_before in zip(data.rows, is_seen, strict=True) if not seen_before]
    reports, start = [], 0
    for report in data.sources:
        count = sum(is_seen[start : start + report.num_kept])
        start += report.num_kept
        reports.append(_without(report, count))
    compared = [replace(report, num_kept=0, dropped={"compared": report.num_kept}) for report in others.sources]
    return Loaded(rows, [*reports, *compared])


def _without(report: SourceReport, count: int) -> SourceReport:
    if not count:
        return report
    return replace(report, num_kept=report.num_kept - count, dropped={**report.dropped, "seen": count})


def _user_messages(messages: Messages) -> set[str]:
    return {" ".join(message.content.casefold().split()) for message in messages if message.role == "user"}
