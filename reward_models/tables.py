"""Reports on reward models for a terminal. Names that users gave are `Text`, in which no bracket is rich's markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from alignment.metrics import show

BAR_WIDTH = 24
Report = Mapping[str, Any]


def report_tables(report: Report, title: str) -> Group:
    """Accuracy and its groups; calibration and length; histograms; detection of unsafe responses where labelled."""
    parts = [_accuracy(report, title), _calibration(report), _histogram(report)]
    if detection := report.get("unsafe_detection"):
        parts.append(_unsafe(detection))
        if again := detection.get("repeated_labels"):
            parts.append(_repeated_labels(again))
    return Group(*parts)


def comparison_table(report: Report, first: str, second: str) -> Table:
    """Two models on the same pairs."""
    models = (Column(Text(name)) for name in (first, second))
    table = Table("pairs of", *models, "difference", "p", "n", title="Accuracy, pair by pair", title_justify="left")
    for name, row in [("all", report), *report["by_source"].items()]:
        difference = row["difference"]
        table.add_row(
            Text(name),
            show(row["first"]),
            show(row["second"]),
            show(difference, "+.3f", bounds=True),
            f"{row['p_value']:.3g}",
            str(difference["count"]),
        )
    return table


def _accuracy(report: Report, title: str) -> Table:
    heading = Text(f"{title}, at most {report['max_length']} tokens each", style="table.title")
    table = Table("pairs of", "accuracy", "95 % interval", "n", title=heading, title_justify="left")
    rows = [("all", report["accuracy"])]
    for group in ("by_source", "by_rating", "by_safety_bin"):
        if len(report[group]) > 1:
            rows += [(f"  {name}", entry) for name, entry in report[group].items()]
    rows += [("(rule: longer wins)", report["longer_wins"]), ("(rule: shorter wins)", report["shorter_wins"])]
    if label := report.get("safety_label_accuracy"):
        rows.append(("(safety label right)", label))
    for name, entry in rows:
        count, prompts = entry["count"], entry.get("prompts")
        number = f"{count} of {prompts} prompts" if prompts is not None and prompts < count else str(count)
        table.add_row(Text(name), show(entry), f"{entry['low']:.3f} - {entry['high']:.3f}", number)
    return table


def _calibration(report: Report) -> Table:
    correlation = report["length_correlation"]
    within = "-" if correlation["within_pairs"] is None else f"{correlation['within_pairs']:+.2f}"
    title = f"Calibration: ECE {report['calibration']['ece']:.3f}; correlation of score and length in pairs {within}"
    table = Table("model's confidence", "mean", "right", "n", title=title, title_justify="left")
    for entry in report["calibration"]["bins"]:
        table.add_row(
            f"{entry['low']:.2f} - {entry['high']:.2f}",
            f"{entry['confidence']:.3f}",
            f"{entry['accuracy']:.3f}",
            str(entry["count"]),
        )
    return table


def _histogram(report: Report) -> Table:
    counts = report["histogram"]
    edges, most = counts["edges"], max(*counts["chosen"], *counts["rejected"])
    table = Table("score", "chosen", "rejected", title="Scores (logits)", title_justify="left")
    for index, low in enumerate(edges[:-1]):
        bars = (_bar(counts[side][index], most) for side in ("chosen", "rejected"))
        table.add_row(f"{low:+.2f} to {edges[index + 1]:+.2f}", *bars)
    return table


def _unsafe(detection: Report) -> Table:
    auc = detection["roc_auc"]
    title = f"Finding {detection['unsafe']} unsafe responses among {detection['safe'] + detection['unsafe']} labelled"
    if auc is not None:
        title += f": ROC AUC {show(auc, bounds=True)}"
    table = Table("unsafe where P(safe) <", "precision", "recall", "flagged", title=title, title_justify="left")
    rows = list(detection["at_threshold"])
    if detection["at_precision"] is not None:
        rows.append(detection["at_precision"])
    for row in rows:
        cells = (show(row[key], bounds=True) for key in ("precision", "recall"))
        table.add_row(f"{row['threshold']:.3f}", *cells, str(row["flagged"]))
    if detection["at_precision"] is None:
        table.add_row(f"(none reaches precision {detection['wanted_precision']:.2f})", "", "", "")
    return table


def _repeated_labels(again: Report) -> Text:
    people, model = (show(again[who], bounds=True) for who in ("people", "model"))
    count = again["people"]["count"]
    return Text(f"ROC AUC on {count} repeated labels: people's other labels of the response {people}, model {model}")


def _bar(count: int, most: int) -> str:
    return f"{'#' * round(BAR_WIDTH * count / most)} {count}".strip() if count else ""
