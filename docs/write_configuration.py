"""Writes `configuration.md` from the settings themselves: `python docs/write_configuration.py`.

`tests/test_docs.py` compares the page with the code, so a setting that was added or changed without it is noticed.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from alignment import config
from alignment.cli.stages import STAGES
from alignment.config import describe
from rlhf.config import RewardSection

PAGE = Path(__file__).with_name("configuration.md")
SHARED: dict[str, type[BaseModel]] = {
    "model": config.ModelSection,
    "lora": config.LoraSection,
    "optim": config.OptimSection,
    "train": config.TrainSection,
    "data": config.DataSection,
    "prompts": config.PromptSection,
    "sampling": config.SamplingSection,
    "run": config.RunSection,
    "rewards": RewardSection,
}
INTRODUCTION = """# Configuration

<!-- Written by docs/write_configuration.py: change the docstrings of the settings, then run it. -->

Every setting with its default, meaning and the paper's value where it gives one. `align STAGE --help` shows the same in
a terminal. A setting is written `key=value` on the command line or nested in YAML
([pipelines and runs](pipelines.md#settings)). Sections that stages share come first; a stage lists them, and below what
it adds or sets otherwise.
"""
ESCAPED_BAR = chr(92) + "|"
_PAPER = re.compile(r"\s*Paper: (.+?)\.(?=\s+[A-Z]|$)")

Row = tuple[str, str, str]  # type, default, meaning


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Shared sections\n"]
    known: dict[tuple[str, Row], str] = {}  # a setting's last name and what it is -> its shared section
    for name, cls in SHARED.items():
        own = _part(parts, f"### {name}", cls, f"{name}.", known)
        known |= {(key, row): name for key, row in own}
    for stage in STAGES.values():
        for kind in (None, *stage.kinds):
            title = f"## {stage.name}{f': kind={kind}' if kind else ''}"
            _part(parts, title, stage.of_kind(kind).config_class(), "", known)
    return "\n".join(parts)


def _part(
    parts: list[str], title: str, cls: type[BaseModel], prefix: str, known: dict[tuple[str, Row], str]
) -> list[tuple[str, Row]]:
    """Adds the part about one class: the shared sections it has, a table of the rest. Returns the rest."""
    taken: dict[str, str] = {}
    rest = []
    for key, *row in describe(cls):
        place, _, last = key.rpartition(".")
        section = known.get((last, tuple(row)))
        if place and section:
            if place.partition(".")[0] in SHARED and "." in place:  # said where that section is
                continue
            taken.setdefault(place, f"- `{prefix}{place}`: see [{section}](#{section}). {_meaning(cls, place)}".strip())
        else:
            rest.append((key, tuple(row)))
    parts.append(f"{title}\n\n{(cls.__doc__ or '').strip().splitlines()[0]}\n")
    if taken:
        parts.append("\n".join(taken.values()) + "\n")
    parts.append(_table(prefix, rest))
    return rest


def _meaning(cls: type[BaseModel], path: str) -> str:
    """The docstring of a section where it stands, with a word where it may be left out."""
    for part in path.split("."):
        info = cls.model_fields[part]
        cls = next((found for found in _classes(info.annotation) if issubclass(found, BaseModel)), cls)
    optional = "Optional. " if not info.is_required() and info.default is None else ""
    return optional + " ".join((info.description or "").split())


def _classes(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _classes(part)]


def _table(prefix: str, rows: list[tuple[str, Row]]) -> str:
    """A Markdown table of settings; without a column for the paper's values where it gives none."""
    cells = []
    for key, (kind, default, text) in rows:
        found = _PAPER.search(text)
        shown = default if default in ("", "required") else f"`{default}`"
        meaning = _PAPER.sub("", text).strip()
        cells.append([f"`{prefix}{key}`", f"`{kind}`", shown, meaning, found.group(1) if found else ""])
    names = ["setting", "type", "default", "meaning", "paper"]
    width = len(names) if any(row[-1] for row in cells) else len(names) - 1
    lines = [names, ["---"] * len(names), *cells]
    return "".join(f"| {' | '.join(cell.replace('|', ESCAPED_BAR) for cell in row[:width])} |\n" for row in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
