"""How well a reward model agrees with people, and two of them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from alignment.dialogue import RATINGS, PreferencePair, safety_bin
from alignment.metrics import Interval, design_effect, mean_interval, paired_rate_interval, wilson_interval
from reward_models.calibration import histogram, length_bias, reliability
from reward_models.unsafe_detection import repeated_labels, unsafe_detection

WANTED_PRECISION = 0.9


def pair_accuracy(
    chosen: Sequence[float], rejected: Sequence[float], prompts: Sequence[Hashable] | None = None
) -> Interval:
    """Share of pairs whose chosen response scores higher; a tie counts half. Llama 2 Sec. 3.2.2, Table 7.

    With the pairs' prompts Wilson's interval is that of as many pairs as tell as much without sharing any.
    """
    wins = [win(*both) for both in zip(chosen, rejected, strict=True)]
    return _rate(wins, range(len(wins)) if prompts is None else prompts)


def _rate(wins: Sequence[float], prompts: Sequence[Hashable]) -> Interval:
    effect = design_effect(wins, prompts)
    return replace(wilson_interval(sum(wins) / effect, len(wins) / effect), count=len(wins))


def label_accuracy(scores: Sequence[float], labels: Sequence[bool | None]) -> Interval:
    """Share of labelled responses on the right side of 0, i.e. of P(safe) = 0.5."""
    judged = [(score > 0) == label for score, label in zip(scores, labels, strict=True) if label is not None]
    return wilson_interval(sum(judged), len(judged))


def evaluate_pairs(
    pairs: Sequence[PreferencePair],
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    max_length: int,
    wanted_precision: float = WANTED_PRECISION,
) -> dict[str, Any]:
    """The whole report on scored pairs, JSON-ready.

    Accuracy overall, per source, per rating (Table 8) and per safety bin, each with a 95 % interval; the rules
    "longer wins" and "shorter wins" (characters) beside it; correlation of score and length; calibration of
    P(chosen) = sigmoid(difference); histograms; and, where responses carry safety labels, how well P(safe) finds the
    unsafe ones. Intervals of accuracy are wider where pairs share prompts and these go together (`design_effect`), and
    `prompts` counts these; all others take responses as independent.

    Args:
        pairs: N of them.
        chosen: (N,) raw scores of the chosen responses.
        rejected: (N,) raw scores of the others.
        max_length: tokens of prompt and response to which long histories were cut. It stands in the report, since
            figures of the same pairs differ a little where it differs.
        wanted_precision: of flagging unsafe responses; the report names the threshold that reaches it.

    Raises:
        ValueError: a score is not a finite number.
    """
    scores = [*chosen, *rejected]
    if wrong := sum(not math.isfinite(score) for score in scores):
        raise ValueError(f"{wrong} of {len(scores)} scores are no finite numbers. Look at the model's training.")
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    longer = pair_accuracy([c for c, _ in lengths], [r for _, r in lengths], prompts)
    shorter = pair_accuracy([-c for c, _ in lengths], [-r for _, r in lengths], prompts)
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "max_length": max_length,
        "accuracy": _accuracy(pairs, chosen, rejected, range(len(pairs))),
        "by_source": _by(pairs, chosen, rejected, lambda pair: pair.source or "unknown"),
        "by_rating": _by(pairs, chosen, rejected, lambda pair: pair.rating or "unrated", order=RATINGS),
        "by_safety_bin": _by(pairs, chosen, rejected, safety_bin),
        "longer_wins": longer.to_json(),
        "shorter_wins": shorter.to_json(),
        "length_correlation": length_bias(
            scores,
            [c for c, _ in lengths] + [r for _, r in lengths],
            [c - r for c, r in zip(chosen, rejected, strict=True)],
            [c - r for c, r in lengths],
        ),
        "mean_chosen": math.fsum(chosen) / max(1, len(chosen)),
        "mean_rejected": math.fsum(rejected) / max(1, len(rejected)),
        "calibration": reliability(chosen, rejected),
        "histogram": histogram({"chosen": chosen, "rejected": rejected}),
    }
    labels = [pair.chosen_safe for pair in pairs] + [pair.rejected_safe for pair in pairs]
    if any(label is not None for label in labels):
        report["safety_label_accuracy"] = label_accuracy(scores, labels).to_json()
        responses = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
        judged = [entry for entry in zip(responses, scores, labels, strict=True) if entry[2] is not None]
        judged_responses, judged_scores, is_safe = zip(*judged, strict=True)
        report["unsafe_detection"] = unsafe_detection(judged_scores, is_safe, wanted_precision=wanted_precision)
        report["unsafe_detection"]["repeated_labels"] = repeated_labels(judged_responses, judged_scores, is_safe)
    return report


def scored_row(pair: PreferencePair, chosen: float, rejected: float) -> dict[str, Any]:
    """A pair with its raw scores, as `align score` and training write it and `align rm compare` reads it."""
    return {**pair.to_json(), "score_chosen": chosen, "score_rejected": rejected}


def compare(
    pairs: Sequence[PreferencePair],
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
) -> dict[str, Any]:
    """Two models on the same pairs: accuracy of each, and second minus first, pair by pair, with a 95 % interval.

    The interval is Agresti and Min's or, where scores of a pair tie, the normal one of the mean difference, wider where
    pairs share prompts and these go together (`design_effect`). `p_value` is McNemar's exact test on the pairs that
    only one of them gets right, two-sided (ties left out); it takes pairs as independent.

    Args:
        pairs: N of them.
        first: (chosen, rejected), (N,) raw scores each.
        second: the same of the other model.
    """
    wins = [[win(*both) for both in zip(*scores, strict=True)] for scores in (first, second)]

    def figures(indices: Sequence[int]) -> dict[str, Any]:
        ours, theirs = ([row[index] for index in indices] for row in wins)
        only_first = sum(a == 1 and b == 0 for a, b in zip(ours, theirs, strict=True))
        only_second = sum(a == 0 and b == 1 for a, b in zip(ours, theirs, strict=True))
        if 0.5 in (*ours, *theirs):
            difference = mean_interval([b - a for a, b in zip(ours, theirs, strict=True)])
        else:
            difference = paired_rate_interval([each == 1 for each in theirs], [each == 1 for each in ours])
        prompts = [pairs[index].prompt for index in indices]
        wider = math.sqrt(design_effect([b - a for a, b in zip(ours, theirs, strict=True)], prompts))
        return {
            "first": _rate(ours, prompts).to_json(),
            "second": _rate(theirs, prompts).to_json(),
            "difference": _widened(difference, wider).to_json(),
            "p_value": mcnemar_p_value(only_first, only_second),
        }

    by_source = _groups(pairs, lambda pair: pair.source or "unknown")
    return {
        **figures(range(len(pairs))),
        "by_source": {name: figures(indices) for name, indices in sorted(by_source.items())},
    }


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: how unlikely so uneven a split of the discordant pairs is by chance."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(total, count) for count in range(fewer + 1)) / 2**total)


def win(chosen: float, rejected: float) -> float:
    """1 where the chosen response scores higher, one half for a tie, else 0."""
    return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def _by(
    pairs: Sequence[PreferencePair],
    chosen: Sequence[float],
    rejected: Sequence[float],
    key: Callable[[PreferencePair], str],
    order: Sequence[str] = (),
) -> dict[str, Any]:
    groups = _groups(pairs, key)
    rank = {name: position for position, name in enumerate(order)}
    return {
        name: _accuracy(pairs, chosen, rejected, groups[name])
        for name in sorted(groups, key=lambda name: (rank.get(name, len(rank)), name))
    }


def _accuracy(
    pairs: Sequence[PreferencePair], chosen: Sequence[float], rejected: Sequence[float], indices: Sequence[int]
) -> dict[str, Any]:
    """Of some pairs, with the number of their different prompts."""
    prompts = [pairs[i].prompt for i in indices]
    found = pair_accuracy([chosen[i] for i in indices], [rejected[i] for i in indices], prompts)
    return {**found.to_json(), "prompts": len(set(prompts))}


def _widened(interval: Interval, factor: float) -> Interval:
    """The interval of a difference of rates, `factor` times as wide."""
    low, high = (interval.value + (bound - interval.value) * factor for bound in (interval.low, interval.high))
    return replace(interval, low=max(-1.0, low), high=min(1.0, high))


def _groups(pairs: Sequence[PreferencePair], key: Callable[[PreferencePair], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(key(pair), []).append(index)
    return groups
