"""Where a named model, data set or template is, without loading it: paths, runs, ALIGN_DATA_DIR, cache, Hub ids."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from alignment.errors import DataError, ModelError

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
BUILT_IN_MODELS = ("toy", "smollm2-135m-instruct")
BUILT_IN_TEMPLATES = ("auto", "llama2", "chatml")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:+-]+)?")


def data_dir() -> Path | None:
    """The local mirror of data sets that ALIGN_DATA_DIR names, or None."""
    value = os.environ.get("ALIGN_DATA_DIR")
    return expanded(value) if value else None


def expanded(name: str) -> Path:
    """The path of that name, `~` and `~user` read as the shell does: those of nobody stay as they are."""
    return Path(os.path.expanduser(name))


def cache_dir() -> Path:
    """ALIGN_CACHE_DIR, else `align` below XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("ALIGN_CACHE_DIR"):
        return expanded(chosen)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "align"


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; where it is absent, `make` fills a temporary one that is then renamed.

    So a folder that exists is complete, also when several processes ask for it at once.
    """
    folder = cache_dir() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / name
            make(made)
            try:
                made.replace(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def find_data(name: str) -> Path | str:
    """The file of a data source, or the name itself where it is a Hub id (`owner/name` or `owner/name:split`).

    Looked up in this order: the toy data (`toy:sft.train`), a path, a name in ALIGN_DATA_DIR (with or without its
    ending), a Hub id; but where there is a folder of the owner's name, a path is meant. Raises DataError with the
    nearest names where nothing fits.
    """
    if name.startswith("toy:"):
        from alignment.toy import toy_file

        return toy_file(name.removeprefix("toy:"))
    path = expanded(name)
    if path.is_file():
        return path
    mirror = data_dir()
    if mirror is not None and not path.is_absolute():
        for suffix in ("", *DATA_SUFFIXES):
            if (candidate := mirror / f"{name}{suffix}").is_file():
                return candidate
    if path.is_dir():
        raise DataError(f"{name}: is a folder. Name a file ({', '.join(DATA_SUFFIXES)}).")
    folder = path.parent if path.parent.is_dir() else None
    looks_like_a_file = name.endswith(DATA_SUFFIXES) or path.is_absolute() or name.startswith(".")
    looks_like_an_id = _HUB_ID.fullmatch(name) and not looks_like_a_file
    if looks_like_an_id and folder is None:
        return name
    nearby = [p.name for p in (folder or Path()).glob("*.jsonl*")]
    nearby += [p.name for p in mirror.glob("*.jsonl*")] if mirror and mirror.is_dir() else []
    guess = difflib.get_close_matches(path.name, nearby, n=1, cutoff=0.6)
    hint = f" Did you mean {guess[0]}?" if guess else " Give the path of a .jsonl or .jsonl.gz file."
    searched = f" (looked here and in ALIGN_DATA_DIR={mirror})" if mirror else " (ALIGN_DATA_DIR is not set)"
    no_id = _no_hub_id(folder) if looks_like_an_id else ""
    raise DataError(f"{name}: no such file{searched}.{no_id}{hint}")


def find_model(name: str) -> Path | str:
    """The folder of a model, or the name itself where it is built in or a Hub id. Raises ModelError otherwise.

    A run directory stands for the model it produced.
    """
    if name in BUILT_IN_MODELS:
        return name
    path = expanded(name)
    if found := _model_in(path):
        return found
    if (path / "manifest.json").is_file():
        raise ModelError(f"{name}: this run has no model. It is unfinished, or its stage makes none.")
    if any((folder / "adapter_config.json").is_file() for folder in (path, path / "model")):
        raise ModelError(
            f"{name}: an adapter alone, without its model. Name the run directory that holds both, or merge it (peft's "
            "merge_and_unload) and name what that saves."
        )
    if path.is_dir():
        raise ModelError(f"{name}: no config.json in this folder. Name a model folder or a run directory.")
    folder = path.parent if path.parent.is_dir() else None
    looks_like_an_id = _HUB_ID.fullmatch(name) and not name.startswith((".", "runs/"))
    if looks_like_an_id and folder is None:
        return name
    guess = difflib.get_close_matches(name, BUILT_IN_MODELS, n=1, cutoff=0.5)
    if not guess and "/" in name and folder:
        there = {near.name: str(near) for near in folder.iterdir() if _model_in(near)}
        guess = [there[near] for near in difflib.get_close_matches(path.name, there, n=1, cutoff=0.6)]
    hint = f' Did you mean "{guess[0]}"?' if guess else ""
    no_id = _no_hub_id(folder) if looks_like_an_id else ""
    raise ModelError(
        f"{name}: no such model.{no_id}{hint} Give a folder, a run directory, a Hub id (owner/name), "
        f"or one of {', '.join(BUILT_IN_MODELS)}."
    )


def place_of(name: str) -> str:
    """One spelling of all paths to the same place, for comparing names; what is built in keeps its name."""
    if name in BUILT_IN_MODELS or name in BUILT_IN_TEMPLATES:
        return name
    return str(expanded(name).resolve())


def find_template(name: str) -> Path:
    """The file of a chat template that is not built in. Raises ModelError where there is none."""
    path = expanded(name)
    if not path.is_file():
        raise ModelError(f"{name} is no file. Use {', '.join(BUILT_IN_TEMPLATES)} or the path of a Jinja template.")
    return path


def _model_in(path: Path) -> Path | None:
    """The model folder that a path is, or that the run there has made."""
    return next((folder for folder in (path / "model", path) if (folder / "config.json").is_file()), None)


def _no_hub_id(folder: Path) -> str:
    return f" It is taken for no Hub id, since there is a folder {folder} here."
