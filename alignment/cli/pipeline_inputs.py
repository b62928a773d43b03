"""What the stages of a pipeline read: models and files of earlier stages, rows, and chat formats, before any runs."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from alignment.cli.pipeline_stages import Pipeline, PlannedStage
from alignment.cli.stages import STAGES, ModelKind
from alignment.config import ModelSection, StageConfig
from alignment.data import OnError, load_rows
from alignment.errors import DataError, ModelError

# The settings that name a reward model; all other models are chat models.
JUDGES = ("rewards.helpfulness", "rewards.safety", "safety", "guard", "evaluation.guard")


def wrong_references(config: StageConfig, earlier: Sequence[PlannedStage]) -> Iterator[str]:
    """Settings that name what an earlier stage does not make: a model of the other kind, a file it does not write."""
    for key, name, kind in config.input_names():
        found = _maker(name, earlier)
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


def _maker(name: str, earlier: Sequence[PlannedStage]) -> PlannedStage | None:
    """The earlier stage whose run directory a model or file is in, if it is in one."""
    stages = {stage.path: stage for stage in earlier}
    place = Path(name)
    return next((stages[folder] for folder in (place, *place.parents) if folder in stages), None)


def check_rows(plan: Pipeline) -> None:
    """Raises DataError with every bad row of the files that the stages to come read and none of them makes.

    A stage reads its rows anew when its turn comes; this is so that the last one's do not fail after hours.
    """
    problems: list[str] = []
    seen: set[tuple[object, ...]] = set()
    for stage in plan.to_run:
        kind = STAGES[stage.config.stage].of_kind(getattr(stage.config, "kind", None))
        for key, name, what in stage.config.input_names():
            if what != "data" or _maker(name, plan.stages):
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


def check_formats(plan: Pipeline) -> None:
    """Raises ModelError where PPO's reward models would write dialogues in other token ids than its policy.

    Of models that are still to be trained the format is that of the model they are trained from.
    """
    stages = [stage for stage in plan.to_run if stage.config.stage == "ppo"]
    if not stages:
        return
    from alignment.models import load_chat_of
    from rlhf.judges import check_same_ids, judges_of

    load = functools.cache(load_chat_of)  # most models are trained from one
    for stage in stages:
        judges = judges_of(stage.config.rewards)
        chats = {
            key: load(*_trained_from(model, plan.stages))[0]
            for key, model in {"model": stage.config.model, **judges}.items()
        }
        try:
            check_same_ids(chats.pop("model"), chats)
        except ModelError as error:
            raise ModelError(f"stages.{stage.name}: {error}") from None


def _trained_from(model: ModelSection, stages: Sequence[PlannedStage]) -> tuple[str, str]:
    """Path and chat template of the model on disk that a model of the pipeline is trained from, in the end."""
    path, template = model.path, model.chat_template
    while (maker := _maker(path, stages)) is not None:
        path, before = maker.config.model.path, maker.config.model.chat_template
        template = before if template == "auto" else template
    return path, template
