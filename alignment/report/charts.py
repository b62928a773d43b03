"""The kinds of charts that the report has: curves, estimates with intervals, bars, histograms, points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.report.drawing import INK, PAPER, Chart, Style, drawing, inline, legend, short, shortened, style_of
from alignment.report.reading import Row, RunFolder, is_number

SMOOTHED_FROM = 30  # points; shorter curves are drawn as they are
MAX_ROWS = 24


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `low` and `high` are the band around it, `pale` draws it as the background of another."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    markers: bool = False
    pale: bool = False


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over an odd number of values, fewer at the ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def metric_curves(runs: Sequence[RunFolder], metrics: Mapping[str, str]) -> list[Curve]:
    """Curves of metrics (name to label) over the steps of runs: smoothed over a pale one where they are long."""
    found = [
        (number, place, run, label, *run.series(metric))
        for number, run in enumerate(runs)
        for place, (metric, label) in enumerate(metrics.items())
        if run.series(metric)[0]
    ]
    many_runs, many_metrics = len({run for _, _, run, *_ in found}) > 1, len({m for _, m, *_ in found}) > 1
    curves = []
    for number, place, run, label, steps, values in found:
        name = f"{run.label}: {label}" if many_runs and many_metrics else run.label if many_runs else label
        style = style_of(number, dash=place) if many_runs and many_metrics else style_of(number if many_runs else place)
        if len(values) >= SMOOTHED_FROM:
            curves.append(Curve("", steps, values, style, pale=True))
            values = smoothed(values, max(5, len(values) // 12))
        curves.append(Curve(name, steps, values, style, markers=len(values) < SMOOTHED_FROM))
    return curves


def curve_chart(
    name: str,
    title: str,
    caption: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    percent_x: bool = False,
    whole_x: bool = True,
    level: float | None = None,
) -> Chart | None:
    """Lines over a number; nothing where there are no points. `level` is a horizontal line to compare with."""
    if not any(curve.x for curve in curves):
        return None
    handles = {}
    with drawing() as figure:
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        if level is not None:
            axes.axhline(level, color=INK, linewidth=0.9, dashes=(4, 3))
        for curve in curves:
            if curve.pale:
                axes.plot(curve.x, curve.y, color=curve.style.color, linewidth=0.8, alpha=0.35)
                continue
            marker = curve.style.marker if curve.markers else None
            look = {"color": curve.style.color, "linestyle": curve.style.dash, "markerfacecolor": curve.style.fill}
            [line] = axes.plot(curve.x, curve.y, marker=marker, **look)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=curve.style.color, alpha=0.16, linewidth=0)
            handles[curve.label] = line
        if percent_x:
            _percent(axes.xaxis)
        elif whole_x:
            _whole_steps(axes.xaxis)
        if percent:
            _percent(axes.yaxis)
        legend(figure, handles if len(handles) > 1 else {})
        return inline(figure, name, title, caption)


def interval_chart(
    name: str,
    title: str,
    caption: str,
    rows: Mapping[str, Mapping[str, Row]],
    *,
    x_label: str,
    percent: bool = False,
    level: float | None = None,
    series: Sequence[str] = (),
) -> Chart | None:
    """Estimates with their 95 % intervals, one row a thing and one mark a series, the row's name above its marks.

    Args:
        rows: by row and series, `{"value", "low", "high", "count"}`; entries without a number are left out.
        level: a vertical line to compare with, e.g. 0.5 for guessing.
        series: all series in order where not every figure has all, so that each looks the same in all of them.
    """
    found = {row: {key: e for key, e in entries.items() if is_number(e["value"])} for row, entries in rows.items()}
    found = {row: entries for row, entries in list(found.items()) if entries}
    series = list(dict.fromkeys([*series, *(key for entries in rows.values() for key in entries)]))
    shown = dict(list(found.items())[:MAX_ROWS])
    if not shown:
        return None
    if len(found) > MAX_ROWS:
        caption += f" The first {MAX_ROWS} of {len(found)} are drawn."
    handles, y = {}, 0.0  # y runs downwards in inches
    with drawing() as figure:
        axes = figure.add_subplot(xlabel=x_label)
        if level is not None:
            axes.axvline(level, color=INK, linewidth=0.9, dashes=(4, 3), zorder=0.6)
        names = dict(zip(shown, shortened(shown), strict=True))
        for row, entries in shown.items():
            counts = "/".join(dict.fromkeys(str(entry["count"]) for entry in entries.values() if "count" in entry))
            label = f"{names[row]}  ({counts})" if counts else names[row]
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}  # over the grid and the level
            axes.text(0, y + 0.15, label, transform=axes.get_yaxis_transform(), size=9, bbox=box)
            y += 0.2
            for key, entry in entries.items():
                y += 0.15
                handles[key] = _mark(axes, y - 0.08, entry, style_of(series.index(key)))
            y += 0.08
        axes.set(ylim=(y + 0.04, -0.03), yticks=[])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.04)
        if percent:
            _percent(axes.xaxis)
        figure.set_figheight(y + 0.62)
        legend(figure, handles if len(handles) > 1 else {})
        return inline(figure, name, title, caption)


def bar_chart(name: str, title: str, caption: str, bars: Mapping[str, float], *, x_label: str, spec: str) -> Chart:
    """Horizontal bars from zero with their values as text (`spec` formats them)."""
    with drawing(0.5 + 0.24 * len(bars)) as figure:
        axes = figure.add_subplot(xlabel=x_label)
        places = list(range(len(bars)))
        axes.barh(places, list(bars.values()), height=0.62, color=style_of(0).color)
        for place, value in zip(places, bars.values(), strict=True):
            axes.annotate(
                format(value, spec), (value, place), (3, 0), textcoords="offset points", va="center", size=8.5
            )
        axes.set_yticks(places, shortened(bars))
        axes.set(ylim=(len(bars) - 0.4, -0.6), xlim=(0, 1.16 * max(bars.values()) or 1))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return inline(figure, name, title, caption)


def histogram_chart(
    name: str, title: str, caption: str, edges: Sequence[float], groups: Mapping[str, Sequence[int]], *, x_label: str
) -> Chart:
    """Counts of groups over the same bins, as outlines over pale areas."""
    handles = {}
    with drawing() as figure:
        axes = figure.add_subplot(xlabel=x_label, ylabel="responses")
        for index, (label, counts) in enumerate(groups.items()):
            style = style_of(index)
            axes.stairs(counts, edges, fill=True, color=style.color, alpha=0.18)
            handles[label] = axes.stairs(counts, edges, color=style.color, linestyle=style.dash, linewidth=1.8)
        legend(figure, handles)
        return inline(figure, name, title, caption)


def scatter_chart(
    name: str,
    title: str,
    caption: str,
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
) -> Chart:
    """Points of groups, on a logarithmic x axis."""
    handles = {}
    with drawing() as figure:
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, xscale="log")
        for index, (label, (x, y)) in enumerate(groups.items()):
            style = style_of(index)
            options = {"color": style.color, "alpha": 0.55, "markersize": 3, "markeredgewidth": 0.8}
            if index:
                options["markerfacecolor"] = "none"
            [handles[label]] = axes.plot(x, y, linestyle="none", marker=style.marker, **options)
        _plain_numbers(axes.xaxis)
        legend(figure, handles)
        return inline(figure, name, title, caption)


def path_chart(
    name: str,
    title: str,
    caption: str,
    paths: Iterable[tuple[str, Sequence[float], Sequence[float], Sequence[str], Style]],
    *,
    x_label: str,
    y_label: str,
) -> Chart:
    """Points in an order, joined by lines, each with a text of its own (an empty one for none)."""
    handles = {}
    with drawing() as figure:
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        for label, x, y, texts, style in paths:
            axes.plot(x, y, color=style.color, linewidth=0.8, alpha=0.5)
            for place, point in enumerate(zip(x, y, strict=True)):  # the later, the stronger
                alpha = 0.25 + 0.75 * (place + 1) / len(x)
                look = {"color": style.color, "marker": style.marker, "markersize": 4.5, "alpha": alpha}
                look |= {"markerfacecolor": style.fill, "markeredgewidth": 0 if style.fill == style.color else 1}
                [handles[label]] = axes.plot(*point, linestyle="none", **look)
            for a, b, text in zip(x, y, texts, strict=True):
                if text:
                    axes.annotate(short(text), (a, b), (4, 4), textcoords="offset points", size=8.5)
        axes.margins(0.1)
        legend(figure, handles if len(handles) > 1 else {})
        return inline(figure, name, title, caption)


def _mark(axes: Any, y: float, entry: Row, style: Style) -> Any:
    if is_number(entry.get("low")) and is_number(entry.get("high")):
        axes.plot([entry["low"], entry["high"]], [y, y], color=style.color, linewidth=1.6, solid_capstyle="butt")
    look = {"color": style.color, "marker": style.marker, "markerfacecolor": style.fill, "markersize": 5}
    [mark] = axes.plot([entry["value"]], [y], linestyle="none", **look)
    return mark


def _whole_steps(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
