"""Reward-model training on transformers' Trainer: one row a pair, the prompt held once (Llama 2 Sec. 3.2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from alignment.compilation import compile_layers
from alignment.data import write_rows
from alignment.distributed import for_all, map_over_processes
from alignment.errors import TrainingError
from alignment.hardware import compute_dtype, process_state
from alignment.isolation import isolated
from alignment.logprobs import branch_scores
from alignment.model_folders import load_chat_of
from alignment.models import add_lora, load_reward_model, save_model
from alignment.prefix_batch import Tree
from alignment.progress import ProgressBar
from alignment.runs import newest_checkpoint, open_run
from alignment.training import (
    GlobalBatchMixin,
    LossFunction,
    MicroBatch,
    StepSchedule,
    training_arguments,
    use_run,
    warn_of_few_steps,
)
from reward_models.config import RewardModelConfig
from reward_models.evaluate import evaluate_pairs, scored_row
from reward_models.losses import centering_loss, ranking_loss, safety_auxiliary_loss
from reward_models.preferences import EncodedPair, pair_batches
from reward_models.prepare import prepare_pairs, warn_of_short_mix
from reward_models.score import score_trees

HELD_OUT_SCORES = "held_out_scores.jsonl"


class RewardTrainer(GlobalBatchMixin, Trainer):
    """transformers' Trainer on prefix-shared pairs."""


@isolated()
def run(config: RewardModelConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains a reward model, measures it on held-out pairs, saves it; returns the headline figures."""
    state = process_state(config.run.device)
    device, seed = state.device, config.run.seed
    chat, context_length = load_chat_of(config.model.path, config.model.chat_template)
    pairs = prepare_pairs(config, chat, context_length=context_length)
    train, valid = pairs.train, pairs.valid
    schedule = StepSchedule(len(train), config.train, seed=seed)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(pairs.sources)
    run_dir.note(**pairs.notes)
    if state.is_main_process:
        warn_of_few_steps(len(train), "pairs", len(schedule), config.train.batch_size)
        warn_of_short_mix(pairs.notes["mix_shortfall"], config.data.mix)

    dtype = compute_dtype(device, config.model.dtype)
    loaded = load_reward_model(
        config.model.path,
        dtype=dtype if config.lora.r else torch.float32,
        chat_template=config.model.chat_template,
        new_head_seed=seed,
        for_training=True,
    )
    model = add_lora(loaded.model, config.lora, is_reward_model=True, seed=seed)
    budget = config.train.max_tokens_per_batch
    checkpoint = newest_checkpoint(run_dir) if resume else None
    arguments = training_arguments(run_dir, config, num_steps=len(schedule), dtype=dtype, device=device)
    trainer = RewardTrainer(model=model, args=TrainingArguments(**arguments), processing_class=loaded.tokenizer)
    if config.train.compile:
        compile_layers(model, trainer.args.device)
    safety_weight = config.safety_loss_weight
    if safety_weight is None:
        safety_weight = 1.0 if config.kind == "safety" else 0.0
    trainer.use_steps(
        schedule,
        lambda rows: pair_batches(train, rows, max_tokens=budget),
        pair_loss(safety_weight=safety_weight, centering_weight=config.centering_weight),
    )
    use_run(trainer, run_dir, f"rm ({config.kind})", "rm")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    title = f"rm ({config.kind}): held-out pairs"
    chosen, rejected = score_pairs(model, valid, max_tokens=budget, dtype=dtype, title=title)
    if not all(map(math.isfinite, (*chosen, *rejected))):
        raise TrainingError(f"{run_dir.path}: scores are no numbers after the last step: lower optim.lr.")
    held_out = [encoded.pair for encoded in valid]
    options = {"max_length": pairs.max_length, "wanted_precision": config.evaluation.wanted_precision}
    report = evaluate_pairs(held_out, chosen, rejected, **options) if held_out else {}
    save_model(model, loaded, run_dir.model_dir)
    if state.is_main_process:
        rows = (scored_row(*values) for values in zip(held_out, chosen, rejected, strict=True))
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
            "train_pairs": len(train),
            "vetoed_pairs": pairs.vetoed,
            "left_out": pairs.left_out,
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


def score_pairs(
    model: nn.Module, pairs: Sequence[EncodedPair], *, max_tokens: int, dtype: torch.dtype, title: str
) -> tuple[list[float], list[float]]:
    """Raw scores of the chosen and of the rejected responses, in the order of the pairs.

    Every process takes a share of them.
    """
    model.eval()
    trees = [pair.tree for pair in pairs]
    spare = next(iter(trees), None)

    def work(mine: Sequence[Tree]) -> list[list[float]]:
        advance = for_all(bar.advance)
        return score_trees(model, mine, max_tokens=max_tokens, autocast=dtype, spare=spare, on_progress=advance)

    with ProgressBar(title, len(pairs), shown=PartialState().is_main_process) as bar:
        both = map_over_processes(work, trees)
    return [chosen for chosen, _ in both], [rejected for _, rejected in both]
