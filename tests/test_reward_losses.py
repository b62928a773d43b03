"""Reward models: losses by hand, the safety veto, pairs as batches, and scores equal to those of separate rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from alignment.chat import encode_prompt
from alignment.chat_formats import CHATML, chat_format
from alignment.dialogue import Message, PreferencePair
from alignment.errors import DataError, ModelError
from alignment.models import LoadedModel, load_reward_model
from reward_models.config import MARGIN_TABLES
from reward_models.losses import centering_loss, ranking_loss, safety_auxiliary_loss
from reward_models.preferences import EncodedPair, apply_veto, encode_pairs, pair_batches
from reward_models.score import Scorer, score
from reward_models.trainer import pair_loss

scores = st.floats(-30, 30)
LN2 = math.log(2)


def pair(**changes: Any) -> PreferencePair:
    values = {"prompt": (Message("user", "How are you?"),), "chosen": "I am fine, thank you.", "rejected": "Go away."}
    return PreferencePair(**{**values, **changes})


# ------------------------------------------------------------------------------------------------ ranking loss


def test_ranking_loss_of_ties_and_differences_worked_by_hand():
    # -ln sigmoid(0) = ln 2. A lead of ln 3: sigmoid = 3/4, loss ln(4/3); a lag of ln 3: sigmoid = 1/4, loss ln 4.
    chosen = torch.tensor([2.0, math.log(3), 0.0])
    rejected = torch.tensor([2.0, 0.0, math.log(3)])
    expected = [LN2, math.log(4 / 3), math.log(4)]
    assert ranking_loss(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_margin_asks_for_that_much_more_difference():
    # A lead of 1 against margins 1, 0 and 3: -ln sigmoid(0), (1), (-2) = 0.6931472, 0.3132617, 2.1269280.
    one, zero = torch.ones(3), torch.zeros(3)
    found = ranking_loss(one, zero, torch.tensor([1.0, 0.0, 3.0]))
    assert found.tolist() == pytest.approx([0.6931472, 0.3132617, 2.1269280], abs=1e-6)


def test_the_margin_tables_are_the_papers():
    # Llama 2 Table 27.
    order = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    assert [MARGIN_TABLES["small"][rating] for rating in order] == [1, 2 / 3, 1 / 3, 0]
    assert [MARGIN_TABLES["large"][rating] for rating in order] == [3, 2, 1, 0]
    assert MARGIN_TABLES["none"] == {}


def test_at_a_tie_the_scores_are_pushed_apart_with_half_a_unit_each():
    # d/dr_c of -ln sigmoid(r_c - r_r) = -(1 - sigmoid(0)) = -1/2.
    chosen, rejected = torch.tensor([3.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    ranking_loss(chosen, rejected).sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


@given(chosen=scores, rejected=scores, margin=st.floats(0, 3), shift=scores)
def test_ranking_loss_equals_the_plain_formula_and_sees_only_differences(chosen, rejected, margin, shift):
    c, r, m = (torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, margin))
    lead = chosen - rejected - margin
    expected = math.log1p(math.exp(-lead)) if lead > 0 else -lead + math.log1p(math.exp(lead))
    assert ranking_loss(c, r, m).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ranking_loss(c + shift, r + shift, m).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert ranking_loss(c, r, m).item() >= ranking_loss(c, r).item() - 1e-12


def test_extreme_scores_give_finite_losses_and_gradients():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = ranking_loss(chosen, -chosen.detach())
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2e4]
    assert chosen.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("shapes", [(3, 1, None), (3, 2, None), (3, 3, 1)])
def test_scores_of_different_shapes_are_refused(shapes):
    """Broadcasting would compare the wrong pairs. Where signatures are checked, that error comes first."""
    chosen, rejected, margin = (None if size is None else torch.zeros(size) for size in shapes)
    with pytest.raises((ValueError, TypeCheckError)):
        ranking_loss(chosen, rejected, margin)
    with pytest.raises(ValueError, match=r"must have one shape, got \(\(3,\), "):
        _unchecked(ranking_loss)(chosen, rejected, margin)


def _unchecked(function: Any) -> Any:
    """The function below its run-time shape check, as users run it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# ------------------------------------------------------------------------------------------ the auxiliary losses


def test_safety_loss_of_safe_unsafe_and_unlabelled_responses_worked_by_hand():
    # Score ln 3 is P(safe) = 3/4: -ln 3/4 where safe, -ln 1/4 where unsafe, nothing where nobody judged.
    raw = torch.full((4,), math.log(3))
    safe = torch.tensor([True, False, True, False])
    labelled = torch.tensor([True, True, False, False])
    expected = [math.log(4 / 3), math.log(4), 0.0, 0.0]
    assert safety_auxiliary_loss(raw, safe, labelled).tolist() == pytest.approx(expected, abs=1e-6)


def test_unlabelled_responses_contribute_nothing_even_where_they_are_nan():
    raw = torch.tensor([0.0, math.nan, math.inf], requires_grad=True)
    loss = safety_auxiliary_loss(raw, torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([LN2, 0.0, 0.0], abs=1e-6)
    assert raw.grad.tolist() == [-0.5, 0.0, 0.0]  # sigmoid(0) - 1


def test_centering_loss_is_the_squared_sum_of_both_scores():
    found = centering_loss(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, -2.0, -2.0]))
    assert found.tolist() == [4.0, 0.0, 9.0]


# ----------------------------------------------------------------------------------------------- veto and bins

VETOED = {
    "chosen_safe": False, "rejected_safe": True, "rating": "better", "margin": 0.5, "source": "s", "is_safety": True
}  # fmt: skip
OTHERS = [(True, False), (True, True), (False, False), (None, True), (False, None), (None, None)]


def test_the_veto_drops_pairs_whose_chosen_response_alone_is_unsafe():
    others = [pair(chosen_safe=chosen, rejected_safe=rejected) for chosen, rejected in OTHERS]
    kept, count = apply_veto([pair(**VETOED), *others], "drop")
    assert kept == others
    assert count == 1


def test_the_veto_may_flip_pairs_and_then_forgets_their_rating_and_margin():
    kept, count = apply_veto([pair(), pair(**VETOED)], "flip")
    assert kept[0] == pair()
    assert kept[1] == pair(
        chosen="Go away.",
        rejected="I am fine, thank you.",
        chosen_safe=True,
        rejected_safe=False,
        rating=None,
        margin=None,
        source="s",
        is_safety=True,
    )
    assert count == 1


def test_the_veto_may_be_waived_and_still_counts():
    pairs = [pair(**VETOED), pair()]
    assert apply_veto(pairs, "keep") == (pairs, 1)


# ------------------------------------------------------------------------------------------------ pairs as rows


@pytest.fixture
def chat(make_tokenizer):
    return chat_format(make_tokenizer(template=CHATML))


def encode(chat: Any, pairs: list[PreferencePair], **changes: Any) -> Any:
    options = {"margins": MARGIN_TABLES["small"], "unrated_margin": 0.25, "max_length": 512, "overlong": "truncate"}
    return encode_pairs(chat, pairs, **{**options, **changes})


def test_a_pair_is_one_tree_with_the_chosen_response_first(chat):
    (encoded,) = encode(chat, [pair(rating="better", chosen_safe=True)]).encoded
    assert encoded.tree.trunk == encode_prompt(chat, pair().prompt)
    assert [branch.ids for branch in encoded.tree.branches] == [
        chat.encode_response("I am fine, thank you."),
        chat.encode_response("Go away."),
    ]
    assert all(branch.ids[-1] == chat.end_of_turn_id for branch in encoded.tree.branches)
    assert encoded.margin == pytest.approx(2 / 3)
    assert (encoded.chosen_safe, encoded.rejected_safe) == (True, None)


def test_margins_follow_the_rating_and_the_table(chat):
    pairs = [pair(rating="significantly_better"), pair(rating="negligibly_better"), pair()]
    assert [e.margin for e in encode(chat, pairs).encoded] == [1.0, 0.0, 0.25]
    assert [e.margin for e in encode(chat, pairs, margins={}).encoded] == [0.0, 0.0, 0.0]
    own = {"significantly_better": 2.0, "better": 1.5, "slightly_better": 1.0, "negligibly_better": 0.5}
    assert [e.margin for e in encode(chat, pairs, margins=own).encoded] == [2.0, 0.5, 0.25]


def test_a_pairs_own_margin_goes_before_the_table_unless_margins_are_off(chat):
    pairs = [pair(rating="better", margin=1.5), pair(rating="better", margin=0), pair(margin=2)]
    assert [e.margin for e in encode(chat, pairs).encoded] == [1.5, 0.0, 2.0]
    assert [e.margin for e in encode(chat, pairs, margins={}).encoded] == [0.0, 0.0, 0.0]
    (part,) = pair_batches(encode(chat, pairs).encoded, [0, 1, 2], max_tokens=10_000)
    assert sorted(part.targets["margin"].tolist()) == [0.0, 1.5, 2.0]


def test_a_long_prompt_loses_old_turns_and_a_long_response_drops_its_pair(chat):
    history = (Message("user", "Napoleon?"), Message("assistant", "A general."), Message("user", "How are you?"))
    long, short = encode(chat, [pair(prompt=history)]).encoded[0], encode(chat, [pair()]).encoded[0]
    # Each branch must fit behind the trunk by itself: the two do not follow each other in the model's eyes.
    longest = len(short.tree.trunk) + max(len(branch.ids) for branch in short.tree.branches)
    needed = len(long.tree.trunk) + max(len(branch.ids) for branch in long.tree.branches)
    exact = encode(chat, [pair(prompt=history)], max_length=needed)
    assert (exact.encoded[0].tree, exact.cut, exact.dropped) == (long.tree, 0, {})
    cut = encode(chat, [pair(prompt=history)], max_length=needed - 1)
    assert (cut.encoded[0].tree, cut.cut, cut.dropped) == (short.tree, 1, {})
    assert encode(chat, [pair(prompt=history)], max_length=longest).cut == 1
    for options in ({"max_length": longest - 1}, {"max_length": needed - 1, "overlong": "drop"}):
        dropped = encode(chat, [pair(prompt=history)], **options)
        assert (dropped.encoded, dropped.cut, dropped.dropped) == ([], 0, {"too_long": 1})


def test_micro_batches_of_pairs_keep_scores_labels_and_margins_together(chat):
    pairs = [
        pair(chosen="Fine." * (n + 1), chosen_safe=(n % 2 == 0), rejected_safe=None if n < 3 else True, rating="better")
        for n in range(5)
    ]
    encoded: list[EncodedPair] = encode(chat, pairs).encoded
    indices = [4, 0, 3, 2]
    budget = 2 * encoded[4].tree.num_tokens
    lengths = [[len(branch.ids) for branch in each.tree.branches] for each in encoded]  # no two pairs have the same
    seen = []
    for part in pair_batches(encoded, indices, max_tokens=budget):
        assert part.batch.num_tokens <= budget
        rows = [lengths.index(both) for both in part.batch.branch_lengths.view(-1, 2).tolist()]
        assert part.weight == len(rows)
        last = part.batch.input_ids[part.batch.last_rows, part.batch.last_columns]
        assert last.tolist() == [chat.end_of_turn_id] * (2 * len(rows))
        labels = [label for row in rows for label in (pairs[row].chosen_safe, pairs[row].rejected_safe)]
        assert part.targets["labelled"].tolist() == [label is not None for label in labels]
        assert part.targets["is_safe"].tolist() == [label is True for label in labels]
        assert part.targets["margin"].tolist() == pytest.approx([2 / 3] * len(rows))
        seen += rows
    assert sorted(seen) == sorted(indices)
    assert len(seen) == 4


def test_the_loss_of_a_batch_is_the_sum_over_its_pairs(make_reward_model, chat):
    pairs = [
        pair(chosen_safe=True, rejected_safe=False, rating="better"),
        pair(rejected="No. Never!", chosen_safe=False),
    ]
    encoded = encode(chat, pairs).encoded
    model = make_reward_model(len(chat.tokenizer))
    (part,) = pair_batches(encoded, [0, 1], max_tokens=1000)
    loss, metrics = pair_loss(safety_weight=0.5, centering_weight=0.1)(model, part)
    total = ranking = wins = 0.0
    for each in encoded:
        ids = ([*each.tree.trunk, *branch.ids] for branch in each.tree.branches)
        c, r = (model(input_ids=torch.tensor([row])).logits.item() for row in ids)
        ranking += math.log1p(math.exp(-(c - r - each.margin)))
        total += 0.1 * (c + r) ** 2
        wins += c > r
        for value, label in ((c, each.chosen_safe), (r, each.rejected_safe)):
            if label is not None:
                total += 0.5 * math.log1p(math.exp(-value if label else value))
    assert loss.item() == pytest.approx(total + ranking, abs=1e-4)
    assert metrics["ranking_loss"].item() == pytest.approx(ranking, abs=1e-4)
    assert metrics["accuracy"].item() == wins


# ------------------------------------------------------------------------------------------------------ scoring


PROMPTS = [(Message("user", "How are you?"),), (Message("user", "What did Napoleon write to the queen?"),)]
RESPONSES = [["I am fine.", "Go away.", "Fine, thank you, and you?"], ["A letter."]]


def separate_scores(loaded: LoadedModel) -> list[list[float]]:
    """The score head on the last token of each response, one row a response, through the bare decoder."""
    found = []
    with torch.no_grad():
        for prompt, texts in zip(PROMPTS, RESPONSES, strict=True):
            rows = [encode_prompt(loaded.chat, prompt) + loaded.chat.encode_response(text) for text in texts]
            hidden = [loaded.model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
            found.append([loaded.model.score(state.float()).item() for state in hidden])
    return found


@pytest.mark.parametrize("max_tokens", [1, 70, 8192])
def test_scores_of_responses_that_share_a_row_equal_those_of_separate_rows(reward_folder, max_tokens):
    scorer = Scorer.load(reward_folder, dtype="float32", max_tokens=max_tokens)
    found = score(scorer, PROMPTS, RESPONSES)
    for ours, expected in zip(found, separate_scores(load_reward_model(reward_folder)), strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)


def test_a_bfloat16_reward_model_scores_with_its_float32_head(reward_folder):
    scorer = Scorer.load(reward_folder, dtype="bfloat16")
    assert scorer.model.score.weight.dtype == torch.float32
    loaded = load_reward_model(reward_folder)
    for ours, expected in zip(scorer.score(PROMPTS, RESPONSES), separate_scores(loaded), strict=True):
        assert ours == pytest.approx(expected, abs=0.15)  # bfloat16 keeps 8 bits of a score of order 1 to 4


def test_a_prompt_that_leaves_no_room_for_its_response_is_refused(reward_folder):
    scorer = Scorer.load(reward_folder, dtype="float32")
    with pytest.raises(DataError, match="prompt 2 with its longest response is over 512 tokens"):
        scorer.score([PROMPTS[0], PROMPTS[1]], [["ok"], ["x!" * 600]])


def test_a_chat_model_is_no_reward_model(tmp_path, make_llama, make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML)
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    with pytest.raises(ModelError, match=r"not a reward model \(LlamaForCausalLM\)"):
        Scorer.load(str(tmp_path / "chat"), dtype="float32")
