"""What a run directory says of its run: status, settings, result, and what it was made from and with."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignment.config import StageConfig
from alignment.errors import RunError
from alignment.files import file_sha256, read_object, write_json
from alignment.sources import expanded, find_model, find_template, place_of

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
# What a tokenizer is made from where there is no tokenizer.json.
VOCABULARY_FILES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
# Of a run; an outdated one is to be made again from the start.
RUNNING, FINISHED, OUTDATED = "running", "finished", "outdated"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, or None where there is none. Raises RunError where it is damaged."""
    file = path / "manifest.json"
    if not file.is_file():
        return None
    return read_object(file, what_to_do="remove the folder and run its stage again, or, if it is no run, name another.")


def read_result(path: Path) -> dict[str, Any]:
    """The headline figures of a finished run. Raises RunError where there are none, or they are damaged."""
    file = path / "result.json"
    if not file.is_file():
        raise RunError(f"{path}: no result.json. The run is unfinished.")
    return read_object(file)


def is_finished(path: Path) -> bool:
    """Whether a run directory holds a finished run."""
    manifest = read_manifest(path)
    return manifest is not None and manifest.get("status") == FINISHED


def mark_outdated(path: Path) -> None:
    """Has a run made again from the start by the next `align run`; until then its files stay."""
    if (manifest := read_manifest(path)) is not None:
        write_json(path / "manifest.json", {**manifest, "status": OUTDATED})


def settings(config: StageConfig) -> dict[str, Any]:
    """What decides a run's outcome: the configuration, of whose `run` section only the seed counts."""
    values = config.model_dump(mode="json")
    values["run"] = {"seed": config.run.seed}
    return values


def changed_settings(manifest: Mapping[str, Any], config: StageConfig) -> list[str]:
    """The keys (`train.epochs`) in which a run's settings differ from `config`; new ones had their defaults."""
    return sorted(setting_changes(manifest, config))


def setting_changes(manifest: Mapping[str, Any], config: StageConfig) -> dict[str, tuple[Any, Any]]:
    """The values then and now of these keys. Another spelling of the same path is no change."""
    before, now = manifest.get("settings", {}), json.loads(json.dumps(settings(config)))
    with suppress(ValidationError):  # a key that is gone: compared as it is
        known = type(config).model_validate({**before, "run": {**before.get("run", {}), "dir": config.run.dir}})
        before = json.loads(json.dumps(settings(known)))
    for mapping in ("max_rows_of", "mix"):  # whose keys name files, too
        then, new = ((values.get("data") or {}).get(mapping) for values in (before, now))
        if isinstance(then, Mapping) and isinstance(new, Mapping):
            spelt = {place_of(name): name for name in new}
            before["data"][mapping] = {spelt.get(place_of(name), name): value for name, value in then.items()}
    inputs = {key for key, _, _ in config.input_names()}
    return {
        key: (one, two)
        for key, one, two in _differences(before, now)
        if not (key.removesuffix(".path") in inputs and _are_same_places(one, two))
    }


def _are_same_places(one: Any, two: Any) -> bool:
    """Whether names of inputs, or lists of them, lead to the same places."""
    if isinstance(one, str) and isinstance(two, str):
        return place_of(one) == place_of(two)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_are_same_places, one, two))
    return False


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], section: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in {**before, **now}:
        one, two = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from _differences(one, two, f"{section}{key}.")
        elif one != two:
            yield f"{section}{key}", one, two


def upstream_runs(config: StageConfig) -> dict[str, str]:
    """The ids of the runs whose models or files a stage reads, by key: another id means they were made again.

    That of an outdated run is empty: it will be.
    """
    found = {}
    for key, name, _ in config.input_names():
        place = expanded(name)
        manifest = next(filter(None, map(manifest_of_a_run, (place, *place.parents))), None)
        if manifest is not None:
            found[f"{key}: {name}"] = "" if manifest.get("status") == OUTDATED else manifest.get("id", "")
    return found


def manifest_of_a_run(folder: Path) -> dict[str, Any] | None:
    """A run's manifest, or None where there is no run: a file of that name may be another program's."""
    with suppress(RunError):
        manifest = read_manifest(folder)
        if manifest is not None and "stage" in manifest:
            return manifest
    return None


def weights_sha256(folder: Path) -> str:
    """One digest of a model folder's weights: of its only file, or of the digests of all its shards."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digests = [file_sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def model_hashes(config: StageConfig) -> dict[str, str]:
    """The digests of the weights that a stage begins from, by key; those of the Hub have none."""
    models = {key: find_model(name) for key, name, kind in config.input_names() if kind == "model"}
    return {key: weights_sha256(found) for key, found in models.items() if isinstance(found, Path)}


def template_hashes(config: StageConfig) -> dict[str, str]:
    """The digests of what rows are encoded with, by key: chat templates, and the tokenizers in models' folders."""
    found = {}
    for key, name, kind in config.input_names():
        if kind == "template":
            found[key] = file_sha256(find_template(name))
        elif kind == "model" and isinstance(folder := find_model(name), Path):
            found[f"{key}.tokenizer"] = tokenizer_sha256(folder)
    return found


def tokenizer_sha256(folder: Path) -> str:
    """One digest of the tokenizer and the chat template in a model's folder."""
    names = TOKENIZER_FILES if (folder / "tokenizer.json").is_file() else (*TOKENIZER_FILES, *VOCABULARY_FILES)
    files = [folder / each for each in names if (folder / each).is_file()]
    digests = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Python's version, and those of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of this checkout, or None where it is none."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
