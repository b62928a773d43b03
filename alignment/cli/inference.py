"""`align sample`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.config import ModelSection, PromptSection, SamplingSection, build_section
from alignment.data import load_prompts, write_rows
from alignment.models import load_chat_of
from alignment.runs import check_new_file
from alignment.sampling.engines import open_sampler
from alignment.sampling.prompts import as_candidate, choose_prompts, fit_prompts, sample_prompts, sampling_params


def sample_file(
    model: str, source: str, settings: Mapping[str, Any], *, max_prompts: int | None, seed: int, out: Path | None
) -> None:
    """Candidates of a file's prompts, to a file or the terminal."""
    if out is not None:
        check_new_file(out)
    prompts = build_section(PromptSection, {"prompts": [source], "max_prompts": max_prompts})
    sampling = build_section(SamplingSection, settings)
    data = load_prompts([source])
    chat, context = load_chat_of(model)
    chosen = choose_prompts(data, prompts, seed)
    fitting = fit_prompts(chat, chosen, prompts, room=context - sampling.max_new_tokens)
    longest = max(len(ids) for _, ids in fitting)
    with open_sampler(ModelSection(path=model), sampling, PartialState().device, max_prompt_length=longest) as sampler:
        samples = sample_prompts(sampler, fitting, sampling, seed=seed, title="sample")
    params = sampling_params(sampling, seed)
    rows = [
        as_candidate(chat, prompt, sample, index, params).to_json()
        for (prompt, _), drawn in zip(fitting, samples, strict=True)
        for index, sample in enumerate(drawn)
    ]
    if out is not None:
        write_rows(out, rows)
        return
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
