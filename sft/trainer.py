"""Supervised fine-tuning on TRL's SFTTrainer: loss on response tokens only (Llama 2 Sec. 3.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import trl
from accelerate import PartialState
from torch import Tensor, nn

from alignment.chat import EncodedDialogue
from alignment.data import load_dialogues, pick
from alignment.errors import DataError
from alignment.hardware import process_state
from alignment.logprobs import response_logprobs
from alignment.models import add_lora, load_chat_model, load_chat_of, save_model
from alignment.progress import ProgressBar
from alignment.runs import newest_checkpoint, open_run
from alignment.training import GlobalBatchMixin, MicroBatch, StepSchedule, training_arguments, use_run
from sft.config import SFTConfig
from sft.examples import Examples, dialogue_batches, make_examples


class MaskedSFTTrainer(GlobalBatchMixin, trl.SFTTrainer):
    """TRL's trainer on ready token ids and masks; micro-batches and loss are ours."""


def run(config: SFTConfig, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tunes, evaluates before and after, saves; returns the headline figures."""
    state = process_state(config.run.device)
    device = state.device
    train_data = load_dialogues(config.data.train, on_error=config.data.on_error)
    valid_data = load_dialogues(config.data.valid, on_error=config.data.on_error)
    chat, context_length = load_chat_of(config.model.path, config.model.chat_template)
    limits = {
        "max_length": min(config.data.max_length, context_length),
        "overlong": config.data.overlong,
        "on_error": config.data.on_error,
    }
    seed = config.run.seed
    train = make_examples(chat, pick(train_data.rows, config.data.max_rows, seed), **limits)
    valid = make_examples(chat, pick(valid_data.rows, config.data.max_valid_rows, seed), **limits)
    if not train.encoded:
        raise DataError(f"data.train: no dialogue fits into {limits['max_length']} tokens (data.max_length).")
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources([*train_data.sources, *valid_data.sources])
    run_dir.note(train=_counts(train), valid=_counts(valid))

    dtype = run_dir.dtype(device, config.model.dtype)
    loaded = load_chat_model(
        config.model.path,
        dtype=dtype if config.lora.r else torch.float32,
        chat_template=config.model.chat_template,
    )
    model = add_lora(loaded.model, config.lora, is_reward_model=False, seed=seed).to(device)
    schedule = StepSchedule(len(train.encoded), config.train, seed=seed)
    budget = config.train.max_tokens_per_batch
    checkpoint = newest_checkpoint(run_dir) if resume else None
    before = run_dir.noted("before")
    if before is None:
        before = evaluate(model, valid, max_tokens=budget, dtype=dtype, title="sft: held-out loss before")
        run_dir.note(before=before)
    arguments = training_arguments(run_dir, config, num_steps=len(schedule), dtype=dtype, device=device)
    trainer = MaskedSFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=_as_dataset(train.encoded),
        data_collator=list,
        processing_class=loaded.tokenizer,
    )
    trainer.use_steps(schedule, lambda rows: dialogue_batches(train.encoded, rows, max_tokens=budget), response_loss)
    use_run(trainer, run_dir, "sft", "sft")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = evaluate(model, valid, max_tokens=budget, dtype=dtype, title="sft: held-out loss after")
    if state.is_main_process:
        save_model(model, loaded, run_dir.model_dir)
    state.wait_for_everyone()
    result = run_dir.finish(
        {
            "stage": "sft",
            "valid_loss_before": before.get("loss"),
            "valid_loss_after": after.get("loss"),
            "valid_loss_by_source": {"before": before.get("by_source"), "after": after.get("by_source")},
            "train_loss_last": run_dir.metrics.last("sft/loss"),
            "steps": len(schedule),
            "train_dialogues": len(train.encoded),
            "trained_tokens": sum(example.num_trained for example in train.encoded),
        }
    )
    run_dir.clear_checkpoints()
    return result


def response_loss(model: nn.Module, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood summed over the trained tokens, in nats (Llama 2 Sec. 3.1: prompts carry no loss)."""
    logprobs = response_logprobs(model, part.batch)
    return -logprobs.sum(), {}


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Examples, *, max_tokens: int, dtype: torch.dtype, title: str = "held-out loss"
) -> dict[str, Any]:
    """Mean loss per trained token, overall and by source; an empty dict where there are no examples."""
    if not examples.encoded:
        return {}
    device = next(model.parameters()).device
    model.eval()
    sums: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    by_source = defaultdict(list)
    for index, source in enumerate(examples.sources):
        by_source[source].append(index)
    with ProgressBar(title, len(examples.encoded), shown=PartialState().is_main_process) as bar:
        for source, indices in by_source.items():
            for part in dialogue_batches(examples.encoded, indices, max_tokens=max_tokens):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    loss, _ = response_loss(model, part.to(device))
                sums[source] += loss.item()
                tokens[source] += part.batch.num_targets
                bar.advance(part.batch.num_branches)
    return {
        "loss": sum(sums.values()) / sum(tokens.values()),
        "by_source": {source: sums[source] / tokens[source] for source in sums},
        "tokens": sum(tokens.values()),
    }


def _as_dataset(examples: Sequence[EncodedDialogue]) -> datasets.Dataset:
    """The rows as TRL knows them: labels are -100 where there is no loss."""
    labels = [
        [token if trained else -100 for token, trained in zip(e.input_ids, e.loss_mask, strict=True)] for e in examples
    ]
    return datasets.Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": labels})


def _counts(examples: Examples) -> dict[str, Any]:
    return {"rows": len(examples.encoded), "history_cut": examples.cut, "dropped": examples.dropped}
