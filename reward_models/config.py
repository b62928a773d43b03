"""Settings of the `rm` stage and of `align score`. Defaults are the paper's where it gives a number."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from alignment.config import (
    DataSection,
    DataSources,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    NonNegativeInt,
    OptimSection,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
    StageConfig,
    TrainSection,
)
from alignment.dialogue import RATINGS, Rating

Margins = dict[Rating, NonNegativeFloat]

# Llama 2 Table 27, in the order significantly better ... negligibly better.
MARGIN_TABLES: dict[str, Margins] = {
    "none": {},
    "small": {"significantly_better": 1.0, "better": 2 / 3, "slightly_better": 1 / 3, "negligibly_better": 0.0},
    "large": {"significantly_better": 3.0, "better": 2.0, "slightly_better": 1.0, "negligibly_better": 0.0},
}


class RewardData(DataSection):
    """Training and validation pairs, and how sources are mixed (Llama 2 Sec. 3.2.2)."""

    mix_in: DataSources = []
    """Pairs of the other aim: safety pairs for a helpfulness model, helpfulness pairs for a safety model."""

    mix: Literal["all", "equal_parts", "90/10"] | dict[str, PositiveFloat] = "all"
    """`all`: every row of `train` and `mix_in`. `equal_parts`: all of `train` and as many rows drawn from `mix_in`.
    `90/10`: all of `train`, and rows of `mix_in` up to a tenth of the whole. Or a weight for every source by the name
    given in `train` or `mix_in`: as many rows as these proportions allow. Drawn without replacement by the seed.
    Paper: equal parts for helpfulness, 90/10 for safety."""

    @model_validator(mode="after")
    def _mix_has_its_sources(self) -> RewardData:
        if self.mix in ("equal_parts", "90/10") and not self.mix_in:
            raise ValueError(f"data.mix = {self.mix} mixes in nothing. Name the other aim's pairs in data.mix_in.")
        if isinstance(self.mix, dict):
            given, wanted = set(self.mix), {*self.train, *self.mix_in}
            if given != wanted:
                wrong = ", ".join(sorted(given ^ wanted))
                raise ValueError(f"data.mix: give one weight to each source of train and mix_in. Look at: {wrong}.")
        if doubled := sorted({name for name in self.mix_in if name in self.train}):
            raise ValueError(f"data.mix_in: {', '.join(doubled)} is in data.train too. Name it once.")
        return self


class EvaluationSection(Section):
    """What the report on held-out pairs looks for."""

    wanted_precision: PositiveFraction = 0.9
    """The report names the threshold on P(safe) at which flagging unsafe responses reaches this precision. The gate's
    0.15 had 0.89 in the paper."""


class RewardOptim(OptimSection):
    """AdamW with Llama 2's reward-model numbers (Sec. 3.2.2)."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate. Paper: 1e-5 (5e-6 for 70B)."""

    min_warmup_steps: NonNegativeInt = 5
    """Linear warm-up is at least this many steps (but never more than half of all). Paper: 5."""


class RewardTrain(TrainSection):
    """Length and batches (Llama 2 Sec. 3.2.2)."""

    epochs: PositiveFloat = 1.0
    """Passes over the pairs. Paper: 1, more overfits."""

    batch_size: PositiveInt = 512
    """Pairs in one optimizer step, over all devices. Paper: 512."""


class RewardModelConfig(StageConfig):
    """A reward model from binary preferences (Llama 2 Sec. 3.2)."""

    stage: ClassVar[str] = "rm"
    resume_may_change: ClassVar[frozenset[str]] = frozenset({"train.save_every"})

    kind: Literal["helpfulness", "safety"]
    """Which of the two aims. `safety` adds the auxiliary loss on labelled responses."""

    model: ModelSection
    """A chat model to start from; its output matrix is replaced by a scalar head."""
    lora: LoraSection = LoraSection()
    data: RewardData
    margin: Literal["none", "small", "large"] | Margins = "small"
    """Margin by rating: a table of the paper, or a number of your own for each of the four ratings. A row's own
    `margin` goes before its rating's, save under `none`, where no pair has one (Eq. 1). Paper: small (Table 27)."""

    unrated_margin: NonNegativeFloat = 0.0
    """Margin of pairs without a rating or a margin of their own; takes no part under `margin=none`. Our choice: 0,
    which claims no strength nobody stated."""

    veto: Literal["drop", "flip", "keep"] = "drop"
    """Pairs whose chosen response is labelled unsafe and the other safe, held-out ones, too; `align score` keeps them.
    Paper: left out."""

    safety_loss_weight: NonNegativeFloat | None = None
    """Weight of the auxiliary safety loss, a sum over both responses; null is 1 for `kind=safety` and 0 for
    `kind=helpfulness`."""

    centering_weight: NonNegativeFloat = 0.0
    """Weight of the score-centring loss; 0 is off, as in the paper."""

    optim: RewardOptim = RewardOptim()
    train: RewardTrain = RewardTrain()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _every_rating_has_its_margin(self) -> RewardModelConfig:
        missing = [rating for rating in RATINGS if rating not in self.margin] if isinstance(self.margin, dict) else []
        if missing:
            raise ValueError(f"margin: no number for {', '.join(missing)}. Give all four ratings, 0 for no margin.")
        return self
