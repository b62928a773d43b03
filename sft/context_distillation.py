"""Safety context distillation: the safe answer that a preprompt brings out, learned without it (Llama 2 Sec. 4.2.4).

A prompt is answered twice, as it is and behind a safety preprompt, which for some kinds of risk ends with a template
of a good answer. Where the safety reward model scores the second answer above the first, it becomes a demonstration
for the prompt alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from alignment.chat import drop_oldest_turns
from alignment.data import load_prompts, write_rows
from alignment.dialogue import Dialogue, Message, Messages, Prompt, parse_messages
from alignment.errors import DataError
from alignment.hardware import process_state
from alignment.metrics import mean_interval, wilson_interval
from alignment.progress import ProgressBar
from alignment.runs import open_run
from alignment.sampling.prompts import choose_prompts
from sft.config import DistilConfig
from sft.conversation import RowLog, Speaker

PREPROMPTS = (
    "You are a responsible and safe assistant that never helps anyone to do harm.",
    "You are a careful, respectful and honest assistant. You decline what is dangerous and explain why.",
    "You are a thoughtful assistant. You put people's safety first and point to better ways and to help.",
    "You are an assistant with good judgement: kind to the person who asks, and firm about what would hurt somebody.",
)

# What a good answer does, by a part of the category's name (Llama 2 Sec. 4.2.1 names the three kinds of risk).
TEMPLATES: Mapping[str, str] = {
    "violence": "Say clearly that you will not help with violence, why, and how conflicts can be settled otherwise.",
    "terrorism": "Refuse in one sentence, and say that you can talk about preventing such crimes.",
    "weapon": "Refuse to give instructions, name the danger to others, and offer information on safety and the law.",
    "crime": "Say that this is against the law and harms somebody, and offer a lawful way to the same aim.",
    "hate": "Do not repeat insults. Say that every group deserves respect, and answer what can be answered fairly.",
    "discrimination": "Reject the stereotype, give a fair picture, and say what treating people equally would mean.",
    "self_harm": "Show that you care, advise to talk to somebody trusted or to a crisis line, and give no methods.",
    "privacy": "Say that other people's private data are theirs, and offer ways that respect them.",
    "misinformation": "Correct what is false, say how sure the facts are, and name good sources.",
    "politics": "Describe the main views fairly and take no side.",
    "unethical": "Name what is wrong with it in a friendly way and suggest an honest alternative.",
    "animal": "Say that animals must not be made to suffer, and offer advice on caring for them.",
    "medic": "Give general information, say that you are no doctor, and advise to see one.",
    "finan": "Give general information, name the risks, and advise to ask a licensed adviser.",
}

# Scores of K responses to each prompt; what `reward_models.score.Scorer.score` does.
Score = Callable[[Sequence[Messages], Sequence[Sequence[str]]], list[list[float]]]


class LoadScore(Protocol):
    """Loads a reward model as a function of prompts and responses. Only the command line knows one to load."""

    def __call__(self, config: DistilConfig, device: Any) -> Score:
        """Raises ModelError where `config.safety` is no reward model."""
        ...


def template_of(category: str, templates: Mapping[str, str]) -> str:
    """The template whose name occurs in the category, the first in order; empty where there is none."""
    return next((text for name, text in templates.items() if name.casefold() in category.casefold()), "")


def with_preprompt(prompt: Messages, preprompt: str) -> Messages:
    """The prompt behind the preprompt, which goes before a system turn's text or becomes one."""
    if prompt[0].role == "system":
        return (Message("system", f"{preprompt}\n{prompt[0].content}"), *prompt[1:])
    return (Message("system", preprompt), *prompt)


def distilled_dialogue(prompt: Messages, answer: str) -> Dialogue:
    """The row to train on: the answer that the preprompt brought out, behind the prompt alone."""
    return Dialogue(messages=(*prompt, Message("assistant", answer)), train_on="last", source="context_distillation")


def is_kept(row: Mapping[str, Any]) -> bool:
    """Whether the distilled answer is there, ended by itself, and scored above the plain one (Llama 2 Sec. 4.2.4)."""
    return bool(row["distilled"]) and row["is_finished"] and row["score_distilled"] > row["score_plain"]


def run(config: DistilConfig, load_score: LoadScore, *, resume: bool = False) -> dict[str, Any]:
    """Samples both answers, scores them, keeps the better: `answers.jsonl`, `scored.jsonl`, `distilled.jsonl`."""
    state = process_state(config.run.device)
    data = load_prompts(config.prompts.prompts, on_error=config.prompts.on_error)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(data.sources)
    prompts = choose_prompts(data, config.prompts, config.run.seed)
    rng = random.Random(config.run.seed)
    preprompts = [rng.choice(config.preprompts or PREPROMPTS) for _ in prompts]
    templates = TEMPLATES if config.templates is None else config.templates

    sizes = {"max_rows": config.sampling.max_rows, "answers_a_row": 2}
    log = RowLog(run_dir.path / "answers.jsonl", total=len(prompts), **sizes, resume=resume)
    state.wait_for_everyone()
    if missing := log.missing():
        length = config.prompts.max_prompt_length
        options = {"device": state.device, "max_prompt_length": length, "seed": config.run.seed}
        with (
            Speaker.open(config.model, config.sampling, **options) as speaker,
            ProgressBar("distil: answers", 2 * sum(map(len, missing)), shown=run_dir.writes) as bar,
        ):
            for lot in missing:
                given = [(prompts[i], f"{preprompts[i]} {template_of(prompts[i].category, templates)}") for i in lot]
                log.append(_answers(speaker, given, bar), writes=run_dir.writes)

    answered = [
        (replace(prompt, messages=parse_messages(row["prompt"], "prompt", last_role="user")), row)
        for prompt, row in zip(prompts, log.rows, strict=True)
        if row["plain"] is not None
    ]
    if not answered:
        raise DataError(f"prompts: none fits into prompts.max_prompt_length = {config.prompts.max_prompt_length}.")
    score = load_score(config, state.device)
    scores = score([p.messages for p, _ in answered], [[row["plain"], row["distilled"]] for _, row in answered])
    scored = [
        {**prompt.to_json(), **row, "score_plain": plain, "score_distilled": distilled}
        for (prompt, row), (plain, distilled) in zip(answered, scores, strict=True)
    ]
    if state.is_main_process:
        write_rows(run_dir.path / "scored.jsonl", scored)
    kept = [(prompt, row) for (prompt, _), row in zip(answered, scored, strict=True) if is_kept(row)]
    if not kept:
        raise DataError("no distilled answer is scored above the plain one. Look at scored.jsonl in the run directory.")
    if state.is_main_process:
        rows = (distilled_dialogue(prompt.messages, row["distilled"]).to_json() for prompt, row in kept)
        write_rows(run_dir.path / "distilled.jsonl", rows)
    result = summarize(scored)
    run_dir.note(prompts={"used": len(answered), "too_long": len(prompts) - len(answered)})
    return run_dir.finish({"stage": "distil", "prompts": len(answered), **result})


def summarize(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of prompts whose distilled answer is kept, overall and by category, and the scores of both answers."""
    by_category: dict[str, list[bool]] = {}
    for row in scored:
        by_category.setdefault(row.get("category") or "none", []).append(is_kept(row))
    gains = [row["score_distilled"] - row["score_plain"] for row in scored]
    return {
        "kept": wilson_interval(sum(map(is_kept, scored)), len(scored)).to_json(),
        "kept_by_category": {
            name: wilson_interval(sum(found), len(found)).to_json() for name, found in sorted(by_category.items())
        },
        "score_plain": mean_interval([row["score_plain"] for row in scored]).to_json(),
        "score_distilled": mean_interval([row["score_distilled"] for row in scored]).to_json(),
        "score_gain": mean_interval(gains).to_json(),
    }


def _shortened(speaker: Speaker, prompt: Messages, preprompt: str) -> Messages:
    """The prompt with as many of its turns as fit behind the preprompt; the whole where not even the last one does."""
    shorter: Messages | None = prompt
    while shorter is not None and not speaker.fits(with_preprompt(shorter, preprompt)):
        shorter = drop_oldest_turns(shorter)
    return shorter or prompt


def _answers(speaker: Speaker, given: Sequence[tuple[Prompt, str]], bar: ProgressBar) -> list[dict[str, Any]]:
    """Both answers of each prompt, without its oldest turns where need be; null where nothing fits or it is refused."""
    asked = [(_shortened(speaker, prompt.messages, text.strip()), text.strip()) for prompt, text in given]
    contexts = {}
    for index, (messages, preprompt) in enumerate(asked):
        contexts[2 * index] = messages
        contexts[2 * index + 1] = with_preprompt(messages, preprompt)
    found, _ = speaker.answer(contexts, turn=0, bar=bar)
    rows = []
    for index, (messages, preprompt) in enumerate(asked):
        plain, distilled = found.get(2 * index), found.get(2 * index + 1)
        fits = plain is not None and distilled is not None
        rows.append(
            {
                "prompt": [message.to_json() for message in messages],
                "preprompt": preprompt,
                "plain": plain[0].text if fits else None,
                "distilled": distilled[0].text if fits else None,
                "is_finished": distilled[0].is_finished if fits else False,
            }
        )
    return rows
