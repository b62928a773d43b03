"""Figures: confidence intervals, and the metrics file with one flat object a step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.data import write_rows
from alignment.line_log import append_lines, whole_lines

Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, float | int | None]:
        """`{"value", "low", "high", "count"}`; null where a number cannot be given."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()} | {
            "count": self.count
        }

    @property
    def side(self) -> int:
        """See `side_of_zero`."""
        return side_of_zero(self.low, self.high)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def show(entry: Mapping[str, float | None], spec: str = ".3f", *, bounds: bool = False) -> str:
    """An interval's JSON as text: `0.512`, or `0.512 [0.489, 0.535]` with its bounds; `-` where there is no number."""
    value, low, high = (
        "-" if (number := entry[name]) is None else format(number, spec) for name in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]" if bounds else value


def side_of_zero(low: float | None, high: float | None) -> int:
    """On which side of 0 an interval lies: 1, -1, or 0 where it holds 0 or has no bounds."""
    return 1 if low is not None and low > 0 else -1 if high is not None and high < 0 else 0


def wilson_interval(num_successes: float, count: int) -> Interval:
    """A rate with Wilson's 95 % score interval (Wilson 1927); half a success is allowed, for ties.

    With no observation the value is NaN and the interval [0, 1].
    """
    if count == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    rate, z2 = num_successes / count, Z_95**2
    center = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(rate, max(0.0, center - half), min(1.0, center + half), count)


def design_effect(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many times as large the variance of a mean is where values of one cluster go together; 1 at least.

    The sums of residuals by cluster (Kish 1965) against independent values. Where all values are the same nothing says
    how far they go together: then a cluster counts once. Of few clusters it is too small, as all such estimates are.
    """
    count = len(values)
    sums: dict[Hashable, float] = {}
    mean = math.fsum(values) / max(1, count)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) == count:
        return 1.0
    spread = math.fsum((value - mean) ** 2 for value in values)
    if len(sums) == 1 or spread == 0:
        return count / len(sums)
    between = math.fsum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return min(float(count), max(1.0, between / spread))


def mean_interval(values: Sequence[float]) -> Interval:
    """A mean with its normal 95 % interval, from the sample standard deviation (divisor n - 1).

    Of few values it is too narrow: by 17 % of eight, by 4 % of thirty.
    """
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = Z_95 * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def paired_rate_interval(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """The difference of two rates over the same observations, with Agresti and Min's 95 % interval (2005).

    Half an observation is added to each of the four kinds of pairs, so that pairs that all agree have an interval too.
    With no observation the value is NaN and the interval [-1, 1].
    """
    count = len(ours)
    if count == 0:
        return Interval(math.nan, -1.0, 1.0, 0)
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    center = (only_ours - only_theirs) / (count + 2)
    half = Z_95 * math.sqrt(((only_ours + only_theirs + 1) / (count + 2) - center**2) / (count + 2))
    return Interval((only_ours - only_theirs) / count, max(-1.0, center - half), min(1.0, center + half), count)


class MetricsLog:
    """`metrics.jsonl` of a run: one flat object a step, on disk at once so that a killed run keeps its curve."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends `{"step", "stage", name: number, ...}`."""
        append_lines(self.path, [{"step": step, "stage": self.stage, **values}])

    def column(self, name: str) -> list[float]:
        """One figure of every row that has it, in the order of steps."""
        return [row[name] for row, _ in whole_lines(self.path) if name in row]

    def last(self, name: str) -> float | None:
        """The newest value of a figure, or None."""
        return next(iter(reversed(self.column(name))), None)

    def truncate_after(self, step: int) -> None:
        """Drops rows beyond `step` (and a half-written last row), so that a resumed run does not repeat them."""
        if self.path.exists():
            write_rows(self.path, [row for row, _ in whole_lines(self.path) if row["step"] <= step])
