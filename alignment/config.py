"""Configuration: the pieces stages share, and a loader that reports every problem of a file in one message."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alignment.errors import AlignError, ConfigError
from alignment.sources import BUILT_IN_TEMPLATES, find_data, find_model, find_template


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


DataSources = Annotated[list[str], BeforeValidator(_as_list)]
InputKind = Literal["data", "model", "template"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Those that transformers and accelerate both know.
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if _has_bool_for_number(cls.model_fields[info.field_name].annotation, value):
            raise PydanticCustomError("bool_for_number", "Input should be a number, not true or false (YAML's yes, no)")
        return value


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

    dropout: Fraction = 0.0
    """Dropout on the adapter's input, a probability."""

    last_layers: PositiveInt | None = None
    """Adapt only this many layers, counted from the last: the backward pass ends there. null adapts all."""


class OptimSection(Section):
    """AdamW and its schedule (Llama 2 Sec. 3.1, 3.2.2, 3.2.3)."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
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
    """Fuse norms, MLPs and adapters with torch.compile: half a minute at the first step, then an SFT update with LoRA
    takes about three quarters of the time; a PPO update with LoRA gains nothing. For long runs. A resumed run equals an
    uninterrupted one to rounding only."""


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

    max_prompts: PositiveInt | None = None
    """Use at most this many prompts, chosen by the seed."""

    safety_share: Fraction = 0.5
    """Share of safety prompts among `max_prompts`; where one kind is too few, the other fills up."""

    max_prompt_length: PositiveInt = 2048
    """Prompts over this many tokens lose the oldest turns of their history, or are dropped and counted."""

    on_error: Literal["stop", "skip"] = "stop"
    """Bad rows: stop, or leave them out and count them."""


class SamplingSection(Section):
    """How responses are drawn."""

    num_candidates: PositiveInt = 1
    """K, responses to each prompt."""

    temperature: NonNegativeFloat = 1.0
    """Logits are divided by this; 0 takes the most likely token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
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


class RunSection(Section):
    """Where results go, and the seed."""

    dir: str
    """Run directory."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random, below 2**32."""

    overwrite: bool = False
    """Throw away what an earlier run left in `run.dir`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: whatever accelerate finds."""

    num_threads: PositiveInt | None = None
    """CPU threads of one process; null leaves it to torch."""

    report_to: list[Tracker] = []
    """Experiment trackers of accelerate and transformers, e.g. [tensorboard]."""

    @field_validator("dir")
    @classmethod
    def _home_is_meant(cls, value: str) -> str:
        return os.path.expanduser(value)


def policies_name_files(policies: dict[str, ModelSection]) -> dict[str, ModelSection]:
    """A field's validator: every policy's answers go to a file of its name."""
    for name in policies:
        if not name or set(name) & set("/\\\0"):
            raise ValueError(f"policies: {name!r} is no name for a file of answers. Use letters, digits, - and _.")
    return policies


class StageConfig(Section):
    """Base of every stage's configuration."""

    stage: ClassVar[str]

    run: RunSection

    def input_names(self) -> Iterator[tuple[str, str, InputKind]]:
        """(key, name, kind) of every data set, model and chat template file the stage reads."""
        yield from _named_inputs(type(self), self.model_dump())


Config = TypeVar("Config", bound=StageConfig)
SectionT = TypeVar("SectionT", bound=Section)


def load_config(
    cls: type[Config],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    check_inputs: bool = True,
) -> Config:
    """A stage's configuration from a YAML file and `key=value` arguments, which win.

    Raises ConfigError with all problems at once: unknown keys, wrong types, impossible values, missing files.
    """
    values = read_yaml(path) if path is not None else {}
    where = str(path) if path is not None else "command line"
    return build_config(cls, merge(values, parse_overrides(overrides)), where, check_inputs=check_inputs)


def build_config(
    cls: type[Config],
    values: Mapping[str, Any],
    where: str,
    *,
    check_inputs: bool = True,
    made_earlier: Sequence[str] = (),
) -> Config:
    """A validated configuration; inputs below the folders of `made_earlier` are taken for granted.

    Raises ConfigError, each line opening with `where`.
    """
    config, problems = _validate(cls, values)
    if check_inputs:
        problems += _input_problems(cls, values, made_earlier)
    if config is None or problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def build_section(cls: type[SectionT], values: Mapping[str, Any], where: str = "command line") -> SectionT:
    """A validated group of settings. Raises ConfigError with all problems."""
    section, problems = _validate(cls, values)
    if section is None:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return section


def missing_packages(config: StageConfig) -> Iterator[str]:
    """What a stage would be told hours later: settings that need a package which is not installed here."""
    sampling = getattr(config, "sampling", None)
    if sampling is not None and sampling.engine == "vllm" and not sampling.fall_back and not _is_installed("vllm"):
        yield (
            'sampling.engine: vllm is not installed here. Run pip install -e ".[vllm]", or set sampling.engine=torch '
            "or sampling.fall_back=true."
        )
    for name in config.run.report_to:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(_is_installed, packages)):
            yield f"run.report_to: {name} is not installed here. Run pip install {name}, or leave it out."


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _RepeatedKey(yaml.constructor.ConstructorError):
    """A key that stands twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """YAML without dates, which no setting is, and with an error where of two values of a key the last would count."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """The mapping as it is written, before others are merged into it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    problem = f'"{key.value}" is there twice in one mapping: keep one'
                    raise _RepeatedKey(None, None, problem, key.start_mark)
                seen.add(name)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file is missing or not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start} ({byte:#04x}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}:{mark.line + 1}: not YAML: {problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}. It must hold `key: value` lines.")
    return values


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as nested mappings; values are read as YAML. Raises ConfigError on a missing `=`."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f'command line: "{argument}" is not key=value. Write for example train.epochs=2.')
        try:
            value = yaml.load(text, _Loader) if text else ""
        except _RepeatedKey as error:
            raise ConfigError(f"command line: {key}: {error.problem}.") from error
        except (yaml.YAMLError, ValueError):
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping. A string beside a model's keys is the model's `path`.

    Next to other keys (margins by rating, weights by source) whichever came last replaces the other.
    """
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(value, Mapping):
            before = {"path": before} if isinstance(before, str) and _are_of_a_model(value) else before
            value = merge(before if isinstance(before, Mapping) else {}, value)
        elif isinstance(value, str) and isinstance(before, Mapping) and _are_of_a_model(before):
            value = {**before, "path": value}
        merged[key] = value
    return merged


def _are_of_a_model(keys: Iterable[Any]) -> bool:
    """Whether a key is a model's, or is so nearly: it is to be reported as misspelt, not to replace the model."""
    return any(difflib.get_close_matches(str(key), ModelSection.model_fields, cutoff=0.75) for key in keys)


def to_yaml(config: StageConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting, nested sections flattened with dots: the help text."""
    for name, info in cls.model_fields.items():
        section = _section_of(info.annotation)
        if section is not None and get_origin(info.annotation) is not dict:
            yield from describe(section, f"{prefix}{name}.")
            continue
        required = info.is_required()
        default = "required" if required else _show_default(info.get_default(call_default_factory=True))
        meaning = " ".join(_description(cls, name).split())
        yield f"{prefix}{name}", _show_type(info.annotation), default, meaning


def _description(cls: type[BaseModel], name: str) -> str:
    """The docstring of a setting, or that of the base class whose default it changes."""
    sections = (base for base in cls.__mro__ if issubclass(base, BaseModel) and name in base.model_fields)
    return next((text for base in sections if (text := base.model_fields[name].description)), "")


def _validate(cls: type[SectionT], values: Mapping[str, Any]) -> tuple[SectionT | None, list[str]]:
    """The configuration, or None, with every problem found.

    Rules that look at several keys run only once each key is valid, so a wrong key is taken out and the rest
    validated again, until nothing new turns up: one round shows a user everything.
    """
    problems: dict[str, None] = {}
    removed: set[tuple[Any, ...]] = set()
    trial: Any = values
    for attempt in range(10):
        try:
            config = cls.model_validate(trial)
        except ValidationError as error:
            wrong: set[tuple[Any, ...]] = set()
            fresh = False
            for item in error.errors():
                location = tuple(takewhile(lambda part: not _is_branch(part), item["loc"]))
                if _is_of_another_branch(item) or any(location[: len(path)] == path for path in removed):
                    continue
                fresh = True
                problems[_explain(cls, item)] = None
                if location and item["type"] != "missing":
                    trial = _without(trial, location)
                    wrong.add(location)
            if not fresh:
                return None, list(problems)
            removed |= wrong
        else:
            return (config if attempt == 0 else None), list(problems)
    return None, list(problems)


def _explain(cls: type[BaseModel], item: Mapping[str, Any]) -> str:
    location, kind = [part for part in item["loc"] if not _is_branch(part) and part != "[key]"], item["type"]
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        parent = _section_at(cls, location[:-1])
        known = list(parent.model_fields) if parent else []
        guess = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f'Did you mean "{guess[0]}"?' if guess else f"Known here: {', '.join(known) or 'nothing'}."
        return f"{key}: unknown key. {hint}"
    if kind == "missing":
        return f"{key}: missing. Add it: it has no default."
    message = item["msg"].removeprefix("Value error, ")
    if not location or kind == "value_error":  # our own rules name their keys
        return message
    return f"{key}: {message[0].lower()}{message[1:]}, found {item['input']!r}."


def _is_branch(part: Any) -> bool:
    """Whether a part of a location is pydantic's name for a branch of `Literal[...] | dict[...]`."""
    return isinstance(part, str) and re.match(r"(literal|dict)\[", part) is not None


def _is_of_another_branch(item: Mapping[str, Any]) -> bool:
    """Whether an error is that of a name where a mapping was given, or of a mapping where a name was."""
    is_mapping = isinstance(item["input"], Mapping)
    wrong_kind = item["type"] == ("literal_error" if is_mapping else "dict_type")
    return wrong_kind and _is_branch(item["loc"][-1])


def _input_problems(cls: type[BaseModel], values: Any, made_earlier: Sequence[str]) -> list[str]:
    """What is missing among the data sets and files that a configuration names, valid or not otherwise."""
    find = {"data": find_data, "model": find_model, "template": find_template}
    problems = []
    for key, name, kind in _named_inputs(cls, values):
        if any(Path(name) == Path(folder) or Path(folder) in Path(name).parents for folder in made_earlier):
            continue
        try:
            find[kind](name)
        except AlignError as error:
            problems.append(f"{key}: {error}")
    return problems


def _named_inputs(cls: type[BaseModel], values: Any, prefix: str = "") -> Iterator[tuple[str, str, InputKind]]:
    if not isinstance(values, Mapping):
        return
    for name, info in cls.model_fields.items():
        value, key = values.get(name), f"{prefix}{name}"
        section = _section_of(info.annotation)
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
            yield from _named_inputs(section, value, f"{key}.")
        elif any(isinstance(part, BeforeValidator) and part.func is _as_list for part in info.metadata):
            for source in _as_list(value) or []:
                if isinstance(source, str):
                    yield key, source, "data"


def _has_bool_for_number(annotation: Any, value: Any) -> bool:
    """Whether true or false stands where a number is meant: pydantic would take it for 1 or 0."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _has_bool_for_number(parts[0], value)
    if origin in (typing.Union, types.UnionType):
        return bool not in parts and any(_has_bool_for_number(part, value) for part in parts)
    if isinstance(value, bool):
        return annotation in (int, float)
    if origin is dict and isinstance(value, Mapping):
        return any(_has_bool_for_number(parts[1], entry) for entry in value.values())
    if origin in (list, tuple) and isinstance(value, list | tuple):
        each = parts * len(value) if origin is list else parts
        return any(map(_has_bool_for_number, each, value))
    return False


def _without(values: Any, location: tuple[Any, ...]) -> Any:
    if not location:
        return values
    head, *rest = location
    if isinstance(values, Mapping) and head in values:
        if not rest:
            return {key: value for key, value in values.items() if key != head}
        return {**values, head: _without(values[head], tuple(rest))}
    if isinstance(values, list) and isinstance(head, int) and head < len(values):
        return [value for index, value in enumerate(values) if index != head]
    return values


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (typing.Union, types.UnionType, dict):
        return next((found for part in get_args(annotation) if (found := _section_of(part))), None)
    return None


def _section_at(cls: type[BaseModel], location: Sequence[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = cls
    for part in location:
        if section is None or part not in section.model_fields:
            return None
        section = _section_of(section.model_fields[part].annotation)
    return section


def _show_type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if origin is Annotated:
        return _show_type(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if part is type(None) else _show_type(part) for part in get_args(annotation))
    if origin is not None:
        inner = ", ".join(_show_type(part) for part in get_args(annotation))
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _show_default(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        value = list(value)
    return str(value)
