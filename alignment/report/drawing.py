"""Figures as inline SVG with the page's colours, so that light, dark and printed pages need no second drawing."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for the colour-blind (https://jfly.uni-koeln.de/color/), without its yellow, which no
# white paper shows. The drawing has these colours; in the page they stand for variables of its style sheet.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7d7d7d")
INK, GRID, PAPER = "#1a1a1a", "#d8d8d8", "#fefefe"
_VARIABLES = {color: f"var(--series-{index})" for index, color in enumerate(PALETTE)}
_VARIABLES |= {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--card)"}
_COLOR = re.compile("|".join(_VARIABLES))

DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.6  # inches; about the width of a phone's screen, so that no text is shrunk there
MAX_LABEL = 44

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "align",  # ids depend on the figure alone: the same runs give the same bytes
    "text.parse_math": False,  # labels are names from data, in which a dollar is a dollar
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": True,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "legend.fontsize": 9,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.2,
    "path.simplify_threshold": 0.3,
} | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
_STYLE |= {"grid.color": GRID, "axes.facecolor": "none", "figure.facecolor": "none", "legend.labelcolor": INK}


@dataclass(frozen=True)
class Style:
    """How one series looks; two differ in colour, dashes and marker, so that none of them alone has to tell.

    The second seven have the colours and markers of the first, but empty.
    """

    color: str
    dash: Any
    marker: str
    fill: str


@dataclass(frozen=True)
class Chart:
    """A figure of the page: heading, drawing, and one sentence that says what to look for."""

    name: str
    title: str
    caption: str
    svg: str


def style_of(index: int, *, dash: int | None = None) -> Style:
    """The look of the series with this number; `dash` overrides the number of its dashes."""
    dash = index if dash is None else dash
    color = PALETTE[index % len(PALETTE)]
    fill = PAPER if index // len(PALETTE) % 2 else color
    return Style(color, DASHES[dash % len(DASHES)], MARKERS[index % len(MARKERS)], fill)


def short(label: str) -> str:
    """A name from data as a label: one line, no characters that a file of XML may not hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL // 2]}…{text[1 - MAX_LABEL // 2 :]}"


def shortened(labels: Iterable[str]) -> list[str]:
    """Names from data as labels, no two of them alike: of long names only their ends are shown."""
    found: list[str] = []
    for label in labels:
        text, number = short(label), 1
        while text in found:
            number += 1
            text = f"{short(label)} ({number})"
        found.append(text)
    return found


@contextmanager
def drawing(height: float = 2.9) -> Iterator[Figure]:
    """A new figure of this height in inches, in the report's style; draw it and `inline` it inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has its own fonts
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def legend(figure: Figure, handles: dict[str, Any]) -> None:
    """A legend below the axes, by label; makes the figure as much higher as it needs."""
    if not handles:
        return
    labels = shortened(handles)
    widest = max(map(len, labels))
    columns = max(1, min(len(handles), int(66 / (widest + 9))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
    figure.legend(handles.values(), labels, loc="outside lower left", ncols=columns)


def inline(figure: Figure, name: str, title: str, caption: str) -> Chart:
    """The finished figure as a chart whose ids begin with `name`, which must be unique in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # its style rules would reach the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _themed(_local(key), value, name) for key, value in element.attrib.items()}
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "class": "chart",
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": title,
    }
    return Chart(name, title, caption, ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _themed(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{name}-")
    return _COLOR.sub(lambda found: _VARIABLES[found.group()], value) if key == "style" else value
