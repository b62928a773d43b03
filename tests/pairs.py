"""Files of preference pairs, and what a reward model would be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.config import load_config
from alignment.model_folders import load_chat_of
from reward_models.config import RewardModelConfig
from reward_models.prepare import PreparedPairs, prepare_pairs


def pair(index: int, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"q{index}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        **fields,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(folder: Path, *settings: str) -> RewardModelConfig:
    return load_config(RewardModelConfig, None, ["model=toy", f"run.dir={folder / 'run'}", *settings])


def prepared(folder: Path, *settings: str) -> PreparedPairs:
    config = configured(folder, *settings)
    chat, context_length = load_chat_of("toy")
    return prepare_pairs(config, chat, context_length=context_length)
