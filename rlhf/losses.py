"""Clipped losses of PPO, token by token (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def clipped_policy_loss(
    logprobs: Float[Tensor, "*s"],
    old_logprobs: Float[Tensor, "*s"],
    advantages: Float[Tensor, "*s"],
    *,
    clip_range: float,
) -> Float[Tensor, "*s"]:
    """PPO's Eq. 7, negated: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) with rho = exp(logprobs - old_logprobs).

    Args:
        logprobs: of the sampled tokens under the policy in training, with gradient.
        old_logprobs: under the policy that sampled them.
        advantages: of the tokens; a constant.
        clip_range: eps. Paper: 0.2.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clipped_value_loss(
    values: Float[Tensor, "*s"],
    old_values: Float[Tensor, "*s"],
    returns: Float[Tensor, "*s"],
    *,
    clip_range: float,
) -> Float[Tensor, "*s"]:
    """Half the squared error, or that of the value kept within `clip_range` of the old one, whichever is larger.

    Our choice: the paper does not give its value loss; this is the form of PPO's reference implementation.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def is_clipped(
    logprobs: Float[Tensor, "*s"],
    old_logprobs: Float[Tensor, "*s"],
    advantages: Float[Tensor, "*s"],
    *,
    clip_range: float,
) -> Bool[Tensor, "*s"]:
    """Where the clip cuts off the gradient: the ratio is outside the range on the side the advantage favours."""
    ratio = torch.exp(logprobs - old_logprobs)
    too_high = (ratio > 1 + clip_range) & (advantages > 0)
    too_low = (ratio < 1 - clip_range) & (advantages < 0)
    return too_high | too_low
