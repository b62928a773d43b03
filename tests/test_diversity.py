"""How different answers are from each other."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from rlhf.diversity import common_sizes, distinct_rate, diversity, ngram_counts


def test_ngrams_do_not_cross_texts_and_forget_case_and_punctuation():
    counts = ngram_counts(["The cat, the CAT!", "the end"], 2)
    assert counts == {("the", "cat"): 2, ("cat", "the"): 1, ("the", "end"): 1}
    assert ngram_counts(["don't"], 1) == {("don't",): 1}
    assert not ngram_counts(["one", ""], 2)


def test_at_its_own_size_it_is_distinct_n():
    # a b a b a: bigrams ab, ba, ab, ba, of which two are different.
    assert distinct_rate(ngram_counts(["a b a b a"], 2), 4) == pytest.approx(2 / 4)


def test_the_expectation_is_that_over_all_ways_to_draw():
    texts = ["a a a b b c d"]
    tokens = texts[0].split()
    for size in range(1, len(tokens) + 1):
        draws = [len(set(draw)) / size for draw in itertools.combinations(tokens, size)]
        expected = sum(draws) / len(draws)
        assert distinct_rate(ngram_counts(texts, 1), size) == pytest.approx(expected, abs=1e-12), size


def test_the_same_source_looks_as_diverse_in_long_texts_as_in_short_ones():
    """Plain distinct-1 of the long texts is a tenth of that of the short ones."""
    rng = random.Random(0)
    words = [f"w{index}" for index in range(200)]
    short, long = ([" ".join(rng.choices(words, k=length)) for _ in range(40)] for length in (10, 100))
    sizes = common_sizes([short, long], (1,))
    assert sizes == {1: 400}
    one, other = (diversity(texts, sizes)["distinct_1"] for texts in (short, long))
    assert one == pytest.approx(other, abs=0.03)
    assert distinct_rate(ngram_counts(long, 1), 4000) < 0.2 * one


def test_one_answer_to_everything_is_not_diverse():
    found = diversity(["I cannot help with that."] * 20, {1: 100, 2: 80})
    assert found == {"distinct_1": pytest.approx(5 / 100), "distinct_2": pytest.approx(4 / 80), "unique_answers": 0.05}
    assert diversity(["yes", " yes", "no"], {1: 3})["unique_answers"] == pytest.approx(2 / 3)


def test_answers_without_a_bigram_have_no_figure():
    assert common_sizes([["yes", "no"], ["a b"]]) == {1: 2, 2: 0}
    assert diversity(["yes", "no"], {1: 2, 2: 0}) == {"distinct_1": 1.0, "distinct_2": None, "unique_answers": 1.0}
    assert diversity([], {1: 0}) == {"distinct_1": None, "unique_answers": None}
    assert math.isnan(distinct_rate(ngram_counts([], 1), 0))


def test_more_cannot_be_drawn_than_there_is():
    with pytest.raises(ValueError, match="3 n-grams cannot be drawn from 2"):
        distinct_rate(ngram_counts(["a b"], 1), 3)
