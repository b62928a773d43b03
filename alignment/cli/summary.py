"""Results for a terminal: those of one stage, and the table at the end of a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.headlines import Result, clock, one_line


def print_result(result: Result, path: Path) -> None:
    """The outcome of one stage."""
    console = _console()
    console.print(f"{result['stage']}: {one_line(result)}")
    if result["stage"] == "rm" and result["valid"]:
        from reward_models.tables import report_tables

        console.print(report_tables(result["valid"], "Held-out pairs"))
    if result["stage"] == "sft" and result["valid_by_source"]["after"]:
        console.print(_losses(result["valid_by_source"]))
    if result["stage"] == "eval":
        console.print(_policies(result))
    console.print(f"{clock(result['time_seconds'])}, peak {result['peak_memory_gb']:.1f} GB. Everything is in {path}")


def print_summary(results: Mapping[str, Result], runs: Path) -> None:
    """Every stage with time and peak memory, then the policies side by side."""
    console = _console()
    table = Table("stage", "result", "time", "peak memory", title="Pipeline", title_justify="left")
    for name, result in results.items():
        cells = (one_line(result), clock(result["time_seconds"]), f"{result['peak_memory_gb']:.1f} GB")
        table.add_row(name, *cells)
    seconds = sum(result["time_seconds"] for result in results.values())
    table.add_row("all", "", clock(seconds), f"{max(r['peak_memory_gb'] for r in results.values()):.1f} GB")
    console.print(table)
    for result in results.values():
        if result["stage"] == "eval":
            console.print(_policies(result))
    chat_models = [name for name, result in results.items() if result["stage"] in ("sft", "ppo")]
    if chat_models:
        console.print(f"Talk to the last model:  align chat {runs / chat_models[-1]}")


def _losses(by_source: Mapping[str, Mapping[str, Any]]) -> Table:
    """Held-out loss and perplexity of every source, before and after."""
    table = Table("source", "tokens", "loss", "perplexity", title="Held-out answers", title_justify="left")
    for source, after in by_source["after"].items():
        before = by_source["before"][source]
        perplexity = " -> ".join("-" if p is None else f"{p:.2f}" for p in (before["perplexity"], after["perplexity"]))
        table.add_row(source, str(after["tokens"]), f"{before['loss']:.3f} -> {after['loss']:.3f}", perplexity)
    return table


def _policies(result: Result) -> Table:
    if result.get("kind") == "gatt":
        from sft.gatt_evaluation import report_table
    else:
        from rlhf.evaluate import report_table
    return report_table(result)


def _console() -> Console:
    """At least wide enough for the tables where the output is no terminal. A bracket in a path is no markup."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 114)
