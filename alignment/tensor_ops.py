"""Masked reductions. A mask is True where the element counts; masked-out values never reach a result, NaN included."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Sum over the True entries."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Mean over the True entries; NaN where there are none."""
    return masked_sum(values, mask) / mask.sum()


def masked_var(values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Population variance (divisor n) over the True entries."""
    mean = masked_mean(values, mask)
    return masked_mean((values - mean) ** 2, mask)


def whiten(values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], *, eps: float = 1e-8) -> Float[Tensor, "*s"]:
    """Zero mean and unit variance (population) over the True entries; 0 at the others.

    Where all entries are equal the result is 0: `eps` is added to the variance under the root.
    """
    return standardize(values, mask, masked_mean(values, mask), masked_var(values, mask), eps=eps)


def standardize(
    values: Float[Tensor, "*s"],
    mask: Bool[Tensor, "*s"],
    mean: Float[Tensor, ""],
    var: Float[Tensor, ""],
    *,
    eps: float = 1e-8,
) -> Float[Tensor, "*s"]:
    """(values - mean) / sqrt(var + eps) at the True entries; 0 at the others."""
    scaled = (values - mean) * torch.rsqrt(var + eps)
    return torch.where(mask, scaled, torch.zeros_like(values))
