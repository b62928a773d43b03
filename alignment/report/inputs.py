"""What went in: rows kept and dropped, and the settings in which runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.headlines import counted
from alignment.report.elements import Section, Table, number, text
from alignment.report.reading import Row, RunFolder

_NOT_COUNTS = {"settings", "versions", "models", "made_from", "inputs", "seed", "num_processes", "max_length", "before"}
_NOTHING = "–"


def data(runs: Sequence[RunFolder]) -> Section:
    """Every source with its rows, and everything else that a manifest counted."""
    sources = [
        [
            text(run.label, "name"),
            text(_relative(source["name"], run)),
            number(source["rows"], ","),
            number(source["kept"], ","),
            text(counted(source["dropped"]) or _NOTHING),
            text((source.get("sha256") or "")[:10], "code"),
        ]
        for run in runs
        for source in run.manifest.get("inputs", [])
    ]
    counts = [
        [text(run.label, "name"), text(" · ".join(part.replace("_", " ") for part in path)), number(value, ",")]
        for run in runs
        for path, value in _counts(run.manifest)
    ]
    tables = [
        Table("Sources", ("run", "source", "rows", "kept", "dropped", "sha256"), sources),
        Table("Counted on the way", ("run", "what", "count"), counts, "What is zero is left out.", is_folded=True),
    ]
    return Section("data", "Data", tables=[table for table in tables if table.rows])


def settings(runs: Sequence[RunFolder]) -> Section:
    """For runs of the same stage (of the same name, where whole pipelines are compared), the settings that differ."""
    tables = []
    for group in _groups(runs):
        flat = [_flat_settings(run) for run in group]
        keys = sorted({key for values in flat for key in values})
        differing = [key for key in keys if len({values.get(key, _NOTHING) for values in flat}) > 1]
        rows = [[text(key, "code"), *(text(values.get(key, _NOTHING)) for values in flat)] for key in differing]
        if rows:
            title = "Differences between " + ", ".join(run.label for run in group)
            tables.append(Table(title, ("setting", *(run.label for run in group)), rows))
    intro = (
        "Only settings, seeds, weights of the models that were read, versions and commits in which the runs differ; "
        "config.yaml and manifest.json in each run have them all."
    )
    return Section("settings", "Settings", intro, tables=tables)


def _groups(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    across = len({run.pipeline for run in runs if run.pipeline}) > 1
    groups: dict[Any, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.name if across else (run.stage, run.kind == "gatt"), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def _flat_settings(run: RunFolder) -> dict[str, str]:
    manifest = run.manifest
    environment = {
        "seed": manifest.get("seed"),
        "auto_dtype": manifest.get("auto_dtype"),
        "num_processes": manifest.get("num_processes"),
        "git_commit": (manifest.get("git_commit") or "")[:10],
        "versions": manifest.get("versions", {}),
        **{f"weights.{key}": str(digest)[:10] for key, digest in (manifest.get("models") or {}).items()},
    }
    chosen = {key: value for key, value in run.settings.items() if key != "run"}
    return {
        ".".join(path): _relative(value if isinstance(value, str) else json.dumps(value), run)
        for path, value in _leaves({**chosen, **environment})
    }


def _relative(value: str, run: RunFolder) -> str:
    """Paths of runs beside this one without their folder, which says nothing about the settings."""
    folders = {str(run.path.parent), str(run.path.resolve().parent), *_recorded_folders(run)}
    for folder in sorted(folders - {".", "/"}, key=len, reverse=True):
        value = re.sub(rf"(?<![\w./-]){re.escape(folder)}/", "", value)  # a path that begins so, not one with it inside
    return value


def _recorded_folders(run: RunFolder) -> Iterator[str]:
    """Where the runs that this one was made from were at the time; the folder may have been moved since."""
    if run.pipeline is None:
        return
    siblings = {sibling.name for sibling in run.path.resolve().parent.iterdir() if sibling.is_dir()}
    for key in run.manifest.get("made_from", {}):
        path = Path(key.partition(": ")[2])
        yield from (str(folder.parent) for folder in (path, *path.parents) if folder.name in siblings)


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _counts(manifest: Row) -> Iterator[tuple[tuple[str, ...], int]]:
    chosen = {key: value for key, value in manifest.items() if key not in _NOT_COUNTS}
    for path, value in _leaves(chosen):
        if isinstance(value, int) and not isinstance(value, bool) and value:
            yield path, value
