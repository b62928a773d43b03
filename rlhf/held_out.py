"""PPO's look at held-out prompts: answers to the same prompts again and again, early stop, the best policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState

from alignment.chat import ChatFormat
from alignment.data import Loaded, write_rows
from alignment.dialogue import Candidate, Prompt
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling.prompts import as_candidate, choose_prompts, fit_prompts, sample_shared, sampling_params
from alignment.sampling.protocol import Sampler
from reward_models.score import Scorer
from rlhf.checkpoint import Learner
from rlhf.config import PPOConfig
from rlhf.gains import judged_gains
from rlhf.judges import RewardModels, guard_scores


class HeldOut:
    """Evaluations of a policy in training.

    Attributes:
        history: of every evaluation the iteration, the mean gated reward and, with a guard, the mean of its scores.
        best_iteration: the one with the highest reward so far, the earliest of equals.
    """

    def __init__(
        self,
        config: PPOConfig,
        data: Loaded[Prompt],
        chat: ChatFormat,
        state: PartialState,
        *,
        guard: Scorer | None,
        room: int,
        run_dir: Run,
    ) -> None:
        """Prompts have at most `room` tokens; others are counted in the manifest.

        Raises DataError where no held-out prompt fits.
        """
        self.section, self.config, self.chat, self.state = config.evaluation, config, chat, state
        prompts = choose_prompts(data, self.section.as_prompts(config.prompts), config.run.seed)
        noted = {"run_dir": run_dir, "noted_as": "evaluation_prompts"}
        self._asked = fit_prompts(chat, prompts, config.prompts, room=room, **noted) if prompts else []
        self.history: list[dict[str, float]] = []
        self.best_iteration = 0
        self._best: dict[str, torch.Tensor] = {}
        self._first: dict[str, list[float]] = {}  # scores of the first evaluation by judge, and what `ended`
        self._gains: dict[str, dict[str, Any]] = {}  # of the best and the last evaluation over the first
        self._guard = guard

    def is_due(self, iteration: int, *, ends: bool = False) -> bool:
        """Whether to look after this iteration: before the first, every so many, and at the end, however it `ends`."""
        last = ends or iteration == self.config.train.max_steps
        return bool(self._asked) and (iteration % self.section.every == 0 or last)

    def look(
        self, iteration: int, sampler: Sampler, rewards: RewardModels, policy: Learner, run_dir: Run
    ) -> dict[str, float]:
        """Answers all held-out prompts; the figures, and `answers-ITERATION.jsonl`. Keeps the policy if it is best."""
        sampling = self.config.sampling.model_copy(update={"num_candidates": 1})
        silent = ProgressBar("", 0, shown=False)
        ids = [ids for _, ids in self._asked]
        drawn = sample_shared(sampler, ids, sampling, seed=self.config.run.seed, bar=silent)
        params = sampling_params(sampling, self.config.run.seed)
        answers = [
            as_candidate(self.chat, prompt, sample, 0, params)
            for (prompt, _), [sample] in zip(self._asked, drawn, strict=True)
        ]
        answers = rewards.score(answers)
        if self._guard is not None:
            answers = guard_scores(self._guard, answers, self.state.device)
        if self.state.is_main_process:
            write_rows(run_dir.path / f"answers-{iteration}.jsonl", (answer.to_json() for answer in answers))
        return self._take_down(iteration, answers, policy)

    def _take_down(self, iteration: int, answers: Sequence[Candidate], policy: Learner) -> dict[str, float]:
        judges = ("reward",) if self._guard is None else ("reward", "guard")
        measured = {judge: [getattr(answer, judge) for answer in answers] for judge in judges}
        ended = [answer.finish_reason == "stop" for answer in answers]
        self._first = self._first or {**measured, "ended": ended}
        figures = {judge: sum(values) / len(values) for judge, values in measured.items()}
        gains = judged_gains(measured, self._first, ended=ended, ended_before=self._first["ended"])
        self._gains["last"] = {name: gain.to_json() for name, gain in gains.items()}
        if all(figures["reward"] > earlier["reward"] for earlier in self.history):
            self.best_iteration = iteration
            keep = self.state.is_main_process
            self._best = {} if self.section.patience is None else policy.parameters(keep=keep)
            self._gains["best"] = self._gains["last"]
        self.history.append({"iteration": iteration, **figures})
        on_safety = [answer.safety < 0 for answer in answers if answer.prompt.is_safety]
        return {
            **{f"held_out_{name}": value for name, value in figures.items()},
            **({"held_out_violation_rate": sum(on_safety) / len(on_safety)} if on_safety else {}),
            "held_out_words": sum(len(answer.response.split()) for answer in answers) / len(answers),
        }

    @property
    def has_stopped(self) -> bool:
        """Whether the held-out reward has not risen for `patience` evaluations of a policy that learns."""
        best = max(self.best_iteration, self.config.ppo.critic_warmup)  # until then the policy is that of the start
        since = sum(entry["iteration"] > best for entry in self.history)
        return self.section.patience is not None and since >= self.section.patience

    def restore_best(self, policy: Learner) -> bool:
        """Puts the best policy back where early stopping is on; whether it did. Collective."""
        if self.section.patience is None or not self.history:
            return False
        policy.load_from_main_process(self._best)
        return True

    def summary(self) -> dict[str, Any] | None:
        """For `result.json`: every evaluation, the best, and the paired gains of the policy that is saved.

        Gains are over the start, with 95 % intervals; those of a best policy flatter it a little, for it was chosen by
        them.
        """
        if not self.history:
            return None
        saved = "last" if self.section.patience is None else "best"
        return {"history": self.history, "best_iteration": self.best_iteration, **self._gains[saved]}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "history": self.history,
            "best_iteration": self.best_iteration,
            "best_weights": self._best,
            "first_values": self._first,
            "gains": self._gains,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a checkpoint's state back."""
        self.history, self.best_iteration = state["history"], state["best_iteration"]
        self._first, self._gains = state["first_values"], state["gains"]
        # A copy: the checkpoint's file, which the tensors are mapped from, is removed before the run ends.
        is_main = self.state.is_main_process
        self._best = {name: weights.clone() for name, weights in state["best_weights"].items()} if is_main else {}
