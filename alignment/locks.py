"""Two processes do not work in one run directory."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from alignment.errors import RunError
from alignment.manifests import read_manifest

LOCK = "lock"

# The locks that this process holds, by the folder they are in.
_held: dict[Path, FileLock] = {}


def lock_folder(path: Path) -> None:
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


def check_not_locked(path: Path) -> None:
    """Raises RunError where another process works in a run directory; leaves no lock."""
    if (path / LOCK).exists() and path.resolve() not in _held:
        lock_folder(path)
        unlock_folder(path)


def unlock_folder(path: Path) -> None:
    """Lets other processes work in a run directory, if this one holds its lock."""
    if (lock := _held.pop(path.resolve(), None)) is not None:
        lock.release()


def release_locks() -> None:
    """Lets other processes work in the run directories that this one has opened."""
    for folder in list(_held):
        unlock_folder(folder)
