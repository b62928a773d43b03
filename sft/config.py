"""Settings of the `sft` and `gatt` stages. Defaults are the paper's where it gives a number."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from alignment.config import (
    DataSection,
    DataSources,
    Fraction,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    NonNegativeInt,
    OptimSection,
    Policies,
    PositiveFloat,
    PositiveInt,
    PromptSection,
    SamplingSection,
    Section,
    StageConfig,
    TrainSection,
)
from sft.instructions import Kind, Part, VerifiableKind


class SFTOptim(OptimSection):
    """AdamW with Llama 2's fine-tuning numbers (Sec. 3.1)."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate. Paper: 2e-5."""


class SFTTrain(TrainSection):
    """Length and batches (Llama 2 Sec. 3.1)."""

    epochs: PositiveFloat = 2.0
    """Passes over the demonstrations. Paper: 2."""

    batch_size: PositiveInt = 64
    """Dialogues in one optimizer step, over all devices. Paper: 64 sequences of 4,096 tokens."""

    packing: bool = True
    """Fill rows of `data.max_length` tokens (`train.max_tokens_per_batch`, if less) with several dialogues, none of
    which sees another. Paper: yes. It never changes a step's result."""


class SFTData(DataSection):
    """Demonstrations to train on, and held-out ones."""

    max_rows_of: dict[str, PositiveInt] = {}
    """Use at most this many rows of a source of `train`, by its name, chosen by the seed; before `max_rows`."""

    @model_validator(mode="after")
    def _names_are_known(self) -> SFTData:
        for name in self.max_rows_of:
            if name not in self.train:
                raise ValueError(f"data.max_rows_of: {name} is not in data.train. There: {', '.join(self.train)}.")
        return self


class SFTEvaluation(Section):
    """What is looked at besides the held-out loss."""

    num_answers: NonNegativeInt = 4
    """Held-out dialogues whose last turn is answered before and after training, into `answers.jsonl`."""

    max_new_tokens: PositiveInt = 96
    """Tokens in such an answer at most."""


class SFTConfig(StageConfig):
    """Supervised fine-tuning on demonstrations (Llama 2 Sec. 3.1)."""

    stage: ClassVar[str] = "sft"
    resume_may_change: ClassVar[frozenset[str]] = frozenset({"train.save_every"})

    model: ModelSection
    """The model to fine-tune."""
    lora: LoraSection = LoraSection()
    data: SFTData
    optim: SFTOptim = SFTOptim()
    train: SFTTrain = SFTTrain()
    evaluation: SFTEvaluation = SFTEvaluation()


class GattPrompts(PromptSection):
    """Dialogues whose user turns seed the Ghost Attention data: rows with prompts, demonstrations or pairs."""

    max_prompt_length: PositiveInt = 1024
    """Tokens of a dialogue up to its last question, the instruction in every turn; a longer one is left out."""

    max_prompts: PositiveInt | None = 64
    """Dialogues to make."""

    turns: PositiveInt = 4
    """User turns in a dialogue at most. Prompts with fewer are filled up with user turns of others."""

    min_turns: PositiveInt = 2
    """User turns in a dialogue at least; each has a number drawn evenly between the two. Only last answers are trained,
    so dialogues of every length teach the instruction at every turn."""

    @model_validator(mode="after")
    def _turns_in_order(self) -> GattPrompts:
        if self.min_turns > self.turns:
            raise ValueError(
                f"prompts.min_turns = {self.min_turns} is more than prompts.turns = {self.turns}. Lower it."
            )
        return self


class GattSampling(SamplingSection):
    """How the answers of the dialogues are drawn."""

    num_candidates: PositiveInt = 1
    """Candidates for each answer, of which the first that keeps the instruction is taken. Our choice: small models
    keep few instructions, so more candidates lose fewer dialogues."""

    temperature: NonNegativeFloat = 0.9
    max_new_tokens: PositiveInt = 128


class GattInstructions(Section):
    """What the instruction to be kept asks for (Llama 2 Sec. 3.3)."""

    kinds: Annotated[list[Kind], Field(min_length=1)] = ["hobby", "language", "figure"]
    """Kinds that are drawn from. Paper: `hobby`, `language`, `figure`. A program can judge `language`, `capitals`,
    `ending`, `opening`, `keyword`, `forbidden_word`, `max_words` and `bullet_points`: dialogues whose answers do not
    keep them are rejected."""

    own: DataSources = []
    """Files with instructions of your own, instead of the built-in ones: rows with `kind` and `value`, or with `full`
    and `short`."""

    part: Part = "train"
    """Built-in values for training, or those held out for measuring; they share none but capital letters. The wording
    around a value is the same."""

    combine_rate: Fraction = 0.3
    """Share of instructions that join two kinds ("act as X and answer in Y")."""

    shorten_rate: Fraction = 0.5
    """Share of dialogues trained with the shortened form ("Figure: Napoleon."). Paper: half."""


class GattConfig(StageConfig):
    """Ghost Attention: dialogues that keep an instruction, as SFT rows (Llama 2 Sec. 3.3, A.3.5)."""

    stage: ClassVar[str] = "gatt"

    model: ModelSection
    """The newest chat model: it answers the turns."""
    prompts: GattPrompts
    instructions: GattInstructions = GattInstructions()
    sampling: GattSampling = GattSampling()


class GattEvalPrompts(PromptSection):
    """Dialogues whose user turns are asked: rows with prompts, demonstrations or pairs."""

    max_prompts: PositiveInt | None = 40
    """Dialogues to hold with each model."""

    turns: PositiveInt = 20
    """User turns in a dialogue. Paper: up to 20 (Table 30)."""

    max_prompt_length: PositiveInt = 4096
    """Tokens of a dialogue up to its last question; one that is longer ends before."""


class GattEvalInstructions(GattInstructions):
    """Instructions that a program can judge."""

    kinds: Annotated[list[VerifiableKind], Field(min_length=1)] = [
        kind for kind in get_args(VerifiableKind) if kind != "capitals"
    ]
    """Kinds that are drawn from. `capitals` has one value only, which cannot be held out."""

    part: Part = "held_out"
    combine_rate: Fraction = 0.0
    """Share of instructions that join two kinds."""

    shorten_rate: Fraction = 0.0
    """Share of dialogues that state the shortened form."""


class GattEvalSampling(SamplingSection):
    """How the answers are drawn."""

    num_candidates: Literal[1] = 1
    """One answer to a turn."""

    temperature: NonNegativeFloat = 0.0
    """0 takes the most likely token, so that models are compared without luck."""

    max_new_tokens: PositiveInt = 64


class GattEvalConfig(StageConfig):
    """Do instructions stated in the first turn only still hold turns later? (Llama 2 Table 30, by program.)"""

    stage: ClassVar[str] = "eval"
    # The picture is made after all answers.
    resume_may_change: ClassVar[frozenset[str]] = frozenset({"num_attention_dialogues"})

    kind: Literal["gatt"] = "gatt"
    """What is measured: `gatt`, adherence to an instruction by turn."""

    policies: Policies
    """Chat models by name; the first is the baseline of the comparisons."""
    prompts: GattEvalPrompts
    instructions: GattEvalInstructions = GattEvalInstructions()
    sampling: GattEvalSampling = GattEvalSampling()

    report_turns: Annotated[list[PositiveInt], Field(min_length=1)] = [2, 4, 6, 10, 20]
    """Turns in the table. The curve has all. Paper: 2, 4, 6, 20."""

    num_attention_dialogues: NonNegativeInt = 8
    """Dialogues of the first policy over which the attention picture is averaged (Llama 2 Fig. 10); 0 draws none."""


class DistilSampling(SamplingSection):
    """How both answers are drawn."""

    num_candidates: Literal[1] = 1
    """One answer with and one without the preprompt."""

    temperature: NonNegativeFloat = 0.9
    max_new_tokens: PositiveInt = 128


class DistilConfig(StageConfig):
    """Safety context distillation: answers given behind a safety preprompt, learned without it (Llama 2 Sec. 4.2.4)."""

    stage: ClassVar[str] = "distil"
    # Answers are scored after all sampling.
    resume_may_change: ClassVar[frozenset[str]] = frozenset({"max_tokens_per_batch"})

    model: ModelSection
    """The newest chat model: it answers with and without the preprompt."""

    safety: ModelSection
    """The safety reward model: a distilled answer is kept only where it is scored above the plain one."""

    prompts: PromptSection
    """Adversarial prompts; their `category` chooses the answer template."""

    sampling: DistilSampling = DistilSampling()

    preprompts: Annotated[list[str], Field(min_length=1)] | None = None
    """Safety preprompts, one drawn for each prompt; null takes the built-in ones."""

    templates: dict[str, str] | None = None
    """What a good answer does, by the name of a risk as `category` has it, alone or between commas; it goes behind the
    preprompt. null takes the built-in ones, {} none."""

    max_tokens_per_batch: PositiveInt = 8192
    """Tokens scored at a time: a memory knob."""
