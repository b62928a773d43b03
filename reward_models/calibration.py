"""Whether a reward model's scores mean what they say: sigmoid(score difference) as a probability, and length bias."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

NUM_RELIABILITY_BINS = 10
NUM_HISTOGRAM_BINS = 20


def reliability(
    chosen: Sequence[float], rejected: Sequence[float], *, num_bins: int = NUM_RELIABILITY_BINS
) -> dict[str, Any]:
    """Reliability table and expected calibration error of P(chosen) = sigmoid(chosen - rejected).

    A model is `confidence = sigmoid(|difference|)` sure of the response it scores higher, and right where that is the
    chosen one (half right in a tie). Pairs are binned by confidence, 0.5 to 1 in bins of equal width; the error is
    the mean distance of a bin's confidence from its accuracy, weighted by pairs (Guo et al. 2017,
    arXiv:1706.04599, Eq. 3).

    Returns:
        `{"ece", "bins": [{"low", "high", "confidence", "accuracy", "count"}, ...]}`, empty bins left out.
    """
    width = 0.5 / num_bins
    found: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for c, r in zip(chosen, rejected, strict=True):
        confidence = sigmoid(abs(c - r))
        right = 1.0 if c > r else 0.5 if c == r else 0.0
        found[min(num_bins - 1, int((confidence - 0.5) / width))].append((confidence, right))
    bins = [
        {
            "low": round(0.5 + index * width, 6),
            "high": round(0.5 + (index + 1) * width, 6),
            "confidence": statistics.fmean(confidence for confidence, _ in members),
            "accuracy": statistics.fmean(right for _, right in members),
            "count": len(members),
        }
        for index, members in enumerate(found)
        if members
    ]
    total = sum(entry["count"] for entry in bins)
    error = sum(entry["count"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins)
    return {"ece": error / total if total else math.nan, "bins": bins}


def length_bias(
    scores: Sequence[float], lengths: Sequence[int], differences: Sequence[float], length_differences: Sequence[int]
) -> dict[str, float | None]:
    """Pearson correlation of scores with lengths: over all responses, and over the differences inside pairs.

    None where one of the two does not vary.
    """
    return {
        "responses": _correlation(scores, lengths),
        "within_pairs": _correlation(differences, length_differences),
    }


def histogram(
    groups: dict[str, Sequence[float]], *, num_bins: int = NUM_HISTOGRAM_BINS
) -> dict[str, list[float] | list[int]]:
    """Counts of each group's scores over shared bins of equal width: `{"edges": num_bins + 1 numbers, name: ...}`."""
    everything = [score for scores in groups.values() for score in scores]
    low, high = min(everything), max(everything)
    width = (high - low) / num_bins or 1.0
    edges = [low + index * width for index in range(num_bins + 1)]
    counts: dict[str, Any] = {"edges": edges}
    for name, scores in groups.items():
        counts[name] = [0] * num_bins
        for score in scores:
            counts[name][min(num_bins - 1, max(0, bisect_right(edges, score) - 1))] += 1
    return counts


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    try:
        return statistics.correlation(first, second)
    except statistics.StatisticsError:  # fewer than two values, or one of the sides is constant
        return None
