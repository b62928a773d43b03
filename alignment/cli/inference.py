"""`align sample`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.chat import ChatFormat
from alignment.cli.partial_file import PartialFile, Row, data_hashes, model_hash
from alignment.config import ModelSection, PromptSection, SamplingSection, build_section
from alignment.data import load_prompts
from alignment.errors import RunError
from alignment.hardware import check_no_launcher, compute_dtype
from alignment.headlines import what_was_left_out
from alignment.model_folders import load_chat_of
from alignment.progress import ProgressBar, console
from alignment.sampling.engines import open_sampler
from alignment.sampling.prompts import (
    Asked,
    as_candidate,
    choose_prompts,
    fit_and_count,
    prompt_room,
    prompts_left_out,
    sampling_params,
)
from alignment.sampling.protocol import Sample, Sampler, SamplingParams


def sample_file(
    model: str,
    source: str,
    settings: Mapping[str, Any],
    *,
    max_prompts: int | None,
    seed: int,
    out: Path | None,
    resume: bool,
) -> None:
    """Candidates of a file's prompts, to a file or the terminal.

    With `out`, a prompt's candidates are written as soon as it has them all; an interrupted call goes on with `resume`.
    Raises RunError, before anything is sampled, where `out` exists or another call's rows are in its way.
    """
    check_no_launcher("align sample", "; align reject shares prompts")
    # A prompt's length is limited by the model's context alone.
    asked = {"prompts": [source], "max_prompts": max_prompts, "max_prompt_length": sys.maxsize}
    prompts = build_section(PromptSection, asked)
    sampling = build_section(SamplingSection, settings)
    made_from: Row = {"settings": {**settings, "max_prompts": max_prompts, "seed": seed}}
    if out is not None:
        made_from |= {"model": model_hash(model), "data": data_hashes([source])}
    partial = PartialFile.open(out, made_from, resume=resume)
    data = load_prompts([source])
    chat, context = load_chat_of(model)
    chosen = choose_prompts(data, prompts, seed)
    fitting, counts = fit_and_count(chat, chosen, prompts, prompt_room(chat, sampling, policy_context=context))
    for words in what_was_left_out({"sample:": prompts_left_out(counts, data.sources)}):
        console.print(words, soft_wrap=True)
    drawn = _by_ids(partial.rows, fitting)
    if drawn is None:
        raise RunError(f"{out}.partial: has other prompts than {source}. Remove it and {out}.partial.json.")
    if missing := [(prompt, ids) for prompt, ids in fitting if tuple(ids) not in drawn]:
        device, longest = PartialState().device, max(len(ids) for _, ids in fitting)
        dtype = str(compute_dtype(device, partial.dtype)).removeprefix("torch.")
        section = ModelSection(path=model, dtype=dtype)
        with open_sampler(section, sampling, device, max_prompt_length=longest) as sampler:
            partial.begin(dtype)
            drawn |= _sample(sampler, chat, missing, sampling_params(sampling, seed), partial)
    rows = {ids: iter(found) for ids, found in drawn.items()}
    in_order = [next(rows[tuple(ids)]) for _, ids in fitting for _ in range(sampling.num_candidates)]
    partial.finish(in_order)
    if out is None:
        for row in in_order:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


def _by_ids(rows: Sequence[Row], fitting: Sequence[Asked]) -> dict[tuple[int, ...], list[Row]] | None:
    """The rows by what the model reads as their prompt; None where one has another prompt than these."""
    ids_of = {json.dumps(prompt.to_json()["prompt"]): tuple(ids) for prompt, ids in fitting}
    found: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if (ids := ids_of.get(json.dumps(row["prompt"]))) is None:
            return None
        found.setdefault(ids, []).append(row)
    return found


def _sample(
    sampler: Sampler, chat: ChatFormat, asked: Sequence[Asked], params: SamplingParams, partial: PartialFile
) -> dict[tuple[int, ...], list[Row]]:
    """Rows by prompt. Prompts that are equal to the model have a stream of random numbers: all are written, or none."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (_, ids) in enumerate(asked):
        places.setdefault(tuple(ids), []).append(place)
    rows: dict[int, list[Row]] = {}
    found: dict[tuple[int, ...], list[Row]] = {}

    def keep(index: int, samples: list[Sample]) -> None:
        prompt, ids = asked[index]
        rows[index] = [as_candidate(chat, prompt, each, k, params).to_json() for k, each in enumerate(samples)]
        equal = places[tuple(ids)]
        if all(place in rows for place in equal):
            found[tuple(ids)] = [row for place in equal for row in rows[place]]
            partial.append(found[tuple(ids)], len(equal))

    with ProgressBar("sample", len(asked) * params.num_candidates, shown=PartialState().is_main_process) as bar:
        sampler.sample([ids for _, ids in asked], params, on_progress=bar.advance, on_prompt=keep)
    return found
