"""The safety gate: which of two reward models speaks for a response (Llama 2 Sec. 3.2.3)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Llama 2 Sec. 3.2.3: precision 0.89 and recall 0.55 for unsafe responses on Meta's safety test set.
SAFETY_THRESHOLD = 0.15


def safety_gate(
    safety_scores: Float[Tensor, " B"],
    is_safety: Bool[Tensor, " B"],
    *,
    threshold: float = SAFETY_THRESHOLD,
) -> Bool[Tensor, " B"]:
    """True where the safety model decides: safety prompts, and responses with P(safe) below the threshold.

    The comparison is made on raw scores, sigmoid(s) < t being s < log(t / (1 - t)), so it is exact at any score.

    Raises:
        ValueError: the threshold is not inside (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be inside (0, 1), got {threshold}")
    return is_safety | (safety_scores < math.log(threshold / (1 - threshold)))


def gated_logits(
    helpfulness_scores: Float[Tensor, " B"],
    safety_scores: Float[Tensor, " B"],
    is_safety: Bool[Tensor, " B"],
    *,
    threshold: float = SAFETY_THRESHOLD,
) -> Float[Tensor, " B"]:
    """LOGIT(R_c): the combined reward before whitening, unbounded.

    Llama 2 Sec. 3.2.3: R_c = R_s if is_safety(p) or R_s < 0.15, else R_h, with R = sigmoid(score). Since
    logit(sigmoid(score)) is the score itself, the chosen raw score is returned: no saturation at extreme scores.

    Args:
        helpfulness_scores: (B,) raw scores of the helpfulness model.
        safety_scores: (B,) raw scores of the safety model.
        is_safety: (B,) True for prompts of the safety set.
        threshold: on P(safe); the paper uses 0.15.
    """
    gate = safety_gate(safety_scores, is_safety, threshold=threshold)
    return torch.where(gate, safety_scores, helpfulness_scores)


def combined_reward(
    helpfulness_scores: Float[Tensor, " B"],
    safety_scores: Float[Tensor, " B"],
    is_safety: Bool[Tensor, " B"],
    *,
    threshold: float = SAFETY_THRESHOLD,
) -> Float[Tensor, " B"]:
    """R_c of the paper, a probability in (0, 1): to look at. Selection and training use `gated_logits`."""
    return torch.sigmoid(gated_logits(helpfulness_scores, safety_scores, is_safety, threshold=threshold))
