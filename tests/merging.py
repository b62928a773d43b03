"""Models with their adapters merged, and what is left of a small change where weights are rounded."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn


def merged_copy(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a model, or of what peft makes of it, with weights in `dtype`."""
    twin = copy.deepcopy(model)
    twin = twin.merge_and_unload() if isinstance(twin, PeftModel) else twin
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    return twin.eval()


def small_change(model: nn.Module, size: float) -> None:
    """Gives every second factor of the adapters entries of one size and a random sign, as Adam's first step does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator).sign())


def share_kept(model: nn.Module, before: nn.Module, after: nn.Module) -> float:
    """How much of the change of a chat model's logits from `before` to `after` a third one has: 0 for `before`, 1."""
    first, last, found = (logits_of(each) for each in (before, after, model))
    wanted = last - first
    return float(((found - first) * wanted).sum() / wanted.square().sum())


@torch.no_grad()
def logits_of(model: nn.Module) -> Float[Tensor, "2 20 V"]:
    """Logits of some tokens, computed in float32 from the weights as they are."""
    ids = torch.arange(5, 45).view(2, 20)
    return copy.deepcopy(model).float()(input_ids=ids).logits
