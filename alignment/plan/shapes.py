"""Models by their shapes alone: architectures by name, and modules on the meta device that hold nothing."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from alignment.config import LoraSection
from alignment.errors import ModelError
from alignment.model_folders import model_folder
from alignment.models import add_lora, float32_head, recompute_activations
from alignment.tree_attention import TREE_ATTENTION

Head = Literal["lm", "score"]
DeviceKind = Literal["cpu", "gpu"]
NO_LORA = LoraSection()

_LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "float16"}
_LLAMA_3 = {
    **{"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "dtype": "bfloat16"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


# Published shapes, as in each model's config.json on the Hugging Face Hub (meta-llama/Llama-2-7b-hf, -13b-hf, -70b-hf,
# meta-llama/Meta-Llama-3-8B, -70B, HuggingFaceTB/SmolLM2-135M-Instruct). A test holds them against the published
# numbers of parameters.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {**_LLAMA_2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA_2, **_sizes(5120, 13824, 40, 40, 40)},
    "llama-2-70b": {**_LLAMA_2, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3-8b": {**_LLAMA_3, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3-70b": {**_LLAMA_3, **_sizes(8192, 28672, 80, 64, 8)},
    "smollm2-135m-instruct": {
        **{"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        "dtype": "float32",
        **_sizes(576, 1536, 30, 9, 3),
    },
}


def preset_of(name: str) -> str | None:
    """The preset that a name stands for: its own, or that of a Hub id of the same shape."""
    short = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    short = re.sub(r"-(chat|instruct|hf)\b", "", short) if short not in PRESETS else short
    return short if short in PRESETS else None


def model_config(name: str) -> PreTrainedConfig:
    """The architecture of a model by a preset's name, a folder, a run directory or a Hub id.

    Raises ModelError where there is none, or the Hub is out of reach.
    """
    if preset := preset_of(name):
        return AutoConfig.for_model(**PRESETS[preset])
    folder = model_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: its config.json cannot be read ({str(error).splitlines()[0]}). Planning needs no weights: name a "
            f"folder that has the model's config.json, or a shape that is built in: {', '.join(PRESETS)}."
        ) from error
    if config.get_text_config(decoder=True) is not config:
        raise ModelError(f"{name}: a {config.model_type} of text and images cannot be planned.")
    return config


@dataclass(frozen=True)
class ModelSpec:
    """A model as a stage holds it.

    Attributes:
        config: its architecture, JSON.
        head: an output matrix, or a scalar score.
        dtype: of frozen weights, or of all where `lora.r` is 0; adapters in training and score heads are float32.
        compute: the type of the arithmetic where it is another, as in full fine-tuning; a trained model is autocast.
        lora: adapters in training; `r = 0` for none.
        is_trained: whether anything of it is.
        checkpointing: whether its layers are computed again in the backward pass.
    """

    config: str
    head: Head = "lm"
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    lora: LoraSection = NO_LORA
    is_trained: bool = False
    checkpointing: bool = False

    @property
    def shape(self) -> PreTrainedConfig:
        """The architecture."""
        return AutoConfig.for_model(**json.loads(self.config))

    @property
    def arithmetic(self) -> torch.dtype:
        """What matrix products compute in."""
        return self.compute or self.dtype

    @property
    def adapted_layers(self) -> int:
        """Layers through which a backward pass goes: all, but for LoRA on the upper ones alone, unless checkpointing,
        which wants a gradient of every layer's input.
        """
        layers = self.shape.num_hidden_layers
        return min(self.lora.last_layers or layers, layers) if self.lora.r and not self.checkpointing else layers


def spec_of(name: str, **options: Any) -> ModelSpec:
    """The model of that name, held as `options` say. Raises ModelError as `model_config` does."""
    return ModelSpec(json.dumps(model_config(name).to_dict(), sort_keys=True), **options)


def meta_model(spec: ModelSpec, *, layers: int | None = None, device: DeviceKind = "cpu") -> nn.Module:
    """The modules on the meta device, with `layers` layers if given, attending as on such a device."""
    config = spec.shape
    lora = spec.lora
    if layers is not None:
        below = min(config.num_hidden_layers - spec.adapted_layers, 1)
        config.num_hidden_layers = below + layers
        lora = lora.model_copy(update={"last_layers": layers if below else None})
    config.pad_token_id = 0
    attention = TREE_ATTENTION if device == "cpu" else "sdpa"
    with torch.device("meta"):
        if spec.head == "lm":
            model = AutoModelForCausalLM.from_config(config, dtype=spec.dtype, attn_implementation=attention)
        else:
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=spec.dtype, attn_implementation=attention
            )
            float32_head(model)
        if spec.is_trained and spec.checkpointing:
            recompute_activations(model)
        if not spec.is_trained:
            return model.requires_grad_(False).eval()
        return add_lora(model, lora, is_reward_model=spec.head == "score", seed=0).train()


def fake_model(spec: ModelSpec, mode: FakeTensorMode, *, layers: int, device: DeviceKind) -> nn.Module:
    """The same as tensors that claim to be on the CPU, so that autocast and our attention treat them as real ones."""
    model = meta_model(spec, layers=layers, device=device)
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_parameter else twin
        return made[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]  # kept alive, so that no two have the same id
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table |= {name: fake(tensor) for name, tensor in table.items() if tensor is not None}
    assert len(made) == len(originals)
    return model


@dataclass(frozen=True)
class Weights:
    """What a model's parameters come to.

    Attributes:
        base: bytes of all but what LoRA adds.
        lora: bytes of what LoRA adds, a reward model's trained head included.
        parameters: all, those of LoRA left out.
        trained: parameters that are trained; gradients and AdamW's two moments are float32, as they are.
        largest: parameters of the largest tensor.
        linear: (sum of inputs and outputs) of the linear layers: what a rank of an adapter adds.
    """

    base: int
    lora: int
    parameters: int
    trained: int
    largest: int
    linear: int


@functools.cache
def weights(spec: ModelSpec) -> Weights:
    """Counted on the meta device."""
    model = meta_model(spec)
    lora = base = parameters = 0
    for parameter in model.parameters():
        if spec.lora.r and parameter.requires_grad:
            lora += parameter.nbytes
        else:
            base += parameter.nbytes
            parameters += parameter.numel()
    plain = meta_model(ModelSpec(spec.config, spec.head))
    linear = [m for m in plain.get_decoder().modules() if isinstance(m, nn.Linear)]
    return Weights(
        base=base,
        lora=lora,
        parameters=parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max(p.numel() for p in model.parameters()),
        linear=sum(m.in_features + m.out_features for m in linear),
    )
