"""Every problem of a configuration in one round, in a user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from alignment.config.schema import section_at, section_of
from alignment.config.sections import ModelSection, Section, named_inputs
from alignment.errors import AlignError
from alignment.sources import expanded, find_data, find_model, find_template

SectionT = TypeVar("SectionT", bound=Section)

HELD_OUT = ("data.valid", "evaluation.prompts")


def validate(cls: type[SectionT], values: Mapping[str, Any]) -> tuple[SectionT | None, list[str]]:
    """The configuration, or None, with every problem found.

    Rules that look at several keys run only once each key is valid, so a wrong key is taken out and the rest
    validated again, until nothing new turns up: one round shows a user everything.
    """
    problems: dict[str, None] = {}
    removed: set[tuple[Any, ...]] = set()
    trial: Any = values
    for attempt in range(10):
        try:
            config = cls.model_validate(trial)
        except ValidationError as error:
            wrong: set[tuple[Any, ...]] = set()
            fresh = False
            for item in error.errors():
                location = tuple(takewhile(lambda part: isinstance(part, str) and not _is_branch(part), item["loc"]))
                if _is_of_another_branch(item) or any(location[: len(path)] == path for path in removed):
                    continue
                fresh = True
                problems |= dict.fromkeys(_explain(cls, item))
                if location and item["type"] != "missing":
                    trial = _without(trial, location)
                    wrong.add(location)
            if not fresh:
                return None, list(problems)
            removed |= wrong
        else:
            return (config if attempt == 0 else None), list(problems)
    return None, list(problems)


def _explain(cls: type[BaseModel], item: Mapping[str, Any]) -> list[str]:
    """What is wrong and what to do: one message, but one for each key where a whole section is missing."""
    location, kind = [part for part in item["loc"] if not _is_branch(part) and part != "[key]"], item["type"]
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        parent = section_at(cls, location[:-1])
        known = list(parent.model_fields) if parent else []
        guess = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f'Did you mean "{guess[0]}"?' if guess else f"Known here: {', '.join(known) or 'nothing'}."
        return [f"{key}: unknown key. {hint}"]
    if kind == "missing":
        parent = section_at(cls, location[:-1])
        missing = _required_keys(parent, location[-1], key) if parent else [key]
        return [f"{name}: missing. Add it: it has no default." for name in missing]
    message = item["msg"].removeprefix("Value error, ")
    if not location or kind == "value_error":  # our own rules name their keys
        return [message]
    hint = _dotted_name(cls, location, item["input"])
    return [f"{key}: {message[0].lower()}{message[1:]}, found {item['input']!r}.{hint}"]


def _dotted_name(cls: type[BaseModel], location: Sequence[Any], value: Any) -> str:
    """How to write a name with a dot in a mapping of names: by itself it was read as several keys."""
    if not isinstance(value, Mapping) or not value or section_at(cls, location[:-1]) is not None:
        return ""
    *before, name = map(str, location)
    while isinstance(value, Mapping) and value:
        part, value = next(iter(value.items()))
        name = f"{name}.{part}"
    return f" A name with a dot goes into braces: '{'.'.join(before)}={{{name}: {value}}}'."


def _required_keys(cls: type[BaseModel], name: str, key: str) -> list[str]:
    """The key of a setting, or those without which its section cannot be; a model is one key, for `model=NAME` is."""
    annotation = cls.model_fields[name].annotation
    section = section_of(annotation)
    if section is None or section is ModelSection or get_origin(annotation) is dict:
        return [key]
    required = [inner for inner, info in section.model_fields.items() if info.is_required()]
    return [found for inner in required for found in _required_keys(section, inner, f"{key}.{inner}")] or [key]


def _is_branch(part: Any) -> bool:
    """Whether a part of a location is pydantic's name for a branch of `Literal[...] | dict[...]`."""
    return isinstance(part, str) and re.match(r"(literal|dict)\[", part) is not None


def _is_of_another_branch(item: Mapping[str, Any]) -> bool:
    """Whether an error is that of a name where a mapping was given, or of a mapping where a name was."""
    is_mapping = isinstance(item["input"], Mapping)
    wrong_kind = item["type"] == ("literal_error" if is_mapping else "dict_type")
    return wrong_kind and _is_branch(item["loc"][-1])


def input_problems(cls: type[BaseModel], values: Any, made_earlier: Sequence[str]) -> list[str]:
    """What is missing among the data sets and files that a configuration names, valid or not otherwise."""
    find = {"data": find_data, "model": find_model, "template": find_template}
    problems = []
    for key, name, kind in named_inputs(cls, values):
        if any(Path(name) == Path(folder) or Path(folder) in Path(name).parents for folder in made_earlier):
            continue
        try:
            find[kind](name)
        except AlignError as error:
            problems.append(f"{key}: {error}")
    return [*problems, *_not_held_out(cls, values)]


def _not_held_out(cls: type[BaseModel], values: Any) -> Iterator[str]:
    """Files to measure on that are trained on too."""
    named = [(key, name) for key, name, kind in named_inputs(cls, values) if kind == "data"]
    trained = {_place(name): key for key, name in named if key not in HELD_OUT}
    for key, name in named:
        if key in HELD_OUT and (other := trained.get(_place(name))):
            yield f"{key}: {name} is in {other} too. Hold other rows out: align data split."


def _place(name: str) -> Path:
    """Where a data set is, or would be."""
    try:
        return Path(find_data(name)).resolve()
    except AlignError:
        return expanded(name).resolve()


def text_problems(values: Any, key: str = "") -> Iterator[str]:
    """Where a text is no UTF-8, such as a file's name in another encoding: the saved settings could not hold it."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from text_problems(value, f"{key}.{name}" if key else name)
    elif isinstance(values, list):
        for value in values:
            yield from text_problems(value, key)
    elif isinstance(values, str):
        try:
            values.encode()
        except UnicodeEncodeError:
            yield f"{key}: {values!r} is not UTF-8. Rename the file or folder, or correct the text."


def _without(values: Any, location: tuple[Any, ...]) -> Any:
    if not location:
        return values
    head, *rest = location
    if isinstance(values, Mapping) and head in values:
        if not rest:
            return {key: value for key, value in values.items() if key != head}
        return {**values, head: _without(values[head], tuple(rest))}
    return values
