"""Supervised fine-tuning on TRL's SFTTrainer: loss on response tokens only (Llama 2 Sec. 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import trl
from torch import nn

from alignment.chat import EncodedDialogue
from alignment.compilation import compile_layers
from alignment.data import pick
from alignment.errors import TrainingError
from alignment.hardware import compute_dtype, process_state
from alignment.isolation import isolated
from alignment.models import add_lora, load_chat_model, save_model
from alignment.runs import newest_checkpoint, open_run
from alignment.training import (
    BeforeTraining,
    GlobalBatchMixin,
    StepSchedule,
    training_arguments,
    use_run,
    warn_of_few_steps,
)
from sft.config import SFTConfig
from sft.evaluate import evaluate, response_loss, sample_answers
from sft.examples import dialogue_batches
from sft.prepare import counts, prepare_dialogues


class MaskedSFTTrainer(GlobalBatchMixin, trl.SFTTrainer):
    """TRL's trainer on ready token ids and masks; micro-batches and loss are ours."""


@isolated()
def run(config: SFTConfig, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tunes, evaluates before and after, saves; returns the headline figures."""
    state = process_state(config.run.device)
    device = state.device
    prepared = prepare_dialogues(config)
    chat, train, valid, seed = prepared.chat, prepared.train, prepared.valid, config.run.seed
    schedule = StepSchedule(len(train.encoded), config.train, seed=seed)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(prepared.sources)
    run_dir.note(train=counts(train), valid=counts(valid))
    if state.is_main_process:
        warn_of_few_steps(len(train.encoded), "dialogues", len(schedule), config.train.batch_size)

    dtype = compute_dtype(device, config.model.dtype)
    loaded = load_chat_model(
        config.model.path,
        dtype=dtype if config.lora.r else torch.float32,
        chat_template=config.model.chat_template,
        for_training=True,
    )
    model = add_lora(loaded.model, config.lora, is_reward_model=False, seed=seed)
    batching = {
        "max_tokens": config.train.max_tokens_per_batch,
        "row_tokens": min(prepared.max_length, config.train.max_tokens_per_batch) if config.train.packing else None,
    }
    checkpoint = newest_checkpoint(run_dir) if resume else None
    asked = pick(valid.dialogues, config.evaluation.num_answers, seed)

    def measure_before(model: nn.Module) -> None:
        if run_dir.noted("before") is None:
            run_dir.note(before=evaluate(model, valid, **batching, dtype=dtype, title="sft: held-out loss before"))
        sample_answers(model, chat, asked, config.evaluation, run_dir, dtype=dtype, part="before")

    arguments = training_arguments(run_dir, config, num_steps=len(schedule), dtype=dtype, device=device)
    arguments |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments["router_aux_loss_coef"] = 0.0  # a loss that balances experts would not know our masks
    text_config = model.config.get_text_config()
    balancing = getattr(text_config, "router_aux_loss_coef", None)
    trainer = MaskedSFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments),
        train_dataset=as_dataset(train.encoded),
        data_collator=list,
        processing_class=loaded.tokenizer,
    )
    if balancing is not None:
        text_config.router_aux_loss_coef = balancing  # TRL has written 0 into what is saved with the model
    if config.train.compile:
        compile_layers(model, trainer.args.device)
    trainer.use_steps(schedule, lambda rows: dialogue_batches(train.encoded, rows, **batching), response_loss)
    trainer.add_callback(BeforeTraining(measure_before))
    use_run(trainer, run_dir, "sft", "sft")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = evaluate(model, valid, **batching, dtype=dtype, title="sft: held-out loss after")
    if not math.isfinite(after.get("loss", 0.0)):
        raise TrainingError(
            f"{run_dir.path}: the held-out loss is {after['loss']} after the last step: lower optim.lr and start anew: "
            "run.overwrite=true, in a pipeline --from STAGE."
        )
    sample_answers(model, chat, asked, config.evaluation, run_dir, dtype=dtype, part="after")
    save_model(model, loaded, run_dir.model_dir)
    state.wait_for_everyone()
    before = run_dir.noted("before")
    result = run_dir.finish(
        {
            "stage": "sft",
            "valid_loss_before": before.get("loss"),
            "valid_loss_after": after.get("loss"),
            "valid_perplexity_before": before.get("perplexity"),
            "valid_perplexity_after": after.get("perplexity"),
            "valid_by_source": {"before": before.get("by_source"), "after": after.get("by_source")},
            "train_loss_last": run_dir.metrics.last("sft/loss"),
            "steps": len(schedule),
            "train_dialogues": len(train.encoded),
            "trained_tokens": sum(example.num_trained for example in train.encoded),
            "left_out": prepared.left_out,
        }
    )
    run_dir.clear_checkpoints()
    return result


def as_dataset(examples: Sequence[EncodedDialogue]) -> datasets.Dataset:
    """The rows as TRL knows them: labels are -100 where there is no loss."""
    labels = [
        [token if trained else -100 for token, trained in zip(e.input_ids, e.loss_mask, strict=True)] for e in examples
    ]
    return datasets.Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": labels})
