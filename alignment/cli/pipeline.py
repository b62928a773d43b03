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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.cli.pipeline_inputs import check_rows, check_stages, wrong_references
from alignment.cli.pipeline_stages import Pipeline, PlannedStage, check_runs
from alignment.cli.rounds import expand_rounds
from alignment.cli.stages import STAGES
from alignment.cli.summary import print_summary
from alignment.config import build_config, merge, parse_overrides, read_yaml
from alignment.errors import AlignError, ConfigError
from alignment.files import write_json
from alignment.headlines import one_line
from alignment.manifests import is_finished, mark_outdated, read_result
from alignment.progress import console
from alignment.report.page import write_report
from alignment.sources import expanded

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_UNKNOWN = "unknown-stage"  # stands for a reference that is reported already


def load_pipeline(
    path: Path, overrides: Sequence[str], *, from_stage: str | None = None, check_inputs: bool = True
) -> Pipeline:
    """Reads and checks all stages before any runs. Raises ConfigError with the problems of all of them.

    Without `check_inputs` data and models need not be there.
    """
    values, given = read_yaml(path), parse_overrides(overrides)
    for key in ("defaults", "stages"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise ConfigError(f"{path}: {key}: a {type(values[key]).__name__}. It must hold `NAME: {{...}}` lines.")
    if not isinstance(given.get("defaults", {}), Mapping):
        raise ConfigError(f"command line: defaults={given['defaults']}: write defaults.KEY=VALUE.")
    entries, outside, problems = expand_rounds(values.get("stages") or {}, given, str(path))
    folder = given.get("runs", values.get("runs"))
    if folder is not None and not (isinstance(folder, str) and folder):
        problems.append(f"{path}: runs: {folder!r} is no folder's name. Give text, e.g. runs/mine.")
    defaults = merge(values.get("defaults") or {}, given.get("defaults") or {})
    problems += _key_problems(path, values, given, defaults, entries, from_stage)
    runs = expanded(str(folder or f"runs/{path.stem}"))
    made = _Stages(path, runs, defaults, check_inputs, problems, places={"here": str(path.parent)})
    again = False
    for name, entry in entries.items():
        again = again or name == from_stage
        own = given.get(name)
        made.add(name, entry, own if isinstance(own, Mapping) else {}, again=again, outside=outside.get(name))
    if not values.get("stages"):
        problems.append(f"{path}: stages: missing or empty. List at least one.")
    devices = {stage.config.run.device for stage in made.stages}
    if "cpu" in devices and len(devices) > 1:
        problems.append(
            f"{path}: run.device is {', '.join(sorted(devices))} in different stages. One process runs them all: "
            "set it in defaults."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return Pipeline(runs, made.stages)


def _key_problems(
    path: Path,
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    entries: Mapping[str, Any],
    from_stage: str | None,
) -> Iterator[str]:
    """What is wrong around the stages: with keys of the file and the command line, `--from` and the defaults.

    `given` is what the command line says; `defaults` are those of both, `entries` the stages with rounds written out.
    """
    written = values.get("stages") or {}
    unknown = (set(values) - {"runs", "defaults", "stages"}) | (set(given) - {"runs", "defaults", *written, *entries})
    for key in sorted(unknown):
        dotted = next((name for name in entries if name.startswith(f"{key}.")), None)
        hint = f" A name with a dot, as {dotted}, cannot be written there: change the file." if dotted else ""
        yield (
            f"{path}: {key}: unknown key. Known here: runs, defaults, stages; on the command line also "
            f"{', '.join(entries) or 'the names of stages'}.{hint}"
        )
    if from_stage is not None and from_stage not in entries:
        yield f"--from {from_stage}: no such stage. Known: {', '.join(entries)}."
    if _names_a_folder(defaults):
        yield f"{path}: defaults.run.dir: every stage has its own folder in a pipeline. Set runs."
    known = {name for stage in STAGES.values() for name in stage.config_class().model_fields}
    for key in sorted(set(defaults) - known):
        yield f"{path}: defaults.{key}: no stage has such a section. Known: {', '.join(sorted(known))}."
    for name in {**written, **entries}:
        if name in given and not isinstance(given[name], Mapping):
            yield f"command line: {name}={given[name]}: write {name}.KEY=VALUE."


@dataclass
class _Stages:
    """The stages of a pipeline as they are made, each of which may name the run directories of those before it.

    `places` is what `${name}` stands for; `problems` grows by what is wrong with each stage.
    """

    path: Path
    runs: Path
    defaults: Mapping[str, Any]
    check_inputs: bool
    problems: list[str]
    places: dict[str, str]
    stages: list[PlannedStage] = field(default_factory=list)

    def add(self, name: str, entry: Any, own: Mapping[str, Any], *, again: bool, outside: str | None) -> None:
        """Makes a stage of its entry in the file and its own settings on the command line, or notes why it cannot.

        `outside` is the name that later stages have for the last round of a repeated one.
        """
        where, folder = f"{self.path}: stages.{name}", str(self.runs / name)
        kind = entry.get("stage", name) if isinstance(entry, Mapping) else None
        if not isinstance(kind, str) or kind not in STAGES:
            self.problems.append(f"{where}.stage is {kind!r}. Use one of {', '.join(STAGES)}.")
            return
        written = {key: value for key, value in entry.items() if key != "stage"}
        try:
            cls = STAGES[kind].of_kind({**written, **own}.get("kind")).config_class()
        except ConfigError as error:
            self.problems.append(f"{where}: {error}")
            return
        if _names_a_folder(written) or _names_a_folder(own):
            self.problems.append(f"{where}.run.dir: is {folder} in a pipeline. Set runs for all stages.")
        fitting = {key: value for key, value in self.defaults.items() if key in cls.model_fields}
        whole = merge(merge(merge(fitting, written), own), {"run": {"dir": folder}})
        filled = _fill_in(whole, self.places, where, self.problems)
        earlier = [*(made for key, made in self.places.items() if key != "here"), _UNKNOWN]
        try:
            config = build_config(cls, filled, where, check_inputs=self.check_inputs, made_earlier=earlier)
        except AlignError as error:
            self.problems.append(str(error))
        else:
            self.problems += [f"{where}: {problem}" for problem in wrong_references(config, self.stages)]
            self.stages.append(PlannedStage(name, config, again))
        self.places[name] = folder
        if outside is not None:
            self.places[outside] = folder


def _names_a_folder(values: Mapping[str, Any]) -> bool:
    """Whether settings of a stage say where its run goes."""
    run = values.get("run")
    return isinstance(run, Mapping) and "dir" in run


def check_pipeline(plan: Pipeline) -> None:
    """Raises what can be known before any stage runs: of run directories, rows and chat formats. It writes nothing."""
    if overwriting := [stage.name for stage in plan.stages if stage.config.run.overwrite]:
        raise ConfigError(
            f"stages.{', '.join(overwriting)}: run.overwrite: a pipeline keeps what is finished and goes on with the "
            f"rest. Add --from {overwriting[0]} instead to run it and the later stages again."
        )
    check_runs(plan)
    check_rows(plan)
    check_stages(plan)


def run_stages(plan: Pipeline) -> None:
    """Runs what is not finished, prints the summary, and writes `summary.json` and `report.html` beside the runs.

    Runs that are to be made again are outdated at once, so that a series that was interrupted can be gone on with.
    """
    from accelerate import PartialState

    from alignment.hardware import PROCESS_TIMEOUT, check_launch

    # A process group can be made only once.
    state = PartialState(cpu=all(stage.config.run.device == "cpu" for stage in plan.stages), timeout=PROCESS_TIMEOUT)
    check_launch(state)
    if state.is_main_process:
        check_pipeline(plan)
        for stage in plan.stages:
            if stage.again:
                mark_outdated(stage.path)
    state.wait_for_everyone()
    is_series = any(stage.again for stage in plan.stages)
    for number, stage in enumerate(plan.stages, start=1):
        heading = f"[{number}/{len(plan.stages)}] {stage.name}"
        if is_finished(stage.path):
            if state.is_main_process:
                done = one_line(read_result(stage.path))
                console.print(f"{heading}: finished before, skipped  ({done})", soft_wrap=True)
            continue
        if state.is_main_process:
            console.print(heading, style="bold", soft_wrap=True)
        config, resume = stage.call()
        state.wait_for_everyone()
        run = STAGES[config.stage].of_kind(getattr(config, "kind", None)).run_function()
        try:
            result = run(config, resume=resume)
        except BaseException:
            if is_series and state.is_main_process:
                console.print(f"{heading}: not finished. The same command without --from goes on here.", soft_wrap=True)
            raise
        state.wait_for_everyone()
        if state.is_main_process:
            console.print(f"{heading}: {one_line(result)}", soft_wrap=True)
    if state.is_main_process:
        results = {stage.name: read_result(stage.path) for stage in plan.stages}
        write_json(plan.runs / "summary.json", results)
        print_summary(results, plan.runs)
        report = write_report([plan.runs], stages=list(results))
        console.print(f"Figures, tables and answers side by side:  {report}", soft_wrap=True)


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
        if name.startswith("each."):
            problems.append(f"{where}: ${{{name}}} is written out in a file's stages outside of repeat blocks only.")
        elif name not in places:
            problems.append(f"{where}: ${{{name}}} is no earlier stage. Known: {', '.join(places)}.")
    return _REFERENCE.sub(lambda found: places.get(found.group(1), _UNKNOWN), value)
