"""torch.compile for what of a decoder is neither attention nor a plain matrix product."""

from __future__ import annotations

import os
import shutil

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignment.errors import ConfigError
from alignment.logprobs import unwrap

_ATTENTION = ("self_attn", "self_attention", "attention", "attn")
# Kernels of one module: with and without gradients and adapters, several shapes of weights.
_MOST_KERNELS = 64


def compile_layers(model: nn.Module, device: torch.device | None = None) -> None:
    """Fuses, in place, norms, MLPs and the linear layers that carry adapters; attention itself stays as it is.

    These parts are the same in every layer and take any number of tokens, so they are compiled once, at the first step.
    The last layer is left alone, since there only some tokens are computed. Weights, their names and what is saved do
    not change; results change by rounding. `device`: where the model is going to run, if it is not there yet.

    Raises ConfigError where the model has no `layers`, or a CPU's kernels could not be built for want of a compiler.
    """
    inner = unwrap(model)
    layers = getattr(inner.get_decoder(), "layers", None)
    if not layers:
        raise ConfigError(f"train.compile: does not know where a {inner.config.model_type} has its layers. Set false.")
    compiler = os.environ.get("CXX", "g++")
    device = device or next(inner.parameters()).device
    if device.type == "cpu" and not shutil.which(compiler):
        raise ConfigError(
            f"train.compile: {compiler} builds a CPU's kernels and is not there. Install it or set false."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KERNELS)
    for layer in layers[:-1]:
        for name, part in layer.named_children():
            adapted = [module for module in part.children() if isinstance(module, BaseTunerLayer)]
            for module in adapted if name in _ATTENTION else [part]:
                module.compile(dynamic=True)
