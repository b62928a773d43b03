"""Linear layers with adapters, `x W' + x [A1; A2]' [B1 B2]'`, in two products more than the layer alone has.

peft computes the same, but under autocast it turns inputs of bfloat16 into float32 and back, keeps a copy of them for
every layer, and scales and adds what each adapter gives by operations of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


class LowRankLinear(Linear):
    """peft's layer for `nn.Linear`, by its own names and with its other methods."""

    _held: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Float[Tensor, "*N I"], *args: Any, **kwargs: Any) -> Float[Tensor, "*N O"]:
        """As peft's: of autocast's type where that is on, else of the input's."""
        names = self._used()
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain(names):
            return super().forward(x, *args, **kwargs)
        dtype = _autocast_dtype(x.device.type) or x.dtype
        is_held = self._held is not None and self._held[0].dtype == dtype
        first, second = self._held if is_held else self._factors(names, dtype)
        weight, bias = self.base_layer.weight.to(dtype), self.base_layer.bias
        flat = _LowRankLinear.apply(x.to(dtype).reshape(-1, x.shape[-1]), weight, first, second)
        y = flat.view(*x.shape[:-1], flat.shape[-1])
        return y if bias is None else y + bias.to(dtype)

    def _used(self) -> list[str]:
        """The names of the adapters that are active and in this layer."""
        return [name for name in self.active_adapters if name in self.lora_A]

    def _factors(self, names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[A1; A2] and [B1 B2]."""
        first = torch.cat([self.lora_A[name].weight.to(dtype) for name in names])
        second = torch.cat([(self.lora_B[name].weight * self.scaling[name]).to(dtype) for name in names], dim=1)
        return first, second

    def _is_plain(self, names: list[str]) -> bool:
        """Whether nothing but the two factors of each adapter changes the frozen weight."""
        return (
            bool(names)
            and type(self.base_layer) is nn.Linear  # what is derived from it, such as quantized layers, has its own way
            and not self.base_layer.weight.requires_grad
            and not self.lora_variant
            and all(isinstance(self.lora_dropout[name], nn.Identity) or not self.training for name in names)
            and not any(self.lora_bias[name] for name in names)
        )


@contextmanager
def held_factors(model: nn.Module) -> Iterator[None]:
    """Puts the factors of all adapters together once instead of at every call: for many calls on the same weights.

    They are of the frozen weights' type, which is the input's where there is no autocast; gradients do not reach them.
    Layers that FSDP has split do without.
    """
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    with torch.no_grad():
        for layer in layers:
            # FSDP gathers a layer's weights for a pass of it and would not gather these.
            if (names := layer._used()) and not isinstance(layer.base_layer.weight, DTensor):
                layer._held = layer._factors(names, layer.base_layer.weight.dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer._held = None


def use_low_rank_linear(config: LoraConfig) -> LoraConfig:
    """The same description, of which peft makes our layers."""
    config._register_custom_module({nn.Linear: LowRankLinear})
    return config


def _autocast_dtype(device: str) -> torch.dtype | None:
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


class _LowRankLinear(torch.autograd.Function):
    """y = x W' + (x A') B', where W is frozen and (x A') of as few numbers a token as the rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], first: Tensor, second: Tensor
    ) -> Float[Tensor, "N O"]:
        low = x @ first.T
        ctx.save_for_backward(x, weight, first, second, low)
        return torch.addmm(x @ weight.T, low, second.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "N O"]) -> tuple[Tensor | None, ...]:
        x, weight, first, second, low = ctx.saved_tensors
        grad_low = grad @ second
        of_x = torch.addmm(grad @ weight, grad_low, first) if ctx.needs_input_grad[0] else None
        of_first = grad_low.T @ x if ctx.needs_input_grad[2] else None
        of_second = grad.T @ low if ctx.needs_input_grad[3] else None
        return of_x, None, of_first, of_second
