"""Settings of the `reject`, `ppo` and `eval` stages. Defaults are the paper's where it gives a number."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from alignment.config import (
    DataSources,
    Fraction,
    LoraSection,
    ModelSection,
    NonNegativeFloat,
    NonNegativeInt,
    NotBool,
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
from alignment.errors import ConfigError

OpenFraction = Annotated[float, Field(gt=0, lt=1), NotBool]


class RewardSection(Section):
    """The two reward models and the gate between them (Llama 2 Sec. 3.2.3)."""

    helpfulness: ModelSection
    """Helpfulness reward model."""

    safety: ModelSection
    """Safety reward model."""

    threshold: OpenFraction = 0.15
    """Responses with P(safe) below this are rewarded by the safety model. Paper: 0.15."""

    max_tokens_per_batch: PositiveInt = 8192
    """Tokens scored at a time: a memory knob."""


class RejectSampling(SamplingSection):
    """How candidates are drawn."""

    num_candidates: PositiveInt = 16
    """K, responses to each prompt. The paper does not give its number; its Fig. 7 shows 1 to 100."""

    temperature: NonNegativeFloat = 1.0
    """Logits are divided by this; not used where there is a grid. Paper: tuned at each iteration, 1.2 to 1.3 for its
    RLHF model (Fig. 8)."""

    temperature_grid: list[NonNegativeFloat] = []
    """Tune it: sample some prompts at each of these, and all at the one whose best of K is rewarded most."""

    temperature_prompts: PositiveInt = 32
    """Prompts that the temperatures are tried on, chosen by the seed. Their candidates all take part."""

    @field_validator("temperature_grid")
    @classmethod
    def _are_different(cls, values: list[float]) -> list[float]:
        if len(set(values)) != len(values):
            raise ValueError(f"sampling.temperature_grid: {values} has a temperature twice. Remove one.")
        return values


class RejectionSamplingConfig(StageConfig):
    """One round of rejection sampling: sample K, score, keep the best as new gold answers (Llama 2 Sec. 3.2.3)."""

    stage: ClassVar[str] = "reject"
    # All sampling comes before scoring, so that the end is what the new settings alone would give: candidates
    # on disk have no scores yet, and a temperature of the grid is chosen anew.
    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"min_gain", "accumulate", "baseline", "rewards.threshold", "rewards.max_tokens_per_batch"}
    )

    model: ModelSection
    """The newest policy: it samples."""
    rewards: RewardSection
    prompts: PromptSection
    sampling: RejectSampling = RejectSampling()

    round: NonNegativeInt = 1
    """Number of this round, written into its candidates. Each draws with random numbers of its own."""

    earlier_rounds: DataSources = []
    """`candidates.jsonl` of earlier rounds."""

    rescore_earlier: bool = True
    """Score the candidates of earlier rounds again: rewards of other reward models are on another scale."""

    accumulate: Literal["best", "all", "last"] = "best"
    """What is trained on, for each prompt: its `best` candidate of all rounds, `all` rounds' bests, or the best of the
    `last` round only. Paper: up to V3 the last round's, and skills were lost; afterwards the top samples of all."""

    min_gain: NonNegativeFloat = 0.0
    """Keep a prompt only where its best reward beats its median, or its `baseline`, by this much (a difference of
    logits)."""

    baseline: DataSources = []
    """Responses to the prompts to measure gains from instead of the median: the SFT model's (a file of `align sample`),
    or demonstrations. Several to a prompt count by their mean; prompts without one are measured from their median."""


class PPOSampling(SamplingSection):
    """How rollouts are drawn."""

    num_candidates: PositiveInt = 1
    """Rollouts for each prompt."""

    vllm: dict[str, Any] = {}
    """Arguments for vLLM's `LLM`. On a GPU it shares the memory with the training: `gpu_memory_utilization` is 0.3
    here. With LoRA `enable_lora` and `max_lora_rank` are as `lora.r` needs them."""

    top_p: Literal[1.0] = 1.0
    """PPO needs samples of the policy itself, not of a truncated one."""

    top_k: Literal[0] = 0
    """PPO needs samples of the policy itself, not of a truncated one."""

    temperature: PositiveFloat = 1.0
    """Log-probabilities are taken at the same temperature."""


class PPOOptim(OptimSection):
    """AdamW with Llama 2's PPO numbers (Sec. 3.2.3)."""

    lr: PositiveFloat = 1e-6
    """Learning rate of the policy. Paper: 1e-6."""

    schedule: Literal["cosine", "constant"] = "constant"
    """Shape of the learning rate after warm-up. Paper: constant."""

    warmup_fraction: Fraction = 0.0
    """Linear warm-up, as a fraction of all steps. Paper: none."""


class PPOTrain(TrainSection):
    """Length and batches of PPO (Llama 2 Sec. 3.2.3)."""

    epochs: PositiveInt = 1
    """Passes over each batch of rollouts. Paper: one gradient step a minibatch."""

    max_steps: PositiveInt = 200
    """Iterations: a batch of rollouts and its updates. Paper: 200 to 400."""

    batch_size: PositiveInt = 512
    """Rollouts in an iteration, over all devices. Paper: 512."""

    minibatch_size: PositiveInt = 64
    """Rollouts in one optimizer step, over all devices. Paper: 64."""

    save_every: PositiveInt = 10
    """Iterations between checkpoints. The last iteration has one in any case."""


class PPOSection(Section):
    """The algorithm's own numbers."""

    beta: NonNegativeFloat = 0.01
    """KL coefficient. Paper: 0.01 (7B, 13B), 0.005 (34B, 70B)."""

    clip_range: PositiveFloat = 0.2
    """Clip of the policy's probability ratio. Paper: 0.2."""

    value_clip_range: PositiveFloat = 0.2
    """Clip of the critic's change. Our choice: as the policy's."""

    gamma: Fraction = 1.0
    """Discount. Our choice: 1."""

    lam: Fraction = 0.95
    """GAE's lambda. Our choice: 0.95."""

    critic_warmup: NonNegativeInt = 0
    """First iterations in which the critic alone learns, without `value_clip_range`. Our choice: 0."""

    critic_lr: PositiveFloat = 1e-5
    """Learning rate of the critic. Our choice: ten times the policy's, since its head is new."""

    truncation: Literal["keep", "penalise", "mask"] = "keep"
    """Responses cut off at `sampling.max_new_tokens`: `keep` their reward; `penalise`, their whitened reward is lowered
    by `truncation_penalty`; `mask`, nothing is learned from them and whitening leaves them out. Our choice: keep."""

    truncation_penalty: PositiveFloat = 1.0
    """In standard deviations of the gated reward."""

    target_kl: PositiveFloat | None = None
    """Adapt beta so that KL stays near this, nats a response (Ziegler et al. 2019). Paper: beta is fixed."""

    kl_horizon: PositiveInt = 10_000
    """Rollouts over which beta adapts, more than `train.batch_size`; not while the critic learns alone."""

    share_backbone: Literal["auto", "always", "never"] = "auto"
    """With LoRA, hold once what policy, critic and reward models have in common, where all were fine-tuned from the
    same weights with LoRA: `auto` where that is so, `always` or an error, `never`. A guard joins them where it can.
    Much less memory."""

    offload: bool = False
    """Keep reference, reward models and a guard that do not share the policy's weights in CPU memory, and on the device
    only while they compute."""


class AlarmSection(Section):
    """Figures that say a run goes wrong; each alarm says what to do."""

    action: Literal["warn", "stop", "off"] = "warn"
    """`warn` when an alarm first rings, `stop` there and save the policy, or neither. A figure that is not a number
    ends the run in any case."""

    max_kl: PositiveFloat = 50.0
    """KL from the reference (k3), nats a response."""

    max_ratio_error: PositiveFloat = 0.1
    """Mean distance of the first minibatch's ratio from 1: rounding in bfloat16 makes a few hundredths."""

    max_sampler_gap: PositiveFloat = 0.2
    """Mean distance of the sampling engine's log-probabilities from the trainer's, nats a token: rounding in bfloat16
    makes a few hundredths."""

    min_entropy: Fraction = 0.2
    """Entropy a token, as a share of the first iteration's."""

    max_length_change: Annotated[float, Field(gt=1), NotBool] = 2.0
    """Mean length of responses against the first iteration's, as a factor, up or down."""

    max_gated_unsafe_rate: Fraction = 0.95
    """Share of ordinary prompts' responses that the safety model speaks for."""


class PPOEvaluation(Section):
    """A look at held-out prompts now and then, and when to stop (Llama 2 Sec. 3.2.3)."""

    prompts: DataSources = []
    """Prompts that nothing is trained on; without any there is no evaluation."""

    not_in: DataSources = []
    """As `prompts.not_in`."""

    max_prompts: PositiveInt = 64
    """Use at most this many, chosen by the seed, with the training prompts' `safety_share`. Where that is null half of
    those chosen are safety prompts, whatever their share in training."""

    every: PositiveInt = 10
    """Iterations between evaluations. One is made before the first, one after the last."""

    patience: PositiveInt | None = None
    """Stop after so many evaluations without a higher gated reward than the best, and save the best policy. Those
    during `ppo.critic_warmup` do not count. null trains to the end and saves the last. Needs `evaluation.prompts`."""

    guard: ModelSection | None = None
    """A reward model on whose scores nothing was trained: it tells a better policy from a fooled reward model."""

    def as_prompts(self, section: PromptSection) -> PromptSection:
        """These prompts with the lengths of the training prompts."""
        own = {"prompts": self.prompts, "not_in": self.not_in, "max_prompts": self.max_prompts}
        return section.model_copy(update=own)


class PPOConfig(StageConfig):
    """PPO on the safety-gated, whitened reward (Llama 2 Sec. 3.2.3, Eq. 4)."""

    stage: ClassVar[str] = "ppo"
    resume_may_change: ClassVar[frozenset[str]] = frozenset({"train.save_every"})

    model: ModelSection
    """The policy to start from; a frozen copy is the reference. Paper: the rejection-sampling checkpoint."""
    lora: LoraSection = LoraSection()
    rewards: RewardSection
    prompts: PromptSection
    sampling: PPOSampling = PPOSampling()
    ppo: PPOSection = PPOSection()
    alarms: AlarmSection = AlarmSection()
    evaluation: PPOEvaluation = PPOEvaluation()
    optim: PPOOptim = PPOOptim()
    train: PPOTrain = PPOTrain()

    @model_validator(mode="after")
    def _settings_agree(self) -> PPOConfig:
        train, sampling = self.train, self.sampling
        if train.batch_size % train.minibatch_size:
            raise ValueError(
                f"train.minibatch_size = {train.minibatch_size} does not divide train.batch_size = "
                f"{train.batch_size}. Choose a divisor (the paper uses 64 of 512)."
            )
        if self.ppo.critic_warmup >= train.max_steps:
            raise ValueError(
                f"ppo.critic_warmup = {self.ppo.critic_warmup} leaves none of train.max_steps = {train.max_steps} "
                "iterations to the policy. Lower it."
            )
        if self.ppo.share_backbone == "always" and not self.lora.r:
            raise ValueError(
                "ppo.share_backbone=always: a policy that is trained in full (lora.r=0) has weights of its own. Set "
                "lora.r above 0, or ppo.share_backbone=auto."
            )
        if train.minibatch_size % sampling.num_candidates:
            raise ValueError(
                f"sampling.num_candidates = {sampling.num_candidates} does not divide train.minibatch_size = "
                f"{train.minibatch_size}. A minibatch takes all rollouts of a prompt."
            )
        return self


def check_effects(config: PPOConfig) -> None:
    """Raises ConfigError where settings would do nothing, or the reverse of what they are for.

    Not asked of an unfinished run, which goes on with the settings that it has.
    """
    ppo, rollouts, problems = config.ppo, config.train.batch_size, []
    if ppo.target_kl is not None and not ppo.beta:
        problems.append("ppo.beta = 0 stays 0 whatever ppo.target_kl is, for it is multiplied. Set it above 0.")
    if ppo.target_kl is not None and ppo.kl_horizon <= rollouts:
        problems.append(
            f"ppo.kl_horizon = {ppo.kl_horizon} counts rollouts, of which an iteration has {rollouts} "
            "(train.batch_size): beta would change by a fifth or more in one, and could fall below 0. Raise it (10000)."
        )
    if config.evaluation.patience is not None and not config.evaluation.prompts:
        problems.append(
            f"evaluation.patience = {config.evaluation.patience}: nothing is evaluated without evaluation.prompts. "
            "Name held-out prompts, or leave it out."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def check_shares(config: PPOConfig, num_processes: int) -> None:
    """Raises ConfigError where the processes cannot share every minibatch evenly, whole prompts each."""
    minibatch, rollouts = config.train.minibatch_size, config.sampling.num_candidates
    if minibatch % (rollouts * num_processes):
        raise ConfigError(
            f"train.minibatch_size = {minibatch} cannot be shared by {num_processes} processes "
            f"with {rollouts} rollouts a prompt. Choose a multiple of their product."
        )


class EvalSampling(SamplingSection):
    """How the answers are drawn."""

    num_candidates: Literal[1] = 1
    """One answer to a prompt."""

    temperature: NonNegativeFloat = 1.0
    max_new_tokens: PositiveInt = 256


class EvalConfig(StageConfig):
    """Policies side by side on held-out prompts: scores of both reward models, gated reward, violations."""

    stage: ClassVar[str] = "eval"
    # Scoring comes last. The KL of answers on disk was computed in the old batches, which differs by rounding.
    resume_may_change: ClassVar[frozenset[str]] = frozenset({"rewards.max_tokens_per_batch"})

    kind: Literal["policies"] = "policies"
    """What is measured: `policies`, their answers by both reward models; `gatt`, adherence to an instruction."""

    policies: Policies
    """Chat models by name; the first is the baseline of the comparisons."""
    rewards: RewardSection

    guard: ModelSection | None = None
    """A reward model on whose scores nothing was trained, best of other pairs: where it disagrees with the gated
    reward, the policies have learned the reward models' mistakes (Llama 2 Sec. 3.4.1)."""

    measure_kl: bool = True
    """Report how far every policy is from the first, in nats an answer; two forward passes a policy. Not where the
    first has another vocabulary, nor with temperature 0, top_p or top_k: such answers are not of the policy's own
    distribution."""
    prompts: PromptSection
    sampling: EvalSampling = EvalSampling()

    truth: Literal["toy"] | None = None
    """Also judge the answers by the computable truth of the built-in `toy` task, whose prompts these must be."""
