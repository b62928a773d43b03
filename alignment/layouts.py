"""Public data layouts, one function each from a raw object to our rows.

HH-RLHF, TRL, PKU-SafeRLHF, UltraFeedback, OASST, ShareGPT, Alpaca, PandaLM, and our pairs with a measure of strength.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations
from operator import itemgetter
from typing import Any, Literal

from alignment.dialogue import RATINGS, RowError, optional_number, refuse_verdict

Raw = Mapping[str, Any]
Aim = Literal["helpfulness", "safety"]
Strength = Literal["ranks", "votes", "scores"]
RatingBins = tuple[float, float, float]


@dataclass(frozen=True)
class Options:
    """What a converter cannot read off a row.

    `aim`: which of PKU-SafeRLHF's two judgements decides.

    `rating_bins`: how graded sources get Llama 2's ratings, which no public layout has. For each measure of strength
    three increasing thresholds a < b < c on how much better the chosen response is: places between the two ranks
    (OASST), the chosen's votes minus the other's (PandaLM, of three annotators), difference of the scores
    (UltraFeedback). Below a is `negligibly_better`, from a `slightly_better`, from b `better`, from c
    `significantly_better`. Rows whose measure has no bins stay unrated.
    """

    aim: Aim = "helpfulness"
    rating_bins: Mapping[Strength, RatingBins] = field(default_factory=dict)


Converter = Callable[[Raw, Options], Iterator[dict[str, Any]]]


def from_hh_rlhf(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    r"""`{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}`: whole transcripts, equal but for the end."""
    chosen, rejected = (_transcript(_text(raw, name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError('"chosen" and "rejected" differ before their last turn.')
    yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def from_trl(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Preference, prompt-completion, prompt-only and language-modelling rows, of text or of messages.

    Text becomes one turn, without the space around it that glued TRL's texts together; a prompt that is a transcript
    of "Human:" and "Assistant:" becomes its turns. A `system` beside them opens the dialogue. A completion is trained,
    its prompt is not. Raises RowError for unpaired preferences: a completion marked as bad is no demonstration.
    """
    if raw.get("chosen") is not None:
        yield {**raw, **_pair_turns(raw)}
    elif _is_judged_alone(raw):
        raise RowError('an unpaired or stepwise row (it has "label"). Pairs need "chosen" and "rejected".')
    elif raw.get("completion") is not None:
        prompt, completion = _asked(raw), _turns(raw, "completion", "assistant")
        if len(completion) != 1:
            raise RowError('"completion" has several turns. It must be one assistant message.')
        yield {**raw, "messages": prompt + completion, "train_on": "last"}
    elif raw.get("messages") is not None:
        yield {**raw, "messages": _behind_system(raw, raw["messages"])}
    elif "response" in raw:
        raise RowError('"response" is no field of TRL. Rename it to "completion" where it is a demonstration.')
    else:
        yield {**raw, "prompt": _asked(raw)}


def from_pku_saferlhf(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Two labelled responses; `better_response_id` (helpfulness) or `safer_response_id` (safety) is the chosen one."""
    name = "safer_response_id" if options.aim == "safety" else "better_response_id"
    chosen = _number(raw, name)
    if chosen not in (0, 1):
        raise RowError(f'"{name}" is {chosen!r}. It must be 0 or 1.')
    row: dict[str, Any] = {"prompt": _turns(raw, "prompt", "user")}
    for side, index in (("chosen", int(chosen)), ("rejected", 1 - int(chosen))):
        row[side] = _turns(raw, f"response_{index}", "assistant")
        row[f"{side}_safe"] = raw.get(f"is_response_{index}_safe")
    yield {**row, "is_safety": True} if options.aim == "safety" else row


def from_ultrafeedback(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Binarized rows with `score_chosen` and `score_rejected` (or `chosen-rating`, `rejected-rating`).

    Rows keep the scores, which `graded` reads.
    """
    is_older = "score_chosen" not in raw and "chosen-rating" in raw
    names = ("chosen-rating", "rejected-rating") if is_older else ("score_chosen", "score_rejected")
    scores = [_number(raw, name) for name in names]
    if scores[0] <= scores[1]:
        how = "ties with" if scores[0] == scores[1] else "is below"
        raise RowError(f"the score of the chosen response {how} that of the rejected one.")
    measures = {"score_chosen": scores[0], "score_rejected": scores[1]}
    yield {**_pair_turns(raw), **measures, **_rated("scores", scores[0] - scores[1], options)}


def from_oasst(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Message trees, `{"prompt": {"text", "role", "replies": [{"text", "rank", "replies": ...}]}}`; rank 0 is best.

    Every two replies to one user message with different ranks make a pair; its prompt is the path from the root.
    Replies that were deleted or turned down in review are left out; all languages and synthetic replies are kept.
    Rows keep the ranks, which `graded` reads.
    """
    root = raw.get("prompt")
    if not isinstance(root, Mapping):
        raise RowError(
            '"prompt" must be the root of a message tree, as in the files named ".trees.jsonl.gz". Flat message files '
            "are not supported."
        )
    num_pairs, open_nodes = 0, [(root, [])]
    while open_nodes:
        node, history = open_nodes.pop()
        path = [*history, _turn(_text(node, "text"), node.get("role"))]
        replies = _approved_replies(node)
        open_nodes += [(reply, path) for reply in replies]
        ranked = [(_number(reply, "rank"), reply) for reply in replies if reply.get("rank") is not None]
        for (rank, better), (worse_rank, worse) in combinations(sorted(ranked, key=itemgetter(0)), 2):
            if better.get("role") == "assistant" and worse_rank > rank:
                num_pairs += 1
                sides = {"chosen": _turns(better, "text", "assistant"), "rejected": _turns(worse, "text", "assistant")}
                ranks = {"rank_chosen": rank, "rank_rejected": worse_rank}
                yield {"prompt": path, **sides, **ranks, **_rated("ranks", worse_rank - rank, options)}
    if not num_pairs:
        raise RowError("no two replies of the tree have different ranks.")


def from_sharegpt(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """`{"conversations": [{"from": "human" | "gpt" | "system", "value"}]}`, and `system` or `system_prompt` beside it.

    `role` and `content` are taken in the places of `from` and `value`.
    """
    turns = raw.get("conversations")
    refuse_verdict(raw)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError('"conversations" must be a list of {"from", "value"} objects.')
    yield {"messages": _behind_system(raw, [_spoken(turn) for turn in turns])}


def from_alpaca(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """`{"instruction", "input", "output"}`, with `system` and `history` ([[user, assistant], ...]) where given."""
    history = raw.get("history") or []
    if not (isinstance(history, list) and all(isinstance(each, list) and len(each) == 2 for each in history)):
        raise RowError('"history" must be a list of [user, assistant] texts.')
    turns = [*chain.from_iterable(history), _question(raw), _text(raw, "output")]
    messages = [_turn(text, ("user", "assistant")[index % 2]) for index, text in enumerate(turns)]
    yield {"messages": _system(raw) + messages}


def from_pandalm(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """`{"instruction", "input", "response1", "response2", "annotator1": 0 | 1 | 2, ...}`; 0 is a tie.

    The response that more of the annotators picked is the chosen one; rows keep the votes, which `graded` reads.
    Raises RowError where none is.
    """
    votes = [_number(raw, f"annotator{number}") for number in (1, 2, 3)]
    if not all(vote in (0, 1, 2) for vote in votes):
        raise RowError('"annotator1" to "annotator3" must be 0, 1 or 2.')
    counts = (votes.count(1), votes.count(2))
    if counts[0] == counts[1]:
        raise RowError("the annotators prefer neither response.")
    chosen, rejected = ("response1", "response2") if counts[0] > counts[1] else ("response2", "response1")
    row = {
        "prompt": [_turn(_question(raw), "user")],
        "chosen": _turns(raw, chosen, "assistant"),
        "rejected": _turns(raw, rejected, "assistant"),
        "votes_chosen": max(counts),
        "votes_rejected": min(counts),
    }
    yield row | _rated("votes", abs(counts[0] - counts[1]), options)


def from_graded(raw: Raw, options: Options) -> Iterator[dict[str, Any]]:
    """Pairs in our form that carry a measure of strength, which `rating_bins` turn into ratings.

    `rank_chosen` and `rank_rejected` (0 is best), `votes_chosen` and `votes_rejected`, or `score_chosen` and
    `score_rejected`; the first of these that both responses have counts.
    """
    for strength, name, sign in _MEASURES:
        chosen, rejected = (optional_number(raw, f"{name}_{side}") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            difference = sign * (chosen - rejected)
            if difference <= 0:
                raise RowError(f'"{name}_chosen" is not better than "{name}_rejected".')
            yield {**raw, **_pair_turns(raw), **_rated(strength, difference, options)}
            return
    raise RowError('no measure of strength ("rank_chosen", "votes_chosen" or "score_chosen", with "..._rejected").')


def measures_of(row: Raw) -> dict[str, Any]:
    """The fields of a pair that `from_graded` reads, which no stage does: they stay, so that it can be rated anew."""
    names = [f"{name}_{side}" for _, name, _ in _MEASURES for side in ("chosen", "rejected")]
    return {name: row[name] for name in names if row.get(name) is not None}


CONVERTERS: dict[str, Converter] = {
    "hh-rlhf": from_hh_rlhf,
    "trl": from_trl,
    "pku-saferlhf": from_pku_saferlhf,
    "ultrafeedback": from_ultrafeedback,
    "oasst": from_oasst,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "pandalm": from_pandalm,
    "graded": from_graded,
}

# Measure, field, and 1 where more is better.
_MEASURES: tuple[tuple[Strength, str, int], ...] = (
    ("ranks", "rank", -1),
    ("votes", "votes", 1),
    ("scores", "score", 1),
)
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {
    **dict.fromkeys(("human", "Human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "Assistant", "assistant"), "assistant"),
    "system": "system",
}


def guess_layout(row: Raw) -> str | None:
    """The layout for `align data convert --from` that a row looks like, or None."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    signs = {
        "sharegpt": "conversations" in row,
        "pku-saferlhf": {"response_0", "response_1"} <= set(row),
        "oasst": isinstance(prompt, Mapping) and "replies" in prompt,
        "alpaca": {"instruction", "output"} <= set(row),
        "pandalm": {"response1", "response2", "annotator1"} <= set(row),
        "hh-rlhf": isinstance(chosen, str) and chosen.lstrip().startswith("Human:"),
        "ultrafeedback": "rejected" in row and bool({"score_chosen", "chosen-rating"} & set(row)),
        "trl": isinstance(prompt, str) or "completion" in row,
    }
    return next((layout for layout, fits in signs.items() if fits), None)


def layout_hint(row: Raw, name: str) -> str:
    """What to do with the rows of a file or Hub data set of which one is in another layout than ours."""
    if layout := guess_layout(row):
        return f'It looks like {layout}: "align data convert {name} --from {layout} --out NEW.jsonl".'
    return 'docs/data-formats.md has every field and, under "Your own layout", how to convert other rows.'


def _turn(text: Any, speaker: Any) -> dict[str, Any]:
    role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": text.strip() if isinstance(text, str) else text}


def _spoken(turn: Raw) -> dict[str, Any]:
    """A turn of ShareGPT's, with whatever else it says of itself, such as that it is not to be trained."""
    speaker = turn.get("role") if turn.get("from") is None else turn["from"]
    name = "content" if turn.get("value") is None and "content" in turn else "value"
    return {**turn, **_turn(_text(turn, name), speaker)}


def _is_judged_alone(raw: Raw) -> bool:
    """Whether a completion, or each step of one, has a judgement of its own: TRL's unpaired and stepwise rows."""
    if raw.get("completion") is not None:
        return raw.get("label") is not None
    is_dialogue_with_verdict = raw.get("messages") is not None and isinstance(raw.get("label"), bool)
    return raw.get("completions") is not None or is_dialogue_with_verdict


def _system(raw: Raw) -> list[dict[str, Any]]:
    name = next((name for name in ("system", "system_prompt") if raw.get(name)), None)
    return [_turn(_text(raw, name), "system")] if name else []


def _behind_system(raw: Raw, turns: Any) -> Any:
    """Turns that open with the row's system message, where it has one and they do not open with one."""
    if not isinstance(turns, list) or not turns:
        return turns
    opens_with_one = isinstance(turns[0], Mapping) and turns[0].get("role") == "system"
    return turns if opens_with_one else _system(raw) + turns


def _asked(raw: Raw) -> list[Any]:
    """A row's prompt as turns; HH-RLHF's transcripts are found in it by what they open with and go on with."""
    prompt = raw.get("prompt")
    turns = _turns(raw, "prompt", "user")
    if isinstance(prompt, str) and prompt.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in prompt:
        turns = _spoken_in(prompt.lstrip("\n"), "prompt")
        if turns[-1] == _turn("", "assistant"):
            turns.pop()
        if turns[-1]["role"] != "user":
            raise RowError('"prompt" ends with an assistant turn, and a response is to follow.')
    return _behind_system(raw, turns)


def _text(raw: Raw, name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise RowError(f'"{name}" is missing.' if value is None else f'"{name}" is a {type(value).__name__}, not text.')
    return value


def _number(raw: Raw, name: str) -> float:
    value = optional_number(raw, name)
    if value is None:
        raise RowError(f'"{name}" is missing. It must be a finite number.')
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
        prompt = _asked(raw)
    elif isinstance(prompt, list) and shared[: len(prompt)] != prompt:
        prompt = _behind_system(raw, prompt + shared)
    else:
        prompt = _behind_system(raw, shared)
    return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _spoken_in(text: str, name: str) -> list[dict[str, Any]]:
    """The turns of a transcript."""
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise RowError(f'"{name}" does not open with "Human:".')
    return [_turn(content, speaker) for speaker, content in zip(parts[0::2], parts[1::2], strict=True)]


def _transcript(text: str, name: str) -> list[dict[str, Any]]:
    turns = _spoken_in(text, name)
    if turns[-1]["role"] != "assistant":
        raise RowError(f'"{name}" ends with a user turn, not with a response.')
    return turns


def _rated(strength: Strength, difference: float, options: Options) -> dict[str, str]:
    """The rating by the bins. Scores of few digits are meant: 8.2 - 7.2, a little less than 1 in floats, is 1."""
    bins = options.rating_bins.get(strength)
    return {"rating": RATINGS[3 - bisect_right(bins, round(difference, 9))]} if bins else {}


def _question(raw: Raw) -> str:
    """Alpaca's instruction and, where there is one, its input."""
    asked = [_text(raw, "instruction"), _text(raw, "input") if raw.get("input") else ""]
    return "\n\n".join(filter(str.strip, asked))


def _approved_replies(node: Raw) -> list[Raw]:
    replies = node.get("replies") or []
    if not (isinstance(replies, list) and all(isinstance(reply, Mapping) for reply in replies)):
        raise RowError('"replies" must be a list of messages.')
    return [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
