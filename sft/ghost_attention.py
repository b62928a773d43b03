"""Ghost Attention: dialogues that keep an instruction given once (Llama 2 Sec. 3.3, A.3.5).

For user turns u1..un and an instruction to hold throughout: the instruction is joined to every user turn while the
newest model answers them; for training it stays in the first turn only, and only the last answer carries loss.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.chat import decode_response, encode_prompt
from alignment.data import load_prompts, write_rows
from alignment.dialogue import Dialogue, Message, Messages, Prompt
from alignment.errors import DataError
from alignment.hardware import compute_dtype, process_state
from alignment.models import load_chat_model
from alignment.progress import ProgressBar
from alignment.runs import open_run
from alignment.sampling.prompts import choose_prompts, sample_ids
from alignment.sampling.torch_engine import TorchSampler
from sft.config import GattConfig, GattInstructions

HOBBIES = (
    "hiking",
    "painting",
    "chess",
    "gardening",
    "cooking",
    "astronomy",
    "fishing",
    "pottery",
    "cycling",
    "poetry",
)
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch", "Swedish", "Latin")
FIGURES = (
    "Napoleon", "Marie Curie", "Albert Einstein", "Cleopatra", "William Shakespeare", "Leonardo da Vinci",
    "Ada Lovelace", "Socrates", "Florence Nightingale", "Isaac Newton",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """What the assistant is to keep doing: the full sentence, and the short form half of the training rows carry."""

    full: str
    short: str


def draw_instruction(settings: GattInstructions, rng: random.Random) -> Instruction:
    """One constraint, or two of different kinds joined (Llama 2 A.3.5: "act as X and answer in Y")."""
    count = 2 if len(settings.kinds) > 1 and rng.random() < settings.combine_rate else 1
    parts = [_draw(kind, rng) for kind in sorted(rng.sample(settings.kinds, count))]
    full = "In the whole conversation, " + " and ".join(part.full for part in parts) + "."
    return Instruction(full, " ".join(part.short for part in parts))


def join(instruction: str, turn: str) -> str:
    """The instruction and a user turn as one user turn."""
    return f"{instruction}\n{turn}"


def sampling_context(instruction: str, user_turns: Sequence[str], answers: Sequence[str]) -> Messages:
    """The prompt for the next answer while sampling: the instruction is joined to every user turn."""
    messages = []
    for turn, answer in zip(user_turns, answers, strict=False):
        messages += [Message("user", join(instruction, turn)), Message("assistant", answer)]
    messages.append(Message("user", join(instruction, user_turns[len(answers)])))
    return tuple(messages)


def training_dialogue(instruction: str, user_turns: Sequence[str], answers: Sequence[str]) -> Dialogue:
    """The row to train on: the instruction in the first turn only, loss on the last answer only.

    Llama 2 Sec. 3.3 sets the loss to zero on all tokens of earlier turns, their answers included.
    """
    first, *later = user_turns
    messages = []
    for turn, answer in zip([join(instruction, first), *later], answers, strict=True):
        messages += [Message("user", turn), Message("assistant", answer)]
    return Dialogue(messages=tuple(messages), train_on="last", source="ghost_attention")


def seed_turns(prompts: Sequence[Prompt], turns: int, rng: random.Random) -> list[list[str]]:
    """`turns` user turns for each prompt: its own, filled up with the opening turns of others."""
    own = [[message.content for message in prompt.messages if message.role == "user"] for prompt in prompts]
    openings = [turns_of[0] for turns_of in own]
    filled = []
    for mine in own:
        others = [turn for turn in openings if turn not in mine]
        missing = max(0, turns - len(mine))
        filled.append((mine + rng.sample(others, min(missing, len(others))))[:turns])
    return filled


def run(config: GattConfig, *, resume: bool = False) -> dict[str, Any]:
    """Samples the dialogues and writes `dialogues.jsonl`, ready for `align sft`."""
    state = process_state(config.run.device)
    data = load_prompts(config.prompts.prompts, on_error=config.prompts.on_error)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(data.sources)
    rng = random.Random(config.run.seed)
    prompts = choose_prompts(data, config.prompts, config.run.seed)
    user_turns = seed_turns(prompts, config.prompts.turns, rng)
    instructions = [draw_instruction(config.instructions, rng) for _ in prompts]
    shortened = [rng.random() < config.instructions.shorten_rate for _ in prompts]

    dtype = compute_dtype(state.device, config.model.dtype)
    loaded = load_chat_model(config.model.path, dtype=dtype, chat_template=config.model.chat_template)
    loaded.model.to(state.device)
    sampler = TorchSampler(loaded.model, stop_ids=[loaded.chat.end_of_turn_id], max_rows=config.sampling.max_rows)
    answers: list[list[str]] = [[] for _ in prompts]
    dropped: Counter[str] = Counter()
    alive = list(range(len(prompts)))
    total = sum(len(turns) for turns in user_turns)
    with ProgressBar("gatt: answers", total, shown=state.is_main_process) as bar:
        for turn in range(max(map(len, user_turns))):
            asked = [index for index in alive if turn < len(user_turns[index])]
            contexts = {
                index: encode_prompt(
                    loaded.chat, sampling_context(instructions[index].full, user_turns[index], answers[index])
                )
                for index in asked
            }
            fitting = [index for index in asked if len(contexts[index]) <= config.prompts.max_prompt_length]
            ids = [contexts[index] for index in fitting]
            samples = sample_ids(sampler, ids, config.sampling, seed=config.run.seed + turn, bar=bar)
            lost = set(asked) - set(fitting)
            dropped["too_long"] += len(lost)
            for index, (sample, *_) in zip(fitting, samples, strict=True):
                answer = decode_response(loaded.chat, sample.token_ids)
                # An earlier answer that was cut off is context only; the last one would teach the model not to stop.
                is_last = turn == len(user_turns[index]) - 1
                if not answer or (is_last and sample.finish_reason == "length"):
                    dropped["cut_off" if answer else "empty"] += 1
                    lost.add(index)
                else:
                    answers[index].append(answer)
            alive = [index for index in alive if index not in lost]
    dialogues = [
        training_dialogue(
            instructions[index].short if shortened[index] else instructions[index].full,
            user_turns[index],
            answers[index],
        )
        for index in alive
    ]
    if not dialogues:
        raise DataError(f"no dialogue was finished ({dict(dropped)}). Raise sampling.max_new_tokens or max_prompts.")
    run_dir.note(dropped=dict(dropped))
    if state.is_main_process:
        write_rows(run_dir.path / "dialogues.jsonl", (dialogue.to_json() for dialogue in dialogues))
    return run_dir.finish({"stage": "gatt", "dialogues": len(dialogues), "dropped": dict(dropped)})


def _draw(kind: str, rng: random.Random) -> Instruction:
    if kind == "hobby":
        hobby = rng.choice(HOBBIES)
        return Instruction(f"you love {hobby} and bring it up", f"Hobby: {hobby}.")
    if kind == "language":
        language = rng.choice(LANGUAGES)
        return Instruction(f"you always answer in {language}", f"Language: {language}.")
    figure = rng.choice(FIGURES)
    return Instruction(f"you act as {figure}", f"Figure: {figure}.")
