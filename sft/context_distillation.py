"""Safety context distillation: the safe answer that a preprompt brings out, learned without it (Llama 2 Sec. 4.2.4).

A prompt is answered twice, as it is and behind a safety preprompt, which for some kinds of risk ends with a template
of a good answer. Where the safety reward model scores the second answer above the first, it becomes a demonstration
for the prompt alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from alignment.chat import ChatFormat, drop_oldest_turns, has_system_turn
from alignment.data import Loaded, write_rows
from alignment.decontamination import load_prompts_of
from alignment.dialogue import Dialogue, Message, Messages, Prompt, parse_messages
from alignment.errors import DataError
from alignment.hardware import process_state
from alignment.headlines import counted
from alignment.metrics import mean_interval, wilson_interval
from alignment.progress import ProgressBar
from alignment.runs import open_run
from alignment.sampling.prompts import choose_prompts
from sft.answer_log import NoAnswer, RowLog
from sft.config import DistilConfig
from sft.conversation import Speaker, encode_within, why_unanswered
from sft.safety_preprompts import PREPROMPTS, TEMPLATES, template_of, with_preprompt

# Scores of K responses to each prompt; what `reward_models.score.Scorer.score` does.
Score = Callable[[Sequence[Messages], Sequence[Sequence[str]]], list[list[float]]]
# Whether the reward model can read a prompt with its responses.
IsReadable = Callable[[Messages, Sequence[str]], bool]


class LoadScore(Protocol):
    """Loads a reward model as a function of prompts and responses. Only the command line knows one to load."""

    def __call__(self, config: DistilConfig, device: Any) -> Score:
        """Raises ModelError where `config.safety` is no reward model."""
        ...


def distilled_dialogue(prompt: Messages, answer: str) -> Dialogue:
    """The row to train on: the answer that the preprompt brought out, behind the prompt alone."""
    return Dialogue(messages=(*prompt, Message("assistant", answer)), train_on="last", source="context_distillation")


def why_not_kept(row: Mapping[str, Any]) -> str:
    """Why a distilled answer is not kept, or nothing where it is (Llama 2 Sec. 4.2.4).

    `empty`, `cut_off` where it did not end by itself, or `not_better` where it is not scored above the plain one.
    """
    if not row["distilled"]:
        return "empty"
    if not row["is_finished"]:
        return "cut_off"
    return "" if row["score_distilled"] > row["score_plain"] else "not_better"


def run(
    config: DistilConfig,
    load_score: LoadScore,
    *,
    judge_context: int | None = None,
    is_readable: IsReadable = lambda prompt, responses: True,
    resume: bool = False,
) -> dict[str, Any]:
    """Samples both answers, scores them, keeps the better: `answers.jsonl`, `scored.jsonl`, `distilled.jsonl`.

    `judge_context`: tokens that the reward model can read, where there is an end to them. What is not readable to it
    is counted as `unscored`: its chat format may refuse a prompt, or make more tokens of an answer.
    """
    state = process_state(config.run.device)
    data = load_prompts_of(config.prompts)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(data.sources)
    drawn = _drawn(config, data)
    prompts = [prompt for prompt, _, _ in drawn]

    sizes = {"max_rows": config.sampling.max_rows, "answers_a_row": 2}
    path = run_dir.path / "answers.jsonl"
    note = run_dir.note_elapsed_now_and_then
    log = RowLog(path, total=len(prompts), **sizes, writes=run_dir.writes, resume=resume, on_append=note)
    state.wait_for_everyone()
    if missing := log.missing():
        length = config.prompts.max_prompt_length
        options = {"device": state.device, "max_prompt_length": length, "seed": config.run.seed}
        options["judge_context"] = judge_context
        with (
            Speaker.open(config.model, config.sampling, **options) as speaker,
            ProgressBar("distil: answers", 2 * sum(map(len, missing)), shown=run_dir.writes) as bar,
        ):
            for lot in missing:
                log.append(_answers(speaker, [drawn[index] for index in lot], bar))

    answered = [
        (replace(prompt, messages=parse_messages(row["prompt"], "prompt", last_role="user")), row)
        for prompt, row in zip(prompts, log.rows, strict=True)
        if not row["dropped"]
    ]
    dropped = Counter(row["dropped"] for row in log.rows if row["dropped"])
    if not answered:
        why = why_unanswered(dropped.keys(), config.model, config.prompts, config.sampling, judge_context)
        raise DataError(f"prompts: {why}.")
    readable = [pair for pair in answered if is_readable(pair[0].messages, [pair[1]["plain"], pair[1]["distilled"]])]
    if not readable:
        raise DataError("safety: this reward model can read none of the prompts with its answers. Name another.")
    dropped += Counter(unscored=len(answered) - len(readable))
    answered = readable
    score = load_score(config, state.device)
    scores = score([p.messages for p, _ in answered], [[row["plain"], row["distilled"]] for _, row in answered])
    scored = [
        {**prompt.to_json(), **row, "score_plain": plain, "score_distilled": distilled}
        for (prompt, row), (plain, distilled) in zip(answered, scores, strict=True)
    ]
    if state.is_main_process:
        write_rows(run_dir.path / "scored.jsonl", scored)
    result = summarize(scored)
    result["dropped"] = dict(sorted((dropped + Counter(result["dropped"])).items()))
    run_dir.note(dropped=result["dropped"], history_cut=result["history_cut"])
    kept = [(prompt, row) for (prompt, _), row in zip(answered, scored, strict=True) if not why_not_kept(row)]
    if not kept:
        raise DataError(
            f"no distilled answer may be kept ({counted(result['dropped'])}). Look at scored.jsonl in the run "
            "directory; raise sampling.max_new_tokens where most are cut off."
        )
    if state.is_main_process:
        rows = (distilled_dialogue(prompt.messages, row["distilled"]).to_json() for prompt, row in kept)
        write_rows(run_dir.path / "distilled.jsonl", rows)
    return run_dir.finish({"stage": "distil", "prompts": len(answered), **result})


def why_not_asked(config: DistilConfig, data: Loaded[Prompt], chat: ChatFormat, *, limit: int) -> list[NoAnswer | None]:
    """For `--dry-run`: why each prompt cannot be asked, plain or behind its preprompt; None where both fit `limit`."""

    def why_not(messages: Messages) -> NoAnswer | None:
        return encode_within(chat, messages, limit)[1]

    found, writes_system = [], has_system_turn(chat)
    for prompt, preprompt, _ in _drawn(config, data):
        behind = partial(with_preprompt, preprompt=preprompt, has_system_turn=writes_system)
        asked = _shortened(why_not, prompt.messages, behind)
        found.append(why_not(asked) or why_not(behind(asked)))
    return found


def _drawn(config: DistilConfig, data: Loaded[Prompt]) -> list[tuple[Prompt, str, bool]]:
    """The prompts that the seed chooses, each with what is put before it, and whether a template is part of that."""
    rng = random.Random(config.run.seed)
    templates = TEMPLATES if config.templates is None else config.templates
    found = []
    for prompt in choose_prompts(data, config.prompts, config.run.seed):
        preprompt, template = rng.choice(config.preprompts or PREPROMPTS), template_of(prompt.category, templates)
        found.append((prompt, f"{preprompt} {template}".strip(), bool(template)))
    return found


def summarize(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of prompts whose distilled answer is kept, overall and by category, and the scores of both answers.

    `dropped` counts the others by reason, `history_cut` the prompts that lost old turns, and `with_template` those
    that got a template of their category. Scores are over all answers, those that may not be kept included: the gain is
    what the preprompt does to the answers, before any choice. A reward model may judge by it that an answer breaks off:
    `score_gain_ended` is the gain where both ended by themselves, `kept_against_cut_off` counts kept answers to prompts
    whose plain one did not.
    """
    reasons = [why_not_kept(row) for row in scored]
    by_category: dict[str, list[bool]] = {}
    for row, reason in zip(scored, reasons, strict=True):
        by_category.setdefault(row.get("category") or "none", []).append(not reason)
    gains = [row["score_distilled"] - row["score_plain"] for row in scored]
    # Rows of a run that an older version began do not say whether the plain answer ended.
    both = [row["is_finished"] and row.get("is_plain_finished") for row in scored]
    broke_off = [row.get("is_plain_finished") is False for row in scored]
    return {
        "kept_rate": wilson_interval(reasons.count(""), len(scored)).to_json(),
        "kept_by_category": {
            name: wilson_interval(sum(found), len(found)).to_json() for name, found in sorted(by_category.items())
        },
        "dropped": dict(sorted(Counter(filter(None, reasons)).items())),
        "history_cut": sum(row["is_history_cut"] for row in scored),
        "with_template": sum(row["has_template"] for row in scored),
        "score_plain": mean_interval([row["score_plain"] for row in scored]).to_json(),
        "score_distilled": mean_interval([row["score_distilled"] for row in scored]).to_json(),
        "score_gain": mean_interval(gains).to_json(),
        "score_gain_ended": mean_interval([gain for gain, ended in zip(gains, both, strict=True) if ended]).to_json(),
        "kept_against_cut_off": sum(cut and not why for cut, why in zip(broke_off, reasons, strict=True)),
    }


def _shortened(
    why_not: Callable[[Messages], NoAnswer | None], prompt: Messages, behind: Callable[[Messages], Messages]
) -> Messages:
    """The prompt with as many turns as fit `behind` its preprompt; the whole where not even the last one does.

    Where the chat format refuses it, it stays whole: it is not to be answered without what is refused.
    """
    shorter: Messages | None = prompt
    while shorter is not None and (reason := why_not(behind(shorter))) is not None:
        if reason != "too_long":
            return prompt
        shorter = drop_oldest_turns(shorter)
    return shorter or prompt


def _answers(speaker: Speaker, given: Sequence[tuple[Prompt, str, bool]], bar: ProgressBar) -> list[dict[str, Any]]:
    """Both answers of each prompt of `_drawn`, without its oldest turns where need be.

    `dropped` says why there are none: `too_long`, or `refused` where the chat format cannot write the prompt or one of
    the answers; null otherwise.
    """
    asked, contexts, writes_system = [], {}, speaker.has_system_turn
    for index, (prompt, preprompt, _) in enumerate(given):
        behind = partial(with_preprompt, preprompt=preprompt, has_system_turn=writes_system)
        messages = _shortened(speaker.why_not, prompt.messages, behind)
        asked.append(messages)
        contexts[2 * index], contexts[2 * index + 1] = messages, behind(messages)
    answered = speaker.answer(contexts, turn=0, bar=bar)
    rows = []
    for index, (prompt, preprompt, has_template) in enumerate(given):
        places = (2 * index, 2 * index + 1)
        reasons = [answered.missing[place] for place in places if place in answered.missing]
        answers = [answered.candidates[place][0] for place in places if place in answered.candidates]
        if any(answer.is_refused for answer in answers):
            reasons.append("refused")
        plain, distilled = answers if not reasons else (None, None)
        rows.append(
            {
                "prompt": [message.to_json() for message in asked[index]],
                "preprompt": preprompt,
                "has_template": has_template,
                "is_history_cut": asked[index] is not prompt.messages,
                "plain": plain.text if plain else None,
                "distilled": distilled.text if distilled else None,
                "is_plain_finished": bool(plain and plain.is_finished),
                "is_finished": bool(distilled and distilled.is_finished),
                "dropped": reasons[0] if reasons else None,
            }
        )
    return rows
