"""Public data layouts -> our rows: HH-RLHF, TRL, PKU-SafeRLHF, UltraFeedback, OASST, ShareGPT, Alpaca."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal

from alignment.data import read_lines, write_rows
from alignment.data_report import parse_row
from alignment.dialogue import RATINGS, RowError
from alignment.errors import DataError
from alignment.sources import find_data

Raw = Mapping[str, Any]
Aim = Literal["helpfulness", "safety"]
RatingBins = tuple[float, float, float]

GRADED_LAYOUTS = ("oasst", "ultrafeedback")


@dataclass(frozen=True)
class Options:
    """What a converter cannot read off a row.

    `aim`: which of PKU-SafeRLHF's two judgements decides. `rating_bins`: three increasing thresholds a < b < c on how
    much better the chosen response is (UltraFeedback: difference of the scores; OASST: difference of the ranks). A
    difference below a is `negligibly_better`, from a `slightly_better`, from b `better`, from c
    `significantly_better`. None leaves pairs unrated: no public layout has Llama 2's ratings.
    """

    aim: Aim = "helpfulness"
    rating_bins: RatingBins | None = None


Converter = Callable[[Raw, Options], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class ConversionSummary:
    """Objects read, rows written, and what was left out: rows by reason, with the place of each reason's first."""

    num_read: int
    num_written: int
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)


def convert_file(
    source: str, layout: str, out: Path, *, aim: Aim = "helpfulness", rating_bins: RatingBins | None = None
) -> ConversionSummary:
    """Writes our rows of a file or Hub data set in a public layout; every row has passed the typed loader.

    Rows that cannot be used are left out and counted. Raises DataError where none is left, in which case `out` is
    not written, and where `out` or the options make no sense.
    """
    _check_request(layout, out, rating_bins)
    found = find_data(source)
    if isinstance(found, Path) and found.resolve() == out.resolve():
        raise DataError(f"{out}: is the file to convert. Name another one.")
    options, counts = Options(aim, rating_bins), Counter()
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, str] = {}

    def drop(error: RowError, where: str) -> None:
        reason = re.sub(r"\[\d+\]", "[i]", error.problem)
        dropped[reason] += 1
        first_dropped.setdefault(reason, where)

    def rows() -> Iterator[dict[str, Any]]:
        for line in read_lines(found):
            counts["read"] += 1
            try:
                if line.row is None:
                    raise RowError(line.problem or "unreadable")
                for row in CONVERTERS[layout](line.row, options):
                    try:
                        typed = parse_row(row)
                    except RowError as error:
                        drop(error, line.where)
                    else:
                        counts["written"] += 1
                        yield typed.to_json()
            except RowError as error:
                drop(error, line.where)
        if not counts["written"]:
            reasons = "".join(f"\n{first_dropped[reason]}: {reason}" for reason, _ in dropped.most_common(5))
            raise DataError(f"{source}: none of {counts['read']} rows can be read as {layout}.{reasons}")

    write_rows(out, rows())
    return ConversionSummary(counts["read"], counts["written"], dict(dropped.most_common()), first_dropped)


def from_hh_rlhf(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    r"""`{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}`: whole transcripts, equal but for the end."""
    chosen, rejected = (_transcript(_text(raw, name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError('"chosen" and "rejected" differ before their last turn.')
    yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def from_trl(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Preference, prompt-completion, prompt-only and language-modelling rows, of text or of messages.

    Text becomes one turn, without the space around it that glued TRL's texts together. A completion is trained,
    its prompt is not. Raises RowError for unpaired preferences: a completion marked as bad is no demonstration.
    """
    if raw.get("chosen") is not None:
        yield {**raw, **_pair_turns(raw)}
    elif "label" in raw or "labels" in raw:
        raise RowError('an unpaired or stepwise row (it has "label"). Pairs need "chosen" and "rejected".')
    elif raw.get("completion") is not None:
        prompt, completion = _turns(raw, "prompt", "user"), _turns(raw, "completion", "assistant")
        if len(completion) != 1:
            raise RowError('"completion" has several turns. It must be one assistant message.')
        yield {**raw, "messages": prompt + completion, "train_on": "last"}
    elif raw.get("messages") is not None:
        yield dict(raw)
    elif "response" in raw:
        raise RowError('"response" is no field of TRL. Rename it to "completion" where it is a demonstration.')
    else:
        yield {**raw, "prompt": _turns(raw, "prompt", "user")}


def from_pku_saferlhf(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Two labelled responses; `better_response_id` (helpfulness) or `safer_response_id` (safety) is the chosen one."""
    name = "safer_response_id" if options.aim == "safety" else "better_response_id"
    chosen = raw.get(name)
    if chosen not in (0, 1):
        raise RowError(f'"{name}" is {chosen!r}. It must be 0 or 1.')
    row: dict[str, Any] = {"prompt": _turns(raw, "prompt", "user")}
    for side, index in (("chosen", int(chosen)), ("rejected", 1 - int(chosen))):
        row[side] = _turns(raw, f"response_{index}", "assistant")
        row[f"{side}_safe"] = raw.get(f"is_response_{index}_safe")
    yield {**row, "is_safety": True} if options.aim == "safety" else row


def from_ultrafeedback(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Binarized rows with `score_chosen` and `score_rejected` (or `chosen-rating`, `rejected-rating`)."""
    scores = [raw.get(f"score_{side}", raw.get(f"{side}-rating")) for side in ("chosen", "rejected")]
    if not all(isinstance(score, int | float) for score in scores):
        raise RowError('"score_chosen" and "score_rejected" must be numbers.')
    if scores[0] <= scores[1]:
        how = "ties with" if scores[0] == scores[1] else "is below"
        raise RowError(f"the score of the chosen response {how} that of the rejected one.")
    yield {**_pair_turns(raw), **_rated(scores[0] - scores[1], options)}


def from_oasst(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Message trees, `{"prompt": {"text", "role", "replies": [{"text", "rank", "replies": ...}]}}`; rank 0 is best.

    Every two replies to one user message with different ranks make a pair; its prompt is the path from the root.
    Replies that were deleted or turned down in review are left out; all languages and synthetic replies are kept.
    """
    root = raw.get("prompt")
    if not isinstance(root, Mapping):
        raise RowError('"prompt" must be the root of a message tree. Flat message files are not supported.')
    num_pairs, open_nodes = 0, [(root, [])]
    while open_nodes:
        node, history = open_nodes.pop()
        path = [*history, _turn(_text(node, "text"), node.get("role"))]
        replies = _approved_replies(node)
        open_nodes += [(reply, path) for reply in replies]
        ranked = [reply for reply in replies if isinstance(reply.get("rank"), int)]
        for better, worse in combinations(sorted(ranked, key=lambda reply: reply["rank"]), 2):
            if better.get("role") == "assistant" and worse["rank"] > better["rank"]:
                num_pairs += 1
                sides = {"chosen": _turns(better, "text", "assistant"), "rejected": _turns(worse, "text", "assistant")}
                yield {"prompt": path, **sides, **_rated(worse["rank"] - better["rank"], options)}
    if not num_pairs:
        raise RowError("no two replies of the tree have different ranks.")


def from_sharegpt(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """`{"conversations": [{"from": "human" | "gpt" | "system", "value"}]}`, and `system` beside it."""
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError('"conversations" must be a list of {"from", "value"} objects.')
    yield {"messages": _system(raw) + [_turn(_text(turn, "value"), turn.get("from")) for turn in turns]}


def from_alpaca(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """`{"instruction", "input", "output"}`, with `system` and `history` ([[user, assistant], ...]) where given."""
    asked = [_text(raw, "instruction"), _text(raw, "input") if raw.get("input") else ""]
    history = raw.get("history") or []
    if not (isinstance(history, list) and all(isinstance(exchange, list) for exchange in history)):
        raise RowError('"history" must be a list of [user, assistant] texts.')
    turns = [*chain.from_iterable(history), "\n\n".join(filter(str.strip, asked)), _text(raw, "output")]
    messages = [_turn(text, ("user", "assistant")[index % 2]) for index, text in enumerate(turns)]
    yield {"messages": _system(raw) + messages}


CONVERTERS: dict[str, Converter] = {
    "hh-rlhf": from_hh_rlhf,
    "trl": from_trl,
    "pku-saferlhf": from_pku_saferlhf,
    "ultrafeedback": from_ultrafeedback,
    "oasst": from_oasst,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
}

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {
    **dict.fromkeys(("human", "Human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "Assistant", "assistant"), "assistant"),
    "system": "system",
}


def _check_request(layout: str, out: Path, rating_bins: RatingBins | None) -> None:
    if layout not in CONVERTERS:
        raise DataError(f'"{layout}": no such layout. Known: {", ".join(CONVERTERS)}.')
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{out}: the file to write must end with .jsonl or .jsonl.gz.")
    if not out.parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}. Make it first.")
    if rating_bins is not None and layout not in GRADED_LAYOUTS:
        raise DataError(f"rating bins: {layout} says nothing of strength. Only {', '.join(GRADED_LAYOUTS)} do.")
    if rating_bins is not None and not (len(rating_bins) == 3 and 0 < rating_bins[0] < rating_bins[1] < rating_bins[2]):
        raise DataError(f"rating bins: {rating_bins} are not three increasing positive numbers, e.g. 1,2,3.")


def _turn(text: Any, speaker: Any) -> dict[str, Any]:
    role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": text.strip() if isinstance(text, str) else text}


def _system(raw: Raw) -> list[dict[str, Any]]:
    return [_turn(_text(raw, "system"), "system")] if raw.get("system") else []


def _text(raw: Raw, name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise RowError(f'"{name}" is missing.' if value is None else f'"{name}" is a {type(value).__name__}, not text.')
    return value


def _turns(raw: Raw, name: str, role: str) -> list[Any]:
    value = raw.get(name)
    return list(value) if isinstance(value, list) else [_turn(_text(raw, name), role)]


def _pair_turns(raw: Raw) -> dict[str, Any]:
    """Prompt and responses of a pair; turns that both conversations open with belong to the prompt."""
    chosen, rejected = (_turns(raw, name, "assistant") for name in ("chosen", "rejected"))
    prompt, shared = raw.get("prompt"), chosen[:-1]
    if shared != rejected[:-1]:
        raise RowError('"chosen" and "rejected" differ before their last turn.')
    if not shared:
        prompt = _turns(raw, "prompt", "user")
    elif isinstance(prompt, list) and shared[: len(prompt)] != prompt:
        prompt = prompt + shared
    else:
        prompt = shared
    return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _transcript(text: str, name: str) -> list[dict[str, Any]]:
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise RowError(f'"{name}" does not open with "Human:".')
    turns = [_turn(content, speaker) for speaker, content in zip(parts[0::2], parts[1::2], strict=True)]
    if turns[-1]["role"] != "assistant":
        raise RowError(f'"{name}" ends with a user turn, not with a response.')
    return turns


def _rated(strength: float, options: Options) -> dict[str, str]:
    if options.rating_bins is None:
        return {}
    return {"rating": RATINGS[3 - bisect_right(options.rating_bins, strength)]}


def _approved_replies(node: Raw) -> list[Raw]:
    replies = node.get("replies") or []
    if not (isinstance(replies, list) and all(isinstance(reply, Mapping) for reply in replies)):
        raise RowError('"replies" must be a list of messages.')
    return [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
