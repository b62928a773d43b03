"""Three optimizer steps of ours and of TRL's RewardTrainer, the same pairs in the same order, in float32."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
import trl
from parity import open_parity_run, steps_in_order
from transformers import TrainingArguments

from alignment.chat_formats import CHATML, chat_format
from alignment.dialogue import Message, PreferencePair
from alignment.runs import Run
from alignment.training import use_run
from reward_models.config import RewardModelConfig
from reward_models.preferences import EncodedPair, encode_pairs, pair_batches
from reward_models.trainer import RewardTrainer, pair_loss

BATCH_SIZE, NUM_STEPS = 4, 3
MARGINS = {"significantly_better": 1.0, "slightly_better": 1 / 3}


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(template=CHATML)


@pytest.fixture
def pairs(tokenizer):
    """Turns and answers of very different lengths, half of the pairs multi-turn."""
    found = []
    for index in range(BATCH_SIZE * NUM_STEPS):
        turns = [Message("user", "How are you today? " * (1 + index % 4))]
        if index % 2:
            turns += [Message("assistant", "Fine."), Message("user", f"And the fox number {index}?")]
        good, bad = "I am fine, thank you. " * (1 + index % 3), "Go away! " * (1 + index % 5)
        rating = ("significantly_better", "slightly_better")[index % 2]
        found.append(PreferencePair(prompt=tuple(turns), chosen=good.strip(), rejected=bad.strip(), rating=rating))
    return found


def encode(tokenizer: Any, pairs: list[PreferencePair], margins: dict[str, float]) -> list[EncodedPair]:
    options = {"unrated_margin": 0.0, "max_length": 512, "overlong": "drop"}
    encoded = encode_pairs(chat_format(tokenizer), pairs, margins=margins, **options).encoded
    assert len(encoded) == len(pairs)
    return encoded


def train_ours(model: Any, encoded: list[EncodedPair], values: dict[str, Any], run: Run) -> list[float]:
    schedule = steps_in_order(len(encoded), BATCH_SIZE)
    trainer = RewardTrainer(model=model, args=TrainingArguments(**values))
    loss = pair_loss(safety_weight=0.0, centering_weight=0.0)
    trainer.use_steps(schedule, lambda rows: pair_batches(encoded, rows, max_tokens=120), loss)
    use_run(trainer, run, "ours", "rm")
    trainer.train()
    return run.metrics.column("rm/loss")


def train_trl(
    model: Any, tokenizer: Any, rows: dict[str, list[Any]], values: dict[str, Any], **extra: Any
) -> list[float]:
    values = {**values, "per_device_train_batch_size": BATCH_SIZE, "train_sampling_strategy": "sequential"}
    arguments = trl.RewardConfig(**values, max_length=None, **extra)
    data = datasets.Dataset.from_dict(rows)
    trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("margins", [{}, MARGINS], ids=["no margin", "margin"])
def test_losses_and_weights_are_those_of_trl(margins, tokenizer, pairs, make_reward_model, tmp_path):
    encoded = encode(tokenizer, pairs, margins)
    run, values = open_parity_run(RewardModelConfig, tmp_path, num_steps=NUM_STEPS, kind="helpfulness")
    ours, theirs = (make_reward_model(len(tokenizer)) for _ in range(2))
    theirs.config.pad_token_id = tokenizer.pad_token_id
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    our_losses = train_ours(ours, encoded, values, run)

    rows = {
        f"{name}_ids": [[*pair.tree.trunk, *pair.tree.branches[index].ids] for pair in encoded]
        for index, name in enumerate(("chosen", "rejected"))
    }
    if margins:
        rows["margin"] = [pair.margin for pair in encoded]
    their_losses = train_trl(theirs, tokenizer, rows, values)

    assert len(our_losses) == NUM_STEPS
    assert our_losses == pytest.approx(their_losses, abs=1e-4)  # TRL logs four decimals
    trained = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, trained[name], atol=2e-6, rtol=1e-5, msg=name)
    assert max((parameter - before[name]).abs().max() for name, parameter in ours.named_parameters()) > 1e-4


def test_trls_own_tokenisation_scores_the_same_responses(tokenizer, pairs):
    """Its rows hold whole conversations; ours are the same ids but for what follows the end of the last turn."""
    chat = chat_format(tokenizer)
    for pair, encoded in zip(pairs, encode(tokenizer, pairs, {}), strict=True):
        for text, branch in zip((pair.chosen, pair.rejected), encoded.tree.branches, strict=True):
            turns = [{"role": m.role, "content": m.content} for m in (*pair.prompt, Message("assistant", text))]
            theirs = tokenizer.apply_chat_template(turns, return_dict=False)
            ours = [*encoded.tree.trunk, *branch.ids]
            assert theirs[: len(ours)] == ours
            assert ours[-1] == chat.end_of_turn_id and tokenizer.decode(theirs[len(ours) :]) == "\n"
