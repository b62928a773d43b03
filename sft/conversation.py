"""A chat model in many dialogues at once, turn by turn, with instructions from a pool."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from alignment.chat import ChatFormat, can_be_a_turn, decode_response, encode_prompt, has_system_turn
from alignment.config import ModelSection, PromptSection, SamplingSection
from alignment.data import Loaded, load_rows
from alignment.decontamination import without_seen
from alignment.dialogue import Dialogue, Messages, PreferencePair, Prompt
from alignment.errors import DataError
from alignment.headlines import by_part
from alignment.model_folders import load_chat_of
from alignment.progress import ProgressBar
from alignment.sampling.engines import open_sampler
from alignment.sampling.prompts import choose_prompts, limit_in_words, prompt_room, sample_shared
from alignment.sampling.protocol import Sample, Sampler
from sft.answer_log import NoAnswer, Turn
from sft.config import GattInstructions
from sft.ghost_attention import Answer, context, seed_turns
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


def load_seeds(section: PromptSection) -> Loaded[Prompt]:
    """Prompts, demonstrations or pairs, all as prompts, of which dialogues take the user turns alone.

    Raises DataError with every bad row.
    """
    data = load_rows(section.prompts, as_prompt, on_error=section.on_error)
    return without_seen(data, section.not_in, on_error=section.on_error)


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
    """The dialogues that the seed decides, each with a number of user turns between the two of `turns`.

    Raises DataError where the data has too few different opening turns to fill them up.
    """
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
        for user_turns in seed_turns(chosen, lengths, rng, spare=data.rows)
    ]


def why_unanswered(
    reasons: Collection[str | None],
    model: ModelSection,
    prompts: PromptSection,
    sampling: SamplingSection,
    judge_context: int | None = None,
) -> str:
    """Why a model could answer no prompt, in words: what its chat format refuses, or which limit of length was met."""
    if set(reasons) == {"refused"}:
        return 'the model\'s chat format refuses all of them: see "align data preview"'
    chat, context = load_chat_of(model.path, model.chat_template)
    room = prompt_room(chat, sampling, policy_context=context, judge_context=judge_context)
    return f"none fits into {limit_in_words(prompts, room)}"


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
        cls,
        model: ModelSection,
        sampling: SamplingSection,
        *,
        device: torch.device,
        max_prompt_length: int,
        seed: int,
        judge_context: int | None = None,
    ) -> Iterator[Speaker]:
        """The model is in memory until the end of the block. Raises as `open_sampler`.

        `judge_context`: tokens that a reward model can read, where one is to judge the answers.
        """
        chat, length = format_and_limit(model, max_prompt_length, sampling, judge_context)
        with open_sampler(model, sampling, device, max_prompt_length=length) as sampler:
            speaker = cls(sampler, chat, sampling, max_prompt_length=length, seed=seed)
            try:
                yield speaker
            finally:
                del sampler, speaker._sampler  # who keeps the speaker does not keep its model

    def answer(self, contexts: Mapping[int, Messages], *, turn: int, bar: ProgressBar) -> Turn:
        """Candidates for every context by its key, and why there are none: `too_long`, or `refused` by the chat format.

        A model may write what its format refuses to read again, as the tags of Llama 2's: such an answer is marked.
        """
        fitting, missing = {}, {}
        for key, messages in contexts.items():
            ids, reason = self._encode(messages)
            if reason is None:
                fitting[key] = ids
            else:
                missing[key] = reason
        drawn = sample_shared(self._sampler, list(fitting.values()), self.sampling, seed=self.seed + turn, bar=bar)
        return Turn({key: list(map(self._read, samples)) for key, samples in zip(fitting, drawn, strict=True)}, missing)

    @property
    def has_system_turn(self) -> bool:
        """Whether the model's chat format writes system messages."""
        return has_system_turn(self.chat)

    def why_not(self, messages: Messages) -> NoAnswer | None:
        """Why a context cannot be answered; None where it can."""
        return self._encode(messages)[1]

    def _read(self, sample: Sample) -> Answer:
        text = decode_response(self.chat, sample.token_ids)
        return Answer(text, sample.finish_reason == "stop", is_refused=not can_be_a_turn(self.chat, text))

    def _encode(self, messages: Messages) -> tuple[list[int], NoAnswer | None]:
        return encode_within(self.chat, messages, self.max_prompt_length)


def format_and_limit(
    model: ModelSection, max_prompt_length: int, sampling: SamplingSection, judge_context: int | None = None
) -> tuple[ChatFormat, int]:
    """A model's chat format, and the tokens of a context at most that it can answer and a reward model can read."""
    chat, context_length = load_chat_of(model.path, model.chat_template)
    room = prompt_room(chat, sampling, policy_context=context_length, judge_context=judge_context)
    return chat, min(max_prompt_length, room)


def describe_asked(
    found: Sequence[NoAnswer | None],
    part: str,
    model: ModelSection,
    prompts: PromptSection,
    sampling: SamplingSection,
    judge_context: int | None = None,
) -> tuple[int, str]:
    """For `--dry-run`: how many contexts can be answered, and ` PART: 2 too_long.`, or nothing, of the others.

    Raises DataError where none can.
    """
    others = Counter(reason for reason in found if reason)
    if others.total() == len(found):
        raise DataError(f"prompts: {why_unanswered(others, model, prompts, sampling, judge_context)}.")
    return len(found) - others.total(), by_part({part: others})


def describe_openings(
    model: ModelSection, prompts: PromptSection, sampling: SamplingSection, turns: Sequence[Sequence[str]]
) -> tuple[int, str]:
    """`describe_asked` of the first user turns of dialogues."""
    chat, limit = format_and_limit(model, prompts.max_prompt_length, sampling)
    found = [encode_within(chat, context(user_turns, []), limit)[1] for user_turns in turns]
    return describe_asked(found, "opening turns", model, prompts, sampling)


def encode_within(chat: ChatFormat, messages: Messages, limit: int) -> tuple[list[int], NoAnswer | None]:
    """Ids of a context of at most `limit` tokens, or why it cannot be answered."""
    try:
        ids = encode_prompt(chat, messages)
    except DataError:
        return [], "refused"
    return ids, None if len(ids) <= limit else "too_long"


def as_prompt(row: Mapping[str, Any]) -> Prompt:
    """A row's prompt: a demonstration without its last answer, a pair without its responses."""
    if row.get("messages") is not None:
        dialogue = Dialogue.from_json(row)
        return Prompt(messages=dialogue.messages[:-1], source=dialogue.source)
    if row.get("chosen") is not None and row.get("prompt") is None:
        pair = PreferencePair.from_json(row)
        return Prompt(messages=pair.prompt, source=pair.source)
    return Prompt.from_json(row)
