"""A chat model in many dialogues at once, turn by turn, with instructions from a pool."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.chat import decode_response, encode_prompt
from alignment.config import ModelSection, PromptSection, SamplingSection
from alignment.data import Loaded, load_rows
from alignment.dialogue import Messages, Prompt
from alignment.hardware import compute_dtype
from alignment.models import LoadedModel, load_chat_model
from alignment.progress import ProgressBar
from alignment.sampling.prompts import choose_prompts, sample_ids
from alignment.sampling.torch_engine import TorchSampler
from sft.config import GattInstructions
from sft.ghost_attention import Answer, seed_turns
from sft.instructions import Instruction, PoolRow, built_in_pool, draw_instruction, own_pool


@dataclass(frozen=True, slots=True)
class Plan:
    """A dialogue to be held: its user turns, the instruction, and whether the short form is the one to state."""

    user_turns: list[str]
    instruction: Instruction
    is_shortened: bool

    @property
    def stated(self) -> str:
        """The instruction as training and measuring state it."""
        return self.instruction.short if self.is_shortened else self.instruction.full


def load_own(instructions: GattInstructions) -> Loaded[PoolRow]:
    """The user's own instructions. Raises DataError with every bad row."""
    return load_rows(instructions.own, PoolRow.from_json)


def make_plans(
    data: Loaded[Prompt],
    prompts: PromptSection,
    own: Loaded[PoolRow],
    instructions: GattInstructions,
    *,
    turns: tuple[int, int],
    seed: int,
) -> list[Plan]:
    """The dialogues that the seed decides, each with a number of user turns between the two of `turns`."""
    rng = random.Random(seed)
    chosen = choose_prompts(data, prompts, seed)
    pool = own_pool(own.rows) if own.rows else built_in_pool(instructions.kinds, instructions.part)
    lengths = [rng.randint(*turns) for _ in chosen]
    return [
        Plan(
            user_turns,
            draw_instruction(pool, rng, combine_rate=instructions.combine_rate),
            rng.random() < instructions.shorten_rate,
        )
        for user_turns in seed_turns(chosen, lengths, rng)
    ]


class Speaker:
    """A chat model that answers the next turn of many dialogues."""

    def __init__(self, loaded: LoadedModel, sampling: SamplingSection, *, max_prompt_length: int, seed: int) -> None:
        self.loaded, self.sampling, self.seed = loaded, sampling, seed
        context_length = loaded.model.config.max_position_embeddings - sampling.max_new_tokens
        self.max_prompt_length = min(max_prompt_length, context_length)
        self._sampler = TorchSampler(loaded.model, stop_ids=[loaded.chat.end_of_turn_id], max_rows=sampling.max_rows)

    @classmethod
    def load(
        cls, model: ModelSection, sampling: SamplingSection, *, device: torch.device, max_prompt_length: int, seed: int
    ) -> Speaker:
        """Raises ModelError where `model` is no chat model."""
        dtype = compute_dtype(device, model.dtype)
        loaded = load_chat_model(model.path, dtype=dtype, chat_template=model.chat_template)
        loaded.model.to(device)
        return cls(loaded, sampling, max_prompt_length=max_prompt_length, seed=seed)

    def answer(self, contexts: Mapping[int, Messages], *, turn: int, bar: ProgressBar) -> dict[int, list[Answer]]:
        """Candidates for every context that is short enough, by its key."""
        encoded = {key: encode_prompt(self.loaded.chat, messages) for key, messages in contexts.items()}
        fitting = {key: ids for key, ids in encoded.items() if len(ids) <= self.max_prompt_length}
        drawn = sample_ids(self._sampler, list(fitting.values()), self.sampling, seed=self.seed + turn, bar=bar)
        return {
            key: [
                Answer(decode_response(self.loaded.chat, sample.token_ids), sample.finish_reason == "stop")
                for sample in samples
            ]
            for key, samples in zip(fitting, drawn, strict=True)
        }


class RowLog:
    """Rows on disk as they come, so that an interrupted run goes on after the last one."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if resume and path.exists():
            self.rows = list(_whole_rows(path))

    def append(self, rows: Iterable[Mapping[str, Any]], *, writes: bool) -> None:
        """Adds rows; only the main process writes them."""
        rows = [dict(row) for row in rows]
        self.rows += rows
        if writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())


def chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`size` items at a time."""
    for start in range(0, len(items), max(1, size)):
        yield items[start : start + max(1, size)]


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the file, from which a half-written last line is cut off."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            yield json.loads(line)
    os.truncate(path, end)
