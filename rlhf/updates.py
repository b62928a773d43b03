"""The gradient steps of a PPO iteration: minibatches in micro-batches, and the losses of policy and critic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from alignment.config import TrainSection
from alignment.distributed import passes, whole
from alignment.hardware import autocast_to
from alignment.logprobs import response_logprobs, token_values
from alignment.prefix_batch import PrefixBatch
from alignment.tensor_ops import masked_sum
from rlhf.checkpoint import Learner
from rlhf.config import PPOConfig
from rlhf.losses import clipped_policy_loss, clipped_value_loss, is_clipped
from rlhf.rollout import Rollouts
from rlhf.tree_tables import TreeParts


def updates_per_iteration(train: TrainSection) -> int:
    """Gradient steps on the rollouts of an iteration."""
    return train.epochs * (train.batch_size // train.minibatch_size)


class Updater:
    """Trains policy and critic (`learners` by these names) on rollouts."""

    def __init__(
        self, config: PPOConfig, accelerator: Accelerator, dtype: torch.dtype, learners: Mapping[str, Learner]
    ) -> None:
        self.config, self.accelerator, self.dtype, self.learners = config, accelerator, dtype, learners

    def update(self, rollouts: Rollouts, *, critic_only: bool) -> dict[str, float]:
        """Minibatches in order, micro-batches inside; losses are means over the tokens of the global minibatch.

        One without a token to train on (`ppo.truncation=mask`) takes no step: momentum would move the weights. Returns
        means over the minibatches, and of the first one the `first_ratio_error`.
        """
        config, accelerator = self.config, self.accelerator
        clip_range = math.inf if critic_only else config.ppo.value_clip_range
        losses_of = {"policy": self.policy_losses, "critic": partial(self.value_losses, clip_range=clip_range)}
        learners = {name: learner for name, learner in self.learners.items() if name == "critic" or not critic_only}
        for learner in self.learners.values():
            learner.model.train()
        parts = TreeParts(rollouts.trees, max_tokens=config.train.max_tokens_per_batch)
        sums: dict[str, float] = {}
        first: dict[str, float] = {}
        num_updates = 0
        for trees in self._minibatches(len(rollouts.trees)):
            batches = [parts.batch(group, accelerator.device) for group in parts.groups(trees)]
            tokens = sum(rollouts.trained[rows, columns].sum() for _, rows, columns in batches)
            # DDP averages gradients over processes; the loss is a mean over the trained tokens of all of them.
            counted = accelerator.reduce(tokens.float(), reduction="sum")
            scale, learns = accelerator.num_processes / counted.clamp_min(1), bool(counted)
            totals: dict[str, Tensor] = {}
            for micro_batch, takes_part, exchanges in passes(batches, accelerator):
                # One model after the other, so that the activations of one are held at a time.
                for model, learner in learners.items():
                    with nullcontext() if exchanges else accelerator.no_sync(learner.model):
                        loss, figures = losses_of[model](rollouts, *micro_batch)
                        accelerator.backward(loss * (scale if takes_part else 0.0))
                    for name, value in figures.items():
                        totals[name] = totals.get(name, 0.0) + value.detach() * takes_part
            norms = {}
            for name, learner in learners.items():
                norm = clip_grad_norm_(learner.model.parameters(), config.optim.max_grad_norm)
                norms[f"{name}_grad_norm"] = float(whole(norm))
                if learns:
                    learner.optimizer.step()
                learner.optimizer.zero_grad()
                learner.scheduler.step()
            means = accelerator.reduce(torch.stack(list(totals.values())), reduction="sum") * scale
            step = dict(zip(totals, (means / accelerator.num_processes).tolist(), strict=True)) | norms
            ratio_error = step.pop("ratio_error", None)
            if num_updates == 0 and ratio_error is not None:
                first = {"first_ratio_error": ratio_error}
            for name, value in step.items():
                sums[name] = sums.get(name, 0.0) + value
            num_updates += 1
        return {name: value / num_updates for name, value in sums.items()} | first

    def policy_losses(
        self, rollouts: Rollouts, batch: PrefixBatch, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss in a micro-batch and figures of it, summed over its trained tokens."""
        policy, temperature = self.learners["policy"].model, self.config.sampling.temperature
        with autocast_to(self.dtype, self.accelerator.device):
            logprobs = response_logprobs(policy, batch, temperature=temperature)
        clip_range, trained = self.config.ppo.clip_range, rollouts.trained[rows, columns]
        old, advantages = rollouts.logprobs[rows, columns], rollouts.advantages[rows, columns]
        logprobs = torch.where(trained, logprobs, old)  # what is not trained has no gradient, not even 0 times inf
        loss = clipped_policy_loss(logprobs, old, advantages, clip_range=clip_range)
        is_off = is_clipped(logprobs.detach(), old, advantages, clip_range=clip_range)
        ratio_error = torch.expm1(logprobs.detach() - old).abs()
        parts = {"policy_loss": loss, "clip_fraction": is_off.to(loss), "ratio_error": ratio_error}
        sums = {name: masked_sum(part, trained) for name, part in parts.items()}
        return sums["policy_loss"], sums

    def value_losses(
        self, rollouts: Rollouts, batch: PrefixBatch, rows: Tensor, columns: Tensor, *, clip_range: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss in a micro-batch, summed over its trained tokens."""
        with autocast_to(self.dtype, self.accelerator.device):
            values = token_values(self.learners["critic"].model, batch)
        old, returns = rollouts.values[rows, columns], rollouts.returns[rows, columns]
        trained = rollouts.trained[rows, columns]
        values = torch.where(trained, values, old)
        loss = masked_sum(clipped_value_loss(values, old, returns, clip_range=clip_range), trained)
        return loss, {"value_loss": loss}

    def _minibatches(self, num_trees: int) -> Iterator[range]:
        """Trees of each optimizer step on this process."""
        config = self.config
        size = config.train.minibatch_size // (config.sampling.num_candidates * self.accelerator.num_processes)
        for _ in range(config.train.epochs):
            for start in range(0, num_trees, size):
                yield range(start, min(start + size, num_trees))
