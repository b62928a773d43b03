"""Results for a terminal: a line a stage, and the table at the end of a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.metrics import show

Result = Mapping[str, Any]


def one_line(result: Result) -> str:
    """What a stage reached, in a few words."""
    kind = result.get("stage")
    if kind == "sft":
        return _sft(result)
    if kind == "rm":
        return _reward_model(result)
    if kind == "gatt":
        dropped = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result["dropped"].items())
        return f"{result['dialogues']} dialogues" + (f"; left out {dropped}" if dropped else "")
    if kind == "distil":
        kept, gain = show(result["kept"], ".0%", bounds=True), show(result["score_gain"], "+.2f")
        return f"{kept} of {result['prompts']} distilled answers kept, safety score {gain} by the preprompt"
    if kind == "reject":
        mean, best = show(result["mean_reward"], "+.2f"), show(result["mean_best_reward"], "+.2f")
        return f"{result['kept']} of {result['prompts']} prompts kept, reward {mean} -> best {best}"
    if kind == "ppo":
        rewards = f"reward {result['reward_first']:+.2f} -> {result['reward_last']:+.2f}"
        held_out = result["held_out"]
        gain = f"; held-out reward {show(held_out['reward_gain'], '+.2f', bounds=True)}" if held_out else ""
        stopped = f"; stopped ({result['stopped']}) at {result['iterations']}" if result["stopped"] else ""
        return f"{rewards}, KL to reference {result['kl']:.2f} nats a response{gain}{stopped}"
    if kind == "eval" and result.get("kind") == "gatt":
        return f"{len(result['policies'])} policies in {result['dialogues']} dialogues"
    if kind == "eval":
        return f"{len(result['policies'])} policies on {result['prompts']} prompts"
    return ""


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


def _sft(result: Result) -> str:
    before, after = result["valid_loss_before"], result["valid_loss_after"]
    if before is None:
        return f"{result['train_dialogues']} dialogues, last training loss {result['train_loss_last']:.3f}"
    return f"held-out loss {before:.3f} -> {after:.3f}"


def _losses(by_source: Mapping[str, Mapping[str, Any]]) -> Table:
    """Held-out loss and perplexity of every source, before and after."""
    table = Table("source", "tokens", "loss", "perplexity", title="Held-out answers", title_justify="left")
    for source, after in by_source["after"].items():
        before = by_source["before"][source]
        perplexity = " -> ".join("-" if p is None else f"{p:.2f}" for p in (before["perplexity"], after["perplexity"]))
        table.add_row(source, str(after["tokens"]), f"{before['loss']:.3f} -> {after['loss']:.3f}", perplexity)
    return table


def _reward_model(result: Result) -> str:
    return "; ".join([_reward_model_figures(result), *_left_out(result.get("left_out", {}))])


def _reward_model_figures(result: Result) -> str:
    if not result["valid"]:
        return f"{result['train_pairs']} pairs, last training loss {result['train_loss_last']:.3f}"
    accuracy = result["valid"]["accuracy"]
    interval = f"[{accuracy['low']:.2f}, {accuracy['high']:.2f}]"
    label = result["valid"].get("safety_label_accuracy")
    extra = f", safety label right {label['value']:.1%}" if label and result["kind"] == "safety" else ""
    return f"held-out accuracy {accuracy['value']:.1%} {interval}, {accuracy['count']} pairs{extra}"


def _left_out(parts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """`train left out 3 vetoed, 2 too long, cut the history of 4`, for each part that lost something."""
    found = []
    for part, reasons in parts.items():
        rows = [f"{count} {name.replace('_', ' ')}" for name, count in reasons.items() if name != "history_cut"]
        words = [f"left out {', '.join(rows)}"] if rows else []
        if cut := reasons.get("history_cut"):
            words.append(f"cut the history of {cut}")
        if words:
            found.append(f"{part} {', '.join(words)}")
    return found


def _policies(result: Result) -> Table:
    if result.get("kind") == "gatt":
        from sft.gatt_evaluation import report_table
    else:
        from rlhf.evaluate import report_table
    return report_table(result)


def _console() -> Console:
    """At least wide enough for the tables where the output is no terminal. A bracket in a path is no markup."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 114)


def clock(seconds: float) -> str:
    """Minutes and seconds, `4:07`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
