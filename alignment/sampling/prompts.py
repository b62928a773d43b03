"""From prompts and settings to samples: which prompts, cut to length, with progress."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import PartialState

from alignment.chat import ChatFormat, can_be_a_turn, cut_to_fit, decode_response
from alignment.config import PromptSection, SamplingSection
from alignment.data import Loaded, SourceReport, raise_together
from alignment.dialogue import Candidate, Prompt
from alignment.distributed import for_all, map_over_processes
from alignment.errors import ConfigError, DataError
from alignment.headlines import by_part
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling.protocol import Sample, Sampler, SamplingParams


class Asked(NamedTuple):
    """A prompt that fits, with its token ids."""

    prompt: Prompt
    ids: list[int]


class Judge(NamedTuple):
    """How a reward model reads a prompt with an answer.

    Attributes:
        chat: its chat format.
        context: tokens of both together at most.
        room: tokens of a prompt at most, beside an answer of full length.
    """

    chat: ChatFormat
    context: int
    room: int


def choose_prompts(data: Loaded[Prompt], section: PromptSection, seed: int) -> list[Prompt]:
    """At most `max_prompts` prompts, chosen by the seed, `safety_share` of them safety prompts if there are enough."""
    rows = data.rows
    if section.max_prompts is None or len(rows) <= section.max_prompts:
        return rows
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    safety = [index for index in order if rows[index].is_safety]
    other = [index for index in order if not rows[index].is_safety]
    share = 0.5 if section.safety_share is None else section.safety_share
    wanted = int(section.max_prompts * share)
    num_safety = min(len(safety), max(wanted, section.max_prompts - len(other)))
    chosen = safety[:num_safety] + other[: section.max_prompts - num_safety]
    return [rows[index] for index in sorted(chosen)]


def sample_prompts(
    sampler: Sampler, fitting: Sequence[Asked], sampling: SamplingSection, *, seed: int, title: str
) -> list[list[Sample]]:
    """K samples for each of `fit_prompts`, with progress and every process at a share."""
    total = len(fitting) * sampling.num_candidates
    with ProgressBar(title, total, shown=PartialState().is_main_process) as bar:
        return sample_shared(sampler, [ids for _, ids in fitting], sampling, seed=seed, bar=bar)


def fit_prompts(
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    section: PromptSection,
    *,
    room: int,
    judges: Mapping[str, Judge] | None = None,
    run_dir: Run | None = None,
    noted_as: str = "prompts",
) -> list[Asked]:
    """The prompts that fit, without the oldest turns of those that are too long, and their token ids.

    So what is scored, kept and trained on later is what was answered. Those that do not fit, those that lost old
    turns, and those that the chat format refuses are counted in the manifest, as are those that are used. Prompts that
    are the same to the model are safety prompts where one of them is.

    Args:
        chat: the format of the model that answers.
        prompts: what it is asked.
        section: its `max_prompt_length` is the limit; its `on_error` decides about those that are refused.
        room: tokens that a model's context leaves for a prompt beside its response: a limit too.
        judges: reward models that have to read it, too, as in `fit_all_formats`.
        run_dir: with a manifest to count in.
        noted_as: the name of its entry.

    Raises:
        DataError: no prompt fits, or the chat format refuses one and bad rows are not to be skipped.
    """
    if judges:
        prompts, counts = fit_all_formats([chat], prompts, section, room=room, judges=judges)
        fitting, _ = fit_and_count(chat, prompts, section, room)
    else:
        fitting, counts = fit_and_count(chat, prompts, section, room)
    if run_dir is not None:
        run_dir.note(**{noted_as: {"used": len(fitting), **counts}})
    return fitting


def fit_and_count(
    chat: ChatFormat, prompts: Sequence[Prompt], section: PromptSection, room: int
) -> tuple[list[Asked], dict[str, int]]:
    """What `fit_prompts` finds and raises, and how many lost old turns, were too long, or were refused."""
    limit = min(section.max_prompt_length, room)
    found, problems = [], []
    for prompt in prompts:
        try:
            if (cut := cut_to_fit(chat, prompt.messages, limit)) is not None:
                found.append((prompt, cut))
        except DataError as error:
            problems.append(f"{prompt.where or 'prompts'}: {error}")
    if section.on_error == "stop":
        raise_together(problems)
    marked = {tuple(ids) for prompt, (_, ids) in found if prompt.is_safety}
    fitting = [
        Asked(replace(prompt, messages=messages, is_safety=tuple(ids) in marked), ids)
        for prompt, (messages, ids) in found
    ]
    if not fitting:
        if len(problems) == len(prompts):
            raise DataError(f"prompts: the chat format refuses all of them, the first because {problems[0]}")
        raise DataError(f"prompts: none fits into {limit_in_words(section, room)}.")
    return fitting, {
        "history_cut": sum(messages is not prompt.messages for prompt, (messages, _) in found),
        "too_long": len(prompts) - len(fitting) - len(problems),
        "refused_by_chat_format": len(problems),
    }


def fit_all_formats(
    chats: Iterable[ChatFormat],
    prompts: Sequence[Prompt],
    section: PromptSection,
    *,
    room: int,
    judges: Mapping[str, Judge] | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that fit in every one of the formats, as `fit_prompts` has them, and the counts of all others.

    Reward models, by the setting that names them, have no limit but their own room. Raises DataError as `fit_prompts`
    does, with the setting of a reward model in front.
    """
    found, counts = list(prompts), Counter()
    for chat in chats:
        fitting, others = fit_and_count(chat, found, section, room)
        found = [prompt for prompt, _ in fitting]
        counts.update(others)
    by_room = section.model_copy(update={"max_prompt_length": sys.maxsize})
    for name, judge in (judges or {}).items():
        try:
            fitting, others = fit_and_count(judge.chat, found, by_room, judge.room)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        found = [prompt for prompt, _ in fitting]
        counts.update(others)
    whole = {id(prompt.messages) for prompt in prompts}
    return found, {**counts, "history_cut": sum(id(prompt.messages) not in whole for prompt in found)}


def describe_fitting(
    chats: Iterable[ChatFormat],
    data: Loaded[Prompt],
    section: PromptSection,
    *,
    seed: int,
    room: int,
    judges: Mapping[str, Judge] | None = None,
    part: str = "prompts",
) -> tuple[str, str]:
    """For `--dry-run`: `8 prompts` that fit every format, and ` PART: 2 too_long.`, or nothing, of those left out.

    Raises DataError as `fit_all_formats` does.
    """
    chosen = choose_prompts(data, section, seed)
    fitting, counts = fit_all_formats(chats, chosen, section, room=room, judges=judges)
    return f"{len(fitting)} prompts", by_part({part: prompts_left_out(counts, data.sources)})


def prompts_left_out(counts: Mapping[str, int] | None, sources: Sequence[SourceReport]) -> dict[str, int]:
    """For the result: prompts left out by reason, those left out of their files included, and those cut; no zeros.

    `counts` are those of `fit_all_formats`, or of the manifest; None where nothing was asked.
    """
    of_files = {name: sum(source.dropped.get(name, 0) for source in sources) for name in ("unreadable", "seen")}
    reasons = {**of_files, **(counts or {})}
    return {name: count for name, count in reasons.items() if count and name != "used"}


def prompt_room(
    chat: ChatFormat, sampling: SamplingSection, *, policy_context: int, judge_context: int | None = None
) -> int:
    """Tokens of a prompt at most, so that it can be answered and the answer be judged.

    Args:
        chat: the policy's format.
        sampling: how long answers may become.
        policy_context: tokens of the policy's context.
        judge_context: the least of the reward models' contexts, or None. They read an answer that was cut off with an
            end of turn, which the policy did not write. Where one has another vocabulary, its count of tokens may be
            higher.

    Raises:
        ConfigError: none is left.
    """
    room = policy_context - sampling.max_new_tokens
    if judge_context is not None:
        room = min(room, judge_context - sampling.max_new_tokens - len(chat.closing))
    if room < 1:
        raise ConfigError(
            f"sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt: the models' contexts hold "
            f"{room + sampling.max_new_tokens} tokens with it. Lower it."
        )
    return room


def limit_in_words(section: PromptSection, room: int) -> str:
    """The limit of a prompt's length and which setting it comes from, for messages."""
    limit = min(section.max_prompt_length, room)
    if limit == section.max_prompt_length:
        return f"{limit} tokens (prompts.max_prompt_length)"
    return f"{limit} tokens (what the models' contexts leave beside sampling.max_new_tokens; lower that)"


def sample_shared(
    sampler: Sampler, prompts: Sequence[Sequence[int]], section: SamplingSection, *, seed: int, bar: ProgressBar
) -> list[list[Sample]]:
    """Samples with a configuration section's settings, every process at a share; all get the same results.

    Equal prompts stay together, since each goes on with the random streams of the one before.
    """

    def work(mine: Sequence[Sequence[int]]) -> list[list[Sample]]:
        return sampler.sample(mine, sampling_params(section, seed), on_progress=for_all(bar.advance))

    return map_over_processes(work, prompts, together=tuple)


def sampling_params(section: SamplingSection, seed: int) -> SamplingParams:
    """A configuration section's settings, as engines take them."""
    return SamplingParams(
        num_candidates=section.num_candidates,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens,
        seed=seed,
    )


def as_candidate(
    chat: ChatFormat, prompt: Prompt, sample: Sample, index: int, params: SamplingParams, *, round_number: int = 0
) -> Candidate:
    """A sample as a row of `candidates.jsonl`, with the parameters it was drawn by.

    Its `finish_reason` is "refused" where the chat format cannot write it as a turn.
    """
    response = decode_response(chat, sample.token_ids)
    return Candidate(
        prompt=prompt,
        response=response,
        index=index,
        finish_reason=sample.finish_reason if can_be_a_turn(chat, response) else "refused",
        round=round_number,
        seed=params.seed,
        temperature=params.temperature,
    )
