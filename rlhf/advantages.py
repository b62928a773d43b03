"""Generalised advantage estimation on padded responses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Advantages(NamedTuple):
    """`advantages` (B, T), and `returns` (B, T), the critic's targets; both 0 outside the mask."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Advantages:
    """Schulman et al. 2015 (arXiv:1506.02438), Eq. 16, backwards over each response.

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}

    with V and A zero after the last token of a response: a response is an episode.

    Args:
        rewards: (B, T) per-token rewards.
        values: (B, T) the critic's value before each token.
        mask: (B, T) True on response tokens, which are consecutive.
        gamma: discount. Our choice: 1, for episodes of bounded length.
        lam: 1 is the Monte-Carlo return, 0 the one-step error. Our choice: 0.95.
    """
    zeros = torch.zeros_like(values)
    rewards, values = torch.where(mask, rewards, zeros), torch.where(mask, values, zeros)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = zeros[:, 0] if values.shape[1] else values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Past the end of a response everything stays 0, so that its last token sees no future.
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, zeros[:, t])
        next_advantage, next_value = advantages[:, t], values[:, t]
    return Advantages(advantages, torch.where(mask, advantages + values, zeros))
