"""Reward models: do they agree with people, on what, how sure are they, and do they only like long answers?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.metrics import wilson_interval
from alignment.report.charts import Curve, curve_chart, histogram_chart, interval_chart, metric_curves, scatter_chart
from alignment.report.drawing import Chart, style_of
from alignment.report.elements import Section, Table, interval, number, present, text
from alignment.report.reading import Row, RunFolder, is_number

MAX_POINTS = 300  # of chosen and of rejected responses in a scatter
_UNTOLD = {"unrated", "unknown", "unlabelled"}


def section(runs: Sequence[RunFolder]) -> Section:
    """Curves and estimates of all reward models together, scores and lengths of each."""
    models = [run for run in runs if run.stage == "rm"]
    names = [run.label for run in models]
    judged = {run: run.result["valid"] for run in models if run.result and run.result.get("valid")}
    curves = [
        curve_chart(
            "rm-loss",
            "Ranking loss in training",
            "Below the dashed line, log 2, a model ranks better than by guessing; far below it, it may learn by heart.",
            metric_curves(models, {"rm/ranking_loss": "loss"}),
            x_label="optimizer step",
            y_label="loss (nats a pair)",
            level=math.log(2),
        ),
        curve_chart(
            "rm-train-accuracy",
            "Accuracy in training",
            "Far above the held-out accuracy below means that the model learns the pairs by heart.",
            metric_curves(models, {"rm/accuracy": "accuracy"}),
            x_label="optimizer step",
            y_label="pairs ranked as people did",
            percent=True,
            level=0.5,
        ),
    ]
    accuracies = [
        interval_chart(
            "rm-accuracy",
            "Held-out accuracy",
            "A model whose interval reaches the dashed line, 50 %, may be guessing.",
            {"all held-out pairs": {run.label: valid["accuracy"] for run, valid in judged.items()}},
            x_label="pairs ranked as people did, with 95 % interval",
            percent=True,
            level=0.5,
            series=names,
        ),
        *(
            _accuracies(judged, part, title, caption, names)
            for part, title, caption in (
                (
                    "by_rating",
                    "Held-out accuracy by rating",
                    "Accuracy should rise with how much better the chosen response is (Llama 2, Table 8).",
                ),
                (
                    "by_source",
                    "Held-out accuracy by source",
                    "A source whose interval reaches the dashed line, 50 %, is one the model guesses at.",
                ),
                (
                    "by_safety_bin",
                    "Held-out accuracy by safety bin",
                    "Pairs of which only one response is safe should be the easiest for a safety model.",
                ),
            )
        ),
    ]
    each = [chart for run, valid in judged.items() for chart in (_histogram(run, valid), _scatter(run, valid))]
    charts = present([*curves, *accuracies, _calibration(judged, names), *each])
    tables = [_agreement(judged), _unsafe_detection(judged)]
    return Section("rm", "Reward models", charts=charts, tables=[table for table in tables if table.rows])


def _accuracies(
    judged: Mapping[RunFolder, Row], part: str, title: str, caption: str, series: Sequence[str]
) -> Chart | None:
    """All models in one figure; nothing where no row of any says what it is."""
    names = list(dict.fromkeys(name for valid in judged.values() for name in valid[part]))
    told = [name for name in names if len(names) > 1 or name not in _UNTOLD]
    if not told:
        return None
    rows = {}
    for name in told:
        having = {run.label: valid[part][name] for run, valid in judged.items() if name in valid[part]}
        rows[name.replace("_", " ")] = having
    look = {"x_label": "pairs ranked as people did, with 95 % interval", "percent": True, "level": 0.5}
    return interval_chart(f"rm-{part.replace('_', '-')}", title, caption, rows, **look, series=series)


def _calibration(judged: Mapping[RunFolder, Row], series: Sequence[str]) -> Chart | None:
    curves = [Curve("perfect", [0.5, 1.0], [0.5, 1.0], style_of(6, dash=2))]
    for run, valid in judged.items():
        bins = valid["calibration"]["bins"]
        estimates = [wilson_interval(entry["accuracy"] * entry["count"], entry["count"]) for entry in bins]
        bounds = [e.low for e in estimates], [e.high for e in estimates]
        sure = [entry["confidence"] for entry in bins]
        label = f"{run.label} (error {valid['calibration']['ece']:.3f})" if bins else run.label
        curves.append(
            Curve(label, sure, [e.value for e in estimates], style_of(series.index(run.label)), *bounds, markers=True)
        )
    return curve_chart(
        "rm-calibration",
        "Calibration",
        "On the diagonal a model is right as often as it is sure; below it is too sure, and PPO will believe it.",
        curves if len(curves) > 1 else [],
        x_label="how sure: sigmoid of the score difference",
        y_label="how often right",
        percent=True,
        percent_x=True,
    )


def _histogram(run: RunFolder, valid: Row) -> Chart:
    groups = {name: counts for name, counts in valid["histogram"].items() if name != "edges"}
    caption = "The further chosen lies right of rejected, the better; one narrow peak means that the scores say little."
    title, edges = f"{run.label}: held-out scores", valid["histogram"]["edges"]
    return histogram_chart(f"scores-{run.label_id}", title, caption, edges, groups, x_label="score (logit)")


def _scatter(run: RunFolder, valid: Row) -> Chart | None:
    rows = [row for row in run.rows("held_out_scores.jsonl") if is_number(row.get("score_chosen"))]
    step = max(1, math.ceil(len(rows) / MAX_POINTS))
    shown = rows[::step]
    groups = {
        side: (
            [max(1, len(row[side][0]["content"])) for row in shown],
            [row[f"score_{side}"] for row in shown],
        )
        for side in ("chosen", "rejected")
    }
    if not rows:
        return None
    correlation = valid["length_correlation"]["within_pairs"]
    found = "" if correlation is None else f" Within pairs Pearson's correlation is {correlation:+.2f}."
    caption = f"A cloud that rises to the right is a model that likes length, which PPO will exploit.{found}"
    title = f"{run.label}: score and length"
    labels = {"x_label": "characters of the response", "y_label": "score (logit)"}
    return scatter_chart(f"length-{run.label_id}", title, caption, groups, **labels)


def _agreement(judged: Mapping[RunFolder, Row]) -> Table:
    columns = (
        "run", "pairs", "accuracy", "safety label right", "longer wins", "correlation with length, within pairs",
        "calibration error", "mean of chosen", "mean of rejected",
    )  # fmt: skip
    rows = [
        [
            text(run.label, "name"),
            number(valid["pairs"], ","),
            interval(valid["accuracy"], ".1%"),
            interval(valid.get("safety_label_accuracy"), ".1%"),
            interval(valid.get("longer_wins"), ".1%"),
            number(valid["length_correlation"]["within_pairs"], "+.2f"),
            number(valid["calibration"]["ece"], ".3f"),
            number(valid["mean_chosen"], "+.2f"),
            number(valid["mean_rejected"], "+.2f"),
        ]
        for run, valid in judged.items()
    ]
    note = "“Longer wins” is the accuracy of preferring the longer response: a model should beat it."
    return Table("Agreement with people on held-out pairs", columns, rows, note)


def _unsafe_detection(judged: Mapping[RunFolder, Row]) -> Table:
    rows = []
    for run, valid in judged.items():
        found: Any = valid.get("unsafe_detection")
        if not found:
            continue
        points = [*found["at_threshold"], *([found["at_precision"]] if found.get("at_precision") else [])]
        for point in points:
            rows.append(
                [
                    text(run.label, "name"),
                    interval(found["roc_auc"], ".3f"),
                    number(point["threshold"], ".3f"),
                    interval(point["precision"], ".1%"),
                    interval(point["recall"], ".1%"),
                    number(point["flagged"], ","),
                ]
            )
    columns = ("run", "ROC AUC", "flagged below P(safe)", "precision", "recall", "flagged")
    return Table("Finding unsafe responses", columns, rows)
