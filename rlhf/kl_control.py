"""The KL coefficient: fixed as in Llama 2, or adapted to a target (Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2)."""

from __future__ import annotations


def adapted_beta(beta: float, kl: float, *, target: float, num_rollouts: int, horizon: int) -> float:
    """The coefficient of the next iteration: larger where the policy is further from the reference than wanted.

    e = clip(KL / target - 1, -0.2, 0.2) and beta <- beta (1 + e n / horizon).

    Args:
        beta: of this iteration.
        kl: of this iteration's rollouts, nats a response.
        target: wanted, nats a response.
        num_rollouts: n, in this iteration, over all processes.
        horizon: rollouts over which a lasting error of one fifth changes beta by about one fifth.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * num_rollouts / horizon)
