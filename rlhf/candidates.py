"""Candidates of many prompts, each prompt's on disk as soon as it has them all, so that none is drawn twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.chat import ChatFormat
from alignment.config import PromptSection
from alignment.dialogue import Candidate, Messages, Prompt
from alignment.distributed import for_all, shares
from alignment.line_log import append_lines, as_object, whole_lines
from alignment.model_folders import load_chat_of
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling.engines import open_sampler
from alignment.sampling.prompts import Asked, Judge, as_candidate, fit_prompts, sampling_params
from alignment.sampling.protocol import Sample, Sampler
from rlhf.config import RejectionSamplingConfig


def distinct_prompts(
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    section: PromptSection,
    *,
    room: int,
    run_dir: Run,
    judges: Mapping[str, Judge] | None = None,
) -> list[Asked]:
    """The prompts of `fit_prompts`, those that are the same to the model once; the manifest counts the others.

    Raises DataError as it does.
    """
    fitting = fit_prompts(chat, prompts, section, room=room, judges=judges, run_dir=run_dir)
    distinct: dict[tuple[int, ...], Prompt] = {}
    for prompt, ids in fitting:
        distinct.setdefault(tuple(ids), prompt)
    run_dir.note(duplicate_prompts=len(fitting) - len(distinct))
    return [Asked(prompt, list(ids)) for ids, prompt in distinct.items()]


def sample_candidates(
    config: RejectionSamplingConfig, wanted: Mapping[float, Sequence[Asked]], run_dir: Run, state: PartialState
) -> dict[float, list[Candidate]]:
    """K candidates of the prompts wanted at each temperature, in their order; what is on disk is not drawn again.

    Every process takes a share of the prompts and writes a file of its own; a run may go on with another number of
    processes. The prompts of a temperature are distinct.
    """
    found = read_candidates(run_dir.path)
    missing = {
        temperature: [asked for asked in prompts if (asked[0].messages, temperature) not in found]
        for temperature, prompts in wanted.items()
    }
    state.wait_for_everyone()  # all have read before anybody writes
    if any(missing.values()):
        del found  # read again at the end, with all processes' files: in memory once
        device, length = state.device, config.prompts.max_prompt_length
        with open_sampler(config.model, config.sampling, device, max_prompt_length=length) as sampler:
            _sample(sampler, config, missing, run_dir, state)
        state.wait_for_everyone()
        found = read_candidates(run_dir.path)
    return {
        temperature: [candidate for prompt, _ in prompts for candidate in found[prompt.messages, temperature]]
        for temperature, prompts in wanted.items()
    }


def round_seed(seed: int, number: int) -> int:
    """The seed of a round's samples: the run's own in round 1, another in every other round.

    With the same one a policy that has changed little would begin its answers as the policy before it did.
    """
    return (seed + 1_000_003 * (number - 1)) % 2**32


def read_candidates(folder: Path) -> dict[tuple[Messages, float | None], list[Candidate]]:
    """Candidates by prompt and temperature, of all processes' files; a line that was being written is not there."""
    found = {}
    for path in sorted(folder.glob("sampled.*.jsonl")):
        for candidates, _ in whole_lines(path, _of_a_prompt):
            found[candidates[0].prompt.messages, candidates[0].temperature] = candidates
    return found


def remove_candidates(folder: Path) -> None:
    """Removes these files, once their candidates stand elsewhere."""
    for path in folder.glob("sampled.*.jsonl"):
        path.unlink()


def _of_a_prompt(rows: Any) -> list[Candidate]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("no list of candidates")
    return [Candidate.from_json(as_object(row)) for row in rows]


def _sample(
    sampler: Sampler,
    config: RejectionSamplingConfig,
    missing: Mapping[float, Sequence[Asked]],
    run_dir: Run,
    state: PartialState,
) -> None:
    """Adds this process's share of what is missing to its file, prompt by prompt."""
    sampling = config.sampling
    chat, _ = load_chat_of(config.model.path, config.model.chat_template)
    path = run_dir.path / f"sampled.{state.process_index}.jsonl"
    title = f"reject: {sampling.num_candidates} candidates a prompt"
    total = sum(map(len, missing.values())) * sampling.num_candidates
    with ProgressBar(title, total, shown=state.is_main_process) as bar:
        for temperature, prompts in missing.items():
            mine = [prompts[index] for index in shares(prompts, state.num_processes)[state.process_index]]

            seed = round_seed(config.run.seed, config.round)
            params = replace(sampling_params(sampling, seed), temperature=temperature)

            def keep(index: int, samples: list[Sample], mine=mine, params=params) -> None:
                prompt, _ = mine[index]
                rows = [
                    as_candidate(chat, prompt, sample, place, params, round_number=config.round).to_json()
                    for place, sample in enumerate(samples)
                ]
                append_lines(path, [rows])
                run_dir.note_elapsed_now_and_then()

            ids = [ids for _, ids in mine]
            sampler.sample(ids, params, on_progress=for_all(bar.advance), on_prompt=keep)
