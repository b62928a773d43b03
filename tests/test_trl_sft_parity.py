"""Three optimizer steps of ours and of TRL's SFTTrainer, the same rows in the same order, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from parity import open_parity_run, steps_in_order

from alignment.chat import EncodedDialogue
from alignment.chat_formats import CHATML, chat_format
from alignment.dialogue import Dialogue, Message
from alignment.runs import Run
from alignment.training import use_run
from sft.config import SFTConfig
from sft.evaluate import response_loss
from sft.examples import dialogue_batches, make_examples
from sft.trainer import MaskedSFTTrainer, as_dataset

BATCH_SIZE, NUM_STEPS = 4, 3


class RecordingTrainer(trl.SFTTrainer):
    """TRL's trainer, keeping every micro-batch's share of its step's loss unrounded."""

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.shares = [*getattr(self, "shares", []), loss.item()]
        return loss


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(template=CHATML)


@pytest.fixture
def dialogues() -> list[Dialogue]:
    """Questions and answers of very different lengths; a third has turns before them, which carry no loss."""
    found = []
    for index in range(BATCH_SIZE * NUM_STEPS):
        turns = [Message("user", "How are you today? " * (1 + index % 4)), Message("assistant", "Fine.")]
        turns = turns if index % 3 == 0 else []
        turns += [Message("user", f"And the fox number {index}?")]
        turns += [Message("assistant", "It jumps over the lazy dog. " * (1 + index % 5))]
        found.append(Dialogue(messages=tuple(turns), train_on="last"))
    return found


def prompt_completion(dialogue: Dialogue) -> dict[str, str]:
    """The row as TRL's users write it, in ChatML by hand."""
    turns = [f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in dialogue.messages[:-1]]
    answer = f"{dialogue.messages[-1].content}<|im_end|>"
    return {"prompt": f"{''.join(turns)}<|im_start|>assistant\n", "completion": answer}


def open_sft_run(tmp_path: Path) -> tuple[Run, dict[str, Any]]:
    run, values = open_parity_run(SFTConfig, tmp_path, num_steps=NUM_STEPS)
    return run, {**values, "max_length": None}


def train_ours(
    model: Any, tokenizer: Any, encoded: list[EncodedDialogue], values: dict[str, Any], run: Run, *, packed: bool
) -> list[float]:
    schedule = steps_in_order(len(encoded), BATCH_SIZE)
    trainer = MaskedSFTTrainer(
        model=model,
        args=trl.SFTConfig(**values, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=as_dataset(encoded),
        data_collator=list,
        processing_class=tokenizer,
    )
    sizes = {"max_tokens": 300, "row_tokens": 300 if packed else None}
    trainer.use_steps(schedule, lambda rows: dialogue_batches(encoded, rows, **sizes), response_loss)
    use_run(trainer, run, "ours", "sft")
    trainer.train()
    return run.metrics.column("sft/loss")


def train_trl(
    model: Any, tokenizer: Any, dialogues: list[Dialogue], values: dict[str, Any], *, micro_batch: int
) -> tuple[list[float], list[dict[str, list[int]]]]:
    """The losses of all steps, and the rows as TRL tokenised them."""
    sizes = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": BATCH_SIZE // micro_batch}
    arguments = trl.SFTConfig(
        **{**values, **sizes}, completion_only_loss=True, packing=False, train_sampling_strategy="sequential"
    )
    rows = datasets.Dataset.from_list([prompt_completion(dialogue) for dialogue in dialogues])
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    count = BATCH_SIZE // micro_batch
    shares = [trainer.shares[start : start + count] for start in range(0, len(trainer.shares), count)]
    return list(map(sum, shares)), list(trainer.train_dataset)


@pytest.mark.parametrize("packed", [False, True], ids=["one a row", "packed"])
@pytest.mark.parametrize("micro_batch", [BATCH_SIZE, BATCH_SIZE // 2], ids=["one batch", "two micro-batches"])
def test_losses_and_weights_are_those_of_trl(packed, micro_batch, tokenizer, dialogues, make_llama, tmp_path):
    encoded = make_examples(chat_format(tokenizer), dialogues, max_length=512, overlong="drop").encoded
    assert len(encoded) == len(dialogues)
    run, values = open_sft_run(tmp_path)
    ours, theirs = (make_llama(len(tokenizer)) for _ in range(2))
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    our_losses = train_ours(ours, tokenizer, encoded, values, run, packed=packed)
    their_losses, rows = train_trl(theirs, tokenizer, dialogues, values, micro_batch=micro_batch)

    for one, row in zip(encoded, rows, strict=True):  # ours has the newline after the last turn, without loss
        assert one.input_ids[:-1] == row["input_ids"] and not one.loss_mask[-1]
        labels = [token if trained else -100 for token, trained in zip(one.input_ids, one.loss_mask, strict=True)]
        assert labels[:-1] == row["labels"]
    assert len(our_losses) == NUM_STEPS
    assert our_losses == pytest.approx(their_losses, abs=5e-6)
    trained = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, trained[name], atol=2e-6, rtol=1e-5, msg=name)
    assert max((parameter - before[name]).abs().max() for name, parameter in ours.named_parameters()) > 1e-4
