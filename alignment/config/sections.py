"""The groups of settings that stages share, and the base of every stage's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alignment.config.schema import section_of
from alignment.sources import BUILT_IN_TEMPLATES, expanded


def as_list(value: Any) -> Any:
    """One source by itself is a list of one."""
    return [value] if isinstance(value, str) else value


def _refuse_bool(value: Any) -> Any:
    """Pydantic would take true, which YAML's yes is, for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "Input should be a number, not true or false (YAML's yes, no)")
    return value


DataSources = Annotated[list[str], BeforeValidator(as_list)]
InputKind = Literal["data", "model", "template"]
NotBool = BeforeValidator(_refuse_bool)
PositiveInt = Annotated[int, Field(gt=0), NotBool]
NonNegativeInt = Annotated[int, Field(ge=0), NotBool]
PositiveFloat = Annotated[float, Field(gt=0), NotBool]
NonNegativeFloat = Annotated[float, Field(ge=0), NotBool]
Fraction = Annotated[float, Field(ge=0, le=1), NotBool]
BelowOne = Annotated[float, Field(ge=0, lt=1), NotBool]
PositiveFraction = Annotated[float, Field(gt=0, le=1), NotBool]
# Those that transformers and accelerate both know.
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSection(Section):
    """A model to start from. `model=NAME` is short for `model.path=NAME`."""

    path: str
    """A folder, a run directory, a Hub id, `smollm2-135m-instruct` or `toy`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of frozen weights and of the arithmetic. `auto`: bfloat16 where the device computes it faster, else
    float32. Trained weights, optimizer state, losses and score heads are float32 in any case."""

    chat_template: str = "auto"
    """`auto` (the tokenizer's own), `llama2` (Meta's [INST] layout), `chatml`, or the path of a Jinja file."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for much less memory."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) instead of full fine-tuning."""

    r: NonNegativeInt = 0
    """Rank; 0 trains all weights, as the paper does."""

    alpha: PositiveFloat = 32.0
    """Scale: the update is alpha / r times the product of the two matrices."""

    dropout: BelowOne = 0.0
    """Dropout on the adapter's input, a probability."""

    last_layers: PositiveInt | None = None
    """Adapt only this many layers, counted from the last: the backward pass ends there. null adapts all."""

    @model_validator(mode="after")
    def _layers_are_of_adapters(self) -> LoraSection:
        """An `r` of 0 that is given is no oversight: one stage of a pipeline may undo its defaults."""
        if self.last_layers is not None and "r" not in self.model_fields_set:
            raise ValueError(
                f"lora.last_layers = {self.last_layers} has no effect without adapters. Set lora.r, or remove it."
            )
        return self


class OptimSection(Section):
    """AdamW and its schedule (Llama 2 Sec. 3.1, 3.2.2, 3.2.3)."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate."""

    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW moment decay rates. Paper: 0.9, 0.95 for reward models and PPO."""

    eps: PositiveFloat = 1e-5
    """AdamW epsilon. Paper: 1e-5 for reward models and PPO."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, not on biases and norms. Paper: 0.1."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm. Paper: 1.0 for reward models and PPO."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""

    final_lr_fraction: Fraction = 0.1
    """The cosine ends at this fraction of the peak. Paper: 0.1 for reward models."""

    warmup_fraction: Fraction = 0.03
    """Linear warm-up, as a fraction of all steps. Paper: 0.03 for reward models."""

    min_warmup_steps: NonNegativeInt = 0
    """Linear warm-up is at least this many steps (but never more than half of all). Paper: 5 for reward models."""


class TrainSection(Section):
    """Length and batches of a training run."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, if that comes first."""

    batch_size: PositiveInt = 64
    """Rows in one optimizer step, over all devices."""

    max_tokens_per_batch: PositiveInt = 4096
    """Tokens in one micro-batch, padding included: the memory knob. It never changes a step's result."""

    save_every: PositiveInt = 50
    """Optimizer steps between checkpoints."""

    compile: bool = False
    """Fuse norms, MLPs and adapters with torch.compile: half a minute at the first step, then less memory and, on a CPU
    with matrix units, about four fifths of the time for an SFT update with LoRA; without them next to nothing, and what
    PPO gains has not been measured. For long runs. A resumed run equals an uninterrupted one to rounding only."""


class DataSection(Section):
    """Training and validation rows."""

    train: Annotated[DataSources, Field(min_length=1)]
    """Files, names in ALIGN_DATA_DIR, Hub ids, or `toy:` names; one or a list."""

    valid: DataSources = []
    """The same, held out: for measuring only."""

    max_length: PositiveInt = 4096
    """Tokens in a row, prompt and response together. Paper: 4096."""

    overlong: Literal["truncate", "drop"] = "truncate"
    """Rows over `max_length`: drop the oldest turns of the history, or the row. The response is never cut: a row
    that is too long without its history is dropped and counted."""

    max_rows: PositiveInt | None = None
    """Use at most this many training rows, chosen by the seed."""

    max_valid_rows: PositiveInt | None = None
    """Use at most this many validation rows, chosen by the seed."""

    on_error: Literal["stop", "skip"] = "stop"
    """Bad rows: stop before training, or leave them out and count them."""


class PromptSection(Section):
    """Prompts to sample responses for."""

    prompts: Annotated[DataSources, Field(min_length=1)]
    """Files, names in ALIGN_DATA_DIR, Hub ids, or `toy:` names with prompt rows; one or a list."""

    not_in: DataSources = []
    """Files of rows of any kind: prompts that share a user message with one, but for case and spaces, are left out and
    counted. Name what is trained on, so that an evaluation is of unseen prompts."""

    max_prompts: PositiveInt | None = None
    """Use at most this many prompts, chosen by the seed."""

    safety_share: Fraction | None = None
    """Share of safety prompts among `max_prompts`; where one kind is too few, the other fills up. null: one half."""

    max_prompt_length: PositiveInt = 2048
    """Prompts over this many tokens lose the oldest turns of their history, or are dropped and counted."""

    on_error: Literal["stop", "skip"] = "stop"
    """Bad rows: stop, or leave them out and count them."""

    @model_validator(mode="after")
    def _share_is_of_a_number(self) -> PromptSection:
        if self.safety_share is not None and self.max_prompts is None:
            raise ValueError(
                "prompts.safety_share: a share of prompts.max_prompts, without which all prompts are used. Set both."
            )
        return self


class SamplingSection(Section):
    """How responses are drawn."""

    num_candidates: PositiveInt = 1
    """K, responses to each prompt."""

    temperature: NonNegativeFloat = 1.0
    """Logits are divided by this; 0 takes the most likely token."""

    top_p: PositiveFraction = 1.0
    """Sample from the smallest set of tokens with this probability; 1 is off."""

    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0 is off."""

    max_new_tokens: PositiveInt = 256
    """Tokens in a response at most, its end-of-turn token included."""

    max_rows: PositiveInt | None = None
    """Responses decoded side by side: the memory knob. More are faster, as long as there are prompts to fill them.
    null: 128; with the built-in engine on a GPU as many as 0.7 of the memory that is free when sampling begins has room
    for with prompts and responses of full length, at most 512."""

    engine: Literal["torch", "vllm"] = "torch"
    """`torch`, the built-in engine; `vllm`, in this process (pip install -e ".[vllm]"), for large models."""

    vllm: dict[str, Any] = {}
    """Arguments for vLLM's `LLM`, e.g. {tensor_parallel_size: 4, gpu_memory_utilization: 0.8}."""

    fall_back: bool = False
    """Sample with `torch` where vLLM cannot be imported or started; otherwise that is an error."""

    @property
    def is_whole(self) -> bool:
        """Whether responses are drawn from the model's own distribution at a temperature, nothing cut off."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


class RunSection(Section):
    """Where results go, and the seed."""

    dir: str
    """Run directory."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1), NotBool] = 0
    """Seed of everything random, below 2**32."""

    overwrite: bool = False
    """Empty `run.dir` first, of an earlier run and of whatever else is there."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: whatever accelerate finds."""

    num_threads: PositiveInt | None = None
    """CPU threads of one process; null leaves it to torch."""

    report_to: list[Tracker] = []
    """Experiment trackers of accelerate and transformers, e.g. [tensorboard]."""

    @field_validator("dir")
    @classmethod
    def _home_is_meant(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("run.dir: empty, which would be the working directory. Name a folder.")
        return str(expanded(value))


def _name_files(policies: dict[str, ModelSection]) -> dict[str, ModelSection]:
    for name in policies:
        if not name or set(name) & set("/\\\0"):
            raise ValueError(f"policies: {name!r} is no name for a file of answers. Use letters, digits, - and _.")
    return policies


# By name; every policy's answers go to a file of it.
Policies = Annotated[dict[str, ModelSection], Field(min_length=1), AfterValidator(_name_files)]


class StageConfig(Section):
    """Base of every stage's configuration."""

    stage: ClassVar[str]
    resume_may_change: ClassVar[frozenset[str]] = frozenset()
    """Settings that nothing on disk depends on while a run is unfinished: --resume may change them. A training's
    `train.max_tokens_per_batch` is none of them, since rounding would part it from the one that is resumed."""

    run: RunSection

    def input_names(self) -> Iterator[tuple[str, str, InputKind]]:
        """(key, name, kind) of every data set, model and chat template file the stage reads."""
        yield from named_inputs(type(self), self.model_dump())


def named_inputs(cls: type[BaseModel], values: Any, prefix: str = "") -> Iterator[tuple[str, str, InputKind]]:
    """(key, name, kind) of the inputs that settings name, which need not be valid otherwise."""
    if not isinstance(values, Mapping):
        return
    for name, info in cls.model_fields.items():
        value, key = values.get(name), f"{prefix}{name}"
        section = section_of(info.annotation)
        if section is ModelSection:
            many = get_origin(info.annotation) is dict and isinstance(value, Mapping)
            for entry_key, entry in {f"{key}.{k}": v for k, v in value.items()}.items() if many else [(key, value)]:
                path = entry.get("path") if isinstance(entry, Mapping) else entry
                if isinstance(path, str):
                    yield entry_key, path, "model"
                template = entry.get("chat_template") if isinstance(entry, Mapping) else None
                if isinstance(template, str) and template not in BUILT_IN_TEMPLATES:
                    yield f"{entry_key}.chat_template", template, "template"
        elif section is not None:
            yield from named_inputs(section, value, f"{key}.")
        elif any(isinstance(part, BeforeValidator) and part.func is as_list for part in info.metadata):
            sources = as_list(value)
            for source in sources if isinstance(sources, Sequence) else ():
                if isinstance(source, str):
                    yield key, source, "data"
