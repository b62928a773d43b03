"""What the annotations of a group of settings say: its sections, and the types and defaults that help texts show."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel


def describe(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting, nested sections flattened with dots: the help text."""
    for name, info in cls.model_fields.items():
        section = section_of(info.annotation)
        if section is not None and get_origin(info.annotation) is not dict:
            yield from describe(section, f"{prefix}{name}.")
            continue
        required = info.is_required()
        default = "required" if required else _show_default(info.get_default(call_default_factory=True))
        meaning = " ".join(_description(cls, name).split())
        yield f"{prefix}{name}", _show_type(info.annotation), default, meaning


def _description(cls: type[BaseModel], name: str) -> str:
    """The docstring of a setting, or that of the base class whose default it changes."""
    sections = (base for base in cls.__mro__ if issubclass(base, BaseModel) and name in base.model_fields)
    return next((text for base in sections if (text := base.model_fields[name].description)), "")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that an annotation has, by itself, as a choice or as the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (typing.Union, types.UnionType, dict):
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return None


def section_at(cls: type[BaseModel], location: Sequence[Any]) -> type[BaseModel] | None:
    """The group of settings at a place in a larger one (`("train",)`), or None."""
    section: type[BaseModel] | None = cls
    for part in location:
        if section is None or part not in section.model_fields:
            return None
        section = section_of(section.model_fields[part].annotation)
    return section


def _show_type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if origin is Annotated:
        return _show_type(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if part is type(None) else _show_type(part) for part in get_args(annotation))
    if origin is not None:
        inner = ", ".join(_show_type(part) for part in get_args(annotation))
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _show_default(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        value = list(value)
    return str(value)
