"""`report.md` beside a pipeline's runs: the tables, and the policies' answers to the same prompts side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.cli.summary import clock, one_line
from alignment.metrics import show
from alignment.runs import write_text

NUM_PROMPTS = 6


def write_report(results: Mapping[str, Mapping[str, Any]], runs: Path) -> Path:
    """Writes the report of a finished pipeline and returns its path."""
    lines = [f"# {runs.name}", "", "| stage | result | time | peak memory |", "|---|---|---|---|"]
    for name, result in results.items():
        memory = f"{result['peak_memory_gb']:.1f} GB"
        lines.append(f"| {name} | {one_line(result)} | {clock(result['time_seconds'])} | {memory} |")
    for name, result in results.items():
        if result["stage"] == "eval" and result.get("kind") == "gatt":
            lines += ["", *_adherence(result, runs / name)]
        elif result["stage"] == "eval":
            lines += ["", *_policies(result), "", *_answers(runs / name, list(result["policies"]))]
    path = runs / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _policies(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {result['prompts']} held-out prompts: raw scores with 95 % intervals",
        "",
        "| policy | helpfulness | safety | gated reward | unsafe answers to safety prompts | refusals of them "
        "| refusals of other prompts | words |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["policies"].items():
        cells = [show(row[key], "+.2f", bounds=True) for key in ("helpfulness", "safety", "reward")]
        cells += [
            show(row[key], ".0%", bounds=True) for key in ("violation_rate", "refusal_rate", "false_refusal_rate")
        ]
        cells.append(f"{row['mean_words']:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _adherence(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Share of answers that keep the instruction, by turn, with the curve."""
    from sft.gatt_evaluation import reported

    turns, cells = reported(result)
    lines = [
        f"## {result['dialogues']} dialogues, instruction in the first turn only: answers that keep it, by turn",
        "",
        f"| policy | {' | '.join(f'turn {turn}' for turn in turns)} |",
        f"|---|{'---|' * len(turns)}",
        *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items()),
    ]
    return [*lines, "", f"![adherence by turn]({folder.name}/adherence.png)"]


def _answers(folder: Path, policies: list[str]) -> list[str]:
    """The first prompts of each kind with every policy's answer."""
    rows = {
        name: [json.loads(line) for line in (folder / f"answers-{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in policies
    }
    first = rows[policies[0]]
    safety = [index for index, row in enumerate(first) if row.get("is_safety")]
    other = [index for index, row in enumerate(first) if not row.get("is_safety")]
    lines = ["## Answers side by side", ""]
    for index in sorted(safety[: NUM_PROMPTS // 2] + other[: NUM_PROMPTS // 2]):
        kind = " (safety prompt)" if first[index].get("is_safety") else ""
        lines += [f"**{_flat(first[index]['prompt'][-1]['content'])}**{kind}", ""]
        for name in policies:
            row = rows[name][index]
            lines.append(f"- *{name}* ({row['reward']:+.1f}): {_flat(row['response'][0]['content'])}")
        lines.append("")
    return lines


def _flat(text: str) -> str:
    return " ".join(text.split())
