"""How different a policy's answers are from each other, in numbers that do not depend on their length."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def ngram_counts(texts: Iterable[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs inside a text; without case and punctuation."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = _WORD.findall(text.casefold())
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return counts


def distinct_rate(counts: Counter[tuple[str, ...]], size: int) -> float:
    """Expected share of different n-grams among `size` of them, drawn without putting any back; NaN where `size` is 0.

    With all n-grams as `size` it is distinct-n (Li et al. 2016, arXiv:1510.03055), which falls as texts become longer,
    whoever wrote them. Drawn to one size, texts of different lengths compare (rarefaction, Hurlbert 1971): a kind that
    occurs c times in N is missed with probability C(N - c, size) / C(N, size).

    Raises:
        ValueError: there are fewer than `size` n-grams.
    """
    total = counts.total()
    if size > total:
        raise ValueError(f"{size} n-grams cannot be drawn from {total}")
    if size == 0:
        return math.nan
    found = sum(1.0 - math.exp(_log_choose(total - c, size) - _log_choose(total, size)) for c in counts.values())
    return found / size


def diversity(texts: Sequence[str], sizes: dict[int, int]) -> dict[str, float | None]:
    """`distinct_1`, `distinct_2`, ... at the given numbers of n-grams by n, and `unique_answers`.

    `unique_answers` is the number of different answers divided by that of all. Null where there is nothing to count.
    """
    rates = {f"distinct_{n}": distinct_rate(ngram_counts(texts, n), size) for n, size in sizes.items()}
    rates["unique_answers"] = len({text.strip() for text in texts}) / len(texts) if texts else math.nan
    return {name: rate if math.isfinite(rate) else None for name, rate in rates.items()}


def common_sizes(policies: Iterable[Sequence[str]], lengths: Sequence[int] = (1, 2)) -> dict[int, int]:
    """For each n the number of n-grams that even the policy with the fewest has."""
    texts = list(policies)
    return {n: min(ngram_counts(each, n).total() for each in texts) for n in lengths}


def _log_choose(total: int, size: int) -> float:
    """log C(total, size); minus infinity where there are too few."""
    if size > total:
        return -math.inf
    return math.lgamma(total + 1) - math.lgamma(size + 1) - math.lgamma(total - size + 1)
