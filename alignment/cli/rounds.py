"""Stages of a pipeline that are repeated: the versions V1 ... Vn of iterated fine-tuning (Llama 2 Sec. 3.2.3).

    rounds:
      repeat: 4
      first: {rs: "${sft}"}                # what ${last.rs} is in round 1
      stages:
        reject:
          model: ${last.rs}                # that of the round before
          round: ${round}
          earlier_rounds: ["${earlier.reject}/candidates.jsonl"]        # one for every round before
          ...
        rs: {stage: sft, data: {train: ["${reject}/sft.jsonl"]}, ...}   # that of this round

This stands for the stages reject-1, rs-1, reject-2, rs-2, ...; after the block, ${rs} is rs-4 and ${rs-1} the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignment.config import merge

# What names mean in references and on the command line.
_TAKEN = ("here", "round", "runs", "defaults", "stages")
_NUMBERED = re.compile(r"\$\{(?:(last|earlier)\.)?([^}.]*)\}")


def expand_rounds(
    entries: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The stages with every `repeat` block written out.

    Args:
        entries: the pipeline's `stages`.
        given: settings of the command line by stage or block, e.g. `{"rounds": {"repeat": 2}}`.
        where: the pipeline's file, for messages.

    Returns:
        Stages by name in order; for the last stage of each repeated name, by its own name, the name it has outside the
        block; problems.
    """
    stages: dict[str, Any] = {}
    outside: dict[str, str] = {}
    problems = [f"{where}: stages: {problem}" for problem in _name_problems(entries)]
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or "repeat" not in entry:
            found = {name: entry}
        else:
            over = given.get(name)
            block = merge(entry, over if isinstance(over, Mapping) else {})
            problem = _problem_of(block)
            if problem:
                problems.append(f"{where}: stages.{name}{problem}")
                continue
            found = _written_out(block, f"{where}: stages.{name}", problems)
            outside |= {f"{inner}-{block['repeat']}": inner for inner in block["stages"]}
        problems += [f"{where}: stages.{each}: there are two stages of this name." for each in found if each in stages]
        stages |= found
    for name in outside.values():
        if name in stages:
            problems.append(f"{where}: stages.{name}: is also a name in a repeat block.")
    return stages, outside, problems


def _name_problems(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name in _TAKEN:
            yield f"{name!r} means something else in a pipeline. Choose another name."
        elif name in ("", ".", "..") or set(name) & set("/\\\0{}"):
            yield f"{name!r} is no name for a folder. Use letters, digits, - and _."


def _problem_of(block: Mapping[str, Any]) -> str | None:
    unknown = sorted(set(block) - {"repeat", "first", "stages"})
    if unknown:
        return f".{unknown[0]}: unknown key. Known in a repeat block: repeat, first, stages."
    repeat = block["repeat"]
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        return f".repeat: {repeat!r}. It must be a whole number above 0."
    if not isinstance(block.get("stages"), Mapping) or not block["stages"]:
        return ".stages: missing or empty. List the stages of a round."
    if problem := next(_name_problems(block["stages"]), None):
        return f".stages: {problem}"
    first = block.get("first", {})
    if not isinstance(first, Mapping) or set(first) - set(block["stages"]):
        return ".first: must name stages of the block, and what each is before round 1."
    return None


def _written_out(block: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    found = {}
    for number in range(1, block["repeat"] + 1):
        for name, entry in block["stages"].items():
            place = f"{where}.stages.{name}"
            found[f"{name}-{number}"] = _in_round(_with_stage(entry, name), block, number, place, problems)
    return found


def _with_stage(entry: Any, name: str) -> Any:
    """A stage that does not say what it is, is what its name says; its numbered name would not."""
    return {"stage": name, **entry} if isinstance(entry, Mapping) else entry


def _in_round(value: Any, block: Mapping[str, Any], number: int, where: str, problems: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            _in_round(key, block, number, f"{where}.{key}", problems): _in_round(
                entry, block, number, f"{where}.{key}", problems
            )
            for key, entry in value.items()
        }
    if isinstance(value, list):
        items: list[Any] = []
        for entry in value:
            rounds = range(1, number) if isinstance(entry, str) and "${earlier." in entry else [number]
            items += [_in_round(_of_earlier(entry, each), block, number, where, problems) for each in rounds]
        return items
    if not isinstance(value, str):
        return value
    if value == "${round}":
        return number

    def name_of(match: re.Match[str]) -> str:
        when, name = match.groups()
        if when is None:
            if name == "round":
                return str(number)
            return f"${{{name}-{number}}}" if name in block["stages"] else match.group()
        if when == "last" and name in block["stages"]:
            if number > 1:
                return f"${{{name}-{number - 1}}}"
            if name in block.get("first", {}):
                return str(block["first"][name])
            problems.append(f"{where}: {match.group()} is nothing in round 1. Say what in first.{name}.")
        elif when == "last":
            problems.append(f"{where}: {match.group()} is no stage of the block. Known: {', '.join(block['stages'])}.")
        else:
            problems.append(f"{where}: {match.group()} stands for many rounds. Write it as an item of a list.")
        return ""

    return _NUMBERED.sub(name_of, value)


def _of_earlier(entry: Any, number: int) -> Any:
    return re.sub(r"\$\{earlier\.([^}]*)\}", rf"${{\1-{number}}}", entry) if isinstance(entry, str) else entry
