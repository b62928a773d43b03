"""What SFT and reward models share on top of transformers' Trainer: whole global batches, split by length.

One item of the Trainer's data is one optimizer step: the rows of a global batch. Each process takes its share, sorts
it by length into micro-batches under a token budget and sums their losses, divided by the weight of the global batch.
So neither the budget nor the number of processes changes a step. The order of rows is a function of the seed, so a
resumed run goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, get_scheduler

from alignment.config import ModelSection, OptimSection, RunSection, TrainSection
from alignment.distributed import add_in_float32, check_split, gather_objects, is_split, passes
from alignment.errors import RunError, TrainingError
from alignment.models import CHECKPOINTING, NOT_REENTRANT
from alignment.prefix_batch import PrefixBatch
from alignment.progress import ProgressBar, console
from alignment.runs import Run, mark_complete, newest_checkpoint

FEW_STEPS = 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """A part of a global batch: its rows as tensors, what the loss needs besides, and its weight in the batch.

    `weight` counts what the loss averages over (tokens for SFT, pairs for reward models); 0 takes no part.
    """

    batch: PrefixBatch
    targets: dict[str, Tensor]
    weight: float

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.targets.items()}
        return MicroBatch(self.batch.to(device), moved, self.weight)


class TrainingConfig(Protocol):
    """The sections of a stage's configuration that decide how it is trained."""

    model: ModelSection
    optim: OptimSection
    train: TrainSection
    run: RunSection


# Loss summed (not averaged) over a micro-batch, with sums of metrics over the same weight.
LossFunction = Callable[[nn.Module, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
# The micro-batches of some rows of the data set, given by index.
Batcher = Callable[[Sequence[int]], Iterator[MicroBatch]]


def num_steps(num_rows: int, train: TrainSection) -> int:
    """Optimizer steps of a training on `num_rows`: `epochs` passes in global batches, at most `max_steps`."""
    steps = math.ceil(math.ceil(num_rows * train.epochs) / train.batch_size)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def warn_of_few_steps(num_rows: int, noun: str, num_steps: int, batch_size: int) -> None:
    """The paper's batches of 64 dialogues or 512 pairs make a step or two of a small file, which trains nothing."""
    if num_steps < FEW_STEPS:
        steps = "1 optimizer step" if num_steps == 1 else f"{num_steps} optimizer steps"
        logger.warning(
            "%d %s in batches of %d make %s. For more, lower train.batch_size (and tune optim.lr).",
            num_rows, noun, batch_size, steps,
        )  # fmt: skip


class StepSchedule(Dataset):
    """Row indices of every optimizer step: `epochs` shuffled passes over `num_rows`, the last step possibly smaller."""

    def __init__(self, num_rows: int, train: TrainSection, *, seed: int) -> None:
        total = min(math.ceil(num_rows * train.epochs), num_steps(num_rows, train) * train.batch_size)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < total:
            order += torch.randperm(num_rows, generator=generator).tolist()
        order = order[:total]
        self.steps = [order[start : start + train.batch_size] for start in range(0, total, train.batch_size)]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[int]:
        return self.steps[index]


class GlobalBatchMixin:
    """Put before a Trainer class: `class RewardTrainer(GlobalBatchMixin, Trainer)`. Set up with `use_steps`."""

    def __init__(self, *, args: TrainingArguments, **options: Any) -> None:
        """Trainer's, on one GPU where no launcher says more: it would take torch's DataParallel, TRL's would refuse."""
        if args.n_gpu > 1:
            console.print(
                f"{args.n_gpu} GPUs are here, one is used. For all of them: accelerate launch --multi_gpu "
                "--num_processes N -m alignment.cli.main ..."
            )
            args._n_gpu = 1
        super().__init__(args=args, **options)

    def use_steps(self, schedule: StepSchedule, batcher: Batcher, loss_function: LossFunction) -> None:
        """Gives the trainer its steps, how to batch rows, and the loss.

        Raises ConfigError where the models would be split over processes in a way that is not supported.
        """
        check_split(self.accelerator)
        add_in_float32(self.accelerator)
        self._schedule, self._batcher, self._loss_function = schedule, batcher, loss_function
        self.step_metrics: dict[str, float] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; whatever happens, the bar is closed, and the run of Weights & Biases, which it leaves open."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.close()
            if (wandb := sys.modules.get("wandb")) and "wandb" in self.args.report_to:
                failed = sys.exc_info()[0] is not None
                wandb.finish(exit_code=int(failed))  # the next stage of a pipeline would go on in it

    def get_train_dataloader(self) -> DataLoader:
        """All processes see all steps; each takes its own share of the rows in `training_step`."""
        generator = torch.Generator().manual_seed(0)
        return DataLoader(self._schedule, batch_size=1, collate_fn=_only, generator=generator)

    def training_step(self, model: nn.Module, inputs: list[int], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a whole global batch; returns its mean loss.

        Raises TrainingError, on every process, where that is no finite number.
        """
        model.train()
        accelerator = self.accelerator
        share = inputs[accelerator.process_index :: accelerator.num_processes]
        # On the device at once: a copy that waits for it would end every pass of the loop below.
        parts = [part.to(accelerator.device) for part in self._batcher(share or inputs[:1])]
        total = sum(part.weight for part in parts) if share else 0.0
        if accelerator.num_processes > 1:
            total = float(accelerator.gather(torch.tensor([total], device=accelerator.device)).sum())
        sums_by_name: dict[str, Tensor] = {}
        loss_sum = torch.zeros((), device=accelerator.device)
        for part, counts, exchanges in passes(parts, accelerator):
            takes_part = bool(share) and counts
            with nullcontext() if exchanges else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, metrics = self._loss_function(model, part)
                scale = accelerator.num_processes / total if takes_part else 0.0
                accelerator.backward(loss * scale)
            if takes_part:
                loss_sum += loss.detach()
                for name, value in metrics.items():
                    sums_by_name[name] = sums_by_name.get(name, 0) + value.detach().float()
        names = sorted(sums_by_name)
        if accelerator.num_processes > 1:
            names = sorted({name for found in gather_objects(names) for name in found})
        stacked = torch.stack([loss_sum, *(sums_by_name.get(name, torch.zeros_like(loss_sum)) for name in names)])
        stacked = accelerator.reduce(stacked, reduction="sum") / total
        self.step_metrics = {"loss": stacked[0].item(), **dict(zip(names, stacked[1:].tolist(), strict=True))}
        if not math.isfinite(self.step_metrics["loss"]):
            raise _diverged(self.state.global_step + 1, "loss", self.step_metrics["loss"], lr=self.args.learning_rate)
        return stacked[0]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Trainer's, with weights under their names in memory, as its loading of checkpoints wants them.

        Mixtures of experts and models of text and images have others in files (transformers issue 48805).
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        kept = vars(model).get("_weight_conversions")
        model._weight_conversions = []  # None would have them looked up
        try:
            super()._save(output_dir, state_dict)
        finally:
            model._weight_conversions = kept

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises RunError where a checkpoint lacks weights: Trainer would go on with those of the base model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        tied = getattr(model, "all_tied_weights_keys", {}).keys()
        if missing := sorted(set(load_result.missing_keys) - tied):
            raise RunError(
                f"{self.args.output_dir}: its checkpoint has no {missing[0]} and {len(missing) - 1} others of the "
                "model's weights. Start anew: run.overwrite=true, in a pipeline --from STAGE."
            )

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer's estimate needs padded tensors; ours have none."""
        return 0


class BeforeTraining(TrainerCallback):
    """Calls a function with the model as it was loaded, once it is on its device or split over the processes.

    A run that goes on from a checkpoint has done so already.
    """

    def __init__(self, measure: Callable[[nn.Module], None]) -> None:
        self.measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """The model in training is what later steps train, without DDP's wrapper."""
        if state.global_step == 0:
            self.measure(model)


class RunCallback(TrainerCallback):
    """Writes every step to the run's metrics, marks checkpoints complete, and moves the progress bar."""

    def __init__(self, run: Run, title: str, metric_prefix: str, trainer: GlobalBatchMixin) -> None:
        self.run, self.title, self.prefix, self.trainer = run, title, metric_prefix, trainer
        self.bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drops what was logged beyond the checkpoint, from which Trainer takes how often to save as well."""
        state.save_steps = args.save_steps
        if self.run.writes:
            self.run.metrics.truncate_after(state.global_step)
        shown = state.is_world_process_zero
        self.bar = ProgressBar(self.title, state.max_steps, shown=shown, start=state.global_step)
        self.bar.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """One row of metrics a step.

        Raises TrainingError, on every process and before anything is saved, where the step has made the weights NaN.
        """
        if "learning_rate" not in logs or self.bar is None:
            return
        values = {**self.trainer.step_metrics, "lr": logs["learning_rate"], "grad_norm": float(logs["grad_norm"])}
        if not math.isfinite(values["grad_norm"]):
            raise _diverged(state.global_step, "gradient's norm", values["grad_norm"], lr=args.learning_rate)
        self.run.log(state.global_step, {f"{self.prefix}/{name}": value for name, value in values.items()})
        self.bar.advance(1, f"loss {values['loss']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The mark goes last, when all processes have written: a checkpoint without it is not resumed from."""
        self.run.note_elapsed()
        self.trainer.accelerator.wait_for_everyone()
        if self.run.writes:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def close(self) -> None:
        """Closes the bar: an open one leaves a terminal without its cursor."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)


def use_run(trainer: Any, run: Run, title: str, metric_prefix: str) -> None:
    """Replaces Trainer's own printing and progress by the run's metrics and bar.

    Raises RunError where the run has checkpoints that this launch cannot read.
    """
    before, now = run.noted("checkpoints"), checkpoint_kind(trainer.accelerator)
    if before not in (None, now) and newest_checkpoint(run):
        raise RunError(
            f"{run.path}: has checkpoints {before}, and this launch reads those {now}. Launch it as before, or start "
            "anew: run.overwrite=true, in a pipeline --from STAGE."
        )
    run.note(checkpoints=now)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RunCallback(run, title, metric_prefix, trainer))


def checkpoint_kind(accelerator: Accelerator) -> str:
    """What writes Trainer's checkpoints, and alone can read them."""
    if not is_split(accelerator):
        return "of one process or DDP"
    return f"of FSDP with {accelerator.state.fsdp_plugin.state_dict_type.name}"


def training_arguments(
    run: Run, config: TrainingConfig, *, num_steps: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments for TrainingArguments (or SFTConfig) that make Trainer take our steps as they are."""
    optim, seed = config.optim, config.run.seed
    # transformers' default is a folder among the checkpoints, which a finished run removes.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
    # A launcher's --mixed_precision and accelerate's configuration file would count for more than bf16=False.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if dtype == torch.bfloat16 else "no"
    name, extra = scheduler_name(optim)
    return {
        "output_dir": str(run.path / "checkpoints"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": optim.lr,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": extra,
        "warmup_steps": num_warmup_steps(num_steps, optim.warmup_fraction, optim.min_warmup_steps),
        "save_strategy": "steps",
        "save_steps": config.train.save_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": list(config.run.report_to) or "none",
        "seed": seed,
        "data_seed": seed,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        CHECKPOINTING: config.model.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": NOT_REENTRANT,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def scheduler_name(optim: OptimSection) -> tuple[str, dict[str, Any]]:
    """transformers' scheduler of a schedule, with its arguments."""
    if optim.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": optim.final_lr_fraction}
    return "constant_with_warmup", {}


def num_warmup_steps(num_steps: int, fraction: float, at_least: int) -> int:
    """Steps of linear warm-up: the fraction rounded up, `at_least`, and never more than half of all steps."""
    return min(max(math.ceil(fraction * num_steps), at_least), num_steps // 2)


def build_scheduler(
    optimizer: torch.optim.Optimizer, optim: OptimSection, *, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The same schedule for our own loops."""
    name, extra = scheduler_name(optim)
    warmup = num_warmup_steps(num_steps, optim.warmup_fraction, optim.min_warmup_steps)
    return get_scheduler(name, optimizer, warmup, num_steps, scheduler_specific_kwargs=extra)


def _diverged(step: int, what: str, value: float, *, lr: float) -> TrainingError:
    return TrainingError(
        f"step {step}: the {what} is {value}. Training has diverged: lower optim.lr (now {lr:g}) and start anew: "
        "run.overwrite=true, in a pipeline --from STAGE. metrics.jsonl has the steps before."
    )


def _only(items: list[list[int]]) -> list[int]:
    return items[0]
