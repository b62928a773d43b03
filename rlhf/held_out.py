"""PPO's look at held-out prompts: answers to the same prompts again and again, early stop, the best policy."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState

from alignment.chat import ChatFormat
from alignment.data import Loaded, write_rows
from alignment.dialogue import Candidate, Prompt
from alignment.metrics import Interval
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling.prompts import (
    Asked,
    Judge,
    as_candidate,
    choose_prompts,
    fit_prompts,
    sample_shared,
    sampling_params,
)
from alignment.sampling.protocol import Sampler
from reward_models.score import Scorer
from rlhf.checkpoint import Learner
from rlhf.config import PPOConfig
from rlhf.gains import judged_gains
from rlhf.judges import RewardModels, guard_scores, unread_prompts

logger = logging.getLogger(__name__)


class HeldOut:
    """Evaluations of a policy in training.

    Attributes:
        history: of every evaluation the iteration, the mean gated reward and, with a guard, the mean of its scores.
        best_iteration: the one with the highest reward so far, the earliest of equals, on the prompts judged in both.
    """

    def __init__(
        self,
        config: PPOConfig,
        data: Loaded[Prompt],
        chat: ChatFormat,
        state: PartialState,
        *,
        guard: Scorer | None,
        judges: Mapping[str, Judge],
        room: int,
        run_dir: Run,
    ) -> None:
        """Prompts have at most `room` tokens, and to each of `judges` its own; others are counted in the manifest.

        Raises DataError where no held-out prompt fits.
        """
        self.section, self.config, self.chat, self.state = config.evaluation, config, chat, state
        self._judges, self._room = judges, room
        self._prompts = choose_prompts(data, self.section.as_prompts(config.prompts), config.run.seed)
        self._asked: list[Asked] = []
        if self._prompts:
            noted = {"run_dir": run_dir, "noted_as": "evaluation_prompts"}
            self._asked = fit_prompts(chat, self._prompts, config.prompts, room=room, judges=judges, **noted)
        self.history: list[dict[str, float]] = []
        self.best_iteration = 0
        self._best: dict[str, torch.Tensor] = {}
        self._best_rewards: list[float | None] = []
        # Scores of the first evaluation by judge, None of answers that were not judged, and what `ended`.
        self._first: dict[str, list[float | None]] = {}
        self._gains: dict[str, dict[str, Any]] = {}  # of the best and the last evaluation over the first
        self._guard = guard

    def is_due(self, iteration: int, *, ends: bool = False) -> bool:
        """Whether to look after this iteration: before the first, every so many, and at the end, however it `ends`."""
        last = ends or iteration == self.config.train.max_steps
        return bool(self._asked) and (iteration % self.section.every == 0 or last)

    def look(
        self, iteration: int, sampler: Sampler, rewards: RewardModels, policy: Learner, run_dir: Run
    ) -> dict[str, float]:
        """Answers all held-out prompts; the figures, and `answers-ITERATION.jsonl`. Keeps the policy if it is best.

        An answer that a reward model cannot read whole stands in the file without scores, and takes no other part.
        """
        sampling = self.config.sampling.model_copy(update={"num_candidates": 1})
        silent = ProgressBar("", 0, shown=False)
        ids = [ids for _, ids in self._asked]
        drawn = sample_shared(sampler, ids, sampling, seed=self.config.run.seed, bar=silent)
        params = sampling_params(sampling, self.config.run.seed)
        answers = [
            as_candidate(self.chat, prompt, sample, 0, params)
            for (prompt, _), [sample] in zip(self._asked, drawn, strict=True)
        ]
        unread = unread_prompts(self._judges, answers)
        scored = iter(self._scored([each for each in answers if each.prompt.messages not in unread], rewards))
        answers = [each if each.prompt.messages in unread else next(scored) for each in answers]
        if self.state.is_main_process:
            write_rows(run_dir.path / f"answers-{iteration}.jsonl", (answer.to_json() for answer in answers))
            if unread:
                logger.warning(
                    "ppo: iteration %d: %d of %d held-out prompts do not fit into the reward models' contexts beside "
                    "their answers, which are more tokens to them than were sampled. They are not in its figures.",
                    iteration, sum(answer.reward is None for answer in answers), len(answers),
                )  # fmt: skip
        return self._take_down(iteration, answers, policy)

    def _scored(self, answers: Sequence[Candidate], rewards: RewardModels) -> Sequence[Candidate]:
        """The answers with all scores."""
        if not answers:
            return answers
        answers = rewards.score(answers)
        return answers if self._guard is None else guard_scores(self._guard, answers, self.state.device)

    def _take_down(self, iteration: int, answers: Sequence[Candidate], policy: Learner) -> dict[str, float]:
        judges = ("reward",) if self._guard is None else ("reward", "guard")
        read = [answer for answer in answers if answer.reward is not None]
        unread = {"held_out_unread": len(answers) - len(read)} if len(read) < len(answers) else {}
        if not read:
            return unread
        now = {judge: [getattr(answer, judge) for answer in answers] for judge in judges}
        now["ended"] = [answer.finish_reason == "stop" for answer in answers]
        self._first = self._first or now
        figures = {judge: sum(getattr(answer, judge) for answer in read) / len(read) for judge in judges}
        gains = self._gains_over_first(now, judges)
        self._gains["last"] = {name: gain.to_json() for name, gain in gains.items()}
        if self._is_best(now["reward"]):
            self.best_iteration, self._best_rewards = iteration, now["reward"]
            keep = self.state.is_main_process
            self._best = {} if self.section.patience is None else policy.parameters(keep=keep)
            self._gains["best"] = self._gains["last"]
        self.history.append({"iteration": iteration, **figures})
        on_safety = [answer.safety < 0 for answer in read if answer.prompt.is_safety]
        return {
            **{f"held_out_{name}": value for name, value in figures.items()},
            **({"held_out_violation_rate": sum(on_safety) / len(on_safety)} if on_safety else {}),
            "held_out_words": sum(len(answer.response.split()) for answer in read) / len(read),
            **unread,
        }

    def _is_best(self, rewards: Sequence[float | None]) -> bool:
        """Whether they are higher than at the best look, on the prompts whose answers were judged in both."""
        if self.history and not self._best_rewards:  # the best was before a checkpoint of an earlier version
            known = [reward for reward in rewards if reward is not None]
            return sum(known) / len(known) > max(look["reward"] for look in self.history)
        pairs = zip(rewards, self._best_rewards or [-math.inf] * len(rewards), strict=True)
        both = [(now, best) for now, best in pairs if now is not None and best is not None]
        return sum(now for now, _ in both) > sum(best for _, best in both)

    def _gains_over_first(
        self, now: Mapping[str, Sequence[float | None]], judges: Sequence[str]
    ) -> dict[str, Interval]:
        """Gains over the first evaluation, on the prompts whose answers were judged in both."""
        pairs = enumerate(zip(now["reward"], self._first["reward"], strict=True))
        both = [index for index, rewards in pairs if None not in rewards]
        ours, theirs = ({name: [of[name][index] for index in both] for name in of} for of in (now, self._first))
        ended, ended_before = ours.pop("ended"), theirs.pop("ended")
        return judged_gains({judge: ours[judge] for judge in judges}, theirs, ended=ended, ended_before=ended_before)

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
            "best_rewards": self._best_rewards,
            "first_values": self._first,
            "gains": self._gains,
            "fits_judges": True,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a checkpoint's state back."""
        self.history, self.best_iteration = state["history"], state["best_iteration"]
        self._first, self._gains = state["first_values"], state["gains"]
        self._best_rewards = state.get("best_rewards", [])
        if self._prompts and "fits_judges" not in state:  # of an earlier version, which fitted them to the policy alone
            self._asked = fit_prompts(self.chat, self._prompts, self.config.prompts, room=self._room)
        # A copy: the checkpoint's file, which the tensors are mapped from, is removed before the run ends.
        is_main = self.state.is_main_process
        self._best = {name: weights.clone() for name, weights in state["best_weights"].items()} if is_main else {}
