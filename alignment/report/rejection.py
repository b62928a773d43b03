"""Rejection sampling: what more samples would gain, which temperature was chosen, what was selected."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.files import read_object
from alignment.report.charts import Curve, curve_chart
from alignment.report.drawing import Chart, style_of
from alignment.report.elements import Section, Table, interval, number, present, text
from alignment.report.reading import RunFolder, is_number


def section(runs: Sequence[RunFolder]) -> Section:
    """Potential and temperature curves of all rounds together, and a table."""
    rounds = [run for run in runs if run.stage == "reject" and run.result]
    columns = (
        "run", "prompts", "candidates", "kept", "temperature", "mean reward", "best of each prompt",
        "gain over the median", "gain over the baseline",
    )  # fmt: skip
    rows = [
        [
            text(run.label, "name"),
            *(number(run.result.get(key), ",") for key in ("prompts", "candidates", "kept")),
            number(run.result.get("temperature"), "g"),
            *(
                interval(run.result.get(key), "+.2f")
                for key in ("mean_reward", "mean_best_reward", "gain_over_median", "gain_over_baseline")
            ),
        ]
        for run in rounds
    ]
    charts = present([_potential(rounds), _temperatures(rounds)])
    return Section("reject", "Rejection sampling", charts=charts, tables=[Table("Rounds", columns, rows)])


def _potential(rounds: Sequence[RunFolder]) -> Chart | None:
    curves = []
    caption = (
        "The distance between the curves is what the best can gain, by reward alone: selection prefers answers that "
        "ended by themselves. Where best flattens, more samples are wasted (Llama 2, Fig. 7)."
    )
    if len(rounds) > 1:
        caption += " Rounds compare where their prompts, temperature and reward models are the same."
    for index, run in enumerate(rounds):
        path = run.path / "potential.json"
        curve = read_object(path) if path.is_file() else {}
        for place, kind in enumerate(("best", "median")):
            entries = curve.get(kind, [])
            values, low, high = ([entry[key] for entry in entries] for key in ("value", "low", "high"))
            band = (low, high) if kind == "best" and None not in [*low, *high] else (None, None)
            style = style_of(index if len(rounds) > 1 else place, dash=place)
            curves.append(Curve(f"{run.label}: {kind} of N", curve.get("n", []), values, style, *band, markers=True))
    return curve_chart(
        "potential",
        "Reward of the best and the median of N samples",
        caption,
        curves,
        x_label="samples of a prompt (N)",
        y_label="gated reward (logit)",
    )


def _temperatures(rounds: Sequence[RunFolder]) -> Chart | None:
    curves, chosen = [], []
    for index, run in enumerate(rounds):
        if not run.result.get("temperatures"):
            continue
        tried = {float(t): row["best"] for t, row in run.result["temperatures"].items()}
        tried = {t: entry for t, entry in sorted(tried.items()) if is_number(entry["value"])}
        values, low, high = ([entry[key] for entry in tried.values()] for key in ("value", "low", "high"))
        band = (low, high) if None not in [*low, *high] else (None, None)
        chosen.append(f"{run.result['temperature']:g}")
        label = f"{run.label} (chosen: {chosen[-1]})"
        curves.append(Curve(label, list(tried), values, style_of(index), *band, markers=True))
    return curve_chart(
        "temperatures",
        "Temperature choice",
        f"The chosen temperature ({', '.join(chosen)}) should be a peak of the best reward, not an end of the "
        "grid; bands are 95 % intervals over prompts (Llama 2, Fig. 8).",
        curves,
        x_label="sampling temperature",
        y_label="best reward of a prompt (logit)",
        whole_x=False,
    )
