"""What the comparisons with TRL's trainers share: the same optimizer, schedule and clipping, the same rows in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignment.config import TrainSection
from alignment.runs import Run, open_run
from alignment.training import StepSchedule, training_arguments


def open_parity_run(config_class: Any, tmp_path: Path, *, num_steps: int, **fields: Any) -> tuple[Run, dict[str, Any]]:
    """A run, and our TrainingArguments as keywords, which TRL's trainer gets too."""
    config = config_class.model_validate(
        {
            "model": "toy",
            "data": {"train": "unused"},
            "optim": {"lr": 1e-3, "min_warmup_steps": 1},
            "run": {"dir": str(tmp_path / "run")},
            **fields,
        }
    )
    run = open_run(config)
    values = training_arguments(run, config, num_steps=num_steps, dtype=torch.float32, device=torch.device("cpu"))
    return run, {**values, "save_strategy": "no"}


def steps_in_order(num_rows: int, batch_size: int) -> StepSchedule:
    """One pass over the rows as they stand."""
    schedule = StepSchedule(num_rows, TrainSection(batch_size=batch_size), seed=0)
    schedule.steps = [list(range(start, start + batch_size)) for start in range(0, num_rows, batch_size)]
    return schedule
