"""Settings of the `sft` and `gatt` stages. Defaults are the paper's where it gives a number."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from alignment.config import (
    DataSection,
    Fraction,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    OptimSection,
    PositiveFloat,
    PositiveInt,
    PromptSection,
    SamplingSection,
    Section,
    StageConfig,
    TrainSection,
)


class SFTOptim(OptimSection):
    """AdamW with Llama 2's fine-tuning numbers (Sec. 3.1)."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate. Paper: 2e-5."""


class SFTTrain(TrainSection):
    """Length and batches (Llama 2 Sec. 3.1)."""

    epochs: PositiveFloat = 2.0
    """Passes over the demonstrations. Paper: 2."""

    batch_size: PositiveInt = 64
    """Dialogues in one optimizer step, over all devices. Paper: 64."""


class SFTConfig(StageConfig):
    """Supervised fine-tuning on demonstrations (Llama 2 Sec. 3.1)."""

    stage: ClassVar[str] = "sft"

    model: ModelSection
    """The model to fine-tune."""
    lora: LoraSection = LoraSection()
    data: DataSection
    optim: SFTOptim = SFTOptim()
    train: SFTTrain = SFTTrain()


class GattPrompts(PromptSection):
    """Dialogues whose user turns seed the Ghost Attention data."""

    max_prompts: PositiveInt | None = 64
    """Dialogues to make."""

    turns: PositiveInt = 3
    """User turns in a dialogue. Dialogues with fewer are filled up with user turns of others."""


class GattSampling(SamplingSection):
    """How the answers of the dialogues are drawn."""

    num_candidates: Literal[1] = 1
    """One answer to a turn."""

    temperature: NonNegativeFloat = 0.9
    max_new_tokens: PositiveInt = 128


class GattInstructions(Section):
    """What the instruction to be kept asks for (Llama 2 Sec. 3.3)."""

    kinds: Annotated[list[Literal["hobby", "language", "figure"]], Field(min_length=1)] = [
        "hobby",
        "language",
        "figure",
    ]
    """Kinds that are drawn from: `hobby`, `language`, `figure`. Paper: all three."""

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
