"""Attention in blocks: which blocks a batch has, what falls back to SDPA, bfloat16, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from alignment import tree_attention
from alignment.errors import ModelError
from alignment.logprobs import branch_scores, hidden_states_at, response_logprobs
from alignment.models import load_chat_model, load_reward_model
from alignment.prefix_batch import Branch, Tree, collate
from alignment.tree_attention import TREE_ATTENTION, some_queries, tree_blocks

# Two rows: a trunk of two with branches of two and one, and a packed dialogue of three; a tree with no branch's trunk.
ROWS = [
    [Tree([1, 2], [Branch([3, 4]), Branch([5])]), Tree([], [Branch([6, 7, 8])])],
    [Tree([9], [Branch([10, 11])])],
]


def shown(bias):
    return ["".join("x" if value == 0 else "." for value in row) for row in bias.tolist()]


def test_a_small_tree_is_one_block_whose_branches_are_blind_to_each_other():
    first, second, third = tree_blocks(collate(ROWS), torch.float32)
    assert [(b.start, b.stop, b.keys) for b in (first, second, third)] == [
        (0, 5, ((0, 5),)), (5, 8, ((5, 8),)), (8, 11, ((8, 11),)),
    ]  # fmt: skip
    assert shown(first.bias) == ["x....", "xx...", "xxx..", "xxxx.", "xx..x"]
    assert shown(second.bias) == ["x..", "xx.", "xxx"]


def test_a_large_tree_has_a_block_for_its_trunk_and_one_for_each_branch(monkeypatch):
    monkeypatch.setattr(tree_attention, "BLOCK_OVERHEAD", 0)
    blocks = tree_blocks(collate(ROWS[:1]), torch.float32)
    assert [(b.start, b.stop, b.keys) for b in blocks] == [
        (0, 2, ((0, 2),)), (2, 4, ((0, 2), (2, 4))), (4, 5, ((0, 2), (4, 5))), (5, 8, ((5, 8),)),
    ]  # fmt: skip
    assert shown(blocks[1].bias) == ["x.", "xx"]  # of its own two tokens: the trunk is seen by all
    assert shown(blocks[2].bias) == ["x"]


def test_a_long_stretch_is_cut_into_equal_pieces_that_see_what_is_before_them(monkeypatch):
    monkeypatch.setattr(tree_attention, "BLOCK_OVERHEAD", 0)
    monkeypatch.setattr(tree_attention, "BLOCK_QUERIES", 2)
    trunk, branch = [1, 2, 3], [4, 5, 6, 7, 8]
    blocks = tree_blocks(collate([[Tree(trunk, [Branch(branch), Branch([9])])]]), torch.float32)
    assert [(b.start, b.stop, b.keys) for b in blocks] == [
        (0, 1, ((0, 1),)), (1, 3, ((0, 3),)),
        (3, 4, ((0, 3), (3, 4))), (4, 6, ((0, 3), (3, 6))), (6, 8, ((0, 3), (3, 8))),
        (8, 9, ((0, 3), (8, 9))),
    ]  # fmt: skip
    assert [shown(b.bias) for b in blocks[:2]] == [["x"], ["x.", "xx"]]  # of the last keys: those before are seen


def test_some_queries_keep_their_keys_and_their_rows_of_the_bias():
    blocks = tree_blocks(collate(ROWS), torch.float32)
    queries = some_queries(blocks, torch.tensor([9, 4, 3, 10]))
    assert queries.places.tolist() == [3, 4, 9, 10]
    assert [(b.start, b.stop, b.keys) for b in queries.blocks] == [(0, 2, ((0, 5),)), (2, 4, ((8, 11),))]
    assert [shown(b.bias) for b in queries.blocks] == [["xxxx.", "xx..x"], ["xx.", "xxx"]]


@pytest.mark.parametrize("pieces", [2, 128])
def test_hidden_states_and_gradients_do_not_depend_on_what_is_left_out(pieces, monkeypatch):
    """The last layer's queries are those of the tokens read: the same values and gradients as from all tokens."""
    monkeypatch.setattr(tree_attention, "BLOCK_OVERHEAD", 0)
    monkeypatch.setattr(tree_attention, "BLOCK_QUERIES", pieces)
    batch = collate(ROWS)
    rows, columns = torch.tensor([0, 0, 1, 0]), torch.tensor([3, 7, 2, 4])
    everywhere = (batch.tree_ids >= 0).nonzero(as_tuple=True)
    order = [place.tolist() for place in torch.stack(everywhere, dim=1)]
    picked = [order.index(place.tolist()) for place in torch.stack([rows, columns], dim=1)]
    found = []
    for places, take in (((rows, columns), range(4)), (everywhere, picked)):
        model = load_reward_model("toy", new_head_seed=0).model
        model.get_decoder().double()  # the order of sums differs
        hidden = hidden_states_at(model, batch, *places)[list(take)]
        hidden.pow(2).sum().backward()
        found.append((hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-8)


def test_kinds_of_attention_that_are_not_computed_are_refused():
    query, module = torch.zeros(1, 1, 1, 4), load_chat_model("toy").model.model.layers[0].self_attn
    with pytest.raises(ModelError, match="its attention has softcap, which is not supported"):
        tree_attention.tree_attention(module, query, query, query, None, softcap=50.0)


def test_layers_that_hand_nothing_on_to_their_attention_are_refused():
    """All tokens of the flat row would see each other."""
    config = StableLmConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation=TREE_ATTENTION,
    )  # fmt: skip
    with pytest.raises(ModelError, match="stablelm: its layers do not hand on"):
        response_logprobs(StableLmForCausalLM(config).eval(), collate(ROWS))


def test_neighbouring_trees_without_trunks_are_not_joined():
    """Both are branch 1 of their tree."""
    blocks = tree_blocks(collate([[Tree([], [Branch([1, 2])]), Tree([], [Branch([3, 4])])]]), torch.float32)
    assert [(b.start, b.stop) for b in blocks] == [(0, 2), (2, 4)]


def test_models_are_loaded_with_it_and_saved_without(tmp_path):
    loaded = load_chat_model("toy")
    assert loaded.model.config._attn_implementation == TREE_ATTENTION
    loaded.model.save_pretrained(tmp_path)
    assert TREE_ATTENTION not in (tmp_path / "config.json").read_text()


def test_other_calls_of_the_model_are_those_of_sdpa():
    """Sampling, transformers' own generate and padded batches with a mask of two axes."""
    ours, plain = load_chat_model("toy").model, load_chat_model("toy").model
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(ours(input_ids=ids, **options).logits, plain(input_ids=ids, **options).logits)
    generated = [model.generate(ids[:1], do_sample=False, max_new_tokens=5) for model in (ours, plain)]
    assert generated[0].tolist() == generated[1].tolist()


@pytest.mark.parametrize("overhead", [0, 10**6])
def test_bfloat16_arithmetic_stays_near_float32(overhead, monkeypatch):
    monkeypatch.setattr(tree_attention, "BLOCK_OVERHEAD", overhead)
    model, batch = load_reward_model("toy", new_head_seed=0).model, collate(ROWS)
    with torch.no_grad():
        exact = branch_scores(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = branch_scores(model, batch)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)
    assert not rounded.equal(exact)


def test_what_all_keys_share_costs_no_precision_in_bfloat16():
    """A common part of 30 times the keys' spread: scores rounded with it would be off by tenths."""
    blocks = tree_blocks(collate(ROWS), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 11, 16, generator=generator) for heads in (4, 2, 2))
    q = q / 4
    shared = 30 * torch.randn(2, 1, 16, generator=generator)
    apply = tree_attention._BlockAttention.apply
    plain = apply(q.bfloat16(), k, v.bfloat16(), blocks)
    shifted = apply(q.bfloat16(), k + shared, v.bfloat16(), blocks)
    exact = apply(q.bfloat16().float(), k, v.bfloat16().float(), [replace(b, bias=b.bias.float()) for b in blocks])
    torch.testing.assert_close(plain.float(), exact, atol=0.03, rtol=0)
    torch.testing.assert_close(shifted.float(), exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("overhead", [0, tree_attention.BLOCK_OVERHEAD])
def test_a_tree_is_rounded_as_alone_whatever_stands_beside_it(monkeypatch, overhead):
    """In bfloat16, with neighbours whose keys have quite another part in common."""
    monkeypatch.setattr(tree_attention, "BLOCK_OVERHEAD", overhead)
    blocks = tree_blocks(collate(ROWS), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 11, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    k[:, 5:] += 50
    alone = tree_attention._BlockAttention.apply(q[:, :5], k[:, :5], v[:, :5], [b for b in blocks if b.stop <= 5])
    beside = tree_attention._BlockAttention.apply(q, k, v, blocks)
    assert torch.equal(beside[:, :5], alone)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(tree_attention, "BLOCK_OVERHEAD", 0)
    blocks = tree_blocks(collate(ROWS), torch.float64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(heads, 11, 4, dtype=torch.float64, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    assert torch.autograd.gradcheck(lambda *x: tree_attention._BlockAttention.apply(*x, blocks), (q, k, v))


def test_attention_dropout_is_refused():
    model = load_chat_model("toy").model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match="set attention_dropout to 0"):
        response_logprobs(model, collate(ROWS))
