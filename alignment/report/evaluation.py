"""Policies on held-out prompts: scores, wins, unsafe answers and refusals; adherence to an instruction by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alignment.report.charts import Curve, curve_chart, interval_chart, path_chart
from alignment.report.drawing import Chart, style_of
from alignment.report.elements import Cell, Section, Table, interval, number, present, text
from alignment.report.reading import Row, RunFolder, is_number

_SCORES = {"helpfulness": "helpfulness", "safety": "safety", "reward": "gated reward", "guard": "guard"}
_RATES = {
    "win_rate": "wins",
    "safety_win_rate": "safer, on safety prompts",
    "violation_rate": "unsafe, on safety prompts",
    "refusal_rate": "refusals, on safety prompts",
    "false_refusal_rate": "false refusals, on others",
}
_CHANGES = {"violation_change": "unsafe", "false_refusal_change": "false refusals"}
_GAINS = {
    "reward_gain": "reward gained",
    "guard_gain": "guard gained",
    "reward_gain_ended": "reward gained, both ended",
    "guard_gain_ended": "guard gained, both ended",
}
_TRUTH = {"reward": "true reward", "violation_rate": "truly unsafe"}


def section(runs: Sequence[RunFolder]) -> Section:
    """Figures and a table for every evaluation of answers."""
    evaluated = [run for run in runs if run.stage == "eval" and run.kind != "gatt" and run.result]
    charts = present(chart for run in evaluated for chart in (_scores(run), _rates(run), _gains(run)))
    intro = (
        "Scores are raw logits, KL is in nats a response; gains, wins, changes and KL are against the first policy, "
        "prompt by prompt; “both ended” means the prompts to which neither answer was cut off, for reward models judge "
        "a broken-off answer otherwise. Refusals of safety prompts and of others belong together: a policy that "
        "refuses everything is safe. Distinct-2 is the share of different pairs of words among as many pairs for every "
        "policy as the one with the fewest has."
    )
    return Section("eval", "Evaluation", intro, charts=charts, tables=list(map(_table, evaluated)))


def ghost_attention(runs: Sequence[RunFolder]) -> Section:
    """Adherence by turn and by kind, for every evaluation of Ghost Attention."""
    evaluated = [run for run in runs if run.stage == "eval" and run.kind == "gatt" and run.result]
    charts = present(chart for run in evaluated for chart in (_adherence(run), _adherence_by_kind(run)))
    return Section("adherence", "Ghost Attention", charts=charts, tables=list(map(_adherence_table, evaluated)))


def _policies(run: RunFolder) -> dict[str, Row]:
    return dict(run.result["policies"])


def _kl(row: Row) -> float | None:
    """Distance from the first policy; of that one itself, and where it was not measured, None."""
    return (row.get("kl") or {}).get("value")


def _scores(run: RunFolder) -> Chart | None:
    return interval_chart(
        f"policies-scores-{run.label_id}",
        f"{run.label}: scores of the policies",
        "Later policies should lie to the right; where the guard stays behind, the gain is in doubt.",
        {
            label: {name: row[key] for name, row in _policies(run).items() if key in row}
            for key, label in _SCORES.items()
        },
        x_label="mean score (logit), with 95 % interval",
    )


def _rates(run: RunFolder) -> Chart | None:
    return interval_chart(
        f"policies-rates-{run.label_id}",
        f"{run.label}: wins, unsafe answers, refusals",
        "Wins are against the first policy, even at the dashed line; fewer unsafe answers count only where false "
        "refusals do not rise with them.",
        {
            label: {name: row[key] for name, row in _policies(run).items() if key in row}
            for key, label in _RATES.items()
        },
        x_label="share of prompts, with 95 % interval",
        percent=True,
        level=0.5,
    )


def _gains(run: RunFolder) -> Chart | None:
    """Gain in reward over the first policy against the distance from it; where the distance was measured."""
    paths: list[Any] = []
    for index, (key, label) in enumerate((("reward_gain", "gated reward"), ("guard_gain", "guard"))):
        points = [
            (_kl(row), row[key]["value"], name)
            for name, row in _policies(run).items()
            if key in row and is_number(_kl(row))
        ]
        if points:
            kl, gain, names = (list(column) for column in zip(*points, strict=True))
            paths.append((label, [0.0, *kl], [0.0, *gain], [next(iter(_policies(run))), *names], style_of(index)))
    if not paths:
        return None
    return path_chart(
        f"policies-gains-{run.label_id}",
        f"{run.label}: gain against distance",
        "Good policies lie high and to the left; a guard that does not rise with the reward has seen through it.",
        paths,
        x_label="KL to the first policy (nats a response)",
        y_label="gain over the first policy (logit)",
    )


def _table(run: RunFolder) -> Table:
    policies = _policies(run)
    scores = {key: label for key, label in _SCORES.items() if any(key in row for row in policies.values())}
    gains = {key: label for key, label in _GAINS.items() if any(key in row for row in policies.values())}
    steps = gains if len(policies) > 2 and all("over_previous" in row for row in policies.values()) else {}
    has_kl = any(is_number(_kl(row)) for row in policies.values())
    changes = {key: label for key, label in _CHANGES.items() if all(key in row for row in policies.values())}
    truth = _TRUTH if any("truth" in row for row in policies.values()) else {}
    rows = [
        [
            text(name, "name"),
            *(interval(row.get(key), "+.2f") for key in [*scores, *gains]),
            *(interval(row["over_previous"].get(key), "+.2f") for key in steps),
            *(interval(row.get(key), ".0%") for key in _RATES),
            *(interval(row[key], "+.0%") for key in changes),
            *(interval(row.get("truth", {}).get(key), ".0%" if "rate" in key else ".3f") for key in truth),
            *([interval(row.get("kl"), ".1f")] if has_kl else []),
            number(row.get("truncated_rate"), ".0%"),
            number(row.get("mean_words"), ".0f"),
            number(row.get("distinct_2"), ".2f"),
        ]
        for name, row in policies.items()
    ]
    columns = [
        "policy", *scores.values(), *gains.values(), *(f"{label} over the one before" for label in steps.values()),
        *_RATES.values(), *(f"{label}, change" for label in changes.values()), *truth.values(),
        *(["KL"] if has_kl else []), "cut off", "words", "distinct-2",
    ]  # fmt: skip
    return Table(f"{run.label}: policies on {run.result['prompts']:,} held-out prompts", columns, rows)


def _adherence(run: RunFolder) -> Chart | None:
    curves = []
    for index, (name, row) in enumerate(_policies(run).items()):
        entries = row["by_turn"]
        values, low, high = ([entry[key] for entry in entries] for key in ("value", "low", "high"))
        curves.append(Curve(name, range(1, len(entries) + 1), values, style_of(index), low, high, markers=True))
    return curve_chart(
        f"adherence-{run.label_id}",
        f"{run.label}: answers that keep the instruction, by turn",
        "Without Ghost Attention the curve falls after the first turns; with it, it should stay up (Llama 2, Table "
        "30).",
        curves,
        x_label="user turn (the instruction stands in the first only)",
        y_label="share of answers, with 95 % interval",
        percent=True,
    )


def _reported(run: RunFolder) -> list[int]:
    longest = max(len(row["by_turn"]) for row in _policies(run).values())
    return [turn for turn in run.result["report_turns"] if turn <= longest]


def _adherence_by_kind(run: RunFolder) -> Chart | None:
    if not (turns := _reported(run)):
        return None
    last = str(turns[-1])
    rows: dict[str, dict[str, Row]] = {}
    for name, row in _policies(run).items():
        for kind, by_turn in row["by_kind"].items():
            if last in by_turn:
                rows.setdefault(kind.replace("_", " "), {})[name] = by_turn[last]
    return interval_chart(
        f"adherence-kinds-{run.label_id}",
        f"{run.label}: adherence at turn {last} by kind of instruction",
        "Kinds that nobody keeps are too hard for the model; more dialogues of them will not help.",
        rows,
        x_label="share of answers, with 95 % interval",
        percent=True,
    )


def _kept(entry: Row, run: RunFolder) -> Cell:
    """Adherence at a turn, with the number of dialogues where some had ended before."""
    cell = interval(entry, ".0%")
    if entry["count"] == run.result["dialogues"]:
        return cell
    return replace(cell, detail=f"{cell.detail} {entry['count']} dialogues".strip())


def _adherence_table(run: RunFolder) -> Table:
    turns = _reported(run)
    rows = []
    for name, row in _policies(run).items():
        reached = len(row["by_turn"])
        kept = [_kept(row["by_turn"][turn - 1], run) if turn <= reached else text("–") for turn in turns]
        gained = [interval(row["gain"].get(str(turn)), "+.0%") for turn in turns]
        rows.append([text(name, "name"), *kept, *gained])
    columns = ["policy", *(f"turn {turn}" for turn in turns), *(f"gain at turn {turn}" for turn in turns)]
    title = f"{run.label}: adherence in {run.result['dialogues']} dialogues"
    return Table(title, columns, rows, "Gains are paired differences from the first policy.")
