"""Which rows of several sources make up a training set (Llama 2 Sec. 3.2.2, data composition)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

Row = TypeVar("Row")
NamedMix = Literal["all", "equal_parts", "90/10"]


def mix_rows(
    train: Mapping[str, Sequence[Row]],
    mix_in: Mapping[str, Sequence[Row]],
    mix: NamedMix | Mapping[str, float],
    *,
    seed: int,
) -> dict[str, list[Row]]:
    """Rows drawn from each source without replacement, in file order; the seed decides which.

    `all`: everything. `equal_parts`: all of `train` and as many rows drawn uniformly from `mix_in` (the paper's
    helpfulness model). `90/10`: all of `train`, and rows of `mix_in` until they are a tenth of the whole (its safety
    model). Where `mix_in` has fewer rows than that, all of them. Weights by source: the largest set in which the
    sources stand in these proportions.

    Args:
        train: rows by source.
        mix_in: rows by source, of the other aim.
        mix: a name, or a positive weight for every source.
        seed: of the draw.
    """
    sources = {**train, **mix_in}
    if mix == "all":
        return {name: list(rows) for name, rows in sources.items()}
    if isinstance(mix, Mapping):
        counts = _proportional({name: len(rows) for name, rows in sources.items()}, mix)
        return {name: _draw(rows, counts[name], f"{seed}:{name}") for name, rows in sources.items()}
    num_train = sum(len(rows) for rows in train.values())
    pool = [(name, index) for name, rows in mix_in.items() for index in range(len(rows))]
    drawn = set(_draw(pool, min(rows_to_mix_in(num_train, mix), len(pool)), f"{seed}:mix_in"))
    mixed = {name: list(rows) for name, rows in train.items()}
    for name, rows in mix_in.items():
        mixed[name] = [row for index, row in enumerate(rows) if (name, index) in drawn]
    return mixed


def rows_to_mix_in(num_train: int, mix: Literal["equal_parts", "90/10"]) -> int:
    """Rows of the other aim that a named mix asks for beside `num_train`."""
    return num_train if mix == "equal_parts" else round(num_train / 9)


def _proportional(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Rows of each source: `scale * weight`, the scale as large as the source that runs out first allows."""
    scale = min(sizes[name] / weights[name] for name in sizes)
    return {name: min(sizes[name], math.floor(scale * weights[name] + 1e-9)) for name in sizes}


def _draw(rows: Sequence[Row], count: int, seed: str) -> list[Row]:
    chosen = sorted(random.Random(seed).sample(range(len(rows)), count))
    return [rows[index] for index in chosen]
