"""Losses of reward models. Pure functions of scores."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def ranking_loss(
    chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"], margin: Float[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """Binary ranking loss of each pair, with a preference-strength margin.

    Llama 2 Sec. 3.2.2, Eq. 2: -log sigmoid(r_c - r_r - m). With no margin, Eq. 1.

    Args:
        chosen: (N,) scores of the preferred responses, unbounded.
        rejected: (N,) scores of the other responses.
        margin: (N,) non-negative, larger for stronger preferences; same scale as the scores.

    Returns:
        (N,) in nats; log 2 where the scores tie and the margin is zero.

    Raises:
        ValueError: the shapes differ (broadcasting would silently compare the wrong pairs).
    """
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        shapes = (tuple(chosen.shape), tuple(rejected.shape), None if margin is None else tuple(margin.shape))
        raise ValueError(f"chosen, rejected and margin must have one shape, got {shapes}")
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -torch.nn.functional.logsigmoid(difference)


def safety_auxiliary_loss(
    scores: Float[Tensor, " N"], is_safe: Bool[Tensor, " N"], labelled: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Binary cross-entropy of each response's safety label on the same scalar, 0 where nobody judged.

    Our choice: Llama 2 A.3.4 names an auxiliary safety classification loss and prints no formula. With this one
    `sigmoid(score)` reads as P(safe) and 0 is the boundary, as the gate of Sec. 3.2.3 needs.

    Args:
        scores: (N,) of the safety model, unbounded.
        is_safe: (N,) True where a person judged the response safe.
        labelled: (N,) True where a person judged it at all.

    Returns:
        (N,) in nats.
    """
    safe_scores = torch.where(labelled, scores, torch.zeros_like(scores))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(safe_scores, is_safe.to(scores.dtype), reduction="none")
    return torch.where(labelled, loss, torch.zeros_like(loss))


def centering_loss(chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Squared sum of the scores of each pair: keeps scores around zero, which the ranking loss leaves open.

    Eisenstein et al. 2023 (arXiv:2312.09244), Eq. 2: (r_c + r_r)^2.
    """
    return (chosen + rejected) ** 2
