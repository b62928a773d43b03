"""Paired differences between two policies' answers to the same prompts, as each judge scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignment.metrics import Interval, mean_interval


def judged_gains(
    now: Mapping[str, Sequence[float]],
    before: Mapping[str, Sequence[float]],
    *,
    ended: Sequence[bool],
    ended_before: Sequence[bool],
) -> dict[str, Interval]:
    """`NAME_gain` and `NAME_gain_ended` for every judge of `now`, with 95 % intervals.

    Judges score answers that break off by their own lights, so a policy that ends more of its answers moves by that
    alone; the second figure is of the prompts to which both answers ended by themselves.

    Args:
        now: scores by judge, one for each prompt.
        before: those of the answers to compare with.
        ended: whether an answer ended by itself, one for each prompt.
        ended_before: the same of the answers to compare with.
    """
    both_ended = [a and b for a, b in zip(ended, ended_before, strict=True)]
    found = {}
    for judge, scores in now.items():
        differences = [ours - theirs for ours, theirs in zip(scores, before[judge], strict=True)]
        among_ended = [gain for gain, is_ended in zip(differences, both_ended, strict=True) if is_ended]
        found |= {f"{judge}_gain": mean_interval(differences), f"{judge}_gain_ended": mean_interval(among_ended)}
    return found
