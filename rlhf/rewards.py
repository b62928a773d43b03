"""From one reward a response to one a token: the KL penalty at every token, the whitened reward at the last."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def per_token_rewards(
    rewards: Float[Tensor, " B"],
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> Float[Tensor, "B T"]:
    """Rewards whose sum over a response is R(g|p) of Llama 2 Sec. 3.2.3, with D_KL estimated on the sample.

    r_t = -beta (log pi(g_t) - log pi_0(g_t)), plus the whitened gated reward at the response's last token.

    Args:
        rewards: (B,) R~_c, whitened before the KL term is added, as the paper has it.
        logprobs: (B, T) of the sampled tokens under the policy that sampled them.
        ref_logprobs: (B, T) of the same tokens under the reference policy.
        mask: (B, T) True on response tokens; every row has at least one.
        beta: KL coefficient. Paper: 0.01 (7B, 13B), 0.005 (34B, 70B).
    """
    penalty = -beta * torch.where(mask, logprobs - ref_logprobs, torch.zeros_like(logprobs))
    last = last_token(mask)
    return penalty.index_put((torch.arange(len(mask), device=mask.device), last), rewards, accumulate=True)


def last_token(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Column of each row's last True entry."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, torch.full_like(columns, -1)).max(dim=1).values


def kl_k1(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log pi - log pi_0 at sampled tokens: its mean is the KL divergence (Schulman 2020, estimator k1)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """exp(d) - 1 - d with d = log pi_0 - log pi: the same mean, never negative (Schulman 2020, estimator k3)."""
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference
