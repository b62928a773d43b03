"""Configurations from YAML files and `key=value` arguments, and back."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from alignment.config.sections import ModelSection, StageConfig
from alignment.config.validation import SectionT, input_problems, text_problems, validate
from alignment.errors import ConfigError

Config = TypeVar("Config", bound=StageConfig)
# Stands for # while it is asked whether YAML took what follows for a comment.
_NO_COMMENT = "⌗"


def load_config(
    cls: type[Config],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    check_inputs: bool = True,
) -> Config:
    """A stage's configuration from a YAML file and `key=value` arguments, which win.

    Raises ConfigError with all problems at once: unknown keys, wrong types, impossible values, missing files.
    """
    values = read_yaml(path) if path is not None else {}
    where = str(path) if path is not None else "command line"
    return build_config(cls, merge(values, parse_overrides(overrides)), where, check_inputs=check_inputs)


def build_config(
    cls: type[Config],
    values: Mapping[str, Any],
    where: str,
    *,
    check_inputs: bool = True,
    made_earlier: Sequence[str] = (),
) -> Config:
    """A validated configuration; inputs below the folders of `made_earlier` are taken for granted.

    Raises ConfigError, each line opening with `where`.
    """
    config, problems = validate(cls, values)
    problems += text_problems(values)
    if check_inputs:
        problems += input_problems(cls, values, made_earlier)
    if config is None or problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def build_section(cls: type[SectionT], values: Mapping[str, Any], where: str = "command line") -> SectionT:
    """A validated group of settings. Raises ConfigError with all problems."""
    section, problems = validate(cls, values)
    if section is None:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return section


def missing_packages(config: StageConfig) -> Iterator[str]:
    """What a stage would be told hours later: settings that need a package which is not installed here."""
    sampling = getattr(config, "sampling", None)
    if sampling is not None and sampling.engine == "vllm" and not sampling.fall_back and not _is_installed("vllm"):
        yield (
            'sampling.engine: vllm is not installed here. Run pip install -e ".[vllm]", or set sampling.engine=torch '
            "or sampling.fall_back=true."
        )
    for name in config.run.report_to:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(_is_installed, packages)):
            yield f"run.report_to: {name} is not installed here. Run pip install {name}, or leave it out."


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _WrongKey(yaml.constructor.ConstructorError):
    """A key that stands twice in a mapping, or is no text."""


class _Loader(yaml.SafeLoader):
    """YAML without dates, which no setting is, and with errors for keys that are no text, or of which one is lost."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """The mapping as it is written, before others are merged into it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    problem = f'"{key.value}" is there twice in one mapping: keep one'
                    raise _WrongKey(None, None, problem, key.start_mark)
                seen.add(name)
                if (kind := key.tag.rpartition(":")[2]) not in ("str", "merge"):
                    problem = f"the key {key.value or 'null'} is read as {kind}, and keys are text: put it in quotes"
                    raise _WrongKey(None, None, problem, key.start_mark)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file is missing or not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start} ({byte:#04x}). Save it as UTF-8.") from error
    except _WrongKey as error:
        raise ConfigError(f"{path}:{error.problem_mark.line + 1}: {error.problem}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}:{mark.line + 1}: not YAML: {problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}. It must hold `key: value` lines.")
    return values


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as nested mappings; values are read as YAML. Raises ConfigError on a missing `=`."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f'command line: "{argument}" is not key=value. Write for example train.epochs=2.')
        try:
            value = _value_of(text)
            is_cut = "#" in text and _NO_COMMENT not in text and _without_comments(text) != repr(value)
        except _WrongKey as error:
            raise ConfigError(f"command line: {key}: {error.problem}.") from error
        if is_cut:
            problem = f"# begins a comment in YAML, so that {text[text.index('#') :]!r} may be lost"
            raise ConfigError(f"command line: {key}: {problem}. Put the text in quotes within quotes: '{key}=\"...\"'.")
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def _without_comments(text: str) -> str:
    """How a setting's value would be shown if nothing in it began a comment."""
    return repr(_value_of(text.replace("#", _NO_COMMENT))).replace(_NO_COMMENT, "#")


def _value_of(text: str) -> Any:
    """A setting's value: YAML or, where it is none, the text."""
    try:
        return yaml.load(text, _Loader) if text else ""
    except _WrongKey:
        raise
    except (yaml.YAMLError, ValueError):
        return text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping. A string beside a model's keys is the model's `path`.

    Next to other keys (margins by rating, weights by source) whichever came last replaces the other.
    """
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and value:  # an empty one replaces: {} is how to name none
            before = {"path": before} if isinstance(before, str) and _are_of_a_model(value) else before
            value = merge(before if isinstance(before, Mapping) else {}, value)
        elif isinstance(value, str) and isinstance(before, Mapping) and _are_of_a_model(before):
            value = {**before, "path": value}
        merged[key] = value
    return merged


def _are_of_a_model(keys: Iterable[Any]) -> bool:
    """Whether a key is a model's, or is so nearly: it is to be reported as misspelt, not to replace the model."""
    return any(difflib.get_close_matches(str(key), ModelSection.model_fields, cutoff=0.8) for key in keys)


def to_yaml(config: StageConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
