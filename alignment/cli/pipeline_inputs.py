"""What the stages of a pipeline read, before any runs: models and files of earlier stages, rows, chat formats."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alignment.cli.pipeline_stages import Pipeline, PlannedStage, maker_of
from alignment.cli.stages import STAGES, ModelKind
from alignment.config import ModelSection, Section, StageConfig
from alignment.data import OnError, load_rows
from alignment.errors import AlignError, ConfigError, DataError, ModelError

# The settings that name a reward model; all other models are chat models.
JUDGES = ("rewards.helpfulness", "rewards.safety", "safety", "guard", "evaluation.guard")


def wrong_references(config: StageConfig, earlier: Sequence[PlannedStage]) -> Iterator[str]:
    """Settings that name what an earlier stage does not make: a model of the other kind, a file it does not write."""
    for key, name, kind in config.input_names():
        found = maker_of(name, earlier)
        if found is None:
            continue
        inside = Path(name).relative_to(found.path)
        shown, stage = "/".join((f"${{{found.name}}}", *inside.parts)), STAGES[found.config.stage]
        if kind == "data":
            if not any(fnmatchcase(str(inside), pattern) for pattern in stage.files):
                guess = difflib.get_close_matches(str(inside), stage.files, n=1)
                hint = f" Did you mean {guess[0]}?" if guess else ""
                yield f"{key}: {shown}: {stage.name} writes no such file, but {', '.join(stage.files)}.{hint}"
        elif kind == "model":
            wanted = _wanted_models(config, key)
            if stage.makes in wanted and inside.parts in ((), ("model",)):
                continue
            makes = f"a {stage.makes}" if stage.makes else f"no model, but {', '.join(stage.files)}"
            known = [each.name for each in earlier if STAGES[each.config.stage].makes in wanted]
            yield (
                f"{key}: {shown}: must be a {' or a '.join(wanted)}; {stage.name} makes {makes}. "
                f"Earlier stages that make one: {', '.join(known) or 'none'}."
            )


def _wanted_models(config: StageConfig, key: str) -> tuple[ModelKind, ...]:
    if key in JUDGES:
        return ("reward model",)
    return ("chat model", "reward model") if config.stage == "rm" else ("chat model",)


def check_rows(plan: Pipeline) -> None:
    """Raises DataError with every bad row of the files that the stages to come read and none of them makes.

    A stage reads its rows anew when its turn comes; this is so that the last one's do not fail after hours.
    """
    problems: list[str] = []
    seen: set[tuple[object, ...]] = set()
    for stage in plan.to_run:
        kind = STAGES[stage.config.stage].of_kind(getattr(stage.config, "kind", None))
        for key, name, what in stage.config.input_names():
            if what != "data" or maker_of(name, plan.stages):
                continue
            parser, on_error = kind.row_parser(key), _on_error(stage.config, key)
            if (name, parser, on_error) in seen:
                continue
            seen.add((name, parser, on_error))
            try:
                load_rows([name], parser, on_error=on_error)
            except DataError as error:
                problems += [f"stages.{stage.name}: {key}: {line}" for line in str(error).splitlines()]
    if problems:
        raise DataError("\n".join(problems))


def _on_error(config: StageConfig, key: str) -> OnError:
    """What a stage does with bad rows of a setting's files. Held-out prompts follow those that are trained on."""
    section = key.partition(".")[0]
    return getattr(getattr(config, "prompts" if section == "evaluation" else section, None), "on_error", "stop")


def check_stages(plan: Pipeline) -> None:
    """Raises ConfigError with what the stages to come would refuse of their settings, rows and chat formats.

    A model that is still to be trained is stood for by the one on disk that it is trained from, in the end: it has the
    same chat format and context. Of a stage whose rows are still to be made, the models alone are looked at.
    """
    problems: dict[str, list[str]] = {}  # stages by what is wrong: many read the same model
    for stage in plan.to_run:
        made = {key: kind for key, name, kind in stage.config.input_names() if maker_of(name, plan.to_run)}
        untrained = made.keys() & set(JUDGES)
        config = _each_model(stage.call()[0], lambda _, model: _on_disk(model, plan.to_run))
        check = STAGES[config.stage].of_kind(getattr(config, "kind", None)).check_function()
        try:
            _check_processes(config)
            if "data" in made.values():
                _each_model(config, functools.partial(_check_model, untrained=untrained))
            elif untrained:
                check(config, untrained=untrained)
            else:
                check(config)
        except AlignError as error:
            problems.setdefault(str(error), []).append(stage.name)
    if problems:
        raise ConfigError("\n".join(f"stages.{', '.join(names)}: {problem}" for problem, names in problems.items()))


def _check_processes(config: StageConfig) -> None:
    """Raises ConfigError for what cannot be done with this number of processes."""
    from alignment.hardware import num_processes
    from alignment.sampling.engines import check_one_process
    from rlhf.config import PPOConfig, check_shares

    if (sampling := getattr(config, "sampling", None)) is not None:
        check_one_process(sampling, num_processes())
    if isinstance(config, PPOConfig):
        check_shares(config, num_processes())


def _check_model(key: str, model: ModelSection, *, untrained: Collection[str]) -> ModelSection:
    from alignment.model_folders import check_is_chat_model, load_chat_of, reward_model_context

    try:
        load_chat_of(model.path, model.chat_template)
        if key not in JUDGES:
            check_is_chat_model(model.path)
        elif key not in untrained:
            reward_model_context(model.path)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from None
    return model


def _on_disk(model: ModelSection, stages: Sequence[PlannedStage]) -> ModelSection:
    """The model that is there already of which these stages make a model, or itself."""
    while (maker := maker_of(model.path, stages)) is not None:
        before = maker.config.model
        template = before.chat_template if model.chat_template == "auto" else model.chat_template
        model = model.model_copy(update={"path": before.path, "chat_template": template})
    return model


def _each_model(value: Any, change: Callable[[str, ModelSection], ModelSection], key: str = "") -> Any:
    """Settings in which every model is what `change` makes of it and its key."""
    if isinstance(value, ModelSection):
        return change(key, value)
    start = f"{key}." if key else ""
    if isinstance(value, Section):
        names = type(value).model_fields
        return value.model_copy(
            update={name: _each_model(getattr(value, name), change, start + name) for name in names}
        )
    if isinstance(value, dict):
        return {name: _each_model(each, change, f"{start}{name}") for name, each in value.items()}
    return value
