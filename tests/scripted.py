"""Ghost Attention and distillation with a model whose answers are scripted, and the settings of their runs."""

from __future__ import annotations

from pathlib import Path

from alignment.config import load_config
from sft.answer_log import Turn
from sft.config import DistilConfig, GattConfig
from sft.ghost_attention import Answer

COMMON = ["model.path=toy", "run.device=cpu", "run.seed=1"]
PROMPTS = ["prompts.prompts=toy:prompts.train", "prompts.max_prompts=6", "prompts.max_prompt_length=400"]


class ScriptedSpeaker:
    """Answers a conversation by a function of its messages, None where it does not fit; keeps what it is asked.

    Texts with [INST] are marked as those that the chat format refuses.
    """

    def __init__(self, answer, *, is_finished: bool = True) -> None:
        self.answer_one, self.is_finished, self.asked, self.num_calls = answer, is_finished, [], 0
        self.has_system_turn = True

    def answer(self, contexts, *, turn, bar):
        self.num_calls += 1
        self.asked += contexts.values()
        found = {key: self.answer_one(messages) for key, messages in contexts.items()}
        missing = {key: "too_long" for key, texts in found.items() if texts is None}
        answers = {key: [self.mark(text) for text in texts or []] for key, texts in found.items()}
        return Turn({key: texts for key, texts in answers.items() if key not in missing}, missing)

    def mark(self, text):
        return Answer(text, self.is_finished, is_refused="[INST]" in text)

    def why_not(self, messages):
        return "too_long" if self.answer_one(messages) is None else None


def gatt_config(folder: Path, *extra: str) -> GattConfig:
    settings = [*COMMON, *PROMPTS, "instructions.kinds=[capitals]", "instructions.combine_rate=0"]
    settings += ["prompts.min_turns=3", "prompts.turns=3", *extra]
    return load_config(GattConfig, None, [*settings, f"run.dir={folder}"])


class Interrupted(Exception):
    pass


def distil_config(folder: Path, *extra: str) -> DistilConfig:
    settings = [*COMMON, "safety=toy", *PROMPTS, *extra, f"run.dir={folder}"]
    return load_config(DistilConfig, None, settings)


def scored_by_length(prompts, responses):
    return [[float(len(text)) for text in texts] for texts in responses]
