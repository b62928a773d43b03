"""Candidates of many prompts, each prompt's on disk as soon as it has them all, so that none is drawn twice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from alignment.dialogue import Candidate, Messages, Prompt
from alignment.distributed import for_all, shares
from alignment.models import load_chat_model, load_chat_of
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling.prompts import as_candidate, fit_prompts, sampling_params
from alignment.sampling.protocol import Sample
from alignment.sampling.torch_engine import TorchSampler
from rlhf.config import RejectionSamplingConfig


def sample_candidates(
    config: RejectionSamplingConfig, prompts: Sequence[Prompt], run_dir: Run, state: PartialState
) -> list[Candidate]:
    """K candidates of each prompt that fits, in the order of the prompts; those of a resumed run are not drawn again.

    Prompts that are the same to the model count once. Every process takes a share of the prompts and writes a file of
    its own; a run may go on with another number of processes.

    Raises DataError where no prompt fits.
    """
    model, sampling = config.model, config.sampling
    chat, _ = load_chat_of(model.path, model.chat_template)
    fitting = fit_prompts(chat, prompts, config.prompts, run_dir)
    distinct: dict[tuple[int, ...], Prompt] = {}
    for prompt, ids in fitting:
        distinct.setdefault(tuple(ids), prompt)
    run_dir.note(duplicate_prompts=len(fitting) - len(distinct))
    found = read_candidates(run_dir.path)
    missing = [(ids, prompt) for ids, prompt in distinct.items() if prompt.messages not in found]
    state.wait_for_everyone()  # all have read before anybody writes
    if missing:
        mine = [missing[index] for index in shares(missing, state.num_processes)[state.process_index]]
        loaded = load_chat_model(
            model.path, dtype=run_dir.dtype(state.device, model.dtype), chat_template=model.chat_template
        )
        loaded.model.to(state.device)
        sampler = TorchSampler(loaded.model, stop_ids=[chat.end_of_turn_id], max_rows=sampling.max_rows)
        title = f"reject: {sampling.num_candidates} candidates a prompt"
        path = _part(run_dir.path, state.process_index)
        _cut_to_whole_lines(path)
        with (
            ProgressBar(title, len(missing) * sampling.num_candidates, shown=state.is_main_process) as bar,
            path.open("a", encoding="utf-8") as file,
        ):

            def keep(index: int, samples: list[Sample]) -> None:
                prompt = mine[index][1]
                drawn = (
                    as_candidate(chat, prompt, sample, place, round_number=config.round)
                    for place, sample in enumerate(samples)
                )
                rows = [replace(candidate, seed=config.run.seed).to_json() for candidate in drawn]
                file.write(json.dumps(rows, ensure_ascii=False) + "\n")
                file.flush()

            sampler.sample(
                [ids for ids, _ in mine],
                sampling_params(sampling, config.run.seed),
                on_progress=for_all(bar.advance),
                on_prompt=keep,
            )
        state.wait_for_everyone()
        found = read_candidates(run_dir.path)
    return [candidate for prompt in distinct.values() for candidate in found[prompt.messages]]


def read_candidates(folder: Path) -> dict[Messages, list[Candidate]]:
    """Every prompt's candidates in the files of all processes; a line that was being written counts as not there."""
    found = {}
    for path in sorted(folder.glob("sampled.*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    candidates = [Candidate.from_json(row) for row in json.loads(line)]
                    found[candidates[0].prompt.messages] = candidates
    return found


def remove_candidates(folder: Path) -> None:
    """Removes these files, once their candidates stand elsewhere."""
    for path in folder.glob("sampled.*.jsonl"):
        path.unlink()


def _part(folder: Path, rank: int) -> Path:
    return folder / f"sampled.{rank}.jsonl"


def _cut_to_whole_lines(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)
