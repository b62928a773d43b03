"""Dialogues, preference pairs, prompts and candidates: what the stages exchange, with their JSON forms."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

Role = Literal["system", "user", "assistant"]
Rating = Literal["significantly_better", "better", "slightly_better", "negligibly_better"]
TrainOn = Literal["all", "last"]

RATINGS: tuple[str, ...] = get_args(Rating)
# What is read of a message. Beside its text that is what makes the row a bad one: calls, and answers not to be trained.
MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", "function_call", "weight", "train", "loss"})


class RowError(ValueError):
    """One row of data is wrong. `problem` names the field, what was found and what to do."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class LayoutError(RowError):
    """A row lacks a field, or has another thing where messages must be: perhaps it is in another layout."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: Role
    content: str

    def to_json(self) -> dict[str, str]:
        """`{"role": ..., "content": ...}`."""
        return {"role": self.role, "content": self.content}


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A demonstration: turns that end with an assistant turn.

    `train_on` says which assistant turns carry loss: all of them, or the last one only (Ghost Attention,
    Llama 2 Sec. 3.3).
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset({"messages", "train_on", "source"})

    messages: Messages
    train_on: TrainOn = "all"
    source: str = ""
    where: str = field(default="", compare=False, repr=False)  # "pairs.jsonl:17", for messages about the row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Dialogue:
        """Raises RowError where a field is missing, misspelt or of the wrong form."""
        _refuse_misspelt(row, cls.FIELDS)
        messages = parse_messages(_require(row, "messages"), "messages", last_role="assistant")
        refuse_verdict(row)
        train_on = "all" if row.get("train_on") is None else row["train_on"]
        if train_on not in get_args(TrainOn):
            raise RowError(f'"train_on" is {_show(train_on)}. Use "all" or "last".')
        _refuse_unlearned(row["messages"], train_on)
        return cls(messages=messages, train_on=train_on, source=_source(row))

    def to_json(self) -> dict[str, Any]:
        """The row as written to a file; `train_on` and `source` only where they say something."""
        row: dict[str, Any] = {"messages": [message.to_json() for message in self.messages]}
        if self.train_on != "all":
            row["train_on"] = self.train_on
        return _with_source(row, self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Everything before a response: history and system message included, ending with a user turn.

    `is_safety` marks prompts of the safety set, for which the gate always takes the safety score. `category` is the
    kind of risk, by which context distillation chooses an answer template.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset({"prompt", "is_safety", "category", "source"})

    messages: Messages
    is_safety: bool = False
    category: str = ""
    source: str = ""
    where: str = field(default="", compare=False, repr=False)  # "pairs.jsonl:17", for messages about the row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Prompt:
        """Raises RowError where a field is missing, misspelt or of the wrong form."""
        _refuse_misspelt(row, cls.FIELDS)
        return cls(
            messages=parse_messages(_require(row, "prompt"), "prompt", last_role="user"),
            is_safety=_optional_bool(row, "is_safety") or False,
            category=_category(row),
            source=_source(row),
        )

    def to_json(self) -> dict[str, Any]:
        """The row as written to a file."""
        row: dict[str, Any] = {"prompt": [message.to_json() for message in self.messages]}
        if self.is_safety:
            row["is_safety"] = True
        if self.category:
            row["category"] = self.category
        return _with_source(row, self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt, of which a person preferred `chosen` (Llama 2 Sec. 3.2.1).

    `rating` is how strongly; `margin`, as in TRL's rows, is the m(r) of Eq. 2 itself and goes before the table's number
    for the rating. `chosen_safe` and `rejected_safe` are the safety labels, `None` where nobody judged.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "chosen", "rejected", "rating", "margin", "chosen_safe", "rejected_safe", "is_safety", "source"}
    )

    prompt: Messages
    chosen: str
    rejected: str
    rating: Rating | None = None
    margin: float | None = None
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    is_safety: bool = False
    source: str = ""
    where: str = field(default="", compare=False, repr=False)  # "pairs.jsonl:17", for messages about the row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PreferencePair:
        """Reads our rows and TRL's conversational preference rows, with or without a separate `prompt`.

        Raises RowError where a field is missing, misspelt or of the wrong form, a response is empty, or the two
        responses are the same.
        """
        _refuse_misspelt(row, cls.FIELDS)
        if row.get("prompt") is None and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
            row = {**row, **_split_shared_prompt(row["chosen"], row["rejected"])}
        prompt = parse_messages(_require(row, "prompt"), "prompt", last_role="user")
        chosen, rejected = (_parse_response(row, name) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise RowError('"chosen" and "rejected" are the same text. Remove the pair: it says nothing.')
        rating = row.get("rating")
        if rating is not None and rating not in RATINGS:
            raise RowError(f'"rating" is {_show(rating)}. Use one of {", ".join(RATINGS)}, or leave it out.')
        margin = optional_number(row, "margin")
        if margin is not None and margin < 0:
            raise RowError(f'"margin" is {_show(margin)}. It must not be negative: exchange the responses instead.')
        return cls(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            rating=rating,
            margin=margin,
            chosen_safe=_optional_bool(row, "chosen_safe"),
            rejected_safe=_optional_bool(row, "rejected_safe"),
            is_safety=_optional_bool(row, "is_safety") or False,
            source=_source(row),
        )

    def to_json(self) -> dict[str, Any]:
        """The row as written to a file; fields nobody filled are left out."""
        row: dict[str, Any] = {
            "prompt": [message.to_json() for message in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }
        for name in ("rating", "margin", "chosen_safe", "rejected_safe"):
            if (value := getattr(self, name)) is not None:
                row[name] = value
        if self.is_safety:
            row["is_safety"] = True
        return _with_source(row, self.source)


_CANDIDATE_FIELDS: dict[str, type] = {
    "index": int,
    "helpfulness": float,
    "safety": float,
    "reward": float,
    "guard": float,
    "kl": float,
    "finish_reason": str,
    "round": int,
    "seed": int,
    "temperature": float,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of K sampled responses to a prompt, with everything measured on it (Llama 2 Sec. 3.2.3).

    `helpfulness` and `safety` are raw reward-model scores (logits), `reward` the gated score the choice is made by,
    `guard` the raw score of a reward model that trained nothing, `kl` the log-probability under the model that sampled
    less that under another (nats).
    """

    FIELDS: ClassVar[frozenset[str]] = Prompt.FIELDS | {"response", *_CANDIDATE_FIELDS}

    prompt: Prompt
    response: str
    index: int
    helpfulness: float | None = None
    safety: float | None = None
    reward: float | None = None
    guard: float | None = None
    kl: float | None = None
    finish_reason: str = "stop"
    round: int = 0
    seed: int = 0
    temperature: float | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Candidate:
        """Raises RowError where a field is missing, misspelt or of the wrong form. `index` is 0 where none is given."""
        _refuse_misspelt(row, cls.FIELDS)
        measured = {name: value for name in _CANDIDATE_FIELDS if (value := _measured(row, name)) is not None}
        response = _parse_response(row, "response", may_be_empty=True)
        return cls(prompt=Prompt.from_json(row), response=response, **{"index": 0, **measured})

    def to_json(self) -> dict[str, Any]:
        """The row as written to a file."""
        row = self.prompt.to_json()
        row["response"] = [{"role": "assistant", "content": self.response}]
        for name in _CANDIDATE_FIELDS:
            if (value := getattr(self, name)) is not None:
                row[name] = value
        return row


def as_response(row: Mapping[str, Any]) -> Candidate:
    """A row with `prompt` and `response`, or a dialogue whose last turn is the response. Raises RowError."""
    if "messages" in row and row.get("response") is None:
        parse_messages(row["messages"], "messages", last_role="assistant")
        *prompt, last = row["messages"]
        row = {**row, "prompt": prompt, "response": [last]}
    return Candidate.from_json(row)


def safety_bin(pair: PreferencePair) -> str:
    """Where a pair falls in Llama 2's safety bins (Sec. 3.2.1), or `unlabelled`."""
    if pair.chosen_safe is None or pair.rejected_safe is None:
        return "unlabelled"
    return {
        (True, False): "chosen_safe_other_unsafe",
        (True, True): "both_safe",
        (False, False): "both_unsafe",
        (False, True): "veto",
    }[pair.chosen_safe, pair.rejected_safe]


def parse_messages(value: Any, name: str, *, last_role: str) -> Messages:
    """Checks roles and contents: an optional system turn, then user and assistant in turn, ending with `last_role`.

    Raises RowError, naming `name` and the turn.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise LayoutError(f'"{name}" is {_show(value)}. It must be a list of {{"role", "content"}} objects.')
    if not value:
        raise RowError(f'"{name}" is empty. It needs at least one turn.')
    messages = []
    for index, turn in enumerate(value):
        where = f'"{name}[{index}]"'
        if not isinstance(turn, Mapping):
            raise RowError(f'{where} is {_show(turn)}. It must be an object with "role" and "content".')
        role, content = turn.get("role"), turn.get("content")
        if role not in get_args(Role):
            raise RowError(f'{where} has role {_show(role)}. Use "system", "user" or "assistant".')
        _refuse_calls(turn, where)
        if not isinstance(content, str):
            raise RowError(f"{where} has content {_show(content)}. It must be text.")
        if not content.strip() and role != "system":
            raise RowError(f"{where} ({role}) is empty. Every user and assistant turn needs text.")
        _check_characters(content, where)
        messages.append(Message(role, content))
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            position = index + len(messages) - len(turns)
            raise RowError(
                f'"{name}[{position}]" is a {message.role} turn where a {expected} turn must stand. '
                "After an optional system turn, user and assistant alternate, user first."
            )
    if messages[-1].role != last_role:
        raise RowError(f'"{name}" ends with a {messages[-1].role} turn. The last turn must be {last_role}.')
    return tuple(messages)


def optional_number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number, or None where the field is missing or null. Raises RowError for all else, booleans included."""
    value = row.get(name)
    if value is None:
        return None
    # NaN is not less than anything, and an integer may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RowError(f'"{name}" is {_show(value)}. It must be a finite number.')
    return value


def _parse_response(row: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = _require(row, name)
    if isinstance(value, str):
        text = value
    elif isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        role, text = value[0].get("role"), value[0].get("content")
        if role != "assistant" or not isinstance(text, str):
            raise RowError(f'"{name}" is {_show(value)}. It must be one assistant message with text.')
        _refuse_calls(value[0], f'"{name}"')
    else:
        raise RowError(f'"{name}" is {_show(value)}. It must be a list with one assistant message.')
    if not text.strip() and not may_be_empty:
        raise RowError(f'"{name}" is empty. Every response needs text.')
    _check_characters(text, f'"{name}"')
    return text


def _label(row: Mapping[str, Any], name: str) -> str:
    """A text that rows are grouped by; empty where it is missing. Raises RowError for all else, and half characters."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f'"{name}" is {_show(value)}. It must be text.')
    _check_characters(value or "", f'"{name}"')
    return value or ""


def _source(row: Mapping[str, Any]) -> str:
    """As `_label`, but a number counts as its text: some data sets number their sources."""
    value = row.get("source")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return str(value) if is_number else _label(row, "source")


def _category(row: Mapping[str, Any]) -> str:
    """As `_label`; a list of texts is joined by commas."""
    value = row.get("category")
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return _label({"category": ",".join(value)}, "category")
    return _label(row, "category")


def _refuse_calls(turn: Mapping[str, Any], where: str) -> None:
    """Raises RowError for a message that calls a tool: its text alone would be another message."""
    if name := next((name for name in ("tool_calls", "function_call") if turn.get(name)), None):
        raise RowError(f'{where} has "{name}", which no stage reads. Remove the row, or write the call into the text.')


def refuse_verdict(row: Mapping[str, Any]) -> None:
    """Raises RowError for an unpaired preference: an answer marked as bad would be trained."""
    for name in ("label", "kto_tag"):
        if isinstance(row.get(name), bool):
            verdict = f'an unpaired preference ("{name}" says whether it is good or bad)'
            raise RowError(f'{verdict}. Keep the good ones, without "{name}".')


def _refuse_unlearned(turns: Sequence[Mapping[str, Any]], train_on: TrainOn) -> None:
    """Raises RowError where an answer that would be trained says that it is not to be, as OpenAI's rows can."""
    first = 0 if train_on == "all" else len(turns) - 1
    for index, turn in enumerate(turns[first:], start=first):
        marks = {"weight": turn.get("weight") not in (None, 1)}
        marks |= {name: turn.get(name) is False for name in ("train", "loss")}
        mark = next((name for name, is_set in marks.items() if is_set), None)
        if turn["role"] == "assistant" and mark:
            raise RowError(
                f'"messages[{index}]" is marked as not to be trained ("{mark}" is {_show(turn[mark])}). Set "train_on" '
                'to "last", which trains no earlier answer, or remove the row.'
            )


def _check_characters(text: str, where: str) -> None:
    """JSON can spell half of a character (a lone surrogate), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise RowError(f"{where} has half a character ({found} alone). Write the whole one, or remove it.") from None


def _split_shared_prompt(chosen: list[Any], rejected: list[Any]) -> dict[str, list[Any]]:
    """TRL's implicit prompt: the turns both conversations share are the prompt, the last turn is the response."""
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise LayoutError('"prompt" is missing, and "chosen" and "rejected" do not share all turns but the last.')
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _require(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise LayoutError(f'"{name}" is missing; the row has: {found}.')
    return row[name]


def _optional_bool(row: Mapping[str, Any], name: str) -> bool | None:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise RowError(f'"{name}" is {_show(value)}. It must be true or false, or be left out.')
    return value


def _measured(row: Mapping[str, Any], name: str) -> Any:
    value, kind = row.get(name), _CANDIDATE_FIELDS[name]
    if kind is float:
        return optional_number(row, name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise RowError(f'"{name}" is {_show(value)}. It must be {"text" if kind is str else "a whole number"}.')
    return value


def _refuse_misspelt(row: Mapping[str, Any], known: frozenset[str]) -> None:
    """Fields we do not know may stay, but not one whose name is nearly that of a field the row lacks."""
    for name, value in row.items():
        if value is not None and (guess := _nearest(str(name), known)) and row.get(guess) is None:
            raise RowError(f'unknown field "{name}": did you mean "{guess}"? Rename or remove it.')


@lru_cache(maxsize=1024)
def _nearest(name: str, known: frozenset[str]) -> str | None:
    # "is_safe" is a response's label (BeaverTails), not "is_safety"; "rejected_score", at 0.81 from "rejected_safe",
    # is a field of many data sets.
    if name in known or name == "is_safe":
        return None
    return next(iter(difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.85)), None)


def _with_source(row: dict[str, Any], source: str) -> dict[str, Any]:
    return {**row, "source": source} if source else row


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
