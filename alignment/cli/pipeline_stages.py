"""The stages of a pipeline with their settings, and whether what is in their run directories is of this plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import StageConfig
from alignment.config.sections import InputKind
from alignment.errors import AlignError, RunError
from alignment.files import file_sha256
from alignment.manifests import (
    OUTDATED,
    is_finished,
    read_manifest,
    setting_changes,
    tokenizer_sha256,
    upstream_runs,
    weights_sha256,
)
from alignment.runs import check_run_dir
from alignment.sources import find_data, find_model, find_template, place_of


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a pipeline with its validated settings; `again` throws away what there is of its run."""

    name: str
    config: StageConfig
    again: bool

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.dir)

    @property
    def is_done(self) -> bool:
        """Whether it is finished and stays as it is."""
        return is_finished(self.path) and not self.again

    def call(self) -> tuple[StageConfig, bool]:
        """With which settings it is run, and whether it is resumed. An outdated run is made again from the start."""
        manifest = read_manifest(self.path)
        if manifest is None:
            return self.config, False
        if self.again or manifest.get("status") == OUTDATED:
            return self.config.model_copy(update={"run": self.config.run.model_copy(update={"overwrite": True})}), False
        return self.config, True


@dataclass(frozen=True)
class Pipeline:
    """Validated stages in order, and where their runs are."""

    runs: Path
    stages: list[PlannedStage]

    @property
    def to_run(self) -> list[PlannedStage]:
        """The stages that are not done."""
        return [stage for stage in self.stages if not stage.is_done]


def maker_of(name: str, earlier: Sequence[PlannedStage]) -> PlannedStage | None:
    """The earlier stage whose run directory a model or file is in, if it is in one."""
    stages = {stage.path: stage for stage in earlier}
    place = Path(name)
    return next((stages[folder] for folder in (place, *place.parents) if folder in stages), None)


def check_runs(plan: Pipeline) -> None:
    """Raises RunError where what is in the run directories is not of this plan. Call before any stage; it only reads.

    A finished stage must have the plan's settings and be made from the runs, data, models and templates that are there
    now; where another stage runs, `open_run` must accept its directory, and what it reads of a finished one must be
    there.
    """
    digest, tokenizer_digest = map(functools.cache, (_digest, tokenizer_sha256))  # many stages read the same file
    for stage in plan.stages:
        if stage.is_done:
            _check_unchanged(stage)
            _check_up_to_date(stage)
            _check_contents(stage, digest, tokenizer_digest)
        else:
            config, resume = stage.call()
            check_run_dir(config, resume=resume)
    for stage in plan.to_run:
        _check_inputs(stage, [each for each in plan.stages if each.is_done])


def _check_inputs(stage: PlannedStage, done: Sequence[PlannedStage]) -> None:
    """Raises RunError where a stage that is to run reads what a finished one made and what was removed since."""
    for key, name, kind in stage.config.input_names():
        maker = maker_of(name, done)
        if maker is not None and not _is_there(name, kind):
            raise RunError(
                f"{maker.path}: finished, but what {stage.name} reads of it ({key}: {name}) was removed since. Put it "
                f"back, or add --from {maker.name} to run it and the later stages again."
            )


def _is_there(name: str, kind: InputKind) -> bool:
    try:
        found = find_model(name) if kind == "model" else find_data(name)
    except AlignError:
        return False
    return kind != "model" or any(Path(found).glob("*.safetensors"))


def _check_unchanged(stage: PlannedStage) -> None:
    changes = setting_changes(read_manifest(stage.path) or {}, stage.config)
    if changes:
        first = min(changes)
        before, now = map(_shown, changes[first])
        raise RunError(
            f"{stage.path}: finished with other settings ({', '.join(sorted(changes))}). {first} was {before}, and is "
            f"{now}. Add --from {stage.name} to run it and the later stages again, or give runs=ANOTHER_FOLDER."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_up_to_date(stage: PlannedStage) -> None:
    """Raises RunError where a run that the finished stage was made from was made again since, or will be."""
    before = (read_manifest(stage.path) or {}).get("made_from", {})
    now = {_by_place(entry): run for entry, run in upstream_runs(stage.config).items()}
    changed = [entry for entry, run in before.items() if now.get(_by_place(entry), "") != run]
    if changed:
        raise RunError(
            f"{stage.path}: was made from an earlier version of {', '.join(changed)}. "
            f"Add --from {stage.name} to run it and the later stages again."
        )


def _by_place(entry: str) -> tuple[str, str]:
    """The key and the place of an entry of `made_from`."""
    key, _, name = entry.partition(": ")
    return key, place_of(name)


def _check_contents(
    stage: PlannedStage, digest: Callable[[Path], str], tokenizer_digest: Callable[[Path], str]
) -> None:
    """Raises RunError where a finished stage read other data or templates, or another model that no run made."""
    manifest = read_manifest(stage.path) or {}
    models, templates = manifest.get("models", {}), manifest.get("templates", {})  # older versions noted no templates
    made_by = {_by_place(entry): run for entry, run in manifest.get("made_from", {}).items()}
    inputs = [each for each in manifest.get("inputs", []) if each["sha256"]]
    changed = [each["name"] for each in inputs if _is_changed(each["name"], find_data, each["sha256"], digest)]
    for key, name, kind in stage.config.input_names():
        if kind == "template" and key in templates and _is_changed(name, find_template, templates[key], digest):
            changed.append(name)
        if kind != "model" or made_by.get((key, place_of(name))):
            continue
        if key in models and _is_changed(name, find_model, models[key], digest):
            changed.append(name)
        tokenizer = templates.get(f"{key}.tokenizer")
        if tokenizer and _is_changed(name, find_model, tokenizer, tokenizer_digest):
            changed.append(f"the tokenizer or chat template of {name}")
    if changed:
        raise RunError(
            f"{stage.path}: finished with other contents of {', '.join(changed)}. Put the old ones back, add "
            f"--from {stage.name} to run it and the later stages again, or give runs=ANOTHER_FOLDER."
        )


def _is_changed(name: str, find: Callable[[str], Path | str], before: str, digest: Callable[[Path], str]) -> bool:
    if name.startswith("toy:"):
        return False
    try:
        found = find(name)
    except AlignError:  # made by an earlier stage, and removed since
        return False
    return not isinstance(found, Path) or digest(found) != before


def _digest(found: Path) -> str:
    return weights_sha256(found) if found.is_dir() else file_sha256(found)
