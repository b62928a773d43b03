"""The page: sections of the runs in a template, with its style sheet and script inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from alignment.errors import RunError
from alignment.files import check_new_file, write_text
from alignment.report import answers, evaluation, fine_tuning, inputs, overview, ppo, rejection, reward_models
from alignment.report.elements import Section
from alignment.report.reading import RunFolder, distinct_labels, read_runs

FILES = Path(__file__).parent / "page"
MARK = '<meta name="generator" content="align report">'


def write_report(paths: Sequence[Path], out: Path | None = None, *, stages: Collection[str] | None = None) -> Path:
    """Writes the report of runs and folders of runs; the same files give the same bytes.

    Args:
        paths: run folders, or folders of runs, as `read_runs` takes them.
        out: the file to write; `report.html` in the only path, or in the working directory where there are several.
        stages: the runs to show of folders of runs, by name; all where it is None.

    Returns:
        The file that was written.

    Raises:
        RunError: a path holds no run, a run's file is damaged, or `out` cannot be written.
        DataError: a run's rows are damaged.
    """
    out = out or ((paths[0] if len(paths) == 1 else Path()) / "report.html")
    runs = read_runs(paths, stages)
    _check_replaceable(out)
    page = render(runs, _title(runs))
    # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark.
    try:
        write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror}). Name another file with --out.") from error
    return out


def _title(runs: Sequence[RunFolder]) -> str:
    """The folders of runs, told apart, and the runs that stand in none of them."""
    folders = list(dict.fromkeys(run.pipeline for run in runs if run.pipeline is not None))
    names = dict(zip(folders, distinct_labels([folder.parts for folder in folders]), strict=True))
    return ", ".join(dict.fromkeys(names[run.pipeline] if run.pipeline else run.label for run in runs))


def render(runs: Sequence[RunFolder], title: str) -> str:
    """The page as text."""
    script = (FILES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections, missing = sections_of(runs)
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
        warnings=[*overview.warnings(runs), *missing],
        sections=sections,
    )


SECTIONS = (
    overview.section,
    evaluation.section,
    answers.section,
    fine_tuning.section,
    fine_tuning.made_data,
    evaluation.ghost_attention,
    reward_models.section,
    rejection.section,
    ppo.section,
    inputs.data,
    inputs.settings,
)


def sections_of(runs: Sequence[RunFolder]) -> tuple[list[Section], list[tuple[str, str]]]:
    """All sections that have something to show, the outcome first, then the stages in order.

    And run and sentence for what is missing: results of other versions may lack figures that a section needs.
    """
    made, missing = [], []
    for section_of in SECTIONS:
        try:
            made.append(section_of(runs))
        except KeyError:
            lacking = {run: figure for run in runs if (figure := _lacks(section_of, run)) is not None}
            found = section_of([run for run in runs if run not in lacking])
            made.append(found)
            missing += [
                (run.label, f"Not shown under “{found.title}”: its files have no “{figure}”: another version of align "
                            "wrote them, or they were changed since. Run the stage again to see it.")
                for run, figure in lacking.items()
            ]  # fmt: skip
    return [section for section in made if not section.is_empty], missing


def _lacks(section_of: Callable[[Sequence[RunFolder]], Section], run: RunFolder) -> str | None:
    """The figure for want of which a section cannot show this run."""
    try:
        section_of([run])
    except KeyError as error:
        return str(error.args[0])
    return None


def _check_replaceable(out: Path) -> None:
    """Raises RunError where `out` has no folder, or is a file that no report is."""
    if not out.exists():
        check_new_file(out)
    elif out.is_dir():
        raise RunError(f"{out}: is a folder. Name a file.")
    elif MARK.encode() not in out.read_bytes()[:2000]:
        raise RunError(f"{out}: exists and is no report. Name another file, or remove it.")
