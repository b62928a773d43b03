"""How many rows the files of a stage have, and so how many steps or prompts: what times are planned by."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.data import read_lines
from alignment.errors import AlignError, DataError
from alignment.plan.training import Setting
from alignment.sources import find_data
from reward_models.mixing import mix_rows

# Prompts of a stage that takes all there are, where their number is not known.
MANY = 1000


def prompt_unit(prompts: Any, setting: Setting) -> tuple[int, str, float | None]:
    """Prompts that one process takes in a unit of time, the unit, and how many units there are."""
    count = num_rows(row_counts(prompts.prompts), prompts.max_prompts)
    if count is None:
        return math.ceil(MANY / setting.processes), f"{MANY} prompts", None
    return math.ceil(count / setting.processes), f"{count} prompts", 1


def num_rows(sizes: Mapping[str, int] | None, at_most: int | None) -> int | None:
    """Rows of all sources, before any is dropped; where a source is not there, as many as the limit."""
    if sizes is None:
        return at_most
    total = sum(sizes.values())
    return min(total, at_most or total)


def mixed_sizes(data: Any) -> dict[str, int] | None:
    """Pairs of each source that the mix takes; None where a source is not there."""
    train, mix_in = row_counts(data.train), row_counts(data.mix_in)
    if train is None or mix_in is None:
        return None
    rows, others = ({name: range(size) for name, size in sizes.items()} for sizes in (train, mix_in))
    return {name: len(taken) for name, taken in mix_rows(rows, others, data.mix, seed=0).items()}


def row_counts(sources: Sequence[str], at_most: Mapping[str, int] | None = None) -> dict[str, int] | None:
    """Rows of each file, at most as many as are wanted of it; None where one is not there."""
    found = {}
    for name in sources:
        try:
            path = find_data(name)
        except AlignError:
            return None
        if not isinstance(path, Path):
            return None
        if path.name.endswith((".json", ".json.gz")):  # one list, however it is broken into lines
            count = sum(1 for _ in read_lines(path))
        else:
            try:
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                    count = sum(1 for line in file if line.strip())
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}: is no whole gzip file ({error}). Get it again.") from error
        found[name] = min(count, (at_most or {}).get(name, count))
    return found
