"""What rejection sampling can gain: the best and the median reward of N samples of a prompt (Llama 2 Fig. 7 and 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignment.files import save_figure
from alignment.metrics import mean_interval


def best_of(rewards: Float[Tensor, "P K"], size: int) -> Float[Tensor, " P"]:
    """Expected best reward among `size` of each prompt's K samples, drawn without replacement.

    The mean over all subsets, so an unbiased estimate of the expected best of `size` samples (size <= K).
    """
    return _order_statistic(rewards, size, size)


def median_of(rewards: Float[Tensor, "P K"], size: int) -> Float[Tensor, " P"]:
    """Expected median reward among `size` of each prompt's K samples; of an even number the mean of the two middle."""
    low, high = (size + 1) // 2, size // 2 + 1
    return (_order_statistic(rewards, size, low) + _order_statistic(rewards, size, high)) / 2


def potential_curve(rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Best and median reward among N = 1 ... K samples, averaged over prompts.

    Args:
        rewards: of P prompts, each with K samples.

    Returns:
        JSON-ready: `n` (1 ... K), `best` and `median` (for each n the mean over prompts with its 95 % interval).

    Raises:
        ValueError: prompts have different numbers of samples, or none.
    """
    counts = {len(row) for row in rewards}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"every prompt needs the same number of samples, and at least one; found {sorted(counts)}")
    table = torch.tensor([list(row) for row in rewards], dtype=torch.float64)
    sizes = range(1, table.shape[1] + 1)
    return {
        "n": list(sizes),
        "best": [mean_interval(best_of(table, size).tolist()).to_json() for size in sizes],
        "median": [mean_interval(median_of(table, size).tolist()).to_json() for size in sizes],
    }


def plot_potential(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The curves by name, best solid and median dashed, as a PNG; a single one with its intervals over prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        for kind, style in (("best", "-"), ("median", "--")):
            values, low, high = ([entry[key] for entry in curve[kind]] for key in ("value", "low", "high"))
            [line] = axes.plot(curve["n"], values, style, color=f"C{index}", label=f"{kind}, {name}")
            if len(curves) == 1 and None not in low:
                axes.fill_between(curve["n"], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("samples of a prompt (N)")
    axes.set_ylabel("gated reward")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _order_statistic(rewards: Tensor, size: int, rank: int) -> Tensor:
    """The mean, over all subsets of `size` samples, of the `rank`-th smallest reward in the subset.

    The i-th smallest of K is the rank-th smallest of C(i-1, rank-1) C(K-i, size-rank) of the C(K, size) subsets.
    """
    count = rewards.shape[-1]
    if not 1 <= size <= count:
        raise ValueError(f"{size} of {count} samples")
    shares = [
        Fraction(comb(place - 1, rank - 1) * comb(count - place, size - rank), comb(count, size))
        for place in range(1, count + 1)
    ]
    return rewards.sort(-1).values @ torch.tensor([float(share) for share in shares], dtype=rewards.dtype)
