"""The stages by name: where their settings and their `run` are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from operator import attrgetter
from typing import Any, Literal

from alignment.config import StageConfig
from alignment.errors import ConfigError

ModelKind = Literal["chat model", "reward model"]


@dataclass(frozen=True)
class Stage:
    """A stage's settings class and functions as `module:name`, so that nothing heavy is imported for help.

    `checker` reads its data and chat formats and says what it found: no weights, no training. `kinds` is what
    differs in further stages that go by its name, chosen by the setting `kind`. `makes` is the model in its run
    directory, `files` are the names of the rows there; * stands for what differs. `rows` are the parsers of the rows
    that it reads, by the setting that names their files.
    """

    name: str
    config: str
    runner: str
    summary: str
    checker: str
    default_kind: str = ""
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    makes: ModelKind | None = None
    files: tuple[str, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)

    def of_kind(self, kind: object) -> Stage:
        """The stage that `kind` in the settings asks for: this one, unless it has another by that name.

        Raises ConfigError where it has none. A stage without `kinds` may have a setting of that name, as `rm` has.
        """
        if not self.kinds or kind in (None, self.default_kind):
            return self
        if not isinstance(kind, str) or kind not in self.kinds:
            names = ", ".join((self.default_kind, *self.kinds))
            raise ConfigError(f"kind = {kind!r}: the {self.name} stage has no such kind. Use one of {names}.")
        return replace(self, **self.kinds[kind], kinds={})

    def config_class(self) -> type[StageConfig]:
        """The pydantic model of its settings."""
        return _load(self.config)

    def run_function(self) -> Callable[..., dict[str, Any]]:
        """`run(config, resume=...) -> result`; importing it imports torch."""
        return _load(self.runner)

    def check_function(self) -> Callable[[StageConfig], str]:
        """`check(config) -> what was found` (`8 prompts.`); raises what `run` would of its data, and imports torch."""
        return _load(self.checker)

    def row_parser(self, key: str) -> Callable[[Mapping[str, Any]], Any]:
        """What makes typed rows of those in the files that the setting `key` names; it raises RowError for bad ones."""
        return _load(self.rows[key])


_DIALOGUES = dict.fromkeys(("data.train", "data.valid"), "alignment.dialogue:Dialogue.from_json")
_PAIRS = dict.fromkeys(("data.train", "data.valid", "data.mix_in"), "alignment.dialogue:PreferencePair.from_json")
_ANY = "alignment.data_report:parse_row"
_PROMPTS = {"prompts.prompts": "alignment.dialogue:Prompt.from_json", "prompts.not_in": _ANY}
_GATT = {
    "prompts.prompts": "sft.conversation:as_prompt",
    "prompts.not_in": _ANY,
    "instructions.own": "sft.instructions:PoolRow.from_json",
}

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "sft",
            "sft.config:SFTConfig",
            "sft.trainer:run",
            "Fine-tune on demonstrations, prompts masked.",
            "sft.prepare:check",
            makes="chat model",
            files=("answers.jsonl",),
            rows=_DIALOGUES,
        ),
        Stage(
            "gatt",
            "sft.config:GattConfig",
            "sft.gatt:run",
            "Make Ghost Attention dialogues for SFT.",
            "sft.gatt:check",
            files=("sampled.jsonl", "dialogues.jsonl", "as_sampled.jsonl"),
            rows=_GATT,
        ),
        Stage(
            "distil",
            "sft.config:DistilConfig",
            "alignment.cli.distil:run",
            "Safety context distillation: safe answers as SFT data, filtered by the safety reward model.",
            "alignment.cli.distil:check",
            files=("answers.jsonl", "scored.jsonl", "distilled.jsonl"),
            rows=_PROMPTS,
        ),
        Stage(
            "rm",
            "reward_models.config:RewardModelConfig",
            "reward_models.trainer:run",
            "Train a helpfulness or safety reward model on preference pairs.",
            "reward_models.prepare:check",
            makes="reward model",
            files=("held_out_scores.jsonl",),
            rows=_PAIRS,
        ),
        Stage(
            "reject",
            "rlhf.config:RejectionSamplingConfig",
            "rlhf.rejection_sampling:run",
            "One round of rejection sampling: the best of K becomes SFT data.",
            "rlhf.rejection_sampling:check",
            files=("candidates.jsonl", "sft.jsonl"),
            rows={
                **_PROMPTS,
                "earlier_rounds": "alignment.dialogue:Candidate.from_json",
                "baseline": "alignment.dialogue:as_response",
            },
        ),
        Stage(
            "ppo",
            "rlhf.config:PPOConfig",
            "rlhf.ppo_run:run",
            "PPO on the safety-gated reward.",
            "rlhf.ppo_run:check",
            makes="chat model",
            files=("answers-*.jsonl",),
            rows={
                **_PROMPTS,
                "evaluation.prompts": "alignment.dialogue:Prompt.from_json",
                "evaluation.not_in": _ANY,
            },
        ),
        Stage(
            "eval",
            "rlhf.config:EvalConfig",
            "rlhf.evaluate:run",
            "Compare policies on held-out prompts, or (kind=gatt) how long they keep an instruction.",
            "rlhf.evaluate:check",
            files=("answers-*.jsonl", "dialogues-*.jsonl"),
            rows=_PROMPTS,
            default_kind="policies",
            kinds={
                "gatt": {
                    "config": "sft.config:GattEvalConfig",
                    "runner": "sft.gatt_evaluation:run",
                    "checker": "sft.gatt_evaluation:check",
                    "rows": _GATT,
                }
            },
        ),
    )
}


def prepare_libraries() -> None:
    """Quiets the libraries' own bars and notices, and sets the allocator; call before a stage runs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity = os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    from alignment.hardware import tune_allocator

    if verbosity == "error":  # where transformers was imported before, it has not seen the variable
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tune_allocator()


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return attrgetter(name)(import_module(module))
