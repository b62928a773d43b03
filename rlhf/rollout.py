"""What is measured on sampled responses before anything is learned: log-probabilities, values, figures of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from alignment.prefix_batch import Branch, Tree
from alignment.sampling.protocol import Sample
from alignment.tensor_ops import masked_mean, masked_var
from rlhf.rewards import kl_k1, kl_k3


def as_judged(trees: Sequence[Tree], drawn: Sequence[Sequence[Sample]], closing: Sequence[int]) -> list[Tree]:
    """Prompts with their samples as reward models are to read them: each with an end of turn.

    There they have learned to give their score, and there evaluation reads it. An answer that was cut off gets one that
    the policy did not write.

    Args:
        trees: a prompt each, with its samples as branches.
        drawn: the samples, in the same order.
        closing: ids of the end of turn.
    """
    return [
        Tree(
            tree.trunk,
            [
                branch if sample.finish_reason == "stop" else Branch([*branch.ids, *closing])
                for branch, sample in zip(tree.branches, samples, strict=True)
            ],
        )
        for tree, samples in zip(trees, drawn, strict=True)
    ]


@dataclass(frozen=True)
class Rollouts:
    """One process's share of an iteration: trees of prompts with sampled responses, and tables over them.

    N responses in the order of trees and branches, T tokens in the longest.

    Attributes:
        trees: a prompt each, with its sampled responses.
        mask: (N, T) True on sampled tokens, the end-of-turn token included.
        logprobs: (N, T) under the policy that sampled, by the trainer's own forward at sampling temperature.
        ref_logprobs: (N, T) under the reference.
        entropy: (N, T) of the policy's distribution, in nats.
        rewards: (N, T) per token: the KL penalty, and the response's whitened reward on its last token.
        values: (N, T) the critic's value before each token.
        trained: (N, T) True on the tokens that are learned from.
        advantages: (N, T) whitened over those of the global batch.
        returns: (N, T) the critic's targets.
    """

    trees: list[Tree]
    mask: Bool[Tensor, "N T"]
    logprobs: Float[Tensor, "N T"]
    ref_logprobs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    rewards: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    trained: Bool[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]


def reward_metrics(
    gated: Float[Tensor, " B"],
    *,
    helpfulness: Float[Tensor, " B"],
    safety: Float[Tensor, " B"],
    is_safety: Bool[Tensor, " B"],
    gate: Bool[Tensor, " B"],
    lengths: Float[Tensor, " B"],
) -> dict[str, Tensor]:
    """Figures of an iteration's scores; `gate` is True where the safety model speaks.

    `gated_unsafe_rate` is its share among responses to ordinary prompts, where it speaks because the response is
    unsafe; it is left out where there are none. `reward_length_correlation` is Pearson's, 0 where one of the two is
    constant.
    """
    ordinary = ~is_safety
    centred = [x - x.mean() for x in (gated.cpu().double(), lengths.cpu().double())]
    norms = centred[0].norm() * centred[1].norm()
    return {
        "reward": gated.mean(),
        "reward_std": gated.std(correction=0),
        "helpfulness": helpfulness.mean(),
        "safety": safety.mean(),
        "gated_rate": gate.float().mean(),
        **({"gated_unsafe_rate": gate[ordinary].float().mean()} if ordinary.any() else {}),
        "reward_length_correlation": (centred[0] @ centred[1]) / norms.clamp_min(1e-12),
    }


def of_all_processes(rollouts: Rollouts, accelerator: Accelerator) -> Rollouts:
    """The tables of all processes, one below the other; the trees remain this process's. Collective."""
    if accelerator.num_processes == 1:
        return rollouts

    def gather(table: Tensor) -> Tensor:
        whole = accelerator.gather(accelerator.pad_across_processes(table.float(), dim=1))
        return whole > 0 if table.dtype == torch.bool else whole

    tables = [field.name for field in fields(Rollouts) if field.name != "trees"]
    return replace(rollouts, **{name: gather(getattr(rollouts, name)) for name in tables})


def rollout_metrics(rollouts: Rollouts) -> dict[str, Tensor]:
    """Figures of rollouts, sums over a response's tokens and means over responses.

    `kl` is the estimate whose mean is exact (k1), `kl_k3` the one that is never negative; nats a response.
    `explained_variance` is 1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant one. It is
    of what the critic is trained on, 0 where that is nothing.
    """
    mask, trained = rollouts.mask, rollouts.trained

    def per_response(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum(1).mean()

    explained = mask.new_zeros((), dtype=torch.float32)
    if trained.any():
        error = masked_var(rollouts.returns - rollouts.values, trained)
        explained = 1 - error / masked_var(rollouts.returns, trained).clamp_min(1e-8)
    return {
        "kl": per_response(kl_k1(rollouts.logprobs, rollouts.ref_logprobs)),
        "kl_k3": per_response(kl_k3(rollouts.logprobs, rollouts.ref_logprobs)),
        "entropy": masked_mean(rollouts.entropy, mask),
        "length": mask.sum(1).float().mean(),
        "return": per_response(rollouts.rewards),
        "explained_variance": explained,
    }


def sampler_gap(rollouts: Rollouts, drawn: Sequence[Sequence[Sample]]) -> Tensor:
    """Mean over tokens of |log-probability by the engine that drew them - by the trainer|, both at its temperature.

    Samples are those of the rollouts, in their order. In nats a token.
    """
    reported = torch.tensor([value for samples in drawn for sample in samples for value in sample.logprobs])
    return (reported - rollouts.logprobs[rollouts.mask].cpu()).abs().mean()
