"""Log-probabilities in chunks: equal to the direct formula, in little memory, on any device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2ForSequenceClassification, MistralConfig, MistralForSequenceClassification

from alignment import logprobs
from alignment.errors import ModelError
from alignment.logprobs import (
    CHUNK_TOKENS,
    branch_scores,
    response_logprobs,
    response_stats,
    token_logprobs,
    token_stats,
    token_values,
)
from alignment.prefix_batch import Branch, Tree, collate

SMOLLM2_VOCAB = 49152


class AllocationWatch(TorchDispatchMode):
    """Of everything computed inside: the largest tensor, the most numbers alive at once, and the devices."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.devices: set[str] = set()
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        self.devices.add(tensor.device.type)
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes() // 4
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


def random_problem(tokens: int, vocab: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (M, H), output matrix (V, H) and targets (M,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)


def gradients(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * torch.linspace(-1.0, 2.0, len(result))).sum(), inputs, retain_graph=True)


# ------------------------------------------------------------------------------------------------------- values


def test_logprobs_and_entropy_of_two_tokens_worked_by_hand():
    # Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8. Entropy 1/8 ln 8 + 2/8 ln 4 + 5/8 ln 1.6 =
    # 0.2599302 + 0.3465736 + 0.2937523 = 0.9002561.
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    stats = token_stats(torch.tensor([[1.0], [0.0]]), weight, torch.tensor([2, 0]))
    assert stats.logprobs.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 3)], abs=1e-6)
    assert stats.entropy.tolist() == pytest.approx([0.9002561, math.log(3)], abs=1e-6)


def test_temperature_divides_the_logits():
    # At T = 2 the weights 1, 4, 9 become their roots 1, 2, 3.
    weight = torch.tensor([[1.0], [4.0], [9.0]]).log()
    hidden, targets = torch.ones(3, 1), torch.tensor([0, 1, 2])
    expected = [math.log(1 / 6), math.log(2 / 6), math.log(3 / 6)]
    assert token_logprobs(hidden, weight, targets, temperature=2.0).tolist() == pytest.approx(expected, abs=1e-6)
    stats = token_stats(hidden, weight, targets, temperature=2.0)
    entropy = -sum(p * math.log(p) for p in (1 / 6, 2 / 6, 3 / 6))
    assert stats.logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    assert stats.entropy.tolist() == pytest.approx([entropy] * 3, abs=1e-6)


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 20),
    vocab=st.integers(1, 30),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([0.5, 1.0, 1.3]),
)
def test_any_chunk_size_gives_the_direct_formula_with_its_gradients(tokens, vocab, chunk, temperature):
    hidden, weight, targets = random_problem(tokens, vocab)
    table = torch.log_softmax((hidden.double() @ weight.double().T) / temperature, dim=-1)
    expected = table.gather(1, targets[:, None])[:, 0]
    expected_entropy = torch.stack([-sum(p.exp() * p for p in row) for row in table])

    ours = token_logprobs(hidden, weight, targets, temperature=temperature, chunk_tokens=chunk)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    stats = token_stats(hidden, weight, targets, temperature=temperature, chunk_tokens=chunk)
    torch.testing.assert_close(stats.logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    assert not stats.logprobs.requires_grad and not stats.entropy.requires_grad


def test_gradients_under_autocast_are_those_of_bfloat16_products():
    hidden, weight, targets = random_problem(40, 300, width=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = token_logprobs(hidden, weight, targets, temperature=0.7, chunk_tokens=18)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float() / 0.7
    expected = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for found, wanted in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert found.dtype == torch.float32
        # Each is rounded to bfloat16 (one part in 256) once or twice, at places of its own.
        torch.testing.assert_close(found, wanted, atol=0.01 * wanted.abs().max().item(), rtol=0.02)


def test_a_frozen_output_matrix_gets_no_gradient():
    hidden, weight, targets = random_problem(5, 12)
    token_logprobs(hidden, weight.detach(), targets).sum().backward()
    alone = hidden.grad
    whole, expected, _ = random_problem(5, 12)
    token_logprobs(whole, expected, targets).sum().backward()
    assert torch.equal(alone, whole.grad)


def test_values_are_the_same_without_gradients():
    hidden, weight, targets = random_problem(10, 12)
    with torch.no_grad():
        without = token_logprobs(hidden, weight, targets, chunk_tokens=3)
    assert not without.requires_grad
    assert torch.equal(without, token_logprobs(hidden, weight, targets, chunk_tokens=3).detach())


def test_entropy_of_an_impossible_token_is_not_nan():
    weight = torch.tensor([[1.0], [1.0], [-math.inf]])
    stats = token_stats(torch.ones(1, 1), weight, torch.tensor([0]))
    assert stats.entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_batch_without_counted_tokens_has_no_logprobs(llama):
    batch = collate([[Tree([1, 2], [Branch([3], [False])])]])
    assert response_logprobs(llama, batch).shape == (0,)
    assert response_stats(llama, batch).entropy.shape == (0,)


def test_bfloat16_logits_are_normalised_in_float32():
    hidden, weight, targets = (x.bfloat16() if x.is_floating_point() else x for x in random_problem(8, 500))
    logits = (hidden @ weight.T).float()
    expected = torch.log_softmax(logits.double(), dim=-1).gather(1, targets[:, None])[:, 0]
    ours = token_logprobs(hidden, weight, targets, chunk_tokens=3)
    assert ours.dtype == torch.float32
    # A bfloat16 softmax would be off by 1e-2.
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def test_the_score_head_stays_in_float32_under_bfloat16_autocast(reward_llama):
    batch = collate([[Tree([1, 2], [Branch([3, 4]), Branch([5])])]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, values = branch_scores(reward_llama, batch), token_values(reward_llama, batch)
        all_five = torch.arange(5)
        hidden = logprobs.hidden_states_at(reward_llama, batch, torch.zeros_like(all_five), all_five).float()
    head = reward_llama.score.weight[0]
    # Last tokens in columns 3 and 4; tokens 3, 4, 5 predicted in columns 1, 2, 1. A bfloat16 head would be off by 1e-2.
    assert scores.dtype == values.dtype == torch.float32
    torch.testing.assert_close(scores, hidden[[3, 4]] @ head, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, hidden[[1, 2, 1]] @ head, atol=1e-5, rtol=1e-5)


def test_response_stats_hold_the_logprobs_of_response_logprobs(llama):
    batch = collate([[Tree([1, 2], [Branch([3, 4, 5]), Branch([6])])]])
    for temperature in (1.0, 0.7):
        stats = response_stats(llama, batch, temperature=temperature)
        plain = response_logprobs(llama, batch, temperature=temperature)
        torch.testing.assert_close(stats.logprobs, plain, atol=1e-6, rtol=1e-6)
        logits = llama(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, 1] / temperature
        table = torch.log_softmax(logits, dim=-1)
        assert stats.logprobs[0].item() == pytest.approx(table[3].item(), abs=1e-5)
        assert stats.entropy[0].item() == pytest.approx(-(table.exp() * table).sum().item(), abs=1e-5)


def test_a_wrapper_with_a_module_attribute_is_looked_through(llama):
    class Wrapper(nn.Module):
        """As DistributedDataParallel: the call goes through it, the model is below."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs: Tensor) -> Any:
            self.calls += 1
            return self.module(**inputs)

    wrapped = Wrapper(llama)
    batch = collate([[Tree([1, 2], [Branch([3, 4])])]])
    torch.testing.assert_close(response_logprobs(wrapped, batch), response_logprobs(llama, batch), atol=0, rtol=0)
    assert wrapped.calls == 1  # DDP and FSDP must see every forward


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("compute", [token_logprobs, token_stats])
def test_the_whole_logit_matrix_is_never_allocated(compute: Callable[..., Any]):
    tokens, chunk = 8 * 16, 16
    hidden, weight, targets = random_problem(tokens, SMOLLM2_VOCAB, width=4)
    with AllocationWatch() as watch:
        found = compute(hidden, weight, targets, chunk_tokens=chunk, temperature=0.9)
        if compute is token_logprobs:
            found.sum().backward()
            assert hidden.grad is not None and weight.grad is not None
    one_chunk = chunk * SMOLLM2_VOCAB
    assert watch.largest <= one_chunk
    # A handful of chunks at a time, backward pass and the (V, H) gradients included: no chunk is kept for later.
    assert watch.peak < 6 * one_chunk < tokens * SMOLLM2_VOCAB


def test_a_models_forward_and_backward_never_hold_the_whole_logit_matrix(make_llama):
    with torch.device("meta"):  # shapes without memory
        model = make_llama(SMOLLM2_VOCAB)
    rows = [[Tree(range(1, 200), [Branch(range(200, 900)), Branch(range(300, 700))])]]
    batch = collate(rows).to("meta")
    assert batch.num_targets == 1100 > 2 * CHUNK_TOKENS
    with AllocationWatch() as watch:
        response_logprobs(model, batch).sum().backward()
    assert watch.largest <= CHUNK_TOKENS * SMOLLM2_VOCAB < batch.num_targets * SMOLLM2_VOCAB
    assert watch.peak < 8 * CHUNK_TOKENS * SMOLLM2_VOCAB


def test_scoring_never_touches_the_vocabulary(make_reward_model):
    with torch.device("meta"):
        model = make_reward_model(SMOLLM2_VOCAB)
    batch = collate([[Tree(range(50), [Branch(range(30)), Branch(range(20))])]]).to("meta")
    with AllocationWatch() as watch:
        branch_scores(model, batch).sum().backward()
    embedding_gradient = SMOLLM2_VOCAB * model.config.hidden_size
    assert watch.largest == embedding_gradient


@pytest.mark.parametrize("attention", ["sdpa", "align_tree"])
@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_the_last_layer_computes_only_tokens_that_are_read(make_reward_model, attention, part):
    """7 real tokens in two rows: three branches end, and four tokens are predicted at three places."""
    model = make_reward_model()
    model.set_attn_implementation(attention)
    batch = collate([[Tree([1, 2], [Branch([3, 4]), Branch([5])])], [Tree([6], [Branch([7])])]])
    seen: list[list[int]] = []
    for layer in model.model.layers:
        module = layer.get_submodule(part)
        forward = module.forward
        module.forward = lambda x, forward=forward: seen[-1].append(x.shape[:-1].numel()) or forward(x)
    for compute in (branch_scores, token_values):
        seen.append([])
        compute(model, batch)
    everything = 7 if attention == "align_tree" else 10
    assert [counts[-1] for counts in seen] == [3, 3]
    assert all(set(counts[:-1]) == {everything} for counts in seen)


def test_a_decoder_whose_layers_have_another_name_computes_all_tokens():
    config = GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    found = branch_scores(model, collate([[Tree([1, 2], [Branch([3, 4]), Branch([5])])]]))
    expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in ([1, 2, 3, 4], [1, 2, 5])]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "align_tree"])
def test_a_window_shorter_than_a_row_is_refused(attention):
    """Rows within the window are right; the K responses of a row may well be longer than it together."""
    config = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6, num_labels=1, pad_token_id=0, attn_implementation=attention,
        initializer_range=0.2,
    )  # fmt: skip
    model = MistralForSequenceClassification(config).eval()
    found = branch_scores(model, collate([[Tree([1, 2], [Branch([3, 4, 5, 6]), Branch([7, 8])])]]))
    expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in ([1, 2, 3, 4, 5, 6], [1, 2, 7, 8])]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match="sees 6 tokens back, and a row has 7"):
        branch_scores(model, collate([[Tree([1, 2], [Branch([3, 4, 5, 6, 7])])]]))


# ------------------------------------------------------------------------------------------------------ devices


def test_a_policy_step_makes_no_tensor_on_another_device(make_llama):
    model = make_llama().to("meta")
    batch = collate([[Tree([1, 2], [Branch([3, 4]), Branch([5])])], [Tree([6], [Branch([7])])]]).to("meta")
    with AllocationWatch() as watch:
        result = response_logprobs(model, batch)
        result.sum().backward()
        stats = response_stats(model, batch)
    assert result.shape == stats.logprobs.shape == stats.entropy.shape == (4,)
    assert watch.devices == {"meta"}


@pytest.mark.parametrize(("compute", "size"), [(branch_scores, 3), (token_values, 4)])
def test_a_critic_step_makes_no_tensor_on_another_device(make_reward_model, compute, size):
    model = make_reward_model().to("meta")
    batch = collate([[Tree([1, 2], [Branch([3, 4]), Branch([5])])], [Tree([6], [Branch([7])])]]).to("meta")
    with AllocationWatch() as watch:
        result = compute(model, batch)
        result.sum().backward()
    assert result.shape == (size,)
    assert watch.devices == {"meta"}
