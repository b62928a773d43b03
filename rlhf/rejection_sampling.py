"""Rejection sampling: the best of K candidates becomes a new gold answer (Llama 2 Sec. 3.2.3)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignment.data import load_prompts, load_rows, write_rows
from alignment.dialogue import Candidate, Dialogue, Message, Messages
from alignment.errors import DataError
from alignment.hardware import process_state
from alignment.metrics import mean_interval
from alignment.runs import open_run, write_json
from alignment.sampling.prompts import choose_prompts
from rlhf.candidates import remove_candidates, sample_candidates
from rlhf.config import RejectionSamplingConfig
from rlhf.potential import plot_potential, potential_curve
from rlhf.rollout import RewardModels


def run(config: RejectionSamplingConfig, *, resume: bool = False) -> dict[str, Any]:
    """Samples, scores, selects; returns the headline figures.

    Writes `candidates.jsonl` (all), `sft.jsonl` (the best, ready for `align sft`), `potential.json` and `.png`.
    """
    state = process_state(config.run.device)
    data = load_prompts(config.prompts.prompts, on_error=config.prompts.on_error)
    earlier = load_rows(config.earlier_rounds, Candidate.from_json)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources([*data.sources, *earlier.sources])

    prompts = choose_prompts(data, config.prompts, config.run.seed)
    candidates = sample_candidates(config, prompts, run_dir, state)
    models = RewardModels.load(config.rewards, state.device)
    scored = models.score(candidates, title="reject: scores")
    before = earlier.rows if config.accumulate != "last" else []
    if before and config.rescore_earlier:
        before = models.score(before, title="reject: scores of earlier rounds")
    selection = select_best([*before, *scored], accumulate=config.accumulate, min_gain=config.min_gain)
    if not selection.best:
        raise DataError(f"no candidate beats its prompt's median by min_gain = {config.min_gain}. Lower it.")
    if state.is_main_process:
        write_rows(run_dir.path / "candidates.jsonl", (candidate.to_json() for candidate in scored))
        rows = (as_dialogue(candidate).to_json() for candidate in selection.best)
        write_rows(run_dir.path / "sft.jsonl", rows)
        curve = potential_curve(_rewards_by_prompt(scored))
        write_json(run_dir.path / "potential.json", {"temperature": config.sampling.temperature, **curve})
        plot_potential({f"temperature {config.sampling.temperature:g}": curve}, run_dir.path / "potential.png")
    this_round = select_best(scored, accumulate="last", min_gain=0.0)
    run_dir.note(selection={"kept": len(selection.best), **selection.left_out})
    result = run_dir.finish(
        {
            "stage": "reject",
            "prompts": len({candidate.prompt.messages for candidate in scored}),
            "candidates": len(scored),
            "kept": len(selection.best),
            "mean_reward": mean_interval([candidate.reward for candidate in scored]).to_json(),
            "mean_best_reward": mean_interval([candidate.reward for candidate in this_round.best]).to_json(),
            "gain_over_median": mean_interval(this_round.gains).to_json(),
        }
    )
    if state.is_main_process:
        remove_candidates(run_dir.path)
    return result


@dataclass(frozen=True)
class Selection:
    """The chosen candidates, their distance from the median of those chosen from, and what was left out, by reason."""

    best: list[Candidate]
    gains: list[float]
    left_out: dict[str, int]


def select_best(
    candidates: Sequence[Candidate], *, accumulate: Literal["best", "all", "last"], min_gain: float = 0.0
) -> Selection:
    """The highest gated reward for each prompt, prompts in order of first appearance; the earliest wins a tie.

    Llama 2 Sec. 3.2.3: up to V3 only the last iteration's samples were used, and skills were lost; afterwards the best
    of all iterations. Empty responses and those cut off at the length limit are chosen only where nothing else is.

    Args:
        candidates: scored by the same reward models, of any number of rounds.
        accumulate: for each prompt its `best` of all rounds; the bests of `all` rounds, a response once; or that of
            the `last` round, for the prompts it has.
        min_gain: leaves out a best that is not this much above the median of the candidates it was chosen from.
    """
    newest = max((candidate.round for candidate in candidates), default=0)
    by_prompt: dict[Messages, dict[int, list[Candidate]]] = {}
    for candidate in candidates:
        if candidate.round == newest or accumulate != "last":
            pool = 0 if accumulate == "best" else candidate.round
            by_prompt.setdefault(candidate.prompt.messages, {}).setdefault(pool, []).append(candidate)
    best, gains = [], []
    left_out = {"below_min_gain": 0, "empty": 0, "repeated": 0}
    left_out["other_rounds"] = len({candidate.prompt.messages for candidate in candidates}) - len(by_prompt)
    for pools in by_prompt.values():
        chosen: set[str] = set()
        for pool in pools.values():
            winner = max(pool, key=lambda c: (bool(c.response), c.finish_reason == "stop", c.reward))
            gain = winner.reward - statistics.median(candidate.reward for candidate in pool)
            if not winner.response:
                left_out["empty"] += 1
            elif winner.response in chosen:
                left_out["repeated"] += 1
            elif min_gain and gain < min_gain:
                left_out["below_min_gain"] += 1
            else:
                chosen.add(winner.response)
                best.append(winner)
                gains.append(gain)
    return Selection(best, gains, left_out)


def _rewards_by_prompt(candidates: Sequence[Candidate]) -> list[list[float]]:
    rewards: dict[Messages, list[float]] = {}
    for candidate in candidates:
        rewards.setdefault(candidate.prompt.messages, []).append(candidate.reward)
    return list(rewards.values())


def as_dialogue(candidate: Candidate) -> Dialogue:
    """A chosen candidate as a demonstration of which only the new answer is trained."""
    messages = (*candidate.prompt.messages, Message("assistant", candidate.response))
    return Dialogue(messages=messages, train_on="last", source=f"rejection_sampling_{candidate.round}")
