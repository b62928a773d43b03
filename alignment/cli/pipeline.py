"""`align run`: the stages of one YAML file in order, each in its own run directory.

    runs: runs/quickstart                    # parent of the run directories
    defaults: {run: {seed: 0}}               # merged into every stage that has the section
    stages:
      sft: {stage: sft, model: smollm2-135m-instruct, data: {train: "${here}/data/sft.train.jsonl"}}
      rm-safety: {stage: rm, kind: safety, model: "${sft}", data: {...}}

`${name}` is the run directory of an earlier stage, `${here}` the folder of the YAML file. Stages can be repeated as
rounds: see `alignment/cli/rounds.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.cli.rounds import expand_rounds
from alignment.cli.stages import STAGES
from alignment.cli.summary import print_summary
from alignment.config import StageConfig, build_config, merge, parse_overrides, read_yaml
from alignment.errors import AlignError, ConfigError, RunError
from alignment.headlines import one_line
from alignment.progress import console
from alignment.report.page import write_report
from alignment.runs import changed_settings, is_finished, read_manifest, read_result, upstream_runs, write_json

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_UNKNOWN = "unknown-stage"  # stands for a reference that is reported already


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a pipeline with its validated settings; `again` throws away a finished run."""

    name: str
    config: StageConfig
    again: bool

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Pipeline:
    """Validated stages in order, and where their runs are."""

    runs: Path
    stages: list[PlannedStage]


def load_pipeline(
    path: Path, overrides: Sequence[str], *, from_stage: str | None = None, check_inputs: bool = True
) -> Pipeline:
    """Reads and checks all stages before any runs. Raises ConfigError with the problems of all of them.

    Without `check_inputs` data and models need not be there.
    """
    values = read_yaml(path)
    given = parse_overrides(overrides)
    for key in ("defaults", "stages"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise ConfigError(f"{path}: {key}: a {type(values[key]).__name__}. It must hold `NAME: {{...}}` lines.")
    written: dict[str, Any] = values.get("stages") or {}
    entries, outside, problems = expand_rounds(written, given, str(path))
    unknown = (set(values) - {"runs", "defaults", "stages"}) | (set(given) - {"runs", "defaults", *written, *entries})
    problems += [
        f"{path}: {key}: unknown key. Known here: runs, defaults, stages; on the command line also "
        f"{', '.join(entries) or 'the names of stages'}."
        for key in sorted(unknown)
    ]
    if from_stage is not None and from_stage not in entries:
        problems.append(f"--from {from_stage}: no such stage. Known: {', '.join(entries)}.")
    runs = Path(given.get("runs") or values.get("runs") or f"runs/{path.stem}")
    defaults = merge(values.get("defaults") or {}, given.get("defaults") or {})
    if _names_a_folder(defaults):
        problems.append(f"{path}: defaults.run.dir: every stage has its own folder in a pipeline. Set runs.")
    known = {name for stage in STAGES.values() for name in stage.config_class().model_fields}
    problems += [
        f"{path}: defaults.{key}: no stage has such a section. Known: {', '.join(sorted(known))}."
        for key in sorted(set(defaults) - known)
    ]
    problems += [
        f"command line: {name}={given[name]}: write {name}.KEY=VALUE."
        for name in {**written, **entries}
        if name in given and not isinstance(given[name], Mapping)
    ]
    given = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    places = {"here": str(path.parent)}
    stages: list[PlannedStage] = []
    again = False
    for name, entry in entries.items():
        again = again or name == from_stage
        kind = entry.get("stage", name) if isinstance(entry, Mapping) else None
        if kind not in STAGES:
            problems.append(f"{path}: stages.{name}.stage is {kind!r}. Use one of {', '.join(STAGES)}.")
            continue
        stage_values = {key: value for key, value in entry.items() if key != "stage"}
        try:
            cls = STAGES[kind].of_kind({**stage_values, **given.get(name, {})}.get("kind")).config_class()
        except ConfigError as error:
            problems.append(f"{path}: stages.{name}: {error}")
            continue
        fitting = {key: value for key, value in defaults.items() if key in cls.model_fields}
        full = merge(merge(fitting, stage_values), given.get(name) or {})
        if _names_a_folder(stage_values) or _names_a_folder(given.get(name, {})):
            problems.append(f"{path}: stages.{name}.run.dir: is {runs / name} in a pipeline. Set runs for all stages.")
        full = merge(full, {"run": {"dir": str(runs / name)}})
        unknown_names: list[str] = []
        full = _fill_in(full, places, f"{path}: stages.{name}", unknown_names)
        problems += unknown_names
        made_earlier = [folder for key, folder in places.items() if key != "here"]
        try:
            earlier = [*made_earlier, _UNKNOWN]
            where = f"{path}: stages.{name}"
            config = build_config(cls, full, where, check_inputs=check_inputs, made_earlier=earlier)
            stages.append(PlannedStage(name, config, again))
        except AlignError as error:
            problems.append(str(error))
        places[name] = str(runs / name)
        if name in outside:
            places[outside[name]] = places[name]
    if not written:
        problems.append(f"{path}: stages: missing or empty. List at least one.")
    devices = {stage.config.run.device for stage in stages}
    if "cpu" in devices and len(devices) > 1:
        problems.append(
            f"{path}: run.device is {', '.join(sorted(devices))} in different stages. One process runs them all: "
            "set it in defaults."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return Pipeline(runs, stages)


def _names_a_folder(values: Mapping[str, Any]) -> bool:
    """Whether settings of a stage say where its run goes."""
    run = values.get("run")
    return isinstance(run, Mapping) and "dir" in run


def run_stages(plan: Pipeline) -> None:
    """Runs what is not finished, prints the summary, and writes `summary.json` and `report.html` beside the runs."""
    from accelerate import PartialState

    for stage in plan.stages:
        if is_finished(stage.path) and not stage.again:
            _check_unchanged(stage)
    # A process group can be made only once.
    state = PartialState(cpu=all(stage.config.run.device == "cpu" for stage in plan.stages))
    for number, stage in enumerate(plan.stages, start=1):
        heading = f"[{number}/{len(plan.stages)}] {stage.name}"
        if is_finished(stage.path) and not stage.again:
            _check_up_to_date(stage)
            if state.is_main_process:
                console.print(f"{heading}: finished before, skipped  ({one_line(read_result(stage.path))})")
            continue
        if state.is_main_process:
            console.print(heading, style="bold")
        resume = read_manifest(stage.path) is not None and not stage.again
        config = stage.config
        if stage.again:
            config = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": True})})
        state.wait_for_everyone()
        run = STAGES[config.stage].of_kind(getattr(config, "kind", None)).run_function()
        result = run(config, resume=resume)
        state.wait_for_everyone()
        if state.is_main_process:
            console.print(f"{heading}: {one_line(result)}")
    if state.is_main_process:
        results = {stage.name: read_result(stage.path) for stage in plan.stages}
        write_json(plan.runs / "summary.json", results)
        print_summary(results, plan.runs)
        console.print(f"Figures, tables and answers side by side:  {write_report([plan.runs])}")


def _check_unchanged(stage: PlannedStage) -> None:
    changed = changed_settings(read_manifest(stage.path) or {}, stage.config)
    if changed:
        raise RunError(
            f"{stage.path}: finished with other settings ({', '.join(changed)}). "
            f"Add --from {stage.name} to run it and the later stages again, or give runs=ANOTHER_FOLDER."
        )


def _check_up_to_date(stage: PlannedStage) -> None:
    """Raises RunError where a run that the finished stage was made from has been made again since."""
    before, now = (read_manifest(stage.path) or {}).get("made_from", {}), upstream_runs(stage.config)
    changed = [key for key in now if key in before and before[key] != now[key]]
    if changed:
        raise RunError(
            f"{stage.path}: was made from an earlier version of {', '.join(changed)}. "
            f"Add --from {stage.name} to run it and the later stages again."
        )


def _fill_in(value: Any, places: Mapping[str, str], where: str, problems: list[str]) -> Any:
    """`${name}` replaced in every string; names that are no earlier stage are added to `problems`."""
    if isinstance(value, Mapping):
        return {
            _fill_in(key, places, where, problems): _fill_in(entry, places, f"{where}.{key}", problems)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [_fill_in(entry, places, where, problems) for entry in value]
    if not isinstance(value, str):
        return value
    for name in _REFERENCE.findall(value):
        if name not in places:
            problems.append(f"{where}: ${{{name}}} is no earlier stage. Known: {', '.join(places)}.")
    return _REFERENCE.sub(lambda found: places.get(found.group(1), _UNKNOWN), value)
