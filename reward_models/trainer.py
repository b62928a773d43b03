"""Reward-model training on transformers' Trainer: one row a pair, the prompt held once (Llama 2 Sec. 3.2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from alignment.data import load_pairs, pick, write_rows
from alignment.errors import DataError
from alignment.hardware import process_state
from alignment.logprobs import branch_scores
from alignment.models import add_lora, load_reward_model, save_model
from alignment.progress import ProgressBar
from alignment.runs import newest_checkpoint, open_run
from alignment.training import GlobalBatchMixin, LossFunction, MicroBatch, StepSchedule, training_arguments, use_run
from reward_models.config import MARGIN_TABLES, RewardModelConfig
from reward_models.evaluate import evaluate_pairs, scored_row
from reward_models.losses import centering_loss, ranking_loss, safety_auxiliary_loss
from reward_models.mixing import mix_rows
from reward_models.preferences import EncodedPair, EncodedPairs, apply_veto, encode_pairs, pair_batches

HELD_OUT_SCORES = "held_out_scores.jsonl"


class RewardTrainer(GlobalBatchMixin, Trainer):
    """transformers' Trainer on prefix-shared pairs."""


def run(config: RewardModelConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains a reward model, measures it on held-out pairs, saves it; returns the headline figures."""
    state = process_state(config.run.device)
    device, seed = state.device, config.run.seed
    train_data = load_pairs([*config.data.train, *config.data.mix_in], on_error=config.data.on_error)
    valid_data = load_pairs(config.data.valid, on_error=config.data.on_error)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources([*train_data.sources, *valid_data.sources])

    dtype = run_dir.dtype(device, config.model.dtype)
    loaded = load_reward_model(
        config.model.path,
        dtype=dtype if config.lora.r else torch.float32,
        chat_template=config.model.chat_template,
        new_head_seed=seed,
    )
    margins = MARGIN_TABLES[config.margin] if isinstance(config.margin, str) else config.margin
    limits = {
        "margins": margins,
        "unrated_margin": config.unrated_margin,
        "max_length": config.data.max_length,
        "overlong": config.data.overlong,
        "on_error": config.data.on_error,
    }
    by_source = train_data.by_source()
    mixed = mix_rows(
        {name: by_source[name] for name in config.data.train},
        {name: by_source[name] for name in config.data.mix_in},
        config.data.mix,
        seed=seed,
    )
    run_dir.note(mix={name: len(rows) for name, rows in mixed.items()})
    chosen_rows = pick([row for rows in mixed.values() for row in rows], config.data.max_rows, seed)
    kept, vetoed = apply_veto(chosen_rows, config.veto)
    train = encode_pairs(loaded.chat, kept, **limits)
    held_out, held_out_vetoed = apply_veto(pick(valid_data.rows, config.data.max_valid_rows, seed), config.veto)
    valid = encode_pairs(loaded.chat, held_out, **limits)
    run_dir.note(
        train={**_counts(train), "veto": {config.veto: vetoed}},
        valid={**_counts(valid), "veto": {config.veto: held_out_vetoed}},
    )
    if not train.encoded:
        raise DataError(f"data.train: no pair fits into data.max_length = {config.data.max_length} tokens.")

    model = add_lora(loaded.model, config.lora, is_reward_model=True, seed=seed).to(device)
    schedule = StepSchedule(len(train.encoded), config.train, seed=seed)
    budget = config.train.max_tokens_per_batch
    checkpoint = newest_checkpoint(run_dir) if resume else None
    arguments = training_arguments(run_dir, config, num_steps=len(schedule), dtype=dtype, device=device)
    trainer = RewardTrainer(model=model, args=TrainingArguments(**arguments), processing_class=loaded.tokenizer)
    safety_weight = config.safety_loss_weight
    if safety_weight is None:
        safety_weight = 1.0 if config.kind == "safety" else 0.0
    trainer.use_steps(
        schedule,
        lambda rows: pair_batches(train.encoded, rows, max_tokens=budget),
        pair_loss(safety_weight=safety_weight, centering_weight=config.centering_weight),
    )
    use_run(trainer, run_dir, f"rm ({config.kind})", "rm")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    title = f"rm ({config.kind}): held-out pairs"
    chosen, rejected = score_pairs(model, valid.encoded, max_tokens=budget, dtype=dtype, title=title)
    pairs = [encoded.pair for encoded in valid.encoded]
    wanted_precision = config.evaluation.wanted_precision
    report = evaluate_pairs(pairs, chosen, rejected, wanted_precision=wanted_precision) if pairs else {}
    if state.is_main_process:
        save_model(model, loaded, run_dir.model_dir)
        rows = (scored_row(*values) for values in zip(pairs, chosen, rejected, strict=True))
        write_rows(run_dir.path / HELD_OUT_SCORES, rows)
    state.wait_for_everyone()
    result = run_dir.finish(
        {
            "stage": "rm",
            "kind": config.kind,
            "accuracy": report["accuracy"]["value"] if report else None,
            "valid": report,
            "train_loss_last": run_dir.metrics.last("rm/loss"),
            "steps": len(schedule),
            "train_pairs": len(train.encoded),
            "vetoed_pairs": vetoed,
        }
    )
    run_dir.clear_checkpoints()
    return result


def pair_loss(*, safety_weight: float, centering_weight: float) -> LossFunction:
    """The loss of a micro-batch of pairs, summed over pairs (Llama 2 Sec. 3.2.2 and A.3.4)."""

    def loss(model: nn.Module, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = branch_scores(model, part.batch)  # (2 N,)
        chosen, rejected = scores[0::2], scores[1::2]
        ranking = ranking_loss(chosen, rejected, part.targets["margin"].to(scores.dtype))
        metrics = {
            "ranking_loss": ranking.sum(),
            "accuracy": ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum(),
            "score_mean": 0.5 * (chosen + rejected).sum(),
            "score_difference": (chosen - rejected).sum(),
        }
        total = ranking.sum()
        if safety_weight:
            safety = safety_auxiliary_loss(scores, part.targets["is_safe"], part.targets["labelled"])
            metrics["safety_loss"] = safety.sum()
            total = total + safety_weight * safety.sum()
        if centering_weight:
            total = total + centering_weight * centering_loss(chosen, rejected).sum()
        return total, metrics

    return loss


@torch.no_grad()
def score_pairs(
    model: nn.Module, pairs: Sequence[EncodedPair], *, max_tokens: int, dtype: torch.dtype, title: str
) -> tuple[list[float], list[float]]:
    """Raw scores of the chosen and of the rejected responses, in the order of the pairs."""
    device = next(model.parameters()).device
    model.eval()
    scores: dict[int, tuple[float, float]] = {}
    with ProgressBar(title, len(pairs), shown=PartialState().is_main_process) as bar:
        for part in pair_batches(pairs, range(len(pairs)), max_tokens=max_tokens):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                values = branch_scores(model, part.batch.to(device)).tolist()
            for row, chosen, rejected in zip(part.targets["rows"].tolist(), values[0::2], values[1::2], strict=True):
                scores[row] = (chosen, rejected)
            bar.advance(len(values) // 2)
    both = [scores[index] for index in range(len(pairs))]
    return [chosen for chosen, _ in both], [rejected for _, rejected in both]


def _counts(pairs: EncodedPairs) -> dict[str, Any]:
    return {"rows": len(pairs.encoded), "history_cut": pairs.cut, "dropped": pairs.dropped}
