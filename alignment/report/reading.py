"""Run folders as plain data: what a report can say is what their files say."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from alignment.errors import DataError, RunError
from alignment.files import read_object
from alignment.manifests import FINISHED, OUTDATED, read_manifest

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RunFolder:
    """One run. `label` is unique in the report; `pipeline` is the folder of runs it was found in, if it was."""

    path: Path
    manifest: Row
    label: str = ""
    pipeline: Path | None = None

    @property
    def name(self) -> str:
        """The folder's name: in a pipeline, the stage's."""
        return self.path.resolve().name

    @property
    def label_id(self) -> str:
        """The label as part of an id in the page; other characters would be no fragment of an address."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.label) + f"-{zlib.crc32(self.label.encode()):08x}"

    @property
    def stage(self) -> str:
        """`sft`, `gatt`, `distil`, `rm`, `reject`, `ppo` or `eval`."""
        return str(self.manifest.get("stage", "unknown"))

    @property
    def settings(self) -> Row:
        """The resolved settings without the run's place."""
        return self.manifest.get("settings", {})

    @property
    def kind(self) -> str | None:
        """`helpfulness` or `safety` of a reward model, `gatt` of an evaluation of Ghost Attention."""
        return (self.result or {}).get("kind") or self.settings.get("kind")

    @property
    def is_outdated(self) -> bool:
        """Whether the next `align run` makes it again; until then its files are those of before."""
        return self.manifest.get("status") == OUTDATED

    @property
    def judges(self) -> tuple[Any, ...] | None:
        """Its reward models, by the digest of their weights or else by name, and the gate's threshold; None without.

        Rewards of two runs are on one scale where these are the same.
        """
        rewards, digests = self.settings.get("rewards"), self.manifest.get("models") or {}
        if not rewards:
            return None
        models = (
            digests.get(f"rewards.{name}") or (rewards.get(name) or {}).get("path")
            for name in ("helpfulness", "safety")
        )
        return (*models, rewards.get("threshold"))

    @cached_property
    def result(self) -> Row | None:
        """The headline figures; None of an unfinished run. Raises RunError where the file is damaged."""
        path = self.path / "result.json"
        if self.manifest.get("status") not in (FINISHED, OUTDATED) or not path.is_file():
            return None
        return read_object(path)

    @cached_property
    def metrics(self) -> list[Row]:
        """The rows of `metrics.jsonl`."""
        return self.rows("metrics.jsonl")

    def rows(self, name: str) -> list[Row]:
        """The rows of a JSONL file; none where there is no such file. Raises DataError where one is damaged."""
        return read_rows(self.path / name, may_be_cut=self.result is None)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it is a finite number."""
        found = [(row["step"], row[name]) for row in self.metrics if is_number(row.get(name)) and "step" in row]
        return [step for step, _ in found], [value for _, value in found]


def read_runs(paths: Sequence[Path], stages: Collection[str] | None = None) -> list[RunFolder]:
    """The runs of run folders and of folders of runs, in order, each once; of the latter only `stages`, if given.

    Raises:
        RunError: a path is no folder, no run and holds none, or one of its files is damaged.
    """
    found: dict[Path, RunFolder] = {}
    for path in paths:
        for run in _runs_of(path, stages):
            found.setdefault(run.path.resolve(), run)
    labels = distinct_labels([run.path.resolve().parts for run in found.values()])
    return [replace(run, label=label) for run, label in zip(found.values(), labels, strict=True)]


def distinct_labels(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest tail of all paths that tells them apart: `sft`, or `quickstart/sft` where there are two."""
    longest = max(map(len, paths), default=1)
    for size in range(1, longest + 1):
        tails = ["/".join(parts[-size:]) for parts in paths]
        if len(set(tails)) == len(tails):
            return tails
    return tails


def read_rows(path: Path, *, may_be_cut: bool = False) -> list[Row]:
    """The objects of a JSONL file, none where it does not exist.

    Args:
        path: the file.
        may_be_cut: whether its writer may have been killed, so that a damaged last line is left out.

    Raises:
        DataError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # not splitlines: answers may hold other separators
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif not (may_be_cut and number == len(lines)):
            raise DataError(f"{path}:{number}: no JSON object. The file is damaged: remove it, or run the stage again.")
    return rows


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (a truth value is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _runs_of(path: Path, stages: Collection[str] | None) -> list[RunFolder]:
    if not path.is_dir():
        raise RunError(f"{path}: no such folder. Give the folder of a run, or a folder of runs.")
    if (manifest := read_manifest(path)) is not None:
        return [RunFolder(path, manifest)]
    children = (child for child in path.iterdir() if child.is_dir() and (stages is None or child.name in stages))
    inside = {child.name: read_manifest(child) for child in children}
    runs = [
        RunFolder(path / name, manifest, pipeline=path.resolve())
        for name, manifest in inside.items()
        if manifest is not None
    ]
    if not runs:
        raise RunError(f"{path}: no run and no folder of runs: no manifest.json here or one folder below.{_hint(path)}")
    return sorted(runs, key=_order(path, runs))


def _order(path: Path, runs: Iterable[RunFolder]) -> Any:
    """The pipeline's own order where it is finished, else the order in which the stages began."""
    summary = path / "summary.json"
    places = {name: place for place, name in enumerate(read_object(summary))} if summary.is_file() else {}
    return lambda run: (places.get(run.path.name, len(places)), str(run.manifest.get("started", "")), run.path.name)


def _hint(path: Path) -> str:
    below = sorted({file.parent.parent.name for file in path.glob("*/*/manifest.json")})
    return f" It holds folders of runs: {', '.join(below[:8])}. Name some of them." if below else ""
