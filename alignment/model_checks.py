"""What a model that is loaded must be: whole, and one that our masks and log-probabilities are right for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignment.errors import ModelError

# Layers that attend to what our masks show them and to nothing else, by the names in `layer_types`.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# What some models do to their logits, by its name in the configuration.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_layers(cls: type, config: PreTrainedConfig, name: str) -> None:
    """Raises ModelError where a layer would mix tokens that our masks keep apart; `cls` is an Auto class."""
    model_class = cls._model_mapping.get(type(config), None)
    if model_class is None:
        return  # from_pretrained says so
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if model_class._is_stateful or kinds - _ATTENTION_LAYERS:
        raise ModelError(
            f"{name}: a {config.model_type} has layers other than full or sliding-window attention. Masks do not stop "
            "what these do, and responses in a row would read each other. Take a model of another family."
        )
    if not model_class._can_set_attn_implementation():
        raise ModelError(
            f"{name}: the attention of a {config.model_type} cannot take our masks: transformers cannot exchange it "
            "(AttentionInterface). Take a model of another family."
        )


def check_logits(model: PreTrainedModel, path: str) -> None:
    """Raises ModelError where logits are not just `hidden @ weight.T`, as `response_logprobs` computes them."""
    config = model.config.get_text_config(decoder=True)
    found = [name for name in _LOGIT_SETTINGS if getattr(config, name, None) not in (None, 1)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found.append("a bias in its output layer")
    if found:
        raise ModelError(
            f"{path}: a {config.model_type} with {' and '.join(found)}, which is not supported: its log-probabilities "
            "would be computed without, and training on them be wrong. Take a model of another family."
        )


class Reach(NamedTuple):
    """Up to how many tokens of a dialogue a model computes what ours reckons with, and why no more."""

    tokens: int
    why: str


def reach_of(config: PreTrainedConfig) -> Reach | None:
    """None where nothing but the context limits a dialogue."""
    config = config.get_text_config(decoder=True)
    found = []
    if window := getattr(config, "sliding_window", None):
        found.append(Reach(window, f"its attention sees {window} tokens back"))
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in (rope, *(each for each in rope.values() if isinstance(each, Mapping))):  # some have one a layer type
        if entry.get("rope_type") == "longrope":
            tokens = entry["original_max_position_embeddings"]
            found.append(Reach(tokens, f"one of more than {tokens} tokens changes the positions of all beside it"))
    return min(found, default=None)


def check_vocabulary(embeddings: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raises ModelError where the tokenizer has tokens that the model has no embedding for."""
    if (rows := embeddings.weight.shape[0]) < len(tokenizer):
        raise ModelError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding only {rows}. Put the tokenizer "
            "beside it that it was trained with, or enlarge it (transformers' resize_token_embeddings)."
        )


def check_complete(model: PreTrainedModel, missing: Collection[str], name: str) -> None:
    """Raises ModelError where a weight is not in the files; but a chat model has no score, which starts fresh."""
    if type(model).__name__ not in (model.config.architectures or []):
        missing = [weight for weight in missing if not weight.startswith("score.")]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(f"{name}: {len(missing)} of its weights are in none of its files ({some}). Copy it again.")
