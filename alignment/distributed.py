"""Sums, means and whitening over the processes of a run; with one process, over its own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from alignment.tensor_ops import masked_sum, whiten


def mean_over_processes(values: Mapping[str, float | Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The mean of each figure over the processes, which all give the same names in the same order."""
    stacked = torch.tensor([float(value) for value in values.values()], device=accelerator.device)
    return dict(zip(values, accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))


def whiten_over_processes(
    values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], accelerator: Accelerator, *, eps: float = 1e-8
) -> Float[Tensor, "*s"]:
    """`tensor_ops.whiten` with mean and variance over the True entries of all processes, whose shapes may differ."""
    if accelerator.num_processes == 1:
        return whiten(values, mask, eps=eps)
    count = accelerator.reduce(mask.sum().to(values.dtype), reduction="sum")
    mean = accelerator.reduce(masked_sum(values, mask), reduction="sum") / count
    var = accelerator.reduce(masked_sum((values - mean) ** 2, mask), reduction="sum") / count
    scaled = (values - mean) * torch.rsqrt(var + eps)
    return torch.where(mask, scaled, torch.zeros_like(values))


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in their order; needs a process group."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
