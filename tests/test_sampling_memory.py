"""Responses side by side where `sampling.max_rows` does not say: by worked examples, and by the engine's own choice."""

from collections import deque

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, OPTConfig

from alignment.models import load_chat_model
from alignment.plan.shapes import model_config
from alignment.sampling import SamplingParams, memory, torch_engine
from alignment.sampling.cohort import Cohort
from alignment.sampling.memory import KV_SHARE, free_memory, rows_that_fit
from alignment.sampling.prompt_cache import Prompts
from alignment.sampling.torch_engine import TorchSampler

BF16 = torch.bfloat16
# Llama 2 7B in bfloat16: 32 layers x 32 heads of 128 numbers x keys and values x 2 bytes = 524,288 bytes a token.
LLAMA, TOKEN = "llama-2-7b", 524_288


def rows(free: int | None, *, candidates: int, prompt_tokens: int = 2048, new_tokens: int = 256) -> int:
    sizes = {"candidates": candidates, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    return rows_that_fit(free, model_config(LLAMA), BF16, **sizes)


@pytest.mark.parametrize(
    ("free", "candidates", "expected"),
    [
        (None, 1, 128),  # a CPU
        (52 * 10**9, 1, 30),  # 36.4e9 of it; a prompt with its response has 2304 tokens, 1.208e9 bytes: 30.1
        (66 * 10**9, 16, 224),  # 46.2e9; 2048 + 16 x 256 tokens are 3.221e9: 14.3 prompts
        (4 * 10**9, 16, 12),  # 2.8e9: no whole prompt. Without the prompt's 1.074e9, 1.726e9 / 0.134e9 = 12.9
        (10**12, 1, 512),  # never more
        (10**12, 48, 480),  # of whole prompts neither: 10 x 48
        (10**12, 1000, 512),  # a prompt with more responses than that comes in lots
        (10**9, 4, 1),  # not even a prompt: one, and the device will say that it is too much
        (-(10**9), 4, 1),  # a plan in which nothing is left
    ],
)
def test_rows_of_worked_examples(free, candidates, expected):
    assert rows(free, candidates=candidates) == expected


def test_space_grows_by_sixteen_tokens_at_a_time():
    room = int((100 + 16) * TOKEN / 0.7) + 1
    assert rows(room, candidates=1, prompt_tokens=100, new_tokens=3) == 1
    assert rows(2 * room, candidates=1, prompt_tokens=100, new_tokens=16) == 2
    assert rows(2 * room, candidates=1, prompt_tokens=100, new_tokens=17) == 1


def test_what_torch_keeps_without_using_it_is_free(monkeypatch):
    device = torch.device("cuda", 0)
    assert free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: (30, 80) if at == device else None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda at: 45 if at == device else None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda at: 25 if at == device else None)
    assert free_memory(device) == 50


def test_the_engine_takes_as_many_as_fit_unless_it_is_told(monkeypatch):
    """Widths of the decoding steps: one row each token, all prompts of one length."""
    model = load_chat_model("toy").model
    shapes: list[int] = []
    hook = lambda _m, _a, inputs: shapes.append(inputs["input_ids"].shape[1])  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    prompts, params = [[5 + n, 9, 11] for n in range(12)], SamplingParams(max_new_tokens=6, seed=3)

    def drawn(**options: int) -> list[list[list[int]]]:
        shapes.clear()
        found = TorchSampler(model, stop_ids=[], **options).sample(prompts, params)
        return [[sample.token_ids for sample in of_prompt] for of_prompt in found]

    expected = drawn()
    assert shapes[1:] == [12] * 5  # on a CPU all at once
    one = memory.kv_bytes(model.config, torch.float32, prompts=1, rows=1, prompt_tokens=3, new_tokens=6)
    monkeypatch.setattr(torch_engine, "free_memory", lambda _device: int(4.5 * one / KV_SHARE))
    assert drawn() == expected
    assert set(shapes[1:6]) == {4} and len(shapes) == 3 * 6
    drawn(max_rows=6)
    assert shapes[1:6] == [6] * 5


@pytest.mark.parametrize("config", [GPT2Config, OPTConfig, GPTNeoXConfig])
def test_models_without_groups_of_heads_have_a_width_too(config):
    shape = config()
    assert memory.kv_width(shape) == shape.hidden_size


def test_prompts_that_stay_for_one_long_response_keep_others_out():
    """Two prompts of four responses fit; each still has one, and so much room is taken that the third has to wait."""
    params = SamplingParams(num_candidates=4, max_new_tokens=16)
    lengths = [100, 100]
    cohort = Cohort(Prompts(lengths, torch.device("cpu")), [0, 1], most_columns=16)
    rows = [torch_engine._Row(0, 0) for _ in range(4)]
    running = torch_engine._Running(cohort, rows[:2], torch.zeros(2, 16), frozenset(), 16)
    taken = 2 * 100 + 2 * 16
    third = torch_engine._Unit(tuple(range(100)), rows)
    for room, enters in ((taken + 100 + 4 * 16, True), (taken + 100 + 4 * 16 - 1, False)):
        units = torch_engine._next_units(deque([third]), [running], params, 8, room)
        assert units == ([third] if enters else [])
    assert torch_engine._next_units(deque([third]), [], params, 8, 10) == [third]  # alone it may try
    assert torch_engine._next_units(deque([third]), [running], params, 8, None) == [third]
