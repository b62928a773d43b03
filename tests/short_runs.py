"""Trainings of a few steps on the toy task."""

from __future__ import annotations

from pathlib import Path

from alignment.cli.stages import STAGES
from alignment.config import load_config

COMMON = ["model.dtype=float32", "run.device=cpu", "run.seed=3", "train.save_every=3"]
TRAIN = [*COMMON, "data.max_length=128", "data.max_rows=160", "train.batch_size=8", "train.epochs=1", "optim.lr=1e-3"]


STAGE_SETTINGS = {
    "sft": [*TRAIN, "model=toy", "data.train=toy:sft.train", "data.valid=toy:sft.valid", "data.max_valid_rows=20"],
    "sft-lora": [*TRAIN, "model=toy", "data.train=toy:sft.train", "lora.r=4", "lora.dropout=0.1"],
    "rm": [*TRAIN, "model=toy", "kind=safety", "data.train=toy:safety.train", "data.valid=toy:safety.valid"],
    "rm-lora": [*TRAIN, "model=toy", "kind=safety", "data.train=toy:safety.train", "lora.r=4", "lora.dropout=0.1"],
}


def run_here(stage: str, settings: list[str], run_dir: Path, *, resume: bool) -> None:
    kinds = [setting.removeprefix("kind=") for setting in settings if setting.startswith("kind=")]
    found = STAGES[stage].of_kind(kinds[0] if kinds else None)
    config = load_config(found.config_class(), None, [*settings, f"run.dir={run_dir}"])
    found.run_function()(config, resume=resume)
