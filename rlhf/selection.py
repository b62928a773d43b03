"""Which candidates become gold answers: a pure function over `candidates.jsonl` (Llama 2 Sec. 3.2.3)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignment.dialogue import Candidate, Dialogue, Message, Messages
from alignment.metrics import mean_interval

# How a response may end, by how well it can be trained on.
_ENDINGS = {"stop": 2, "length": 1, "refused": 0}


@dataclass(frozen=True)
class Selection:
    """The chosen candidates, their gains (see `select_best`), and what was left out, by reason."""

    best: list[Candidate]
    gains: list[float]
    left_out: dict[str, int]


def select_best(
    candidates: Sequence[Candidate],
    *,
    accumulate: Literal["best", "all", "last"],
    min_gain: float = 0.0,
    baseline: Mapping[Messages, float] | None = None,
) -> Selection:
    """The highest gated reward for each prompt, prompts in order of first appearance; the earliest wins a tie.

    Llama 2 Sec. 3.2.3: up to V3 only the last iteration's samples were used, and skills were lost; afterwards the best
    of all iterations. Responses cut off at the length limit are chosen only where nothing else is; empty ones and those
    that the chat format refuses, which nothing can be trained on, are left out.

    Args:
        candidates: scored by the same reward models, of any number of rounds.
        accumulate: for each prompt its `best` of all rounds; the bests of `all` rounds, a response once; or that of
            the `last` round, for the prompts it has.
        min_gain: leaves out a best whose gain is less: its reward less the prompt's baseline or, where there is none,
            the median of the candidates it was chosen from.
        baseline: rewards by prompt.
    """
    baseline = baseline or {}
    newest = max((candidate.round for candidate in candidates), default=0)
    taking_part = [c for c in candidates if c.round == newest or accumulate != "last"]
    best, gains = [], []
    left_out = {"below_min_gain": 0, "empty": 0, "refused": 0, "repeated": 0}
    left_out["other_rounds"] = len(by_prompt(candidates)) - len(by_prompt(taking_part))
    for messages, found in by_prompt(taking_part).items():
        pools: dict[int, list[Candidate]] = {}
        for candidate in found:
            pools.setdefault(0 if accumulate == "best" else candidate.round, []).append(candidate)
        chosen: set[str] = set()
        for pool in pools.values():
            winner = pick(pool)
            median = statistics.median(candidate.reward for candidate in pool)
            gain = winner.reward - baseline.get(messages, median)
            if not winner.response:
                left_out["empty"] += 1
            elif winner.finish_reason == "refused":
                left_out["refused"] += 1
            elif winner.response in chosen:
                left_out["repeated"] += 1
            elif min_gain and gain < min_gain:
                left_out["below_min_gain"] += 1
            else:
                chosen.add(winner.response)
                best.append(winner)
                gains.append(gain)
    return Selection(best, gains, left_out)


def choose_temperature(tried: Mapping[float, Sequence[Candidate]]) -> tuple[float, dict[str, Any]]:
    """The temperature whose picked candidates are rewarded most; of equal ones the lowest (Llama 2 Fig. 8).

    Args:
        tried: scored candidates by temperature, K of each prompt, the same prompts at every temperature.

    Returns:
        The temperature, and for each one (as text) `best`, the mean reward of what `pick` takes from K candidates of
        every prompt, an empty or refused one where there is no other, with `against_chosen`, its paired difference from
        the chosen temperature's, and `finished`, the share of candidates that ended by themselves. JSON-ready.
    """
    best = {
        temperature: {messages: pick(pool).reward for messages, pool in by_prompt(candidates).items()}
        for temperature, candidates in tried.items()
    }
    chosen = max(sorted(best), key=lambda temperature: statistics.fmean(best[temperature].values()))
    table = {}
    for temperature, candidates in tried.items():
        rewards = best[temperature]
        differences = [reward - best[chosen][messages] for messages, reward in rewards.items()]
        table[f"{temperature:g}"] = {
            "best": mean_interval(list(rewards.values())).to_json(),
            "against_chosen": mean_interval(differences).to_json(),
            "finished": sum(c.finish_reason == "stop" for c in candidates) / len(candidates),
        }
    return chosen, table


def pick(pool: Sequence[Candidate]) -> Candidate:
    """The highest reward of those that ended; where none did of those cut off, then of refused, then of empty ones."""
    return max(pool, key=lambda c: (bool(c.response), _ENDINGS.get(c.finish_reason, 0), c.reward))


def by_prompt(candidates: Sequence[Candidate]) -> dict[Messages, list[Candidate]]:
    """Candidates by prompt, in order of first appearance."""
    pools: dict[Messages, list[Candidate]] = {}
    for candidate in candidates:
        pools.setdefault(candidate.prompt.messages, []).append(candidate)
    return pools


def as_dialogue(candidate: Candidate) -> Dialogue:
    """A chosen candidate as a demonstration of which only the new answer is trained."""
    messages = (*candidate.prompt.messages, Message("assistant", candidate.response))
    return Dialogue(messages=messages, train_on="last", source=f"rejection_sampling_{candidate.round}")
