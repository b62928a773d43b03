"""Trunk-and-branches rows: masks and positions by definition, and numbers equal to those of separate rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alignment import tree_attention
from alignment.config import LoraSection
from alignment.logprobs import branch_scores, response_logprobs, token_values, unwrap
from alignment.models import add_lora, recompute_activations
from alignment.prefix_batch import Branch, PrefixBatch, Tree, collate, even_groups, micro_batches, pack

VOCAB = 64
Rows = Sequence[Sequence[Tree]]

tokens = st.integers(min_value=0, max_value=VOCAB - 1)


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    ids = draw(st.lists(tokens, min_size=1, max_size=5))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Branch(ids, mask)


trees = st.builds(Tree, st.lists(tokens, max_size=5), st.lists(branches(), min_size=1, max_size=4))
tree_rows = st.lists(st.lists(trees, min_size=1, max_size=3), min_size=1, max_size=3)

# A trunk with unequal branches and masks; several trees in a row; an empty trunk; a row that needs padding.
EXAMPLE: Rows = [
    [Tree([5, 6, 7], [Branch([8, 9, 10, 11]), Branch([12], [True]), Branch([13, 14, 15], [False, True, True])])],
    [Tree([], [Branch([20, 21, 22], [False, False, True])]), Tree([23], [Branch([24]), Branch([24, 25])])],
]


def separate_rows(rows: Rows) -> list[tuple[list[int], int, list[bool]]]:
    """(ids, length of the trunk, counted ids) of every branch, as a row of its own."""
    found = []
    for row in rows:
        for tree in row:
            for branch in tree.branches:
                mask = branch.mask if branch.mask is not None else [True] * len(branch.ids)
                counts = [False] * len(tree.trunk) + list(mask)
                counts[0] = False  # nothing stands before it
                found.append(([*tree.trunk, *branch.ids], len(tree.trunk), counts))
    return found


def separate_logprobs(model: nn.Module, rows: Rows) -> Tensor:
    values = []
    for ids, _, counts in separate_rows(rows):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        table = torch.log_softmax(logits, dim=-1)
        values += [table[place - 1, ids[place]] for place, counted in enumerate(counts) if counted]
    return torch.stack(values) if values else torch.zeros(0)


def separate_scores(model: nn.Module, rows: Rows) -> Tensor:
    """transformers' own classifier on one unpadded row a branch."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0] for ids, _, _ in separate_rows(rows)])


def separate_values(model: nn.Module, rows: Rows) -> Tensor:
    values, inner = [], unwrap(model)
    for ids, _, counts in separate_rows(rows):
        hidden = inner.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        values += [inner.score(hidden[place - 1])[0] for place, counted in enumerate(counts) if counted]
    return torch.stack(values) if values else torch.zeros(0)


def assert_same_values_and_gradients(model: nn.Module, ours: Callable[[], Tensor], reference: Callable[[], Tensor]):
    """To 1e-5: float32 sums of a few dozen terms of unit order, taken in another order."""
    gradients, values = [], []
    for compute in (ours, reference):
        model.zero_grad()
        result = compute()
        values.append(result.detach())
        if len(result):
            # Unequal weights, so that exchanged elements show; a mean, so that the gradients are of unit order.
            (result * torch.linspace(-1.0, 2.0, len(result))).mean().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()})
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module", params=["sdpa", "whole trees", "blocks"])
def attention(request):
    """transformers' attention under a dense mask, and ours on flat rows, with small trees whole and in blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "BLOCK_OVERHEAD", 0 if request.param == "blocks" else 10**6)
        yield "sdpa" if request.param == "sdpa" else tree_attention.TREE_ATTENTION


@pytest.fixture(scope="module")
def policy(make_llama, attention):
    model = make_llama(VOCAB)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def critic(make_reward_model, attention):
    model = make_reward_model(VOCAB)
    model.set_attn_implementation(attention)
    return model


# --------------------------------------------------------------------------------------- equal to separate rows


@settings(max_examples=20)
@given(rows=tree_rows)
def test_logprobs_and_their_gradients_equal_those_of_separate_rows(policy, rows):
    batch = collate(rows)
    assert_same_values_and_gradients(
        policy, lambda: response_logprobs(policy, batch), lambda: separate_logprobs(policy, rows)
    )


@settings(max_examples=20)
@given(rows=tree_rows)
def test_scores_and_their_gradients_equal_those_of_separate_rows(critic, rows):
    batch = collate(rows)
    assert_same_values_and_gradients(
        critic, lambda: branch_scores(critic, batch), lambda: separate_scores(critic, rows)
    )


@settings(max_examples=20)
@given(rows=tree_rows)
def test_values_and_their_gradients_equal_those_of_separate_rows(critic, rows):
    batch = collate(rows)
    assert_same_values_and_gradients(critic, lambda: token_values(critic, batch), lambda: separate_values(critic, rows))


def test_the_mean_loss_of_the_example_equals_transformers_own(policy):
    """labels of -100 outside the response: the loss that every fine-tuning script uses, one row at a time."""
    total = 0.0
    for ids, _, counts in separate_rows(EXAMPLE):
        labels = [token if counted else -100 for token, counted in zip(ids, counts, strict=True)]
        loss = policy(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += loss.item() * sum(counts)
    # Counted tokens by hand: 4 + 1 + 2 in the first row, 1 + 1 + 2 in the second.
    assert -response_logprobs(policy, collate(EXAMPLE)).mean().item() == pytest.approx(total / 11, abs=1e-5)


@pytest.fixture(params=["plain", "checkpointed"])
def lora_policy(request, make_llama, attention):
    model = make_llama(VOCAB)
    model.set_attn_implementation(attention)
    return _with_adapters(model, request.param == "checkpointed", is_reward_model=False)


@pytest.fixture(params=["plain", "checkpointed"])
def lora_critic(request, make_reward_model, attention):
    model = make_reward_model(VOCAB)
    model.set_attn_implementation(attention)
    return _with_adapters(model, request.param == "checkpointed", is_reward_model=True)


def _with_adapters(model: nn.Module, checkpointed: bool, *, is_reward_model: bool) -> nn.Module:
    if checkpointed:
        recompute_activations(model)
    adapted = add_lora(model, LoraSection(r=4, alpha=8), is_reward_model=is_reward_model, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts at zero: the adapters would not show
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted.train()  # transformers checkpoints in training mode only


def test_adapters_and_gradient_checkpointing_leave_logprobs_equal(lora_policy):
    batch = collate(EXAMPLE)
    assert_same_values_and_gradients(
        lora_policy, lambda: response_logprobs(lora_policy, batch), lambda: separate_logprobs(lora_policy, EXAMPLE)
    )


def test_adapters_and_gradient_checkpointing_leave_values_equal(lora_critic):
    batch = collate(EXAMPLE)
    assert_same_values_and_gradients(
        lora_critic, lambda: token_values(lora_critic, batch), lambda: separate_values(lora_critic, EXAMPLE)
    )


def test_adapters_and_gradient_checkpointing_leave_scores_equal(lora_critic):
    batch = collate(EXAMPLE)
    assert_same_values_and_gradients(
        lora_critic, lambda: branch_scores(lora_critic, batch), lambda: separate_scores(lora_critic, EXAMPLE)
    )


def test_gradient_checkpointing_of_a_full_model_leaves_logprobs_equal(make_llama, attention):
    model = make_llama(VOCAB).train()
    model.set_attn_implementation(attention)
    recompute_activations(model)
    batch = collate(EXAMPLE)
    assert_same_values_and_gradients(
        model, lambda: response_logprobs(model, batch), lambda: separate_logprobs(model, EXAMPLE)
    )


def test_branches_do_not_see_each_other(policy):
    trunk, kept = [5, 6, 7], Branch([8, 9, 10])
    first = response_logprobs(policy, collate([[Tree(trunk, [Branch([11, 12]), kept])]]))[2:]
    second = response_logprobs(policy, collate([[Tree(trunk, [Branch([40, 41, 42, 43]), kept])]]))[4:]
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------- padding


@settings(max_examples=15)
@given(rows=tree_rows, junk=tokens)
def test_what_stands_in_the_padding_never_matters(policy, rows, junk):
    batch = collate(rows)
    padding = batch.tree_ids < 0
    other = replace(
        batch,
        input_ids=batch.input_ids.masked_fill(padding, junk),
        position_ids=batch.position_ids.masked_fill(padding, 3),
        branch_ids=batch.branch_ids.masked_fill(padding, 1),
    )
    assert_same_values_and_gradients(
        policy, lambda: response_logprobs(policy, batch), lambda: response_logprobs(policy, other)
    )


def test_more_padding_changes_nothing(policy, critic):
    batch = collate(EXAMPLE)
    fill = {"input_ids": 9, "position_ids": 0, "tree_ids": -1, "branch_ids": 0}
    longer = replace(
        batch, **{name: nn.functional.pad(getattr(batch, name), (0, 7), value=value) for name, value in fill.items()}
    )
    torch.testing.assert_close(response_logprobs(policy, batch), response_logprobs(policy, longer), atol=1e-5, rtol=0)
    torch.testing.assert_close(branch_scores(critic, batch), branch_scores(critic, longer), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------- the tensors, by definition


def test_the_example_of_the_module_is_collated_as_its_docstring_says():
    batch = collate([[Tree([1, 2], [Branch([3, 4]), Branch([5])])]])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    # 3 and 5 are predicted at the trunk's end (column 1), 4 at the column of 3.
    assert batch.target_ids.tolist() == [3, 4, 5]
    assert batch.target_sources.tolist() == [0, 1, 0]
    assert (batch.source_rows.tolist(), batch.source_columns.tolist()) == ([0, 0], [1, 2])
    assert batch.target_branches.tolist() == [0, 0, 1]
    assert batch.target_offsets.tolist() == [0, 1, 0]
    assert batch.last_columns.tolist() == [3, 4]
    assert batch.branch_lengths.tolist() == [2, 1]
    assert (batch.num_branches, batch.num_targets, batch.num_tokens) == (2, 3, 5)


@settings(max_examples=60)
@given(rows=tree_rows)
def test_mask_and_positions_follow_their_definition(rows):
    batch = collate(rows)
    length = batch.input_ids.shape[1]
    for row_index, row in enumerate(rows):
        columns = []  # (tree, branch or None for the trunk, position, token)
        for tree_index, tree in enumerate(row):
            columns += [(tree_index, None, place, token) for place, token in enumerate(tree.trunk)]
            for branch_index, branch in enumerate(tree.branches):
                start = len(tree.trunk)
                columns += [(tree_index, branch_index, start + i, token) for i, token in enumerate(branch.ids)]
        assert batch.input_ids[row_index, : len(columns)].tolist() == [token for *_, token in columns]
        assert batch.position_ids[row_index, : len(columns)].tolist() == [place for _, _, place, _ in columns]
        expected = [[i == j for j in range(length)] for i in range(length)]
        for i, (tree_i, branch_i, _, _) in enumerate(columns):
            for j, (tree_j, branch_j, _, _) in enumerate(columns[: i + 1]):
                expected[i][j] = tree_i == tree_j and (branch_j is None or branch_i == branch_j)
        assert batch.attention_mask[row_index, 0].tolist() == expected


@settings(max_examples=60)
@given(rows=tree_rows)
def test_every_counted_token_is_found_once_with_its_place(rows):
    batch = collate(rows)
    expected = []
    for index, (ids, trunk, counts) in enumerate(separate_rows(rows)):
        expected += [(ids[place], index, place - trunk) for place, counted in enumerate(counts) if counted]
    found = zip(batch.target_ids.tolist(), batch.target_branches.tolist(), batch.target_offsets.tolist(), strict=True)
    assert list(found) == expected
    assert batch.branch_lengths.tolist() == [len(ids) - trunk for ids, trunk, _ in separate_rows(rows)]
    last = batch.input_ids[batch.last_rows, batch.last_columns].tolist()
    assert last == [ids[-1] for ids, _, _ in separate_rows(rows)]


def test_by_branch_puts_each_value_at_its_place_in_its_branch():
    batch = collate(EXAMPLE)
    values = torch.arange(1.0, 12.0, requires_grad=True)
    # Branches 0, 1, 2 of the first row and 3, 4, 5 of the second; -1 where nothing counts.
    assert batch.by_branch(values, fill=-1.0).tolist() == [
        [1, 2, 3, 4],
        [5, -1, -1, -1],
        [-1, 6, 7, -1],
        [-1, -1, 8, -1],
        [9, -1, -1, -1],
        [10, 11, -1, -1],
    ]
    assert batch.target_mask().int().tolist() == [
        [1, 1, 1, 1],
        [1, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 0],
    ]
    (batch.by_branch(values)[0] * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad.tolist() == [1, 10, 100, 1000] + [0] * 7


@settings(max_examples=40)
@given(rows=tree_rows)
def test_by_branch_and_target_mask_agree_with_separate_rows(rows):
    batch = collate(rows)
    separate = separate_rows(rows)
    width = max(len(ids) - trunk for ids, trunk, _ in separate)
    expected = [(counts[trunk:] + [False] * width)[:width] for _, trunk, counts in separate]
    assert batch.target_mask().tolist() == expected
    table = batch.by_branch(batch.target_ids.float(), fill=-1.0)
    for line, (ids, trunk, counts) in zip(table.tolist(), separate, strict=True):
        kept = [float(t) if c else -1.0 for t, c in zip(ids[trunk:], counts[trunk:], strict=True)]
        assert line == kept + [-1.0] * (width - len(kept))


def test_the_first_token_below_an_empty_trunk_is_not_counted_even_after_another_tree():
    batch = collate([[Tree([1], [Branch([2])]), Tree([], [Branch([3, 4])])]])
    assert batch.target_ids.tolist() == [2, 4]


def test_an_empty_branch_and_an_empty_batch_are_refused():
    with pytest.raises(ValueError, match="branch 1 of tree 0 in row 0 is empty"):
        collate([[Tree([1], [Branch([2]), Branch([])])]])
    with pytest.raises(ValueError, match="no rows"):
        collate([])


def test_a_mask_of_another_length_than_its_branch_is_refused():
    with pytest.raises(ValueError, match="zip"):
        collate([[Tree([1], [Branch([2, 3], [True])])]])


def test_to_moves_every_tensor():
    moved: PrefixBatch = collate(EXAMPLE).to("meta")
    assert {getattr(moved, field.name).device.type for field in fields(moved)} == {"meta"}
    assert moved.attention_mask.device.type == "meta"


# --------------------------------------------------------------------------------------- packing, micro-batches


def test_pack_takes_the_longest_first_and_the_first_row_with_room():
    # 5 | 4 | 3 joins the 5 (8 of 8) | 2 and 2 join the 4 (8 of 8)
    assert pack([5, 4, 3, 2, 2], 8) == [[0, 2], [1, 3, 4]]
    assert pack([], 8) == []


def test_pack_gives_an_item_over_the_capacity_a_row_of_its_own():
    assert pack([3, 12, 4], 8) == [[1], [2, 0]]


@given(lengths=st.lists(st.integers(1, 20), max_size=30), capacity=st.integers(1, 25))
def test_pack_respects_the_capacity_loses_nothing_and_opens_no_row_in_vain(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in row) for row in rows]
    assert all(load <= capacity or len(row) == 1 for load, row in zip(loads, rows, strict=True))
    assert all(one + other > capacity for one, other in combinations(loads, 2))


def test_even_groups_of_a_worked_example():
    # 9 | 4 | then 3 to the 4, 2 to the 4 + 3 (7 < 9): 9 and 9.
    assert even_groups([3, 9, 4, 2], workers=2, max_tokens=10) == [[1], [2, 0, 3]]
    # An item over the limit sets it: two groups of 9 again. Two groups of 7 are over 6, so four.
    assert even_groups([3, 9, 4, 2], workers=2, max_tokens=4) == [[1], [2, 0, 3]]
    assert even_groups([3, 5, 4, 2], workers=2, max_tokens=6) == [[1], [2], [0], [3]]
    assert even_groups([], workers=2, max_tokens=6) == []


@given(lengths=st.lists(st.integers(1, 20), max_size=30), workers=st.integers(1, 4), limit=st.integers(1, 60))
def test_even_groups_cover_every_index_once_within_the_limit(lengths, workers, limit):
    groups = even_groups(lengths, workers=workers, max_tokens=limit)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in group) for group in groups]
    assert all(0 < size <= max(limit, *lengths) for size in sizes)
    # No group is larger than the smallest by more than the last item it took.
    assert all(size - lengths[group[-1]] <= min(sizes) for size, group in zip(sizes, groups, strict=True))
    assert len(groups) % workers == 0 or len(groups) == len(lengths)


def test_micro_batches_of_a_worked_example():
    # Longest first: 9 alone (2 x 9 > 10); 4 with 3 (2 x 4 <= 10, but 3 x 4 > 10); 2.
    assert list(micro_batches([3, 9, 4, 2], lambda length: length, max_tokens=10)) == [[1], [2, 0], [3]]


@given(lengths=st.lists(st.integers(1, 20), max_size=30), budget=st.integers(1, 60))
def test_micro_batches_cover_every_index_once_within_the_budget(lengths, budget):
    groups = list(micro_batches(lengths, lambda length: length, max_tokens=budget))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    padded = [len(group) * max(lengths[index] for index in group) for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(padded, groups, strict=True))
    flat = [lengths[index] for group in groups for index in group]
    assert flat == sorted(lengths, reverse=True)
    # No group could have taken the next item.
    assert all((len(group) + 1) * lengths[group[0]] > budget for group in groups[:-1])
