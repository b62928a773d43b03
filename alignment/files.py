"""Files and folders that readers see whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignment.errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, which takes the place of `path` at the end; after an error it is removed.

    Readers see the old file or the new, never half, also after a loss of power. A killed process leaves the sibling,
    which ends in `.tmp`: the next one writes over it.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path, *, what_to_do: str = "run the stage again.") -> dict[str, Any]:
    """The object of a JSON file. Raises RunError, which ends with `what_to_do`, where the file is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{path}: no JSON object. The file is damaged: {what_to_do}")
    return found


def save_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as a PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a folder's files into a temporary sibling and renames it; an old folder is replaced.

    The files are on disk by then: what they were made from may be removed next.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    sync_files(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)


def sync_files(folder: Path) -> list[Path]:
    """All files below a folder, once they are on disk."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return files


def check_new_file(path: Path) -> None:
    """Raises RunError where a result cannot go to `path`: it exists, or its folder does not. Call before the work."""
    if path.exists():
        raise RunError(f"{path}: exists. Name another file, or remove it.")
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}. Make it first.")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
