"""Run directories: atomic writes, manifest, result, checkpoints, lock, protection of finished runs, resume."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, SoftFileLock, Timeout
from pydantic import ValidationError

from alignment.config import StageConfig, to_yaml
from alignment.data import SourceReport, file_sha256
from alignment.errors import RunError
from alignment.metrics import MetricsLog

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
COMPLETE_MARK = "complete"
OUTDATED = "outdated"  # the status of a run that is to be made again from the start
LOCK = "lock"

# Settings that nothing on disk depends on while a run is unfinished, by stage: --resume may change them. `reject` and
# `distil` score after all sampling, so that what they end with is what the new settings alone would give: candidates on
# disk have no scores yet, and a temperature of the grid is chosen anew. `eval` scores last too; the KL of answers on
# disk was computed in the old batches, which differs by rounding. `train.max_tokens_per_batch` is not here: rounding
# would part a training from the one that is resumed.
RESUME_MAY_CHANGE: dict[str, frozenset[str]] = {
    "sft": frozenset({"train.save_every"}),
    "rm": frozenset({"train.save_every"}),
    "ppo": frozenset({"train.save_every"}),
    "reject": frozenset({"min_gain", "accumulate", "baseline", "rewards.threshold", "rewards.max_tokens_per_batch"}),
    "distil": frozenset({"max_tokens_per_batch"}),
    "eval": frozenset({"rewards.max_tokens_per_batch"}),
}

# The locks that this process holds, by the folder they are in.
_held: dict[Path, FileLock] = {}


def write_text(path: Path, text: str) -> None:
    """Writes a file through a temporary sibling and a rename: readers see the old text or the new, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_new_file(path: Path) -> None:
    """Raises RunError where a result cannot go to `path`: it exists, or its folder does not. Call before the work."""
    if path.exists():
        raise RunError(f"{path}: exists. Name another file, or remove it.")
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}. Make it first.")


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


class Run:
    """One run directory, opened by `open_run`.

    Only the main process writes; the others get the same object with `writes = False`.
    """

    def __init__(self, path: Path, stage: str, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.metrics = MetricsLog(path / "metrics.jsonl", stage)
        self._started = time.monotonic()
        self._manifest: dict[str, Any] = {}

    @property
    def model_dir(self) -> Path:
        """Where the produced model goes."""
        return self.path / "model"

    def noted(self, name: str) -> Any:
        """An entry of the manifest, or None; a resumed run finds those of its first part."""
        return self._manifest.get(name)

    def note_sources(self, sources: Iterable[SourceReport]) -> None:
        """Records inputs with hashes, rows kept and rows dropped by reason.

        Raises RunError where a resumed run began with other contents: it would go on with other rows. A new name is
        that of a setting which --resume may change.
        """
        inputs = [source.to_json() for source in sources]
        before = {entry["name"]: entry["sha256"] for entry in self.noted("inputs") or []}
        now = {entry["name"]: entry["sha256"] for entry in inputs}
        if changed := [name for name, digest in now.items() if before.get(name, digest) != digest]:
            raise RunError(_changed_message(self.path, changed))
        self.note(inputs=inputs)

    def note(self, **values: Any) -> None:
        """Adds entries to the manifest."""
        self._manifest.update(values)
        self._write_manifest()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of `metrics.jsonl`."""
        if self.writes:
            self.metrics.write(step, values)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `result.json` with time and peak memory, then marks the run finished; returns the result."""
        from alignment import hardware  # imports torch, which the command line's quick answers do without

        self.note_elapsed()
        full = {
            **result,
            "time_seconds": self._manifest["elapsed_seconds"],
            "peak_memory_gb": round(hardware.peak_memory_gb(), 2),
        }
        if self.writes:
            write_json(self.path / "result.json", full)
            self.note(status="finished")
            _unlock(self.path)
        return full

    def note_elapsed(self) -> None:
        """Adds the time since the last call to the manifest, so that a resumed run knows what came before."""
        now = time.monotonic()
        elapsed = self._manifest.get("elapsed_seconds", 0.0) + now - self._started
        self._started = now
        self.note(elapsed_seconds=round(elapsed, 1))

    def clear_checkpoints(self) -> None:
        """Removes checkpoints, which a finished run no longer needs."""
        if self.writes:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _write_manifest(self) -> None:
        if self.writes:
            write_json(self.path / "manifest.json", self._manifest)


def open_run(config: StageConfig, *, resume: bool = False, state: PartialState | None = None) -> Run:
    """Makes the run directory and writes `config.yaml` and `manifest.json`; all processes call it.

    The main process locks the directory, until the run is finished or the stage ends. Raises RunError for what
    `check_run_dir` does, and for other models. With `state`, it is settled what `dtype: auto` means.
    """
    path = Path(config.run.dir)
    is_main = state is None or state.is_main_process
    if is_main:
        _make_ready(path, config, resume)
    if state is not None:
        state.wait_for_everyone()
    if config.run.num_threads is not None:
        import torch

        torch.set_num_threads(config.run.num_threads)
    run = Run(path, config.stage, writes=is_main)
    run._manifest = read_manifest(path) or {}
    models = _model_hashes(config) if is_main else {}
    before = run.noted("models") or models
    if changed := [key for key, digest in models.items() if before.get(key) != digest]:
        raise RunError(_changed_message(path, changed))
    run.note(
        stage=config.stage,
        status="running",
        seed=config.run.seed,
        settings=settings(config),
        versions=_versions(),
        git_commit=_git_commit(),
        num_processes=1 if state is None else state.num_processes,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        models=models,
        made_from=upstream_runs(config),
    )
    if state is not None:
        _settle_auto(run, state.device)
    return run


def _settle_auto(run: Run, device: torch.device) -> None:
    """One meaning of `dtype: auto` for all processes, and for a resumed run that which it began with."""
    import torch

    from alignment import hardware
    from alignment.distributed import gather_objects

    if "auto_dtype" not in run._manifest:
        found = gather_objects(hardware.compute_dtype(device))[0]  # CPUs are timed
        run.note(auto_dtype=str(found).removeprefix("torch."))
    hardware.settle_auto(device, getattr(torch, run.noted("auto_dtype")))


def check_run_dir(config: StageConfig, *, resume: bool = False) -> None:
    """Raises RunError where `open_run` would refuse the run directory. Call before the work; it only reads.

    The directory may hold a finished run, an unfinished one that is not to be resumed, has other settings or is worked
    on by another process, or files that no run wrote.
    """
    path = Path(config.run.dir)
    if path.is_file():
        raise RunError(f"{path}: is a file. Give another run.dir.")
    manifest = read_manifest(path)
    is_run = manifest is not None and "stage" in manifest
    if not is_run and path.is_dir() and any(file.suffix != ".tmp" and file.name != LOCK for file in path.iterdir()):
        raise RunError(f"{path}: not empty and not a run directory. Give another run.dir.")
    if (path / LOCK).exists() and path.resolve() not in _held:
        _lock(path)
        _unlock(path)
    if config.run.overwrite and not resume:
        _check_not_read(path, config)
    elif manifest is not None:
        _check_may_resume(path, config, manifest, resume)


def release_locks() -> None:
    """Lets other processes work in the run directories that this one has opened."""
    for folder in list(_held):
        _unlock(folder)


def mark_outdated(path: Path) -> None:
    """Has a run made again from the start by the next `align run`; until then its files stay."""
    if (manifest := read_manifest(path)) is not None:
        write_json(path / "manifest.json", {**manifest, "status": OUTDATED})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, or None where there is none."""
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None


def read_result(path: Path) -> dict[str, Any]:
    """The headline figures of a finished run. Raises RunError where there are none."""
    try:
        return json.loads((path / "result.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: no result.json. The run is unfinished.") from error


def is_finished(path: Path) -> bool:
    """Whether a run directory holds a finished run."""
    manifest = read_manifest(path)
    return manifest is not None and manifest.get("status") == "finished"


def settings(config: StageConfig) -> dict[str, Any]:
    """What decides a run's outcome: the configuration without the `run` section's place and overwrite flag."""
    values = config.model_dump(mode="json")
    values["run"] = {"seed": config.run.seed}
    return values


def changed_settings(manifest: Mapping[str, Any], config: StageConfig) -> list[str]:
    """The keys (`train.epochs`) in which a run's settings differ from `config`; new ones had their defaults."""
    before, now = manifest.get("settings", {}), json.loads(json.dumps(settings(config)))
    with suppress(ValidationError):  # a key that is gone: compared as it is
        known = type(config).model_validate({**before, "run": {**before.get("run", {}), "dir": config.run.dir}})
        before = json.loads(json.dumps(settings(known)))
    return sorted(_differences(before, now))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for key in {**before, **now}:
        one, two = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from _differences(one, two, f"{section}{key}.")
        elif one != two:
            yield f"{section}{key}"


def newest_checkpoint(run: Run) -> Path | None:
    """The checkpoint folder with the highest step among the complete ones."""
    found = [mark.parent for mark in (run.path / "checkpoints").glob(f"*-*/{COMPLETE_MARK}")]
    return max(found, key=checkpoint_step, default=None)


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint folder's name, e.g. 40 for `checkpoint-40`."""
    return int(path.name.rsplit("-", 1)[1])


def mark_complete(checkpoint: Path) -> None:
    """Written last: a checkpoint without the mark was cut off and is not used. Syncs the files before it."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    write_text(checkpoint / COMPLETE_MARK, "")


def _make_ready(path: Path, config: StageConfig, resume: bool) -> None:
    check_run_dir(config, resume=resume)
    path.mkdir(parents=True, exist_ok=True)
    _lock(path)
    if config.run.overwrite and not resume:
        _clear(path)
    for leftover in path.glob("*.tmp"):
        _remove(leftover)
    first = {"stage": config.stage, "status": "running", "id": uuid.uuid4().hex, "settings": settings(config)}
    process = f"{os.getpid()} on {platform.node()}"
    # The first file, so that whatever a killed run leaves is known to be a run.
    write_json(path / "manifest.json", {**(read_manifest(path) or first), "process": process})
    # Whoever runs the file again wants another run, not this one gone.
    kept = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
    write_text(path / "config.yaml", to_yaml(kept))


def _lock(path: Path) -> None:
    """Keeps other processes out of a run directory; this one may open it again. Raises RunError where one is there.

    Waits for a moment: the processes of one launch look at the directory at the same time. Where the file system has
    no locks, two processes are not kept apart.
    """
    folder = path.resolve()
    if folder in _held:
        return
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        process = (read_manifest(path) or {}).get("process")
        name = f"another process ({process})" if process else "another process"
        raise RunError(f"{path}: {name} is working here. Wait for it, or stop it.") from None
    except (OSError, NotImplementedError):
        return
    if isinstance(lock, SoftFileLock):  # its instead: a file that a killed process would leave
        lock.release()
    else:
        _held[folder] = lock


def _unlock(path: Path) -> None:
    if (lock := _held.pop(path.resolve(), None)) is not None:
        lock.release()


def _clear(path: Path) -> None:
    """Removes what a run left, its manifest last: interrupted, the folder still is a run's, and to be made again."""
    mark_outdated(path)
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == "manifest.json"):
        if entry.name != LOCK:
            _remove(entry)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _check_not_read(path: Path, config: StageConfig) -> None:
    """Raises RunError where the stage reads what is to be removed."""
    for key, name, _ in config.input_names():
        if Path(name).expanduser().resolve().is_relative_to(path.resolve()):
            raise RunError(
                f"{path}: holds {key} ({name}), which run.overwrite=true would remove. Give another run.dir."
            )


def _check_may_resume(path: Path, config: StageConfig, manifest: Mapping[str, Any], resume: bool) -> None:
    if manifest.get("status") == "finished":
        raise RunError(f"{path}: holds a finished run. Give another run.dir, or run.overwrite=true to replace it.")
    if manifest.get("status") == OUTDATED:
        raise RunError(
            f"{path}: holds an outdated run, which was to be made again. Let `align run` do so, or run.overwrite=true."
        )
    if not resume:
        raise RunError(f"{path}: holds an unfinished run. Add --resume to go on, or run.overwrite=true to start anew.")
    may_change = RESUME_MAY_CHANGE.get(config.stage, frozenset())
    if changed := [key for key in changed_settings(manifest, config) if key not in may_change]:
        raise RunError(
            f"{path}: the unfinished run has other settings ({', '.join(changed)}). "
            "Resume with the same, or start anew: run.overwrite=true, in a pipeline --from STAGE."
        )


def _changed_message(path: Path, changed: Iterable[str]) -> str:
    return (
        f"{path}: {', '.join(changed)} changed since the unfinished run began. Put the old contents back, or start "
        "anew: run.overwrite=true, in a pipeline --from STAGE."
    )


def upstream_runs(config: StageConfig) -> dict[str, str]:
    """The ids of the runs whose models or files a stage reads, by key: another id means they were made again.

    That of an outdated run is empty: it will be.
    """
    found = {}
    for key, name, _ in config.input_names():
        place = Path(name).expanduser()
        folder = next((f for f in (place, *place.parents) if (f / "manifest.json").is_file()), None)
        if folder is not None:
            manifest = read_manifest(folder) or {}
            found[f"{key}: {name}"] = "" if manifest.get("status") == OUTDATED else manifest.get("id", "")
    return found


def weights_sha256(folder: Path) -> str:
    """One digest of a model folder's weights: of its only file, or of the digests of all its shards."""
    digests = [file_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _model_hashes(config: StageConfig) -> dict[str, str]:
    from alignment.sources import find_model

    models = {key: find_model(name) for key, name, kind in config.input_names() if kind == "model"}
    return {key: weights_sha256(found) for key, found in models.items() if isinstance(found, Path)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
