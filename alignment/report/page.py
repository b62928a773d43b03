"""The page: sections of the runs in a template, with its style sheet and script inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from alignment.errors import RunError
from alignment.report import answers, evaluation, fine_tuning, inputs, overview, ppo, rejection, reward_models
from alignment.report.elements import Section
from alignment.report.reading import RunFolder, read_runs
from alignment.runs import write_text

FILES = Path(__file__).parent / "page"
MARK = '<meta name="generator" content="align report">'


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of runs and folders of runs; the same files give the same bytes.

    Args:
        paths: run folders, or folders of runs, as `read_runs` takes them.
        out: the file to write; `report.html` in the only path, or in the working directory where there are several.

    Returns:
        The file that was written.

    Raises:
        RunError: a path holds no run, a run's file is damaged, or `out` cannot be written.
        DataError: a run's rows are damaged.
    """
    out = out or ((paths[0] if len(paths) == 1 else Path()) / "report.html")
    runs = read_runs(paths)
    _check_replaceable(out)
    title = ", ".join(dict.fromkeys(run.pipeline or run.label for run in runs))
    page = render(runs, title)
    # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark.
    write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    return out


def render(runs: Sequence[RunFolder], title: str) -> str:
    """The page as text."""
    script = (FILES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(FILES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title,
        mark=Markup(MARK),
        style=Markup((FILES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        facts=overview.facts(runs),
        warnings=overview.warnings(runs),
        sections=sections_of(runs),
    )


def sections_of(runs: Sequence[RunFolder]) -> list[Section]:
    """All sections that have something to show, the outcome first, then the stages in order."""
    made = [
        overview.section(runs),
        evaluation.section(runs),
        answers.section(runs),
        fine_tuning.section(runs),
        fine_tuning.made_data(runs),
        evaluation.ghost_attention(runs),
        reward_models.section(runs),
        rejection.section(runs),
        ppo.section(runs),
        inputs.data(runs),
        inputs.settings(runs),
    ]
    return [section for section in made if not section.is_empty]


def _check_replaceable(out: Path) -> None:
    """Raises RunError where `out` has no folder, or is a file that no report is."""
    if not out.parent.is_dir():
        raise RunError(f"{out}: there is no folder {out.parent}. Make it first.")
    if out.is_dir():
        raise RunError(f"{out}: is a folder. Name a file.")
    if out.exists() and MARK.encode() not in out.read_bytes()[:2000]:
        raise RunError(f"{out}: exists and is no report. Name another file, or remove it.")
