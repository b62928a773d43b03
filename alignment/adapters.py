"""Adapters of fine-tuned models on the weights that all of them began from, so that these need be held only once.

A model fine-tuned with LoRA is saved merged, and beside it as an adapter in peft's format. Where the model that it was
trained from had an adapter itself, both are stacked: `W + B1 A1 + B2 A2 = W + [B1 B2] [A1; A2]`. So the adapters of an
SFT model, a reward model trained from it and a rejection-sampling model all belong on the same weights, and one minus
another turns the one model into the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from alignment.errors import ModelError
from alignment.low_rank import use_low_rank_linear
from alignment.weight_files import read_weight

# The name of the frozen adapter; the trained one has peft's own, "default".
FROZEN_ADAPTER = "frozen"
_FILE, _BACKBONE, _DECODER = "adapter_model.safetensors", "backbone", "decoder"

LowRank = tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]


@dataclass(frozen=True)
class Adapter:
    """What is added to a decoder's linear layers: (A, B) for W + B A, by the layer's name.

    Attributes:
        backbone: fingerprint of the weights that it belongs on.
        layers: float32 factors of each layer that is changed.
    """

    backbone: str
    layers: dict[str, LowRank]

    def __add__(self, other: Adapter) -> Adapter:
        """Both at once. Raises ValueError where they belong on different weights."""
        if self.backbone != other.backbone:
            raise ValueError("the adapters belong on different weights")
        layers = dict(self.layers)
        for layer, (first, second) in other.layers.items():
            if layer in layers:
                first, second = torch.cat([layers[layer][0], first]), torch.cat([layers[layer][1], second], dim=1)
            layers[layer] = (first, second)
        return Adapter(self.backbone, layers)

    def __neg__(self) -> Adapter:
        """What takes it away again."""
        return Adapter(self.backbone, {layer: (first, -second) for layer, (first, second) in self.layers.items()})

    def config(self, prefix: str = "", **options: object) -> LoraConfig:
        """peft's description of it, with names below `prefix`."""
        ranks = {f"{prefix}{layer}": len(first) for layer, (first, _) in self.layers.items()}
        most = max(ranks.values(), default=1)  # programs that read no patterns, as vLLM, take it for that of all
        others = {layer: rank for layer, rank in ranks.items() if rank != most}
        patterns = {"rank_pattern": others, "alpha_pattern": dict(others)}
        return LoraConfig(r=most, lora_alpha=most, target_modules=list(ranks), **patterns, **options)


def trained_adapter(model: PeftModel, weights: Mapping[str, Tensor], backbone: str) -> Adapter:
    """The adapter in training, taken from the model's whole weights by name, on a backbone with this fingerprint."""
    decoder = model.get_base_model().get_decoder()
    prefix, layers = _prefix(model, decoder), {}
    for name, scaling in _scalings(decoder).items():
        first, second = _factors(f"{prefix}{name}", weights)
        layers[name] = (first.float(), second.float() * scaling)
    return Adapter(backbone, layers)


def merged_weights(model: PeftModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 weights of the plain model, by its own names: each with what the adapter in training adds to it.

    `weights` are the model's whole ones by name. Those below adapters are taken out as they are merged, one by one, so
    that both sets are never held together.
    """
    scalings, prefix, merged = _scalings(model), _prefix(model, model.get_base_model()), {}
    for name in list(weights):
        if ".lora_" in name or ".original_module." in name:
            continue
        weight, layer = weights.pop(name).float(), name.removesuffix(".base_layer.weight")
        if layer in scalings:
            first, second = _factors(layer, weights)
            weight = weight + (second.float() @ first.float()) * scalings[layer]
        plain = name.removeprefix(prefix)
        merged[plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = weight
    return merged


def backbone_weights(model: PeftModel, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Of a model's whole weights those of its decoder, by the decoder's own names and in its order."""
    decoder = model.get_base_model().get_decoder()
    prefix = _prefix(model, decoder)
    return ((name, weights[f"{prefix}{name}"]) for name, _ in decoder.named_parameters())


def fingerprint(decoder: Iterable[tuple[str, Tensor]]) -> str:
    """Tells a decoder's weights apart, the same in float32 and in bfloat16: a hash of the beginning of each.

    Of a decoder with adapters on it, that of the weights below them.
    """
    digest = hashlib.sha256()
    for name, weight in decoder:
        if "lora_" not in name:
            name, values = name.replace(".base_layer", ""), weight.detach().flatten()[:1024].bfloat16()
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(values.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def write_adapter(adapter: Adapter, folder: Path, *, base: str, decoder: str, score: Tensor | None = None) -> None:
    """Writes a folder that peft loads on the model `base`; `score` is a reward model's head.

    `decoder` is what stands before the names of the decoder's layers in those of the model.
    """
    folder.mkdir()
    task = TaskType.CAUSAL_LM if score is None else TaskType.SEQ_CLS
    config = adapter.config(decoder, task_type=task, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    tensors = {} if score is None else {"base_model.model.score.weight": score.detach().float().cpu().contiguous()}
    for layer, factors in adapter.layers.items():
        for name, values in zip(("lora_A", "lora_B"), factors, strict=True):
            tensors[f"base_model.model.{decoder}{layer}.{name}.weight"] = values.contiguous()
    metadata = {_BACKBONE: adapter.backbone, _DECODER: decoder, "format": "pt"}
    save_file(tensors, folder / _FILE, metadata=metadata)


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter that `write_adapter` left in a folder; None where there is none.

    Raises ModelError where its file is damaged.
    """
    if not (folder / _FILE).is_file():
        return None
    factors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / _FILE, framework="pt") as file:
            metadata = file.metadata() or {}
            backbone, decoder = metadata.get(_BACKBONE), metadata.get(_DECODER, "model.")
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                if ".lora_" in key:
                    layer, name, _ = key.removeprefix(f"base_model.model.{decoder}").rsplit(".", 2)
                    factors.setdefault(layer, {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise ModelError(f"{folder / _FILE}: cannot be read ({error}). Copy the model's folder again.") from error
    if backbone is None:
        return None
    return Adapter(backbone, {layer: (parts["lora_A"], parts["lora_B"]) for layer, parts in factors.items()})


def attach_frozen(decoder: nn.Module, adapter: Adapter) -> None:
    """Puts an adapter on a decoder, in place, frozen and in the type of its weights."""
    if not adapter.layers:
        return
    inject_adapter_in_model(use_low_rank_linear(adapter.config()), decoder, adapter_name=FROZEN_ADAPTER)
    for layer, factors in adapter.layers.items():
        module = decoder.get_submodule(layer)
        for part, values in zip((module.lora_A, module.lora_B), factors, strict=True):
            part[FROZEN_ADAPTER].weight = nn.Parameter(values.to(module.base_layer.weight), requires_grad=False)


@torch.no_grad()
def take_off(model: nn.Module, adapter: Adapter, files: Mapping[str, Path]) -> None:
    """Gives a model that was loaded with an adapter merged the weights below it, in place and in their type.

    The difference is taken in the precision of the files that each weight is in, by its name there: a model of text
    and images has others in memory.
    """
    decoder = model.get_decoder()
    prefix = _prefix(model, decoder)
    for layer, (first, second) in adapter.layers.items():
        weight = decoder.get_parameter(f"{layer}.weight")
        [name] = revert_weight_conversion(model, {f"{prefix}{layer}.weight": weight})
        weight.copy_(read_weight(files[name], name).float() - second @ first)


def keep_frozen_active(model: nn.Module) -> None:
    """After a second adapter has been added for training: both are used, only that one is trained."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and FROZEN_ADAPTER in module.lora_A:
            module.set_adapter([FROZEN_ADAPTER, *(name for name in module.lora_A if name != FROZEN_ADAPTER)])
            for part in (module.lora_A, module.lora_B):
                part[FROZEN_ADAPTER].requires_grad_(False)


def set_decoder(model: nn.Module, decoder: nn.Module) -> None:
    """Gives a Hugging Face model another decoder of the same shape; their own `set_decoder` does nothing to a Llama."""
    old = model.get_decoder()
    parent, _, name = next(name for name, module in model.named_modules() if module is old).rpartition(".")
    setattr(model.get_submodule(parent), name, decoder)


def linear_layers(decoder: nn.Module) -> Iterator[str]:
    """Names of the linear layers, those with adapters on them included, those inside of adapters not."""
    inside: str | None = None
    for name, module in decoder.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, LoraLayer):
            inside = f"{name}."
        if isinstance(module, nn.Linear | LoraLayer):
            yield name


def decoder_prefix(model: nn.Module) -> str:
    """What stands before the names of the decoder's weights in those of a plain model: `model.` in most."""
    return _prefix(model, model.get_decoder())


def _prefix(model: nn.Module, part: nn.Module) -> str:
    """What stands before the names of a part's weights in those of the whole model."""
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""


def _scalings(model: nn.Module) -> dict[str, float]:
    """By what the adapter in training is multiplied in each layer that it changes."""
    return {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }


def _factors(layer: str, weights: Mapping[str, Tensor]) -> LowRank:
    """A and B of the adapter in training, from weights by name."""
    return weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
