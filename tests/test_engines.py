"""Which engine a configuration opens, and what can be said of vLLM without it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.config import ModelSection, SamplingSection
from alignment.errors import ConfigError, SamplerError
from alignment.model_checks import Reach
from alignment.sampling import Sample, SamplingParams, engines, vllm_engine
from alignment.sampling.engines import open_sampler
from alignment.sampling.torch_engine import TorchSampler
from alignment.sampling.vllm_engine import VllmSampler
from sft import conversation

CPU = torch.device("cpu")
TOY = ModelSection(path="toy", dtype="float32")
PROMPTS = [[5, 6], [9], [5, 6]]


def opened(**settings: object):
    return open_sampler(TOY, SamplingSection(max_new_tokens=4, **settings), CPU, max_prompt_length=20)


def test_the_built_in_engine_is_the_default_and_does_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with opened() as sampler:
        assert isinstance(sampler, TorchSampler)
        ((sample,),) = sampler.sample([[5]], SamplingParams(max_new_tokens=3))
        assert len(sample.token_ids) <= 3


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with (
        pytest.raises(SamplerError, match=r'cannot be imported \(.*\)\. .*-e "\.\[vllm\]".*make test-vllm'),
        opened(engine="vllm"),
    ):
        pass


def test_without_vllm_the_built_in_engine_samples_where_that_is_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with opened(engine="vllm", fall_back=True) as sampler:
        assert isinstance(sampler, TorchSampler)
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert "cannot be imported" in said
    assert "torch engine instead (sampling.fall_back)" in said


def test_several_processes_are_refused_also_with_fall_back(monkeypatch):
    monkeypatch.setattr(engines, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ConfigError, match="tensor_parallel_size"), opened(engine="vllm", fall_back=True):
        pass


# ----------------------------------------------------------------------------------------- with a stand-in for vLLM


@dataclass
class FakeEngine:
    """Finishes its newest request at each step, candidates in reverse; a token tells its request's seed."""

    arguments: dict[str, Any]
    requests: dict[str, Any] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    shut_down: int = 0
    breaks: bool = False

    @property
    def model_config(self) -> SimpleNamespace:
        return SimpleNamespace(max_model_len=self.arguments["max_model_len"])

    @property
    def engine_core(self) -> SimpleNamespace:
        return SimpleNamespace(shutdown=lambda: setattr(self, "shut_down", self.shut_down + 1))

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any, lora_request: object) -> None:
        assert prompt["type"] == "token" and lora_request is None
        self.requests[request_id] = params

    def step(self) -> list[SimpleNamespace]:
        if self.breaks:
            raise RuntimeError("first line\nout of memory\n")
        request_id, params = self.requests.popitem()
        completions = [
            SimpleNamespace(
                index=index,
                token_ids=(params.seed + index,),
                logprobs=[{params.seed + index: SimpleNamespace(logprob=-0.5)}],
                finish_reason="length",
            )
            for index in reversed(range(params.n))
        ]
        return [SimpleNamespace(request_id=request_id, outputs=completions)]

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def reset_prefix_cache(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """vLLM's names over engines that are collected here."""
    started: list[FakeEngine] = []

    class LLM:
        def __init__(self, model: str, *, dtype: object = "auto", enforce_eager: bool = False, **kwargs: Any) -> None:
            if kwargs.get("max_num_seqs") == 0:
                raise ValueError("first line\nno room")
            torch.set_num_threads = lambda _: None  # as vLLM does on a CPU
            self.llm_engine = FakeEngine({"model": model, "dtype": dtype, "enforce_eager": enforce_eager, **kwargs})
            started.append(self.llm_engine)

    parts = {name: ModuleType(name) for name in ("vllm", "vllm.sampling_params", "vllm.distributed", "vllm.platforms")}
    known = ("max_num_seqs", "max_model_len", "kv_cache_memory_bytes", "skip_tokenizer_init", "logprobs_mode")
    parts["vllm"].LLM, parts["vllm"].EngineArgs = LLM, make_dataclass("EngineArgs", known)
    parts["vllm"].SamplingParams = SimpleNamespace
    parts["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)
    parts["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    parts["vllm.distributed"].cleanup_dist_env_and_memory = lambda: None
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    return started


def test_settings_become_arguments_of_vllm_and_the_users_replace_them(fake):
    with opened(engine="vllm", max_rows=7) as sampler:
        assert isinstance(sampler, VllmSampler)
    with opened(engine="vllm", max_rows=7, vllm={"dtype": "float16", "max_num_seqs": 3, "max_model_len": 9}):
        pass
    ours, theirs = (engine.arguments for engine in fake)
    assert (ours["dtype"], ours["max_num_seqs"], ours["max_model_len"]) == (torch.float32, 7, 24)
    assert (theirs["dtype"], theirs["max_num_seqs"], theirs["max_model_len"]) == ("float16", 3, 9)
    assert ours["logprobs_mode"] == "processed_logprobs"
    assert [engine.shut_down for engine in fake] == [1, 1]


@pytest.mark.parametrize(("reach", "length"), [(20, 20), (30, 24)])
def test_vllm_is_told_no_longer_context_than_the_model_computes_as_the_trainer_does(fake, monkeypatch, reach, length):
    monkeypatch.setattr(vllm_engine, "reach_of", lambda _config: Reach(reach, "longrope"))
    with opened(engine="vllm"):
        assert fake[0].arguments["max_model_len"] == length


def test_the_number_of_threads_can_be_set_while_vllm_runs(fake):
    """By the stages that follow, and by the threads that score what it sampled."""
    set_num_threads = torch.set_num_threads
    with opened(engine="vllm"):
        assert torch.set_num_threads is set_num_threads


def test_vllm_is_not_started_on_more_than_the_models_context(fake):
    with open_sampler(TOY, SamplingSection(engine="vllm"), CPU, max_prompt_length=2048):
        assert fake[0].arguments["max_model_len"] == 512


def test_an_argument_that_vllm_does_not_have_is_named(fake):
    with pytest.raises(SamplerError, match=r"sampling\.vllm: .* no argument max_num_sequences"):
        opened(engine="vllm", vllm={"max_num_sequences": 3, "dtype": "float16"}).__enter__()
    with pytest.raises(SamplerError, match=r"sampling\.vllm: logprobs_mode cannot be changed"):
        opened(engine="vllm", vllm={"logprobs_mode": "raw_logprobs"}).__enter__()


def test_a_start_that_fails_says_why_in_one_line(fake):
    with pytest.raises(SamplerError, match=r"^vLLM cannot start on \S+: no room\. Its settings: sampling\.vllm\.$"):
        opened(engine="vllm", vllm={"max_num_seqs": 0}).__enter__()
    with opened(engine="vllm", vllm={"max_num_seqs": 0}, fall_back=True) as sampler:
        assert isinstance(sampler, TorchSampler)


@pytest.fixture
def sampler(fake: list[FakeEngine]) -> Iterator[VllmSampler]:
    with opened(engine="vllm") as sampler:
        yield sampler


def test_results_come_in_the_order_of_prompts_and_candidates_however_they_finish(sampler):
    heard: list[int] = []
    prompts: dict[int, list[Sample]] = {}
    params = SamplingParams(num_candidates=3, max_new_tokens=1)
    assert sampler.sample(PROMPTS, params, on_progress=heard.append, on_prompt=prompts.__setitem__) == [[], [], []]
    assert heard == [3, 3, 3]
    assert list(prompts) == [2, 1, 0]
    found = sampler.sample(PROMPTS, params)
    assert found == [prompts[index] for index in range(3)]
    for of_prompt in found:
        (first,) = of_prompt[0].token_ids
        assert of_prompt == [Sample([first + index], [-0.5], "length") for index in range(3)]


def test_a_prompt_given_again_goes_on_with_its_own_seeds(sampler):
    def seeds(prompts: list[list[int]], num_candidates: int = 3, seed: int = 0) -> list[list[int]]:
        params = SamplingParams(num_candidates=num_candidates, max_new_tokens=1, seed=seed)
        return [[sample.token_ids[0] for sample in of_prompt] for of_prompt in sampler.sample(prompts, params)]

    first, other, again = seeds(PROMPTS)
    assert len({*first, *other, *again}) == 9
    assert seeds(PROMPTS) == [first, other, again]
    assert seeds([[9], [5, 6]]) == [other, first]
    assert seeds([[5, 6]], num_candidates=6) == [first + again]
    assert not {*first, *other, *again} & {number for of_prompt in seeds(PROMPTS, seed=1) for number in of_prompt}
    assert all(0 <= number < 2**63 for number in first + other)


def test_greedy_samples_are_asked_for_once_and_given_as_often_as_wanted(sampler, fake):
    [of_prompt] = sampler.sample([[5]], SamplingParams(num_candidates=3, max_new_tokens=1, temperature=0))
    assert of_prompt[0] == of_prompt[1] == of_prompt[2]
    of_prompt[0].token_ids.append(7)
    assert len(of_prompt[1].token_ids) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_has_not_finished_is_dropped_where_a_callback_raises(sampler, fake, error):
    def stop(index: int, samples: list[Sample]) -> None:
        raise error

    with pytest.raises(error):
        sampler.sample(PROMPTS, SamplingParams(max_new_tokens=1), on_prompt=stop)
    assert len(fake[0].aborted) == 2
    assert not fake[0].requests
    assert len(sampler.sample([[5]], SamplingParams(max_new_tokens=1))) == 1


def test_a_breakdown_is_told_in_one_line(sampler, fake):
    fake[0].breaks = True
    with pytest.raises(SamplerError, match=r"^vLLM broke down while sampling: out of memory\.$"):
        sampler.sample(PROMPTS, SamplingParams(max_new_tokens=1))
    assert len(fake[0].aborted) == 3


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_sampled(sampler, fake):
    with pytest.raises(SamplerError, match="a prompt of 21 tokens and 4 new ones are more than the 24"):
        sampler.sample([[5], [5] * 21], SamplingParams(max_new_tokens=4))
    assert not fake[0].requests
    assert len(sampler.sample([[5] * 20], SamplingParams(max_new_tokens=4))) == 1


def test_a_closed_sampler_says_so_and_may_be_closed_again(sampler, fake):
    sampler.close()
    sampler.close()
    assert fake[0].shut_down == 1
    with pytest.raises(SamplerError, match="closed"):
        sampler.sample([[5]], SamplingParams(max_new_tokens=1))


def test_whoever_keeps_a_speaker_does_not_keep_its_model(monkeypatch):
    """`eval kind=gatt` opens one policy after the other, and `distil` a reward model after it."""
    models, opened = [], conversation.open_sampler

    @contextmanager
    def remember(*args, **options):
        with opened(*args, **options) as sampler:
            models.append(weakref.ref(sampler.model))
            yield sampler

    monkeypatch.setattr(conversation, "open_sampler", remember)
    options = {"device": CPU, "max_prompt_length": 20, "seed": 0}
    for _ in range(2):
        assert all(model() is None for model in models)
        with conversation.Speaker.open(TOY, SamplingSection(max_new_tokens=4), **options) as speaker:
            assert models[-1]() is not None
    assert speaker is not None and models[-1]() is None
