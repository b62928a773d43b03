"""The torch engine: what it draws, what it reports, and what must not change a sample."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.errors import ModelError
from alignment.logprobs import response_logprobs
from alignment.models import load_chat_model
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling import Sample, SamplingParams, prompt_cache, torch_engine
from alignment.sampling.draw import draw, inverse_cdf
from alignment.sampling.prompt_row import prompt_row
from alignment.sampling.torch_engine import TorchSampler

VOCAB = 24
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14, 15, 16, 17, 18], [5, 6]]


@pytest.fixture(scope="module", params=["random", "toy"])
def exact_llama(request, make_llama):
    """In float64, so that rounding cannot move a draw from one token to the next."""
    if request.param == "toy":
        return load_chat_model("toy").model.double()
    return make_llama(VOCAB, torch.float64)


def ids(samples: Sequence[Sequence[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in of_prompt] for of_prompt in samples]


def calls_of(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Shapes of the `input_ids` of every later call of the model."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _m, _a, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


# --------------------------------------------------------------------------------------------- against references


@pytest.mark.parametrize("attention", [prompt_cache.attention_with_lse, prompt_cache.plain_attention_with_lse])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_and_its_sum_are_those_of_softmax(attention, padded):
    """Both, the kernel of CPUs and the products of other devices."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(3, 2, n, 8, generator=generator, dtype=torch.float64) for n in (5, 70, 70))
    lengths = [70, 69, 1] if padded else [70, 70, 70]
    bias = torch.zeros(3, 1, 1, 70, dtype=torch.float64)
    for lane, length in enumerate(lengths):
        bias[lane, ..., length:] = float("-inf")
    attended, sums = attention(queries, keys, values, bias if padded else None)
    for lane, length in enumerate(lengths):
        weights = (queries[lane] @ keys[lane, :, :length].mT).exp()
        torch.testing.assert_close(sums[lane], weights.sum(-1).log())
        expected = weights @ values[lane, :, :length] / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(attended[lane], expected)


def test_the_sum_of_bfloat16_queries_is_not_rounded_to_bfloat16():
    """It decides between the prompt and all of a sample's own tokens."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, n, 64, generator=generator).bfloat16() for n in (4, 300, 300))
    expected = (queries.double() @ keys.double().mT).logsumexp(-1)
    _, sums = prompt_cache.attention_with_lse(queries, keys, values, None)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("stop", [3, 17])
def test_greedy_equals_transformers_generate_on_one_prompt_at_a_time(exact_llama, stop):
    found = TorchSampler(exact_llama, stop_ids=[stop]).sample(PROMPTS, SamplingParams(temperature=0, max_new_tokens=12))
    for prompt, (sample,) in zip(PROMPTS, found, strict=True):
        whole = exact_llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=stop,
            pad_token_id=0,
        )
        assert sample.token_ids == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 1.1, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_logprobs_equal_teacher_forcing_at_the_sampling_temperature(make_llama, settings_):
    """Also where top-p or top-k cut the distribution: what is reported is the untruncated probability."""
    model = make_llama(VOCAB)
    params = SamplingParams(num_candidates=3, max_new_tokens=10, **settings_)
    found = TorchSampler(model, stop_ids=[3]).sample(PROMPTS, params)
    trees = [
        [Tree(prompt, [Branch(sample.token_ids) for sample in of_prompt])]
        for prompt, of_prompt in zip(PROMPTS, found, strict=True)
    ]
    with torch.no_grad():
        expected = response_logprobs(model, collate(trees), temperature=params.temperature)
    reported = torch.tensor([value for of_prompt in found for sample in of_prompt for value in sample.logprobs])
    torch.testing.assert_close(reported, expected, atol=1e-4, rtol=0)


def test_greedy_logprobs_are_those_at_temperature_one(llama):
    (sample,) = TorchSampler(llama, stop_ids=[]).sample([[5, 6]], SamplingParams(temperature=0, max_new_tokens=6))[0]
    with torch.no_grad():
        expected = response_logprobs(llama, collate([[Tree([5, 6], [Branch(sample.token_ids)])]]))
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


def chi_square(counts: Sequence[int], probs: Tensor) -> float:
    expected = probs * sum(counts)
    assert expected.min() >= 5  # below, the statistic does not follow its distribution
    return ((torch.tensor(counts) - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_first_tokens_are_drawn_with_the_probabilities_of_the_softmax(make_llama, temperature):
    model = make_llama(12)
    params = SamplingParams(num_candidates=4000, max_new_tokens=1, temperature=temperature, seed=11)
    samples = TorchSampler(model, stop_ids=[], max_rows=4000).sample([[5, 6, 7]], params)[0]
    counts = Counter(sample.token_ids[0] for sample in samples)
    with torch.no_grad():
        probs = (model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)
    # 11 degrees of freedom: 31.26 is exceeded once in a thousand seeds.
    assert chi_square([counts[token] for token in range(12)], probs) < 31.26


def test_the_second_token_follows_the_first_with_its_conditional_probability(make_llama):
    model = make_llama(4)
    params = SamplingParams(num_candidates=4000, max_new_tokens=2, seed=12)
    samples = TorchSampler(model, stop_ids=[], max_rows=4000).sample([[1, 2]], params)[0]
    counts = Counter(tuple(sample.token_ids) for sample in samples)
    probs = []
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
        for token in range(4):
            second = model(input_ids=torch.tensor([[1, 2, token]])).logits[0, -1].softmax(-1)
            probs += (first[token] * second).tolist()
    # 15 degrees of freedom: 37.70 is exceeded once in a thousand seeds.
    observed = [counts[first, second] for first in range(4) for second in range(4)]
    assert chi_square(observed, torch.tensor(probs)) < 37.70


def nucleus(probs: Sequence[float], top_k: int, top_p: float) -> dict[int, float]:
    """Top-k, then the smallest set of most likely tokens that holds `top_p` of what is left; renormalised."""
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    ranked = ranked[:top_k] if top_k else ranked
    total = sum(probs[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        kept.append(token)
        mass += probs[token]
        if mass >= top_p * total:
            break
    return {token: probs[token] / mass for token in kept}


@settings(max_examples=60)
@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=12, unique=True),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.05, 0.35, 0.6, 0.9, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.4]),
)
def test_top_k_and_top_p_keep_the_nucleus_with_its_probabilities(logits, top_k, top_p, temperature):
    # An even grid of random numbers draws each token in proportion to its probability, to one grid step.
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    table = torch.tensor(logits, dtype=torch.float64).expand(2000, -1)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn, logprobs = draw(table, grid, params)
    full = (table[0] / temperature).softmax(-1)
    kept = nucleus(full.tolist(), top_k, top_p)
    counts = Counter(drawn.tolist())
    assert set(counts) <= set(kept)
    for token, prob in kept.items():
        assert abs(counts[token] - 2000 * prob) <= 1.001
    torch.testing.assert_close(logprobs, full.log()[drawn], atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_of_the_unit_interval_draw_tokens_that_exist(dtype):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]], dtype=dtype).expand(3, -1)
    largest = 1 - 2.0**-53  # what a float64 generator can return at most
    uniforms = torch.tensor([0.0, largest, 0.5], dtype=torch.float64)
    # p(1) = 1 / (1 + e) = 0.269, p(2) = 0.731
    assert draw(logits, uniforms, SamplingParams())[0].tolist() == [1, 2, 2]
    assert draw(logits, uniforms, SamplingParams(top_k=1))[0].tolist() == [2, 2, 2]


def test_the_drawn_token_is_the_one_whose_share_of_the_interval_holds_the_number():
    # Shares of 1/8, 2/8, 5/8: borders at 0.125 and 0.375.
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.1249, 0.1251, 0.3749, 0.3751, 0.9999], dtype=torch.float64)
    assert draw(logits, uniforms, SamplingParams())[0].tolist() == [0, 0, 1, 1, 2, 2]


@settings(max_examples=60)
@given(vocabulary=st.integers(1, 1400), seed=st.integers(0, 1000), zeros=st.floats(0, 0.99))
def test_block_sums_choose_the_entry_that_the_whole_running_sum_does(vocabulary, seed, zeros):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(6, vocabulary, generator=generator, dtype=torch.float64)
    weights *= torch.rand(6, vocabulary, generator=generator) >= zeros
    weights[:, seed % vocabulary] += 0.1  # no row is all zero
    uniforms = torch.tensor([0.0, 1e-9, 0.3, 0.7, 0.999, 1 - 2**-53], dtype=torch.float64)
    found = inverse_cdf(weights, uniforms)
    assert (weights.gather(1, found[:, None]) > 0).all()
    running = weights.cumsum(-1)
    low = running.gather(1, found[:, None])[:, 0] - weights.gather(1, found[:, None])[:, 0]
    wanted, slack = uniforms * running[:, -1], 1e-9 * vocabulary
    assert ((low <= wanted + slack) & (wanted <= running.gather(1, found[:, None])[:, 0] + slack)).all()


def test_entries_without_weight_are_never_drawn_in_float32():
    weights = torch.zeros(4, 1000)
    weights[:, [300, 511, 512]] = torch.tensor([1e-30, 1.0, 1e-7])
    found = inverse_cdf(weights, torch.tensor([0.0, 0.5, 0.99999994, 1.0]))
    assert found.tolist()[:2] == [300, 511]
    assert set(found.tolist()) <= {300, 511, 512}


@pytest.mark.parametrize("index", [0, 2])
def test_a_stream_is_the_candidate_of_that_number(exact_llama, index):
    sampler = TorchSampler(exact_llama, stop_ids=[3])
    params = SamplingParams(num_candidates=3, max_new_tokens=40, seed=5)
    [drawn] = sampler.sample([PROMPTS[0]], params)
    assert list(sampler.stream(PROMPTS[0], params, index=index)) == drawn[index].token_ids
    short = SamplingParams(max_new_tokens=1)
    assert len(list(sampler.stream(PROMPTS[0], short))) == 1


def test_a_stream_that_is_left_leaves_the_model_as_it_was(llama):
    llama.train()
    stream = TorchSampler(llama, stop_ids=[]).stream(PROMPTS[0], SamplingParams(max_new_tokens=9))
    next(stream)
    assert torch.is_grad_enabled() and not llama.training
    stream.close()
    assert llama.training and llama.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------ what must not matter


@pytest.fixture(scope="module")
def expected_samples(exact_llama) -> list[list[list[int]]]:
    return ids(TorchSampler(exact_llama, stop_ids=[3, 4], max_rows=64).sample(PROMPTS, PARAMS))


PARAMS = SamplingParams(num_candidates=4, max_new_tokens=14, temperature=1.2, seed=7)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 20])
def test_samples_do_not_depend_on_how_many_rows_run_side_by_side(exact_llama, expected_samples, max_rows):
    assert (
        ids(TorchSampler(exact_llama, stop_ids=[3, 4], max_rows=max_rows).sample(PROMPTS, PARAMS)) == expected_samples
    )


def test_samples_do_not_depend_on_how_many_prompts_are_run_at_once(exact_llama, expected_samples, monkeypatch):
    """Three lots of prompts are run before the first step, and join."""
    monkeypatch.setattr(torch_engine, "PREFILL_TOKENS", 8)
    calls = calls_of(exact_llama)
    assert ids(TorchSampler(exact_llama, stop_ids=[3, 4], max_rows=64).sample(PROMPTS, PARAMS)) == expected_samples
    assert [tokens for _, tokens in calls[:3]] == [7, 4 + 2 + 2, 1]
    assert calls[3][1] > 3 * PARAMS.num_candidates


@pytest.mark.parametrize("attention", [prompt_cache.attention_with_lse, prompt_cache.plain_attention_with_lse])
@pytest.mark.parametrize("max_rows", [3, 4, 7])
def test_prompts_of_like_length_share_tables_as_they_come_and_go(exact_llama, monkeypatch, attention, max_rows):
    """Each is answered as if it were alone, with the attention of CPUs and that of other devices."""
    prompts = [[5 + (3 * number + place) % 18 for place in range(9 - number % 5)] for number in range(12)]
    prompts.append([5 + place % 17 for place in range(40)])  # one that all others would be padded to
    expected = [ids(TorchSampler(exact_llama, stop_ids=[3, 4]).sample([prompt], PARAMS))[0] for prompt in prompts]
    tables = []
    set_lengths = prompt_cache.Prompts._set_lengths

    def note(kept: prompt_cache.Prompts, lengths: Tensor) -> None:
        set_lengths(kept, lengths)
        tables.append([(table.stop - table.start, table.columns) for table in kept.tables])

    monkeypatch.setattr(prompt_cache.Prompts, "_set_lengths", note)
    monkeypatch.setattr(prompt_cache, "attention_with_lse", attention)
    params = replace(PARAMS, num_candidates=1)
    firsts = [[samples[0]] for samples in expected]
    assert ids(TorchSampler(exact_llama, stop_ids=[3, 4], max_rows=max_rows).sample(prompts, params)) == firsts
    assert any(count > 1 for of_prompts in tables for count, _ in of_prompts)  # some shared a table, with padding
    assert all(columns <= 9 for of_prompts in tables for _, columns in of_prompts if (1, 40) not in of_prompts)
    found = ids(TorchSampler(exact_llama, stop_ids=[3, 4], max_rows=max_rows).sample(prompts, PARAMS))
    assert found == expected


def test_one_long_prompt_does_not_widen_the_others():
    kept = prompt_cache.Prompts([4000, 110, 100, 90], torch.device("cpu"))
    assert [(table.start, table.stop, table.columns) for table in kept.tables] == [(0, 1, 4000), (1, 4, 110)]
    kept.join([prompt_cache.Prompts([500, 105, 50], torch.device("cpu"))])
    assert [table.columns for table in kept.tables] == [4000, 500, 110, 50]
    assert kept.lengths.tolist() == [4000, 500, 110, 105, 100, 90, 50]


def test_samples_do_not_depend_on_the_order_of_prompts(exact_llama, expected_samples):
    found = TorchSampler(exact_llama, stop_ids=[3, 4]).sample(PROMPTS[::-1], PARAMS)
    assert ids(found)[::-1] == expected_samples


def test_samples_do_not_depend_on_other_prompts(exact_llama, expected_samples):
    sampler = TorchSampler(exact_llama, stop_ids=[3, 4])
    for prompt, expected in zip(PROMPTS, expected_samples, strict=True):
        assert ids(sampler.sample([prompt], PARAMS)) == [expected]


def test_samples_do_not_depend_on_how_many_follow(exact_llama, expected_samples):
    fewer = SamplingParams(num_candidates=2, max_new_tokens=14, temperature=1.2, seed=7)
    found = ids(TorchSampler(exact_llama, stop_ids=[3, 4]).sample(PROMPTS, fewer))
    assert found == [of_prompt[:2] for of_prompt in expected_samples]


def test_samples_that_are_handed_over_are_not_kept(exact_llama, expected_samples):
    """Of 20 samples in lots of four no more than two lots live at once."""
    handed: dict[int, list[list[int]]] = {}
    living: list[int] = []

    def take(index: int, samples: list[Sample]) -> None:
        [handed[index]] = ids([samples])
        rows = [each for each in gc.get_objects() if type(each) is torch_engine._Row]
        living.append(sum(bool(row.token_ids) for row in rows) - before)

    before = sum(type(each) is torch_engine._Row and bool(each.token_ids) for each in gc.get_objects())
    sampler = TorchSampler(exact_llama, stop_ids=[3, 4], max_rows=4)
    assert sampler.sample(PROMPTS, PARAMS, on_prompt=take) == [[] for _ in PROMPTS]
    assert [handed[index] for index in range(len(PROMPTS))] == expected_samples
    assert max(living) <= 8


def test_a_larger_limit_lengthens_samples_without_changing_them(exact_llama, expected_samples):
    short = SamplingParams(num_candidates=4, max_new_tokens=5, temperature=1.2, seed=7)
    found = ids(TorchSampler(exact_llama, stop_ids=[3, 4]).sample(PROMPTS, short))
    assert found == [[sample[:5] for sample in of_prompt] for of_prompt in expected_samples]


def test_the_seed_changes_samples_and_repeats_them(exact_llama):
    sampler = TorchSampler(exact_llama, stop_ids=[])
    first, again, other = (
        ids(sampler.sample([[5, 6]], SamplingParams(num_candidates=2, max_new_tokens=12, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert not {tuple(s) for s in first[0]} & {tuple(s) for s in other[0]}


def test_candidates_of_a_prompt_differ_and_a_prompt_given_twice_gets_others(exact_llama):
    sampler = TorchSampler(exact_llama, stop_ids=[])
    twice = ids(sampler.sample([[5, 6], [9], [5, 6]], SamplingParams(num_candidates=2, max_new_tokens=12)))
    assert len({tuple(sample) for of_prompt in twice for sample in of_prompt}) == 6
    # The second occurrence goes on where the first ended.
    four = ids(sampler.sample([[5, 6]], SamplingParams(num_candidates=4, max_new_tokens=12)))
    assert twice[0] + twice[2] == four[0]


def test_every_prompt_has_random_numbers_of_its_own(make_llama):
    """With equal logits everywhere a sample shows its random numbers, whatever the prompt."""
    model = make_llama(VOCAB)
    model.lm_head.weight.data.zero_()
    found = ids(TorchSampler(model, stop_ids=[]).sample(PROMPTS, SamplingParams(num_candidates=2, max_new_tokens=12)))
    assert len({tuple(sample) for of_prompt in found for sample in of_prompt}) == 10


def test_temperature_zero_gives_every_candidate_the_same_text(exact_llama):
    params = SamplingParams(num_candidates=3, max_new_tokens=6, temperature=0)
    one, two, three = ids(TorchSampler(exact_llama, stop_ids=[]).sample([[5, 6]], params))[0]
    assert one == two == three


def test_a_low_temperature_approaches_greedy(exact_llama):
    sampler = TorchSampler(exact_llama, stop_ids=[])
    greedy = ids(sampler.sample(PROMPTS, SamplingParams(temperature=0, max_new_tokens=8)))
    assert ids(sampler.sample(PROMPTS, SamplingParams(temperature=1e-4, max_new_tokens=8))) == greedy
    assert ids(sampler.sample(PROMPTS, SamplingParams(temperature=2.0, top_k=1, max_new_tokens=8))) == greedy


# --------------------------------------------------------------------------------------------------- stopping


def test_a_stop_token_ends_a_sample_and_is_part_of_it(exact_llama):
    params = SamplingParams(num_candidates=16, max_new_tokens=20, temperature=1.5)
    samples = [s for of_prompt in TorchSampler(exact_llama, stop_ids=[3, 4]).sample(PROMPTS, params) for s in of_prompt]
    reasons = Counter(sample.finish_reason for sample in samples)
    assert min(reasons["stop"], reasons["length"]) > 5
    for sample in samples:
        assert not {3, 4} & set(sample.token_ids[:-1])
        assert (sample.token_ids[-1] in (3, 4)) == (sample.finish_reason == "stop")
        assert len(sample.token_ids) == 20 or sample.finish_reason == "stop"
        assert len(sample.logprobs) == len(sample.token_ids)


def test_a_stop_token_in_the_last_place_counts_as_stop(exact_llama):
    sampler = TorchSampler(exact_llama, stop_ids=[3, 4])
    long = sampler.sample(PROMPTS, SamplingParams(num_candidates=16, max_new_tokens=20, temperature=1.5))
    sample = next(s for s in long[0] if s.finish_reason == "stop" and len(s.token_ids) > 1)
    k, length = long[0].index(sample), len(sample.token_ids)
    exact = sampler.sample(PROMPTS, SamplingParams(num_candidates=16, max_new_tokens=length, temperature=1.5))
    assert exact[0][k].finish_reason == "stop"
    less = sampler.sample(PROMPTS, SamplingParams(num_candidates=16, max_new_tokens=length - 1, temperature=1.5))
    assert less[0][k].finish_reason == "length"
    assert less[0][k].token_ids == sample.token_ids[:-1]


def test_without_stop_tokens_every_sample_has_full_length(exact_llama):
    found = TorchSampler(exact_llama, stop_ids=[]).sample(PROMPTS, SamplingParams(num_candidates=3, max_new_tokens=9))
    assert {len(sample.token_ids) for of_prompt in found for sample in of_prompt} == {9}


# ----------------------------------------------------------------------------------------------------- economy


def test_candidates_share_one_prefill_and_each_later_call_adds_one_token(make_llama):
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    TorchSampler(model, stop_ids=[]).sample(PROMPTS[:3], SamplingParams(num_candidates=5, max_new_tokens=6))
    # Three prompts of 4, 1 and 2 tokens side by side, once; then 15 rows for each of the five tokens after the first.
    assert shapes == [(1, 7)] + [(1, 15)] * 5


def test_a_prompt_given_twice_is_run_once(make_llama):
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    TorchSampler(model, stop_ids=[]).sample([[5, 6], [9], [5, 6]], SamplingParams(num_candidates=2, max_new_tokens=2))
    assert shapes == [(1, 3), (1, 6)]


def test_prompts_that_begin_alike_share_their_beginning(make_llama):
    model = make_llama(VOCAB, torch.float64)
    beginning = [5, 6, 7, 8] * 10
    prompts = [[*beginning, 9], [*beginning, 10, 11], [12, 13], beginning]
    params = SamplingParams(num_candidates=2, max_new_tokens=4)
    shapes = calls_of(model)
    together = ids(TorchSampler(model, stop_ids=[]).sample(prompts, params))
    # All but the last token of the shortest is common: 39, then 2, 3 and 1 of their own, and the 2 of the other.
    assert shapes[0] == (1, 39 + 2 + 3 + 1 + 2)
    assert together == [
        of_prompt for prompt in prompts for of_prompt in ids(TorchSampler(model, stop_ids=[]).sample([prompt], params))
    ]


@pytest.mark.parametrize(
    ("shared", "ending", "num_trees"), [(15, 7, 2), (18, 7, 2), (18, 900, 2), (25, 7, 1), (25, 900, 1)]
)
def test_prompts_share_what_leaves_the_fewest_tokens(shared, ending, num_trees):
    """Two share 40 tokens; with a third, all three would share fewer: 2 x 25 saves more than 40, 2 x 18 does not."""
    beginning = list(range(100, 140))
    prompts = [[*beginning, 1], [*beginning, 2, 3], [*beginning[:shared], ending, 8]]
    row = prompt_row(prompts)
    assert int(row.batch.tree_ids.max()) + 1 == num_trees
    found = row.batch.input_ids[0].tolist()
    assert len(found) == sum(map(len, prompts)) - (40 if num_trees == 2 else 2 * shared)
    for index, spans in zip(row.order, row.spans, strict=True):
        assert [token for first, last in spans for token in found[first:last]] == prompts[index]


@settings(max_examples=60)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=60).map(tuple), min_size=1, max_size=9, unique=True
    )
)
def test_every_prompt_is_whole_whatever_it_shares(prompts):
    prompts = [[3] * 12 + list(prompt) for prompt in prompts]
    row = prompt_row(prompts)
    found = row.batch.input_ids[0].tolist()
    assert sorted(row.order) == list(range(len(prompts)))
    for index, spans in zip(row.order, row.spans, strict=True):
        assert [token for first, last in spans for token in found[first:last]] == prompts[index]
    assert sorted(row.last_columns) == sorted(row.batch.last_columns)
    lengths = [len(prompts[index]) for index in row.order]
    assert lengths == sorted(lengths, reverse=True)
    assert len(found) <= sum(map(len, prompts))


def test_many_prompts_with_one_beginning_do_not_recurse_deeply():
    prompts = [[5] * 20 + [number, 1] for number in range(3000)]
    assert len(prompt_row(prompts).batch.input_ids[0]) == 20 + 2 * 3000


def test_finished_rows_leave_the_batch(make_llama):
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    params = SamplingParams(num_candidates=40, max_new_tokens=30, temperature=1.5, seed=3)
    (samples,) = TorchSampler(model, stop_ids=[3, 4, 5]).sample([[9, 10]], params)
    rows = [count for _, count in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    lengths = [len(sample.token_ids) for sample in samples]
    for step, count in enumerate(rows, start=1):  # this call computes token `step + 1` of every row still in
        wanted = sum(length > step for length in lengths)
        assert wanted <= count <= max(wanted / 0.93, wanted + 1)


def test_new_prompts_take_the_rows_of_finished_samples(make_llama):
    """With four rows, forty short and long answers need far fewer steps than in groups that wait for the longest."""
    model = make_llama(VOCAB, torch.float64)
    prompts = [[5 + number % 8, 6 + number // 8] for number in range(40)]
    params = SamplingParams(max_new_tokens=40, temperature=1.5)
    calls = calls_of(model)
    found = TorchSampler(model, stop_ids=[3, 4], max_rows=4).sample(prompts, params)
    num_calls = len(calls)
    lengths = [len(sample.token_ids) for (sample,) in found]
    in_groups = sum(max(lengths[start : start + 4]) for start in range(0, 40, 4))
    assert max(lengths) > 3 * min(lengths)
    assert num_calls - 40 < 0.7 * in_groups  # at most forty of the calls are prefills
    assert ids(found) == ids(TorchSampler(model, stop_ids=[3, 4], max_rows=64).sample(prompts, params))


def test_sampling_ends_with_the_last_sample(make_llama):
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    params = SamplingParams(num_candidates=3, max_new_tokens=50, temperature=1.5)
    (samples,) = TorchSampler(model, stop_ids=list(range(VOCAB // 2))).sample([[20, 21]], params)
    longest = max(len(sample.token_ids) for sample in samples)
    assert longest < 50
    assert len(shapes) == longest  # prefill gives the first token


def test_no_call_has_more_rows_than_allowed(make_llama):
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    done: list[int] = []
    found = TorchSampler(model, stop_ids=[], max_rows=4).sample(
        PROMPTS, SamplingParams(num_candidates=3, max_new_tokens=3), on_progress=done.append
    )
    # Three samples of a prompt leave one row free, too few for the next prompt's: one prompt after the other.
    prompts = [7, 4, 2, 2, 1]
    assert shapes == [shape for length in prompts for shape in ((1, length), (1, 3), (1, 3))]
    assert done == [3] * 5
    assert [len(of_prompt) for of_prompt in found] == [3] * 5


def test_more_candidates_than_rows_are_drawn_in_lots(exact_llama):
    params = SamplingParams(num_candidates=7, max_new_tokens=5)
    found = ids(TorchSampler(exact_llama, stop_ids=[], max_rows=3).sample([[5, 6]], params))
    assert found == ids(TorchSampler(exact_llama, stop_ids=[], max_rows=64).sample([[5, 6]], params))
    assert len({tuple(sample) for sample in found[0]}) == 7


def test_the_longest_prompts_come_first(make_llama):
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    TorchSampler(model, stop_ids=[], max_rows=2).sample(PROMPTS, SamplingParams(max_new_tokens=1))
    assert shapes == [(1, 7 + 4), (1, 2 + 2), (1, 1)]  # what does not fit into memory fails at once


def test_long_prompts_are_run_a_few_at_a_time(make_llama, monkeypatch):
    monkeypatch.setattr(torch_engine, "PREFILL_TOKENS", 8)
    model = make_llama(VOCAB)
    shapes = calls_of(model)
    TorchSampler(model, stop_ids=[], max_rows=8).sample(PROMPTS, SamplingParams(max_new_tokens=1))
    assert [tokens for _, tokens in shapes] == [7, 4 + 2 + 2, 1]  # at most eight tokens, or one prompt


def test_no_prompts_give_no_samples(llama):
    assert TorchSampler(llama, stop_ids=[]).sample([], SamplingParams()) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_sampled_in_evaluation_mode_and_left_as_it_was(make_llama, training):
    model = make_llama(VOCAB).train(training)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    TorchSampler(model, stop_ids=[]).sample([[5]], SamplingParams(max_new_tokens=2))
    assert modes == [False, False]
    assert model.training is training


@pytest.mark.parametrize("attention", ["sdpa", "eager", "align_tree"])
def test_the_models_own_attention_is_back_afterwards(make_llama, attention):
    model = make_llama(VOCAB)
    model.set_attn_implementation(attention)
    TorchSampler(model, stop_ids=[]).sample([[5]], SamplingParams(max_new_tokens=2))
    assert model.config._attn_implementation == attention


def test_a_window_shorter_than_prompt_and_response_is_refused(make_llama):
    model = make_llama(VOCAB)
    model.config.sliding_window = 9
    sampler = TorchSampler(model, stop_ids=[])
    sampler.sample([[5, 6, 7, 8]], SamplingParams(max_new_tokens=5))
    with pytest.raises(ModelError, match="sees 9 tokens back, and prompt and response may have 10"):
        sampler.sample([[5, 6, 7, 8]], SamplingParams(max_new_tokens=6))


def test_a_layer_with_an_attention_of_its_own_is_refused(make_llama):
    """It would see all prompts of the flat row."""
    model = make_llama(VOCAB)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelError, match="1 of its 2 layers call the attention that is set"):
        TorchSampler(model, stop_ids=[]).sample([[5]], SamplingParams(max_new_tokens=2))


def test_sampling_makes_no_tensor_that_grows_with_the_vocabulary_for_prompt_tokens(make_llama):
    """Logits are computed where a token is drawn, not for the tokens of prompts."""
    model = make_llama(VOCAB)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[1]))
    TorchSampler(model, stop_ids=[]).sample(PROMPTS, SamplingParams(num_candidates=3, max_new_tokens=2))
    assert rows == [5, 15]


def test_random_numbers_are_made_when_their_samples_begin(make_llama, monkeypatch):
    """Those of all samples of a large run would be gigabytes before its first token."""
    made: list[int] = []
    before: list[int] = []
    real = torch_engine.uniforms_of
    monkeypatch.setattr(torch_engine, "uniforms_of", lambda *arguments: made.append(1) or real(*arguments))
    model = make_llama(VOCAB)
    model.register_forward_pre_hook(lambda *_: before.append(len(made)))
    prompts = [[5, 6, token] for token in range(7, 19)]
    TorchSampler(model, stop_ids=[], max_rows=2).sample(prompts, SamplingParams(max_new_tokens=3))
    assert before[0] <= 2 and max(before) == len(made) == 12


def test_a_bfloat16_model_samples(make_llama: Callable[..., torch.nn.Module]):
    model = make_llama(VOCAB, torch.bfloat16)
    (samples,) = TorchSampler(model, stop_ids=[]).sample([[5, 6]], SamplingParams(num_candidates=2, max_new_tokens=4))
    assert [len(sample.token_ids) for sample in samples] == [4, 4]
