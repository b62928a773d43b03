"""The stages by name: where their settings and their `run` are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

from alignment.config import StageConfig
from alignment.errors import ConfigError

ModelKind = Literal["chat model", "reward model"]


@dataclass(frozen=True)
class Stage:
    """A stage's settings class and functions as `module:name`, so that nothing heavy is imported for help.

    `checker` reads its data and chat formats and says what it found: no weights, no training. `kinds` are further
    settings, runners and checkers that go by the stage's name, chosen by the setting `kind`. `makes` is the model in
    its run directory, `files` are the names of the rows there; * stands for what differs.
    """

    name: str
    config: str
    runner: str
    summary: str
    checker: str
    default_kind: str = ""
    kinds: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    makes: ModelKind | None = None
    files: tuple[str, ...] = ()

    def of_kind(self, kind: object) -> Stage:
        """The stage that `kind` in the settings asks for: this one, unless it has another by that name.

        Raises ConfigError where it has none. A stage without `kinds` may have a setting of that name, as `rm` has.
        """
        if not self.kinds or kind in (None, self.default_kind):
            return self
        if not isinstance(kind, str) or kind not in self.kinds:
            names = ", ".join((self.default_kind, *self.kinds))
            raise ConfigError(f"kind = {kind!r}: the {self.name} stage has no such kind. Use one of {names}.")
        config, runner, checker = self.kinds[kind]
        return replace(self, config=config, runner=runner, checker=checker, kinds={})

    def config_class(self) -> type[StageConfig]:
        """The pydantic model of its settings."""
        return _load(self.config)

    def run_function(self) -> Callable[..., dict[str, Any]]:
        """`run(config, resume=...) -> result`; importing it imports torch."""
        return _load(self.runner)

    def check_function(self) -> Callable[[StageConfig], str]:
        """`check(config) -> what was found` (`8 prompts.`); raises what `run` would of its data, and imports torch."""
        return _load(self.checker)


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
        ),
        Stage(
            "gatt",
            "sft.config:GattConfig",
            "sft.gatt:run",
            "Make Ghost Attention dialogues for SFT.",
            "sft.gatt:check",
            files=("sampled.jsonl", "dialogues.jsonl", "as_sampled.jsonl"),
        ),
        Stage(
            "distil",
            "sft.config:DistilConfig",
            "alignment.cli.distil:run",
            "Safety context distillation: safe answers as SFT data, filtered by the safety reward model.",
            "alignment.cli.distil:check",
            files=("answers.jsonl", "scored.jsonl", "distilled.jsonl"),
        ),
        Stage(
            "rm",
            "reward_models.config:RewardModelConfig",
            "reward_models.trainer:run",
            "Train a helpfulness or safety reward model on preference pairs.",
            "reward_models.prepare:check",
            makes="reward model",
            files=("held_out_scores.jsonl",),
        ),
        Stage(
            "reject",
            "rlhf.config:RejectionSamplingConfig",
            "rlhf.rejection_sampling:run",
            "One round of rejection sampling: the best of K becomes SFT data.",
            "rlhf.rejection_sampling:check",
            files=("candidates.jsonl", "sft.jsonl"),
        ),
        Stage(
            "ppo",
            "rlhf.config:PPOConfig",
            "rlhf.ppo_run:run",
            "PPO on the safety-gated reward.",
            "rlhf.ppo_run:check",
            makes="chat model",
            files=("answers-*.jsonl",),
        ),
        Stage(
            "eval",
            "rlhf.config:EvalConfig",
            "rlhf.evaluate:run",
            "Compare policies on held-out prompts, or (kind=gatt) how long they keep an instruction.",
            "rlhf.evaluate:check",
            files=("answers-*.jsonl", "dialogues-*.jsonl"),
            default_kind="policies",
            kinds={"gatt": ("sft.config:GattEvalConfig", "sft.gatt_evaluation:run", "sft.gatt_evaluation:check")},
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
    return getattr(import_module(module), name)
