"""Files and folders that readers see whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Writes a file through a temporary sibling and a rename: readers see the old text or the new, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as a PNG, atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a folder's files into a temporary sibling and renames it; an old folder is replaced."""
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)


def check_new_file(path: Path) -> None:
    """Raises RunError where a result cannot go to `path`: it exists, or its folder does not. Call before the work."""
    if path.exists():
        raise RunError(f"{path}: exists. Name another file, or remove it.")
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}. Make it first.")
