"""`train.compile`: fewer kernels, the same numbers, the same names of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from alignment.compilation import compile_layers
from alignment.config import LoraSection
from alignment.errors import ConfigError
from alignment.logprobs import response_logprobs
from alignment.models import add_lora, load_chat_model
from alignment.prefix_batch import Branch, Tree, collate

BATCHES = (
    [Tree([5, 6, 7, 8], [Branch([9, 10, 11]), Branch([12, 13])])],
    [Tree([5, 6], [Branch([9, 10, 11, 14, 15, 16])]), Tree([7, 8, 9], [Branch([10])])],
)


def learned(model: torch.nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities and gradients on batches of unlike sizes, then log-probabilities without gradients."""
    found = []
    for trees in BATCHES:
        logprobs = response_logprobs(model, collate([trees]))
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found.append(logprobs.detach())
    with torch.no_grad():
        found.append(response_logprobs(model, collate([BATCHES[1]])))
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.e2e
@pytest.mark.parametrize("rank", [0, 4])
def test_compiled_layers_compute_the_same(rank):
    plain = add_lora(load_chat_model("toy").model, LoraSection(r=rank), is_reward_model=False, seed=0)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch._dynamo.utils.counters.clear()
    (expected, expected_grads), (found, grads) = learned(plain), learned(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= (6 if rank else 2)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys() and len(grads) > 4
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected_grads[name], atol=1e-5, rtol=1e-4, msg=name)
    copied = copy.deepcopy(compiled)  # a sampler's merged copy is one: it is not compiled, and computes the same
    torch.testing.assert_close(learned(copied)[0][2], expected[2], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_compiled_is_said_before_training(monkeypatch):
    model = load_chat_model("toy").model
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train\.compile: no-such-compiler"):
        compile_layers(model)
    monkeypatch.delenv("CXX")
    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16))
    with pytest.raises(ConfigError, match="where a gpt2 has its layers"):
        compile_layers(small)
