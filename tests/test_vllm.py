"""The vLLM engine for real, on CPUs with vLLM's build for them (make test-vllm) or on a GPU."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from merging import merged_copy
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alignment.chat import encode_prompt
from alignment.chat_formats import CHATML
from alignment.config import LoraSection, ModelSection, SamplingSection
from alignment.dialogue import Message
from alignment.errors import SamplerError
from alignment.logprobs import response_logprobs
from alignment.model_folders import model_folder
from alignment.models import LoadedModel, add_lora, load_chat_model
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling import Sample, SamplingParams
from alignment.sampling.engines import open_sampler
from alignment.sampling.torch_engine import TorchSampler
from alignment.sampling.vllm_engine import VllmSampler
from alignment.tree_attention import TREE_ATTENTION

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
VOCAB = 64
STOP, EOS = 3, 4  # what the sampler stops at, and what the model's own configuration would
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14, 15, 16, 17, 18], [5, 6]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
WITH_LORA = {"enable_lora": True, "max_lora_rank": 8}


def llama(seed: int, *, tied: bool = False) -> LlamaForCausalLM:
    """A random Llama with heads of a size that vLLM's CPU kernels have."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=tied,
        attn_implementation=TREE_ATTENTION,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # norms too differ from one model to the next
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(0)


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., VllmSampler]]:
    """`start(folder, dtype=torch.float32, **arguments)`: closes the sampler before, since vLLM has one at a time."""
    running: list[VllmSampler] = []

    def close() -> None:
        while running:
            running.pop().close()

    def start(folder: Path | str, dtype: torch.dtype = torch.float32, **arguments: object) -> VllmSampler:
        close()
        settings = {"stop_ids": [STOP], "dtype": dtype, "max_rows": 64, "max_length": 200}
        running.append(VllmSampler(folder, **settings, engine_args=arguments))
        return running[0]

    yield start
    close()


@pytest.fixture(scope="module")
def started(start: Callable[..., VllmSampler], folder: Path) -> VllmSampler:
    return start(folder, **WITH_LORA)


@pytest.fixture
def sampler(started: VllmSampler, model: LlamaForCausalLM) -> VllmSampler:
    """With the weights it was started with, whatever the last test handed over."""
    started.refresh(model)
    return started


def ids(samples: Sequence[Sequence[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in of_prompt] for of_prompt in samples]


def greedy_of(model: nn.Module) -> list[list[list[int]]]:
    return ids(TorchSampler(model, stop_ids=[STOP]).sample(PROMPTS, GREEDY))


def gaps(model: nn.Module, found: Sequence[Sequence[Sample]], temperature: float) -> Tensor:
    """Reported log-probabilities less those of a teacher-forced pass in float32."""
    trees = [
        [Tree(prompt, [Branch(sample.token_ids) for sample in of_prompt])]
        for prompt, of_prompt in zip(PROMPTS, found, strict=True)
    ]
    with torch.no_grad():
        expected = response_logprobs(model, collate(trees), temperature=temperature)
    return torch.tensor([value for of_prompt in found for sample in of_prompt for value in sample.logprobs]) - expected


def next_token_probs(model: nn.Module, prompt: list[int], temperature: float) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
    return (logits.float() / temperature).softmax(-1)


def chance_of(counts: Counter[int], probs: Tensor) -> float:
    """The chance of counts as far from the probabilities as these (chi-square); rare tokens count as one."""
    total = counts.total()
    rare = probs * total < 10
    expected = torch.cat([probs[~rare], probs[rare].sum()[None]]) * total
    observed = torch.tensor([counts[token] for token in range(len(probs))])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected.clamp_min(1)).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), statistic / 2).item()


# ---------------------------------------------------------------------------------------------- against references


def test_greedy_equals_the_torch_engine(sampler, model):
    found = sampler.sample(PROMPTS, GREEDY)
    expected = TorchSampler(model, stop_ids=[STOP]).sample(PROMPTS, GREEDY)
    assert ids(found) == ids(expected)
    for (one,), (other,) in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)  # at temperature one


def test_greedy_candidates_are_equal(sampler):
    params = SamplingParams(num_candidates=3, temperature=0, max_new_tokens=6)
    [[one, two, three]] = sampler.sample(PROMPTS[:1], params)
    assert one == two == three


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_teacher_forcing_at_the_sampling_temperature(sampler, model, temperature):
    params = SamplingParams(num_candidates=8, max_new_tokens=12, temperature=temperature)
    found = sampler.sample(PROMPTS, params)
    assert gaps(model, found, temperature).abs().max() < 1e-4  # float32, as between two orders of summation


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_are_drawn_with_the_probabilities_of_the_softmax(sampler, model, temperature):
    params = SamplingParams(num_candidates=2000, max_new_tokens=1, temperature=temperature, seed=11)
    [samples] = sampler.sample([[5, 6, 7]], params)
    counts = Counter(sample.token_ids[0] for sample in samples)
    assert chance_of(counts, next_token_probs(model, [5, 6, 7], temperature)) > 1e-3


def test_second_tokens_follow_the_first_with_their_conditional_probabilities(sampler, model):
    """Also that the random numbers of a sample's first and second token have nothing to do with each other."""
    params = SamplingParams(num_candidates=2000, max_new_tokens=2, seed=12)
    [samples] = sampler.sample([[5, 6, 7]], params)
    (first, _), *_ = Counter(sample.token_ids[0] for sample in samples if sample.token_ids[0] != STOP).most_common(1)
    counts = Counter(sample.token_ids[1] for sample in samples if sample.token_ids[0] == first)
    assert counts.total() > 200
    assert chance_of(counts, next_token_probs(model, [5, 6, 7, first], 1.0)) > 1e-3


def test_neighbouring_candidates_have_nothing_to_do_with_each_other(sampler, model):
    """vLLM gives them neighbouring seeds."""
    [samples] = sampler.sample([[5, 6, 7]], SamplingParams(num_candidates=2000, max_new_tokens=1, seed=13))
    tokens = [sample.token_ids[0] for sample in samples]
    probs = next_token_probs(model, [5, 6, 7], 1.0)
    pairs = Counter(one * VOCAB + two for one, two in zip(tokens[::2], tokens[1::2], strict=True))
    assert chance_of(pairs, torch.outer(probs, probs).flatten()) > 1e-3


@pytest.mark.parametrize("settings_", [{"top_k": 5}, {"top_p": 0.7}], ids=str)
def test_where_top_k_or_top_p_cut_the_logprobs_are_those_of_what_is_left(sampler, model, settings_):
    params = SamplingParams(num_candidates=500, max_new_tokens=1, temperature=2.0, **settings_)
    [samples] = sampler.sample([[5, 6, 7]], params)
    probs = next_token_probs(model, [5, 6, 7], 2.0)
    ranked = probs.argsort(descending=True).tolist()
    size = 5 if "top_k" in settings_ else 1 + int((probs[ranked].cumsum(0) < 0.7).sum())
    left = set(ranked[:size])
    assert 1 < size < VOCAB
    assert {sample.token_ids[0] for sample in samples} == left
    total = probs[ranked[:size]].sum()
    for sample in samples:
        assert sample.logprobs[0] == pytest.approx(math.log(probs[sample.token_ids[0]] / total), abs=1e-4)


# ----------------------------------------------------------------------------------------------------- random streams


def test_the_seed_repeats_samples_and_another_changes_them(sampler):
    first, again, other = (
        ids(sampler.sample(PROMPTS, SamplingParams(num_candidates=3, max_new_tokens=12, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert not {tuple(sample) for sample in one} & {tuple(sample) for sample in two}


def test_a_prompt_given_twice_gets_other_samples_the_second_time(sampler):
    params = SamplingParams(num_candidates=2, max_new_tokens=12)
    twice = ids(sampler.sample([[5, 6], [9], [5, 6]], params))
    assert len({tuple(sample) for of_prompt in twice for sample in of_prompt}) == 6
    four = ids(sampler.sample([[5, 6]], SamplingParams(num_candidates=4, max_new_tokens=12)))
    assert twice[0] + twice[2] == four[0]  # in the order of their numbers, too


def test_every_prompt_has_random_numbers_of_its_own(sampler, model):
    """With equal logits everywhere a sample shows its random numbers, whatever the prompt."""
    level = copy.deepcopy(model)
    level.model.norm.weight.data.zero_()
    sampler.refresh(level)
    found = ids(sampler.sample(PROMPTS, SamplingParams(num_candidates=2, max_new_tokens=12)))
    assert len({tuple(sample) for of_prompt in found for sample in of_prompt}) == 10


# ------------------------------------------------------------------------------------------------ stopping, reporting


def test_only_the_given_stop_token_ends_a_sample_and_is_part_of_it(sampler):
    params = SamplingParams(num_candidates=40, max_new_tokens=20, temperature=2.0)
    samples = [sample for of_prompt in sampler.sample(PROMPTS, params) for sample in of_prompt]
    reasons = Counter(sample.finish_reason for sample in samples)
    assert min(reasons["stop"], reasons["length"]) > 5
    for sample in samples:
        assert STOP not in sample.token_ids[:-1]
        assert (sample.token_ids[-1] == STOP) == (sample.finish_reason == "stop")
        assert len(sample.token_ids) == 20 or sample.finish_reason == "stop"
        assert len(sample.logprobs) == len(sample.token_ids)
    assert any(EOS in sample.token_ids[:-1] for sample in samples)


def test_a_stop_token_in_the_last_place_counts_as_stop(sampler):
    params = {"num_candidates": 40, "temperature": 2.0}
    [long] = sampler.sample([[5, 6]], SamplingParams(max_new_tokens=20, **params))
    k, sample = next((k, s) for k, s in enumerate(long) if s.finish_reason == "stop" and len(s.token_ids) > 1)
    length = len(sample.token_ids)
    [exact] = sampler.sample([[5, 6]], SamplingParams(max_new_tokens=length, **params))
    assert (exact[k].token_ids, exact[k].finish_reason) == (sample.token_ids, "stop")
    [less] = sampler.sample([[5, 6]], SamplingParams(max_new_tokens=length - 1, **params))
    assert (less[k].token_ids, less[k].finish_reason) == (sample.token_ids[:-1], "length")


def test_every_prompt_is_reported_once_with_the_samples_that_would_be_returned(sampler):
    done: list[int] = []
    reported: dict[int, list[Sample]] = {}

    def on_prompt(index: int, samples: list[Sample]) -> None:
        assert index not in reported
        assert sum(done) == 3 * (len(reported) + 1)  # progress comes as prompts finish, not at the end
        reported[index] = samples

    params = SamplingParams(num_candidates=3, max_new_tokens=12, temperature=2.0)
    assert sampler.sample(PROMPTS * 10, params, on_progress=done.append, on_prompt=on_prompt) == [[]] * 50
    assert sum(done) == 150
    found = sampler.sample(PROMPTS * 10, params)
    assert ids(reported[index] for index in range(50)) == ids(found)


def test_no_prompts_give_no_samples(sampler):
    assert sampler.sample([], SamplingParams()) == []


def test_the_sampler_goes_on_after_an_interruption(sampler):
    params = SamplingParams(num_candidates=3, max_new_tokens=12, temperature=2.0)
    expected = sampler.sample(PROMPTS, params)
    reported: list[int] = []

    def stop(index: int, samples: list[Sample]) -> None:
        reported.append(index)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(PROMPTS * 3, params, on_prompt=stop)
    assert len(reported) == 1
    assert not sampler._engine().has_unfinished_requests()
    assert ids(sampler.sample(PROMPTS, params)) == ids(expected)


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_sampled(sampler):
    params = SamplingParams(max_new_tokens=4)
    assert len(sampler.sample([[5] * 196], params)) == 1
    reported: list[int] = []
    with pytest.raises(SamplerError, match="a prompt of 197 tokens and 4 new ones are more than the 200"):
        sampler.sample([[5], [5] * 197], params, on_progress=reported.append)
    assert not reported


# -------------------------------------------------------------------------------------------------------- new weights


def test_refresh_samples_from_the_model_handed_over(sampler, model):
    other = llama(1)
    assert greedy_of(other) != greedy_of(model)
    sampler.refresh(other)
    assert ids(sampler.sample(PROMPTS, GREEDY)) == greedy_of(other)
    sampler.refresh(model)
    assert ids(sampler.sample(PROMPTS, GREEDY)) == greedy_of(model)


def test_keys_and_values_of_old_weights_are_not_used_again(sampler, model):
    """vLLM keeps what it computed of a prompt in blocks, of 128 tokens on a CPU."""
    prompt = [5 + number * number % 50 for number in range(140)]
    other = llama(1)
    greedy = SamplingParams(temperature=0, max_new_tokens=8)
    for each in (model, other, model):
        sampler.refresh(each)
        expected = TorchSampler(each, stop_ids=[STOP]).sample([prompt], greedy)
        assert ids(sampler.sample([prompt], greedy)) == ids(expected)


def adapted(model: PreTrainedModel, seed: int, last_layers: int | None = None, r: int = 4) -> nn.Module:
    """With adapters that have left their start."""
    lora = LoraSection(r=r, alpha=8, last_layers=last_layers)
    peft = add_lora(copy.deepcopy(model), lora, is_reward_model=False, seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return peft.eval()


@pytest.mark.parametrize("last_layers", [None, 1])
def test_refresh_takes_one_adapter_after_the_other_over_the_same_base(sampler, model, last_layers):
    expected = [greedy_of(model)]
    for seed in (1, 2):
        peft = adapted(model, seed, last_layers)
        sampler.refresh(peft)
        expected.append(greedy_of(merged_copy(peft, torch.float32)))
        assert ids(sampler.sample(PROMPTS, GREEDY)) == expected[-1]
    assert expected[0] != expected[1] != expected[2] != expected[0]
    sampler.refresh(model)
    assert ids(sampler.sample(PROMPTS, GREEDY)) == expected[0]


def test_the_model_handed_over_is_left_as_it_was(sampler, model):
    peft = adapted(model, 1)
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    sampler.refresh(peft)
    sampler.sample(PROMPTS, GREEDY)
    assert all(torch.equal(value, before[name]) for name, value in peft.state_dict().items())


def test_an_adapter_of_too_high_a_rank_is_refused_and_the_last_one_stays(sampler, model):
    sampler.refresh(adapted(model, 1))
    before = ids(sampler.sample(PROMPTS, GREEDY))
    with pytest.raises(SamplerError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        sampler.refresh(adapted(model, 2, r=16))
    assert ids(sampler.sample(PROMPTS, GREEDY)) == before


# -------------------------------------------------------------------------- engines of their own, one after the other


def test_a_closed_sampler_says_so_and_another_can_be_started(start, folder, model):
    sampler = start(folder)
    sampler.close()
    sampler.close()
    with pytest.raises(SamplerError, match="closed"):
        sampler.sample(PROMPTS, GREEDY)
    sampler = start(folder)
    assert ids(sampler.sample(PROMPTS, GREEDY)) == greedy_of(model)
    with pytest.raises(SamplerError, match=r"started without adapters\. Set sampling\.vllm\.enable_lora"):
        sampler.refresh(adapted(model, 1))


@pytest.mark.parametrize("shared", [False, True], ids=["untied", "tied"])
def test_refresh_in_bfloat16(start, tmp_path, shared):
    llama(0, tied=shared).save_pretrained(tmp_path)
    sampler = start(tmp_path, torch.bfloat16)
    other = llama(1, tied=shared)
    sampler.refresh(other)
    found = sampler.sample(PROMPTS, SamplingParams(num_candidates=8, max_new_tokens=12))
    # Eight bits of mantissa move a log-probability of these by hundredths; other weights, by one and more.
    assert gaps(other, found, 1.0).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"max_num_sequences": 4}, r"sampling\.vllm: vllm\.LLM has no argument max_num_sequences"),
        ({"max_model_len": 10_000}, r"cannot start on .*max_model_len \(10000\).*sampling\.vllm"),
        (
            {"gpu_memory_utilization": 3.0},
            r"cannot start on .*: gpu_memory_utilization: Input should be .*sampling\.vllm",
        ),
        ({"kv_cache_memory_bytes": 1000}, r"cannot start on .*memory.*sampling\.vllm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_start_that_fails_says_why(start, folder, monkeypatch, arguments, problem):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # goes before kv_cache_memory_bytes
    with pytest.raises(SamplerError, match=problem):
        start(folder, **arguments)


def test_a_folder_without_a_model_is_named(start, tmp_path):
    with pytest.raises(SamplerError, match=f"cannot start on {tmp_path}"):
        start(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have kernels for it")
def test_a_breakdown_while_sampling_is_told_in_one_line(start):
    """vLLM's CPU kernels have no heads of 16, and say so only when they are called."""
    sampler = start(model_folder("toy"))
    with pytest.raises(SamplerError, match=r"^vLLM broke down while sampling: .*head_dim=16"):
        sampler.sample(PROMPTS, GREEDY)
    sampler.close()


def test_a_configuration_opens_vllm_with_the_users_arguments(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML)
    config = llama(0).config
    config.vocab_size = len(tokenizer)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sampling = SamplingSection(engine="vllm", max_new_tokens=5, vllm={"dtype": "bfloat16", "max_num_seqs": 3})
    section = ModelSection(path=str(tmp_path), dtype="float32")
    with open_sampler(section, sampling, torch.device("cpu"), max_prompt_length=20) as sampler:
        assert isinstance(sampler, VllmSampler)
        settings = sampler._engine().vllm_config
        assert settings.model_config.dtype == torch.bfloat16
        assert (settings.model_config.max_model_len, settings.scheduler_config.max_num_seqs) == (25, 3)
        assert sampler.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert len(sampler.sample(PROMPTS, SamplingParams(max_new_tokens=5))) == len(PROMPTS)
    with pytest.raises(SamplerError, match="closed"):
        sampler.sample(PROMPTS, GREEDY)


# -------------------------------------------------------------------------------------------------------- SmolLM2-135M


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_chat_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def smollm2_sampler(start: Callable[..., VllmSampler], smollm2: LoadedModel) -> VllmSampler:
    sampler = start(model_folder("smollm2-135m-instruct"), **WITH_LORA)
    sampler.stop_ids = [smollm2.chat.end_of_turn_id]
    return sampler


@pytest.fixture(scope="module")
def questions(smollm2: LoadedModel) -> list[list[int]]:
    texts = ("What is the capital of France?", "Write one sentence about rain.", "2 + 2 =", "Name three primes.")
    return [encode_prompt(smollm2.chat, (Message("user", text),)) for text in texts]


def test_smollm2_greedy_equals_the_torch_engine(smollm2, smollm2_sampler, questions):
    greedy = SamplingParams(temperature=0, max_new_tokens=16)
    expected = TorchSampler(smollm2.model, stop_ids=[smollm2.chat.end_of_turn_id]).sample(questions, greedy)
    assert ids(smollm2_sampler.sample(questions, greedy)) == ids(expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_smollm2_logprobs_equal_teacher_forcing(smollm2, smollm2_sampler, questions, temperature):
    params = SamplingParams(num_candidates=4, max_new_tokens=24, temperature=temperature)
    found = smollm2_sampler.sample(questions, params)
    trees = [
        [Tree(prompt, [Branch(sample.token_ids) for sample in of_prompt])]
        for prompt, of_prompt in zip(questions, found, strict=True)
    ]
    with torch.no_grad():
        expected = response_logprobs(smollm2.model, collate(trees), temperature=temperature)
    reported = torch.tensor([value for of_prompt in found for sample in of_prompt for value in sample.logprobs])
    # Thirty layers of float32 sums in another order; the softmax of unlikely tokens shows them most.
    torch.testing.assert_close(reported, expected, atol=1e-3, rtol=0)
    assert (reported - expected).mean().abs() < 1e-5


def test_smollm2_first_tokens_are_drawn_with_the_probabilities_of_the_softmax(smollm2, smollm2_sampler, questions):
    params = SamplingParams(num_candidates=400, max_new_tokens=1, temperature=1.0, seed=5)
    [samples] = smollm2_sampler.sample(questions[1:2], params)
    counts = Counter(sample.token_ids[0] for sample in samples)
    assert chance_of(counts, next_token_probs(smollm2.model, questions[1], 1.0)) > 1e-3


def test_smollm2_refresh_with_an_adapter_and_with_other_weights(smollm2, smollm2_sampler, questions):
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    stop_ids = [smollm2.chat.end_of_turn_id]
    peft = adapted(smollm2.model, 1, r=8)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter *= 0.05
    merged = merged_copy(peft, torch.float32)
    expected = ids(TorchSampler(merged, stop_ids=stop_ids).sample(questions, greedy))
    assert expected != ids(TorchSampler(smollm2.model, stop_ids=stop_ids).sample(questions, greedy))
    smollm2_sampler.refresh(peft)
    assert ids(smollm2_sampler.sample(questions, greedy)) == expected
    smollm2_sampler.refresh(smollm2.model)
    assert ids(smollm2_sampler.sample(questions, greedy)) != expected
    smollm2_sampler.refresh(merged)
    assert ids(smollm2_sampler.sample(questions, greedy)) == expected
