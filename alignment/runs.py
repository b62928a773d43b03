"""Run directories: opening, protection of finished runs, resume, checkpoints."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import StageConfig, to_yaml
from alignment.data import SourceReport
from alignment.errors import RunError
from alignment.files import read_object, sync_files, write_json, write_text
from alignment.locks import LOCK, check_not_locked, lock_folder, unlock_folder
from alignment.manifests import (
    FINISHED,
    OUTDATED,
    RUNNING,
    changed_settings,
    git_commit,
    manifest_of_a_run,
    mark_outdated,
    model_hashes,
    package_versions,
    read_manifest,
    settings,
    template_hashes,
    upstream_runs,
)
from alignment.metrics import MetricsLog
from alignment.sources import expanded, place_of

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

COMPLETE_MARK = "complete"
logger = logging.getLogger(__name__)


class Run:
    """One run directory, opened by `open_run`.

    Only the main process writes; the others get the same object with `writes = False`.
    """

    def __init__(self, path: Path, stage: str, *, writes: bool, manifest: Mapping[str, Any] | None = None) -> None:
        self.path, self.writes = path, writes
        self.metrics = MetricsLog(path / "metrics.jsonl", stage)
        self._started = time.monotonic()
        self._manifest = dict(manifest or {})

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
        before = {place_of(entry["name"]): entry["sha256"] for entry in self.noted("inputs") or []}
        now = {entry["name"]: entry["sha256"] for entry in inputs}
        if changed := [name for name, digest in now.items() if before.get(place_of(name), digest) != digest]:
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
        self.note_elapsed()
        full = {
            **result,
            "time_seconds": self._manifest["elapsed_seconds"],
            "peak_memory_gb": self._manifest["peak_memory_gb"],
        }
        if self.writes:
            write_json(self.path / "result.json", full)
            self.note(status=FINISHED)
            unlock_folder(self.path)
        return full

    def note_elapsed(self) -> None:
        """Notes time and peak memory until now in the manifest, so that a resumed run knows what came before."""
        from alignment import hardware  # imports torch, which the command line's quick answers do without

        now = time.monotonic()
        elapsed = self._manifest.get("elapsed_seconds", 0.0) + now - self._started
        self._started = now
        peak = max(self._manifest.get("peak_memory_gb", 0.0), hardware.peak_memory_gb())
        self.note(elapsed_seconds=round(elapsed, 1), peak_memory_gb=round(peak, 2))

    def note_elapsed_now_and_then(self, seconds: float = 20.0) -> None:
        """`note_elapsed`, unless the last time was less than `seconds` ago. Call where work has become durable."""
        if time.monotonic() - self._started >= seconds:
            self.note_elapsed()

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
    `check_run_dir` does, and for other models or templates. With `state`, it is settled what `dtype: auto` means.
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
    run = Run(path, config.stage, writes=is_main, manifest=read_manifest(path))
    models, templates = (model_hashes(config), template_hashes(config)) if is_main else ({}, {})
    before = (run.noted("models") or models) | templates | (run.noted("templates") or {})
    if changed := [key for key, digest in (models | templates).items() if before.get(key) != digest]:
        raise RunError(_changed_message(path, changed))
    run.note(
        stage=config.stage,
        status=RUNNING,
        seed=config.run.seed,
        settings=settings(config),
        versions=package_versions(),
        git_commit=git_commit(),
        num_processes=1 if state is None else state.num_processes,
        started=run.noted("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        models=models,
        templates=templates,
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

    if run.noted("auto_dtype") is None:
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
    check_not_locked(path)
    if config.run.overwrite and not resume:
        _check_not_read(path, config)
        _check_no_other_run(path)
    elif manifest is not None:
        _check_may_resume(path, config, manifest, resume)


def newest_checkpoint(run: Run) -> Path | None:
    """The checkpoint folder with the highest step among the complete ones; damaged ones are warned of and passed by."""
    complete = [mark.parent for mark in (run.path / "checkpoints").glob(f"*-*/{COMPLETE_MARK}")]
    for folder in sorted(complete, key=checkpoint_step, reverse=True):
        if not (damaged := _damaged_files(folder)):
            return folder
        if run.writes:
            what_next = "The run goes on from the one before it, or begins anew where there is none."
            logger.warning("%s: the checkpoint is damaged (%s). %s", folder, ", ".join(damaged), what_next)
    return None


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint folder's name, e.g. 40 for `checkpoint-40`."""
    return int(path.name.rsplit("-", 1)[1])


def mark_complete(checkpoint: Path) -> None:
    """Writes the mark and in it the files' sizes, once these are on disk: a checkpoint without it is not used."""
    files = [file for file in sync_files(checkpoint) if file.name != COMPLETE_MARK]
    sizes = {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in files}
    write_json(checkpoint / COMPLETE_MARK, sizes)


def _damaged_files(checkpoint: Path) -> list[str]:
    """The files of a complete checkpoint that are gone or have another size than when its mark was written."""
    mark = checkpoint / COMPLETE_MARK
    if not mark.stat().st_size:  # of an earlier version, which wrote no sizes
        return []
    try:
        sizes = read_object(mark)
    except RunError:
        return [COMPLETE_MARK]
    files = {name: checkpoint / name for name in sizes}
    return [name for name, file in files.items() if not file.is_file() or file.stat().st_size != sizes[name]]


def _make_ready(path: Path, config: StageConfig, resume: bool) -> None:
    check_run_dir(config, resume=resume)
    if resume and not path.exists():
        logger.warning("%s: there is no run to resume, so one begins.", path)
    path.mkdir(parents=True, exist_ok=True)
    lock_folder(path)
    if config.run.overwrite and not resume:
        _clear(path)
    _remove_half_written(path)
    known = None if _has_nothing(path) else read_manifest(path)
    first = {"stage": config.stage, "status": RUNNING, "id": uuid.uuid4().hex, "settings": settings(config)}
    process = f"{os.getpid()} on {platform.node()}"
    # The first file, so that whatever a killed run leaves is known to be a run.
    write_json(path / "manifest.json", {**(known or first), "process": process})
    # Whoever runs the file again wants another run, not this one gone.
    kept = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
    write_text(path / "config.yaml", to_yaml(kept))


def _has_nothing(path: Path) -> bool:
    """Whether a run was stopped before it had made anything: no figures, rows or checkpoints. It begins anew."""
    made = (entry for entry in path.iterdir() if entry.name not in ("manifest.json", "config.yaml", LOCK))
    return all(entry.suffix == ".tmp" or (entry.is_dir() and not any(entry.iterdir())) for entry in made)


def _clear(path: Path) -> None:
    """Removes what a run left, its manifest last: interrupted, the folder still is a run's, and to be made again."""
    mark_outdated(path)
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == "manifest.json"):
        if entry.name != LOCK:
            _remove(entry)


def _remove_half_written(path: Path) -> None:
    """Temporary files, and checkpoints without their mark: counted among those kept, they would push out whole ones."""
    unmarked = (entry for entry in path.glob("checkpoints/*") if not (entry / COMPLETE_MARK).exists())
    for entry in [*path.glob("*.tmp"), *unmarked]:
        _remove(entry)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _check_not_read(path: Path, config: StageConfig) -> None:
    """Raises RunError where the stage reads what is to be removed."""
    for key, name, _ in config.input_names():
        if expanded(name).resolve().is_relative_to(path.resolve()):
            raise RunError(
                f"{path}: holds {key} ({name}), which run.overwrite=true would remove. Give another run.dir."
            )


def _check_no_other_run(path: Path) -> None:
    """Raises RunError where there are other runs in the folder that is to be emptied."""
    folders = (each.parent for each in path.rglob("manifest.json") if each.parent != path)
    others = sorted(folder for folder in folders if manifest_of_a_run(folder) is not None)
    if others:
        raise RunError(
            f"{path}: holds another run ({others[0]}), which run.overwrite=true, or --from, would remove. Move it."
        )


def _check_may_resume(path: Path, config: StageConfig, manifest: Mapping[str, Any], resume: bool) -> None:
    if manifest.get("status") == FINISHED:
        raise RunError(f"{path}: holds a finished run. Give another run.dir, or run.overwrite=true to replace it.")
    if manifest.get("status") == OUTDATED:
        raise RunError(
            f"{path}: holds an outdated run, which was to be made again. Let `align run` do so, or run.overwrite=true."
        )
    if not resume:
        raise RunError(f"{path}: holds an unfinished run. Add --resume to go on, or run.overwrite=true to start anew.")
    changed = [key for key in changed_settings(manifest, config) if key not in config.resume_may_change]
    if changed and not _has_nothing(path):
        raise RunError(
            f"{path}: the unfinished run has other settings ({', '.join(changed)}). "
            "Resume with the same, or start anew: run.overwrite=true, in a pipeline --from STAGE."
        )


def _changed_message(path: Path, changed: Iterable[str]) -> str:
    return (
        f"{path}: {', '.join(changed)} changed since the unfinished run began. Put the old contents back, or start "
        "anew: run.overwrite=true, in a pipeline --from STAGE."
    )
