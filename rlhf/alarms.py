"""What looks wrong in a PPO run, and what to do about it: a function of the run's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.errors import TrainingError
from rlhf.config import AlarmSection

Figures = Mapping[str, float]


class Watch:
    """The alarms of a run: each is reported when it first rings, and `stopped` names the one that ended the run."""

    def __init__(
        self,
        section: AlarmSection,
        *,
        first: Figures | None = None,
        rung: Mapping[str, int] | None = None,
        stopped: str | None = None,
    ) -> None:
        """All but the section are those of `state`, where a run goes on."""
        self.section, self.first, self.stopped = section, first, stopped
        self.rung = dict(rung or {})  # alarms by name with the iteration they first rang at

    def look(self, iteration: int, now: Figures) -> list[str]:
        """Messages of the alarms that ring for the first time.

        Raises TrainingError where a figure is not a number.
        """
        broken = sorted(name for name, value in now.items() if not math.isfinite(value))
        if broken:
            raise TrainingError(
                f"ppo: iteration {iteration}: {', '.join(broken)}: not a number. Lower optim.lr and ppo.critic_lr, and "
                "look at the reward models' scores."
            )
        self.first = self.first or dict(now)
        if self.section.action == "off":
            return []
        fresh = {name: text for name, text in alarms_of(now, self.first, self.section).items() if name not in self.rung}
        self.rung |= dict.fromkeys(fresh, iteration)
        if fresh and self.section.action == "stop":
            self.stopped = next(iter(fresh))
        return list(fresh.values())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self.first, "rung": self.rung, "stopped": self.stopped}


def alarms_of(now: Figures, first: Figures, section: AlarmSection) -> dict[str, str]:
    """Messages by name (`kl`, `ratio`, `sampler`, `entropy`, `length`, `gated`): what was found, its limit, what to do.

    Args:
        now: an iteration's figures, as in `metrics.jsonl` without `ppo/`.
        first: those of the run's first iteration.
        section: the limits.
    """
    found = {}
    if now["kl_k3"] > section.max_kl:
        found["kl"] = (
            f"kl_k3 is {now['kl_k3']:.1f} nats a response, over alarms.max_kl = {section.max_kl:g}: the policy runs "
            "away from the reference. Raise ppo.beta or set ppo.target_kl, or lower optim.lr."
        )
    if now.get("first_ratio_error", 0.0) > section.max_ratio_error:
        found["ratio"] = (
            f"first_ratio_error is {now['first_ratio_error']:.4f}, over alarms.max_ratio_error = "
            f"{section.max_ratio_error:g}: before any step old and new log-probabilities must be the same. Turn "
            "dropout off (lora.dropout=0) and compute in one type (model.dtype)."
        )
    if now["sampler_gap"] > section.max_sampler_gap:
        found["sampler"] = (
            f"sampler_gap is {now['sampler_gap']:.3f} nats a token, over alarms.max_sampler_gap = "
            f"{section.max_sampler_gap:g}: the engine that samples computes other probabilities than the trainer, with "
            "old weights or too coarsely. Look at sampling.vllm (dtype, quantization), or use sampling.engine=torch."
        )
    if now["entropy"] < section.min_entropy * first["entropy"]:
        found["entropy"] = (
            f"entropy fell from {first['entropy']:.3f} to {now['entropy']:.3f} nats a token, below alarms.min_entropy "
            f"= {section.min_entropy:g} of the first: the policy gives one answer. Lower optim.lr or raise ppo.beta."
        )
    change = now["length"] / first["length"]
    if not 1 / section.max_length_change <= change <= section.max_length_change:
        found["length"] = (
            f"responses went from {first['length']:.0f} to {now['length']:.0f} tokens, a factor over "
            f"alarms.max_length_change = {section.max_length_change:g}. Look at reward_length_correlation, and at "
            "score and length in the reward models' reports; against ever longer ones ppo.truncation=penalise helps."
        )
    if now.get("gated_unsafe_rate", 0.0) > section.max_gated_unsafe_rate:
        found["gated"] = (
            f"gated_unsafe_rate is {now['gated_unsafe_rate']:.2f}, over alarms.max_gated_unsafe_rate = "
            f"{section.max_gated_unsafe_rate:g}: the safety model finds nearly all answers to ordinary prompts unsafe, "
            "so helpfulness is not learned. Look at its calibration and at rewards.threshold."
        )
    return found
