"""How well a reward model agrees with people: accuracy by source, rating and safety bin, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from alignment.dialogue import RATINGS, PreferencePair, safety_bin
from alignment.metrics import Interval, wilson_interval


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> Interval:
    """Share of pairs whose chosen response scores higher; a tie counts half. Llama 2 Sec. 3.2.2, Table 7."""
    wins = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True))
    return wilson_interval(wins, len(chosen))


def label_accuracy(scores: Sequence[float], labels: Sequence[bool | None]) -> Interval:
    """Share of labelled responses on the right side of 0, i.e. of P(safe) = 0.5."""
    judged = [(score > 0) == label for score, label in zip(scores, labels, strict=True) if label is not None]
    return wilson_interval(sum(judged), len(judged))


def evaluate_pairs(
    pairs: Sequence[PreferencePair], chosen: Sequence[float], rejected: Sequence[float]
) -> dict[str, Any]:
    """Accuracy overall, per source, per rating (Table 8) and per safety bin, "longer wins" beside it; JSON-ready."""
    labels = [label for pair in pairs for label in (pair.chosen_safe, pair.rejected_safe)]
    scores = [score for both in zip(chosen, rejected, strict=True) for score in both]
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "accuracy": pair_accuracy(chosen, rejected).to_json(),
        "by_source": _by(pairs, chosen, rejected, lambda pair: pair.source or "unknown"),
        "by_rating": _by(pairs, chosen, rejected, lambda pair: pair.rating or "unrated", order=RATINGS),
        "by_safety_bin": _by(pairs, chosen, rejected, safety_bin),
        "longer_wins": pair_accuracy([len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]).to_json(),
        "mean_chosen": sum(chosen) / max(1, len(chosen)),
        "mean_rejected": sum(rejected) / max(1, len(rejected)),
    }
    if any(label is not None for label in labels):
        report["safety_label_accuracy"] = label_accuracy(scores, labels).to_json()
    return report


def report_table(report: dict[str, Any], title: str) -> Table:
    """The report for a terminal."""
    table = Table("pairs of", "accuracy", "95 % interval", "n", title=title, title_justify="left")
    for name, entry in [("all", report["accuracy"]), *_groups(report)]:
        table.add_row(name, f"{entry['value']:.3f}", f"{entry['low']:.3f} - {entry['high']:.3f}", str(entry["count"]))
    longer = report["longer_wins"]
    table.add_row("(the longer response)", f"{longer['value']:.3f}", f"{longer['low']:.3f} - {longer['high']:.3f}", "")
    if label := report.get("safety_label_accuracy"):
        table.add_row(
            "(safety label right)", f"{label['value']:.3f}", f"{label['low']:.3f} - {label['high']:.3f}",
            str(label["count"]),
        )  # fmt: skip
    return table


def _by(
    pairs: Sequence[PreferencePair],
    chosen: Sequence[float],
    rejected: Sequence[float],
    key: Callable[[PreferencePair], str],
    order: Sequence[str] = (),
) -> dict[str, Any]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(key(pair), []).append(index)
    rank = {name: position for position, name in enumerate(order)}
    return {
        name: pair_accuracy([chosen[i] for i in groups[name]], [rejected[i] for i in groups[name]]).to_json()
        for name in sorted(groups, key=lambda name: (rank.get(name, len(rank)), name))
    }


def _groups(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for group in ("by_source", "by_rating", "by_safety_bin"):
        if len(report[group]) > 1:
            rows += [(f"  {name}", entry) for name, entry in report[group].items()]
    return rows
