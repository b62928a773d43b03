"""The settings of a training, as its Trainer takes them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from alignment.config import ModelSection, OptimSection, RunSection, StageConfig, TrainSection
from alignment.runs import Run
from alignment.training import training_arguments


class TinyConfig(StageConfig):
    stage: ClassVar[str] = "tiny"

    model: ModelSection = ModelSection(path="toy")
    optim: OptimSection = OptimSection(lr=1e-3, min_warmup_steps=0, warmup_fraction=0.0)
    train: TrainSection = TrainSection(save_every=1000)


def arguments(run: Run, num_steps: int, **changes: Any) -> TrainingArguments:
    config = TinyConfig(run=RunSection(dir=str(run.path)))
    config = config.model_copy(update={"optim": config.optim.model_copy(update=changes)})
    device = torch.device("cpu")
    return TrainingArguments(**training_arguments(run, config, num_steps=num_steps, dtype=torch.float32, device=device))
