"""The safetensors files of a model's folder, read weight by weight."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_WEIGHTS = "model.safetensors"


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of every weight in a folder, by the weight's name; empty where there are none."""
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        return {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    if not (folder / _WEIGHTS).is_file():
        return {}
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _WEIGHTS)


def read_weight(path: Path, name: str) -> Tensor:
    """One weight of a file, in its own type."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
