"""A result file that grows as a call goes on, and that another call can go on with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.data import write_rows
from alignment.errors import RunError
from alignment.files import check_new_file, file_sha256, read_object, write_json
from alignment.line_log import append_lines, whole_lines
from alignment.locks import lock_file, unlock_file
from alignment.manifests import weights_sha256
from alignment.model_folders import model_folder
from alignment.sources import find_data

Row = dict[str, Any]


class PartialFile:
    """Rows made so far, beside the file they will become: `F.jsonl.partial`, and what they were made from.

    The rows never stand without the other file, which alone means that nothing is done. Without `out` nothing is kept.
    """

    def __init__(
        self, out: Path | None, made_from: Row, dtype: str = "auto", rows: Sequence[Row] = (), num_prompts: int = 0
    ) -> None:
        self.out, self.made_from, self.dtype, self.rows, self.num_prompts = out, made_from, dtype, rows, num_prompts

    @classmethod
    def open(cls, out: Path | None, made_from: Row, *, resume: bool) -> PartialFile:
        """What there is of it, with the arithmetic type it was begun in, which is kept.

        Raises RunError where `out` exists, or unfinished rows are there that may not be gone on with, are damaged, or
        are another process's.
        """
        if out is None:
            return cls(None, made_from)
        check_new_file(out)
        data, about = _partial_paths(out)
        if not data.exists():
            return cls(out, made_from)
        if not resume:
            raise _unfinished(data, about)
        lock_file(data)
        known = read_object(about, what_to_do=f"remove it and {data}.") if about.exists() else {}
        dtype = known.pop("dtype", None)
        if dtype is None or known != made_from:
            raise RunError(f"{data}: was made with another model, other data or settings. Remove it and {about}.")
        try:
            return cls(out, made_from, dtype, *_whole_blocks(data))
        except RunError as error:
            raise RunError(f"{error} With it {about}.") from error

    def begin(self, dtype: str) -> None:
        """Makes the files where they are not there, once the model is: a wrong one leaves nothing behind.

        Raises RunError where another process has made them meanwhile.
        """
        if self.out is None:
            return
        data, about = _partial_paths(self.out)
        lock_file(data)
        check_new_file(self.out)
        if data.exists() and self.dtype == "auto":  # another process has been here since `open`
            raise _unfinished(data, about)
        if not data.exists():
            write_json(about, {**self.made_from, "dtype": dtype})
            data.touch()

    def resumed(self, fresh: Iterator[tuple[list[Row], int]]) -> Iterator[Row]:
        """Earlier rows, then fresh ones, each block written before it is handed on."""
        yield from self.rows
        for rows, num_prompts in fresh:
            self.append(rows, num_prompts)
            yield from rows

    def append(self, rows: Iterable[Row], num_prompts: int) -> None:
        """Writes the rows of `num_prompts` more prompts."""
        self.num_prompts += num_prompts
        if self.out is None:
            return
        block = [*rows, {"prompts_done": self.num_prompts}]
        append_lines(_partial_paths(self.out)[0], block, default=str)  # a Hub's rows may hold dates

    def finish(self, rows: Iterable[Row] | None = None) -> None:
        """Turns the partial file into the final one: its rows as they stand, or these, which are the same in order."""
        if self.out is None:
            return
        data, about = _partial_paths(self.out)
        as_they_stand = (row for row, _ in whole_lines(data) if "prompts_done" not in row)
        write_rows(self.out, as_they_stand if rows is None else rows)
        data.unlink()
        about.unlink()
        unlock_file(data)


def model_hash(model: str) -> str:
    """Of a model's weights on disk; a Hub's model is known by its name."""
    folder = model_folder(model)
    return weights_sha256(folder) if isinstance(folder, Path) else model


def data_hashes(files: Sequence[str]) -> list[str]:
    """Of files' contents; other sources are known by their names."""
    return [file_sha256(found) if isinstance(found := find_data(name), Path) else str(name) for name in files]


def _partial_paths(out: Path) -> tuple[Path, Path]:
    return out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")


def _unfinished(data: Path, about: Path) -> RunError:
    return RunError(f"{data}: an unfinished call's rows. Add --resume to go on, or remove it and {about}.")


def _whole_blocks(path: Path) -> tuple[list[Row], int]:
    """The rows up to the last complete block, to which the file is cut, and the prompts they cover."""
    kept: list[Row] = []
    block: list[Row] = []
    end = num_prompts = 0
    for row, position in whole_lines(path):
        if "prompts_done" in row:
            kept += block
            block, end, num_prompts = [], position, row["prompts_done"]
        else:
            block.append(row)
    os.truncate(path, end)
    return kept, num_prompts
