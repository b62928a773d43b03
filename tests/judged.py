"""Rejection sampling with a function in the place of both reward models."""

from __future__ import annotations

from dataclasses import replace

from alignment.dialogue import Candidate, Message, Prompt
from rlhf import rejection_sampling
from rlhf.config import RejectionSamplingConfig


def candidate(prompt: str, reward: float, *, round_number: int = 1, text: str | None = None, finish: str = "stop"):
    return Candidate(
        prompt=Prompt(messages=(Message("user", prompt),)),
        response=f"{prompt} {reward}" if text is None else text,
        index=0,
        reward=reward,
        round=round_number,
        finish_reason=finish,
    )


def judged_by(monkeypatch, reward) -> None:
    """Puts a function of a candidate in the place of both reward models and the gate."""

    def score(section, candidates, device, *, title):
        return [replace(each, reward=reward(each)) for each in candidates]

    monkeypatch.setattr(rejection_sampling, "score_candidates", score)
    monkeypatch.setattr(rejection_sampling, "judges_context", lambda judges, **_: 512)


def config_of(folder, prompts, **extra) -> RejectionSamplingConfig:
    return RejectionSamplingConfig.model_validate(
        {
            "model": {"path": "toy", "dtype": "float32"},
            "rewards": {"helpfulness": "toy", "safety": "toy"},
            "prompts": {"prompts": str(prompts)},
            "sampling": {"num_candidates": 3, "max_new_tokens": 6},
            "run": {"dir": str(folder), "device": "cpu"},
            **extra,
        }
    )
