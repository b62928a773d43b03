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
Later stages have all versions, however many there are, as an item of a list, ["${each.rs}"], or by name:

    eval: {policies: {sft: "${sft}", "rs-${round}": "${each.rs}"}, ...}

There `${round}` and `${each.NAME}` are replaced in name and value alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignment.config import merge

# What names mean in references and on the command line.
_TAKEN = ("here", "round", "runs", "defaults", "stages")
_NUMBERED = re.compile(r"\$\{(?:(last|earlier)\.)?([^}.]*)\}")
_EARLIER = re.compile(r"\$\{earlier\.([^}]*)\}")
_EACH = re.compile(r"\$\{each\.([^}]*)\}")


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
    repeated: dict[str, int] = {}  # stages of the blocks so far, and how often there is each
    problems = [f"{where}: stages: {problem}" for problem in _name_problems(entries)]
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or "repeat" not in entry:
            found = {name: _of_each(entry, repeated, f"{where}: stages.{name}", problems)}
        else:
            over = given.get(name)
            block = merge(entry, over if isinstance(over, Mapping) else {})
            problem = _problem_of(block)
            if problem:
                problems.append(f"{where}: stages.{name}{problem}")
                continue
            found = _written_out(block, f"{where}: stages.{name}", problems)
            outside |= {f"{inner}-{block['repeat']}": inner for inner in block["stages"]}
            repeated |= dict.fromkeys(block["stages"], block["repeat"])
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
    if wrong := [name for name, place in first.items() if not isinstance(place, str)]:
        return f".first.{wrong[0]}: must be text, what ${{last.{wrong[0]}}} stands for in round 1."
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
            str(_in_round(key, block, number, f"{where}.{key}", problems)): _in_round(
                entry, block, number, f"{where}.{key}", problems
            )
            for key, entry in value.items()
        }
    if isinstance(value, list):
        items: list[Any] = []
        for entry in value:
            if isinstance(entry, str) and "${earlier." in entry:
                found = [_EARLIER.sub(rf"${{\1-{each}}}", entry) for each in range(1, number)]
            else:
                found = [entry]
            items += [_in_round(each, block, number, where, problems) for each in found]
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


def _of_each(value: Any, repeated: Mapping[str, int], where: str, problems: list[str]) -> Any:
    """What a stage after repeated ones says, with all their rounds written out."""
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, entry in value.items():
            place = f"{where}.{key}"
            if isinstance(key, str) and ("${round}" in key or "${each." in key):
                rounds = _rounds_of([key, entry], repeated, place, problems)
                written = [(_numbered(key, each), _numbered(entry, each)) for each in rounds]
            else:
                written = [(key, _of_each(entry, repeated, place, problems))]
            twice = "is there twice, under its name and with ${round}."
            problems += [f"{where}.{new}: {twice}" for new, _ in written if new in found]
            found |= written
        return found
    if isinstance(value, list):
        items: list[Any] = []
        for entry in value:
            if isinstance(entry, str) and "${each." in entry:
                items += [_numbered(entry, each) for each in _rounds_of(entry, repeated, where, problems)]
            else:
                items.append(_of_each(entry, repeated, where, problems))
        return items
    if isinstance(value, str) and (found_in := _EACH.search(value)):
        name, key = found_in.group(1), where.rpartition(".")[2]
        problems.append(
            f"{where}: {found_in.group()} stands for many rounds. Write it as an item of a list, or with a name for "
            f'each: "{key}-${{round}}". The last one is ${{{name}}}.'
        )
        return ""
    return value


def _rounds_of(entry: Any, repeated: Mapping[str, int], where: str, problems: list[str]) -> range:
    """The rounds of the stages that are named as `${each.NAME}`."""
    names = {name for text in _texts(entry) for name in _EACH.findall(text)}
    if not names:
        problems.append(f"{where}: has a ${{round}} in its name and no ${{each.STAGE}}, whose rounds these are.")
    elif unknown := sorted(names - set(repeated)):
        known = f"Known: {', '.join(repeated)}." if repeated else "There is no repeat block before this stage."
        problems.append(f"{where}: ${{each.{unknown[0]}}} is no repeated stage before this one. {known}")
    elif len({repeated[name] for name in names}) > 1:
        problems.append(f"{where}: {', '.join(sorted(names))} have different numbers of rounds.")
    else:
        return range(1, repeated[names.pop()] + 1)
    return range(0)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, str):
        yield value
        return
    elif not isinstance(value, list):
        return
    for entry in value:
        yield from _texts(entry)


def _numbered(value: Any, number: int) -> Any:
    """`${each.NAME}` becomes `${NAME-number}`, and `${round}` the number."""
    if isinstance(value, Mapping):
        return {_numbered(key, number): _numbered(entry, number) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbered(entry, number) for entry in value]
    if not isinstance(value, str):
        return value
    return _EACH.sub(rf"${{\1-{number}}}", value).replace("${round}", str(number))
