"""A chat model in many dialogues at once, turn by turn, with instructions from a pool."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from alignment.chat import ChatFormat, decode_response, encode_prompt
from alignment.config import ModelSection, PromptSection, SamplingSection
from alignment.data import Loaded, load_rows
from alignment.dialogue import Dialogue, Messages, PreferencePair, Prompt
from alignment.errors import DataError
from alignment.models import load_chat_of
from alignment.progress import ProgressBar
from alignment.sampling.engines import open_sampler
from alignment.sampling.memory import CPU_MAX_ROWS
from alignment.sampling.prompts import choose_prompts, sample_shared
from alignment.sampling.protocol import Sampler
from sft.config import GattInstructions
from sft.ghost_attention import Answer, seed_turns
from sft.instructions import Instruction, PoolRow, built_in_pool, draw_instruction, own_pool

NoAnswer = Literal["too_long", "refused"]

# The sampler decodes prompts of like length side by side, so a lot has more than go side by side.
GROUPS_IN_A_LOT = 4


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


def load_seeds(section: PromptSection) -> Loaded[Prompt]:
    """Prompts, demonstrations or pairs, all as prompts. Raises DataError with every bad row."""
    return load_rows(section.prompts, _seed, on_error=section.on_error)


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

    def __init__(
        self, sampler: Sampler, chat: ChatFormat, sampling: SamplingSection, *, max_prompt_length: int, seed: int
    ) -> None:
        self.chat, self.sampling, self.seed = chat, sampling, seed
        self.max_prompt_length = max_prompt_length
        self._sampler = sampler

    @classmethod
    @contextmanager
    def open(
        cls, model: ModelSection, sampling: SamplingSection, *, device: torch.device, max_prompt_length: int, seed: int
    ) -> Iterator[Speaker]:
        """The model is in memory until the end of the block. Raises as `open_sampler`."""
        chat, context = load_chat_of(model.path, model.chat_template)
        length = min(max_prompt_length, context - sampling.max_new_tokens)
        with open_sampler(model, sampling, device, max_prompt_length=length) as sampler:
            yield cls(sampler, chat, sampling, max_prompt_length=length, seed=seed)

    def answer(
        self, contexts: Mapping[int, Messages], *, turn: int, bar: ProgressBar
    ) -> tuple[dict[int, list[Answer]], dict[int, NoAnswer]]:
        """Candidates for every context by its key, and why there are none: `too_long`, or `refused` by the chat format.

        A model may write what its format refuses to read again, as the tags of Llama 2's.
        """
        fitting, missing = {}, {}
        for key, messages in contexts.items():
            ids, reason = self._encode(messages)
            if reason is None:
                fitting[key] = ids
            else:
                missing[key] = reason
        drawn = sample_shared(self._sampler, list(fitting.values()), self.sampling, seed=self.seed + turn, bar=bar)
        found = {
            key: [Answer(decode_response(self.chat, one.token_ids), one.finish_reason == "stop") for one in samples]
            for key, samples in zip(fitting, drawn, strict=True)
        }
        return found, missing

    def fits(self, messages: Messages) -> bool:
        """Whether a context can be answered."""
        return self._encode(messages)[1] is None

    def _encode(self, messages: Messages) -> tuple[list[int], NoAnswer | None]:
        try:
            ids = encode_prompt(self.chat, messages)
        except DataError:
            return [], "refused"
        return ids, None if len(ids) <= self.max_prompt_length else "too_long"


class RowLog:
    """`total` rows on disk as they come, in lots: an interrupted run goes on after the last whole one.

    A lot is what is sampled together: some groups of as many rows as are decoded side by side, `answers_a_row` each.
    It does not depend on the machine, even where the number of these does.
    """

    def __init__(self, path: Path, *, total: int, max_rows: int | None, answers_a_row: int = 1, resume: bool) -> None:
        self.path, self.total = path, total
        self.size = max(1, GROUPS_IN_A_LOT * (max_rows or CPU_MAX_ROWS) // answers_a_row)
        self.rows: list[dict[str, Any]] = []
        if resume and path.exists():
            self.rows = _whole_lots(path, self.total, self.size)

    def missing(self) -> list[range]:
        """The lots of rows that are not there yet."""
        starts = range(len(self.rows), self.total, self.size)
        return [range(start, min(start + self.size, self.total)) for start in starts]

    def append(self, rows: Iterable[Mapping[str, Any]], *, writes: bool) -> None:
        """Adds rows; only the main process writes them."""
        rows = [dict(row) for row in rows]
        self.rows += rows
        if writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())


def _seed(row: Mapping[str, Any]) -> Prompt:
    """A row's prompt: a demonstration without its last answer, a pair without its responses."""
    source = str(row.get("source") or "")
    if "messages" in row:
        return Prompt(messages=Dialogue.from_json(row).messages[:-1], source=source)
    if "chosen" in row and row.get("prompt") is None:
        return Prompt(messages=PreferencePair.from_json(row).prompt, source=source)
    return Prompt.from_json(row)


def _whole_lots(path: Path, total: int, size: int) -> list[dict[str, Any]]:
    """The rows of whole lots, of which the last may be smaller; the file is cut off behind them.

    What else is asked in a lot decides the random streams of repeated prompts, so a lot is sampled whole or not at all.
    """
    rows: list[dict[str, Any]] = []
    ends = [0]
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            rows.append(json.loads(line))
            ends.append(ends[-1] + len(line))
    count = total if len(rows) == total else len(rows) - len(rows) % size
    os.truncate(path, ends[count])
    return rows[:count]
