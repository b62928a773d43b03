"""PPO on the safety-gated reward, started from the rejection-sampling checkpoint (Llama 2 Sec. 3.2.3, Eq. 3-4).

Where it departs from textbook PPO or the paper is silent (see docs/deviations.md):
  1. The reward is R_c of the gate, as a logit, whitened over the global batch of all processes before the KL term.
  2. KL is a per-token penalty inside the reward, estimated by log pi - log pi_0 on the sample.
  3. Old, new and reference log-probabilities all come from the trainer's own forward, at sampling temperature.
  4. Advantages are whitened over the global batch; a response is an episode (gamma 1) and ends with its last token.
  5. Answers cut off at the length limit are scored with an end of turn that the policy did not write, and keep their
     reward unless `ppo.truncation` says otherwise.
  6. beta is fixed unless `ppo.target_kl` is given.
  7. In the first `ppo.critic_warmup` iterations the critic alone learns, without a clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from alignment.dialogue import Prompt
from alignment.distributed import (
    compute_in,
    drop_gathered,
    is_split,
    mean_over_processes,
    whiten_over_processes,
)
from alignment.errors import DataError
from alignment.hardware import autocast_to
from alignment.logprobs import response_logprobs, response_stats, token_values
from alignment.model_folders import context_length
from alignment.prefix_batch import Branch, PrefixBatch, Tree
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling.prompts import Asked, fit_prompts, prompt_room, sample_shared
from alignment.sampling.vllm_engine import VllmSampler
from alignment.training import build_scheduler
from rlhf.advantages import gae
from rlhf.checkpoint import Learner
from rlhf.clock import PhaseClock
from rlhf.config import PPOConfig, check_shares
from rlhf.gating import safety_gate
from rlhf.kl_control import adapted_beta
from rlhf.policy import load_models, parameter_groups
from rlhf.policy_sampler import PolicySampler
from rlhf.rewards import per_token_rewards
from rlhf.rollout import (
    Rollouts,
    as_judged,
    of_all_processes,
    reward_metrics,
    rollout_metrics,
    sampler_gap,
)
from rlhf.tree_tables import tabulate
from rlhf.updates import Updater, updates_per_iteration


class PPOTrainer:
    """State of a PPO run: models, optimizers, and one `iterate` a batch of rollouts."""

    def __init__(
        self, config: PPOConfig, accelerator: Accelerator, dtype: torch.dtype, vllm: VllmSampler | None = None
    ) -> None:
        self.config, self.accelerator, self.dtype = config, accelerator, dtype
        self.beta = config.ppo.beta
        check_shares(config, accelerator.num_processes)
        compute_in(accelerator, dtype)
        self.models = load_models(config, dtype, accelerator.device, is_split=is_split(accelerator))
        self.rewards = self.models.rewards
        self.learners = {
            "policy": self._learner(self.models.policy, config.optim.lr, without=config.ppo.critic_warmup),
            "critic": self._learner(self.models.critic, config.ppo.critic_lr),
        }
        self.policy, self.critic = (learner.model for learner in self.learners.values())
        self.updater = Updater(config, accelerator, dtype, self.learners)
        rows = config.sampling.max_rows
        stop_ids = [self.models.loaded.chat.end_of_turn_id]
        self.sampler = PolicySampler(self.policy, stop_ids, dtype, max_rows=rows, vllm=vllm)

    def _learner(self, model: nn.Module, lr: float, *, without: int = 0) -> Learner:
        """A model with its optimizer and a schedule over all iterations but the first `without`."""
        optim = self.config.optim
        groups = parameter_groups(model, optim.weight_decay)
        fused = self.accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=fused)
        num_updates = (self.config.train.max_steps - without) * updates_per_iteration(self.config.train)
        scheduler = build_scheduler(optimizer, optim, num_steps=num_updates)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        return Learner(model, optimizer, scheduler)

    @property
    def context(self) -> int:
        """Tokens of a prompt with its response at most, so that every model can read them."""
        rewards = (self.rewards.helpfulness.context_length, self.rewards.safety.context_length)
        return min(context_length(self.models.loaded.model.config), *rewards)

    @property
    def room(self) -> int:
        """Tokens of a prompt at most, so that every model's context holds it with its response."""
        chat, context = self.models.loaded.chat, self.context
        return prompt_room(chat, self.config.sampling, policy_context=context, judge_context=context)

    def encode(self, prompts: Sequence[Prompt], run_dir: Run) -> list[Asked]:
        """Prompts that fit, with their ids; the others are counted. Raises DataError where none fits."""
        chat, room = self.models.loaded.chat, self.room
        return fit_prompts(chat, prompts, self.config.prompts, room=room, run_dir=run_dir)

    def prompts_of(self, step: int, prompts: Sequence[Asked]) -> list[Asked]:
        """The prompts of an iteration: consecutive pieces of seeded shuffles, the same on all processes."""
        count = self.config.train.batch_size // self.config.sampling.num_candidates
        chosen: list[Asked] = []
        while len(chosen) < count:
            shuffle, start = divmod(step * count + len(chosen), len(prompts))
            generator = torch.Generator().manual_seed(iteration_seed(self.config.run.seed, shuffle))
            order = torch.randperm(len(prompts), generator=generator)[start : start + count - len(chosen)]
            chosen += [prompts[index] for index in order.tolist()]
        return chosen

    def iterate(self, prompts: Sequence[Asked], *, seed: int, critic_only: bool = False) -> dict[str, float]:
        """One iteration: sample, score, gate, whiten, KL, advantages, updates; returns metrics over all processes.

        With `critic_only` the policy stays as it is, and there are no metrics of its update.
        """
        accelerator, sampling, config = self.accelerator, self.config.sampling, self.config.ppo
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        clock = PhaseClock()

        # 1. Sample responses from the present policy; all prompts, so that equal ones have samples of their own.
        silent, ids = ProgressBar("", 0, shown=False), [prompt.ids for prompt in prompts]
        drawn = sample_shared(self.sampler, ids, sampling, seed=seed, bar=silent)[share]
        mine = prompts[share]
        trees = [
            Tree(prompt.ids, [Branch(sample.token_ids) for sample in samples])
            for prompt, samples in zip(mine, drawn, strict=True)
        ]
        clock.lap("sample")

        # 2. Score them with both reward models; the gate chooses which one speaks.
        helpfulness, safety = self.rewards.score_trees(as_judged(trees, drawn, self.models.loaded.chat.closing))
        for name, scores in (("helpfulness", helpfulness), ("safety", safety)):
            if not torch.isfinite(scores).all():
                raise DataError(f"rewards.{name}: gave a score that is not a number. Look at its training run.")
        is_safety = torch.tensor([p.prompt.is_safety for p in mine]).repeat_interleave(sampling.num_candidates)
        gated = self.rewards.gated_logits(helpfulness, safety, is_safety)
        clock.lap("score")

        # 3. Whiten over the global batch, before the KL term.
        gated, device = gated.to(accelerator.device), accelerator.device
        stopped = torch.tensor([sample.finish_reason == "stop" for samples in drawn for sample in samples])
        is_trained = (stopped if config.truncation == "mask" else torch.ones_like(stopped)).to(device)
        whitened = whiten_over_processes(gated, is_trained, accelerator)
        largest = accelerator.gather(whitened.abs().max()[None]).max()
        if config.truncation == "penalise":
            whitened = whitened - config.truncation_penalty * (~stopped).to(whitened)

        # 4. Log-probabilities under policy and reference, and the critic's values.
        rollouts = self._measure(trees, whitened, is_trained)
        clock.lap("measure")

        # 5. One gradient step a minibatch, policy and critic. Every iteration and process drops out by its own.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed * accelerator.num_processes + accelerator.process_index)
            update = self.updater.update(rollouts, critic_only=critic_only)
        self.sampler.weights_changed()
        clock.lap("update")

        gate = safety_gate(safety, is_safety, threshold=self.rewards.threshold)
        scores = {"helpfulness": helpfulness, "safety": safety, "is_safety": is_safety, "gate": gate}
        tokens = float(rollouts.mask.sum())
        local = {
            "truncated_rate": 1.0 - stopped.float().mean(),
            "sampler_gap": sampler_gap(rollouts, drawn) * tokens,
            "tokens": tokens,
            **{f"{name}_tokens_per_second": tokens / seconds for name, seconds in clock.phases()},
        }
        means = mean_over_processes(local, accelerator)
        means["sampler_gap"] /= means.pop("tokens")
        metrics = {
            **self._reward_metrics(gated, scores, rollouts.mask.sum(1)),
            **{name: float(value) for name, value in rollout_metrics(of_all_processes(rollouts, accelerator)).items()},
            "whitened_largest": float(largest),
            "beta": self.beta,
            **means,
            **update,
            **clock.seconds,
        }
        if config.target_kl is not None and not critic_only:
            self.beta = adapted_beta(
                self.beta,
                metrics["kl"],
                target=config.target_kl,
                num_rollouts=self.config.train.batch_size,
                horizon=config.kl_horizon,
            )
        return metrics

    def _reward_metrics(self, gated: Tensor, scores: Mapping[str, Tensor], lengths: Tensor) -> dict[str, float]:
        """`reward_metrics` over the responses of all processes, which have equally many."""
        columns = {"gated": gated, **scores, "lengths": lengths}
        table = self.accelerator.gather(torch.stack([column.to(gated) for column in columns.values()], dim=1))
        found = dict(zip(columns, table.unbind(1), strict=True))
        flags = {name: found.pop(name) > 0 for name in ("is_safety", "gate")}
        return {name: float(value) for name, value in reward_metrics(**found, **flags).items()}

    def _measure(self, trees: list[Tree], rewards: Tensor, is_trained: Tensor) -> Rollouts:
        """Everything the losses need; nothing is learned from responses for which `is_trained` (N,) is False."""
        config, device = self.config, self.accelerator.device
        temperature = config.sampling.temperature
        options = {"max_tokens": config.train.max_tokens_per_batch, "device": device}
        collective = self.accelerator if is_split(self.accelerator) else None

        def under_policy(batch: PrefixBatch) -> Sequence[Tensor]:
            stats = response_stats(self.policy, batch, temperature=temperature)
            return stats.logprobs, stats.entropy, token_values(self.critic, batch), torch.ones_like(stats.logprobs)

        self.policy.eval()
        self.critic.eval()
        with autocast_to(self.dtype, device):
            logprobs, entropy, values, counted = tabulate(trees, under_policy, collective=collective, **options)
            with self.models.reference_policy(device) as reference:
                [ref_logprobs] = tabulate(
                    trees, lambda batch: [response_logprobs(reference, batch, temperature=temperature)], **options
                )
        for model in (self.policy, self.critic):
            drop_gathered(model)
        mask = counted > 0
        token_rewards = per_token_rewards(rewards, logprobs, ref_logprobs, mask, beta=self.beta)
        advantages, returns = gae(token_rewards, values, mask, gamma=config.ppo.gamma, lam=config.ppo.lam)
        trained = mask & is_trained[:, None]
        advantages = whiten_over_processes(advantages, trained, self.accelerator)
        return Rollouts(
            trees=trees,
            mask=mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            entropy=entropy,
            rewards=token_rewards,
            values=values,
            trained=trained,
            advantages=advantages,
            returns=returns,
        )


def iteration_seed(seed: int, step: int) -> int:
    """A seed for every iteration of a run."""
    return seed * 1_000_003 + step
