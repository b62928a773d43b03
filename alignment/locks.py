"""Two processes do not work in one run directory, or at one growing file."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from alignment.errors import RunError
from alignment.manifests import read_manifest

LOCK = "lock"

# The locks that this process holds, by their files.
_held: dict[Path, FileLock] = {}


def lock_folder(path: Path) -> None:
    """Keeps other processes out of a run directory; this one may open it again. Raises RunError where one is there.

    Waits for a moment: the processes of one launch look at the directory at the same time. Where the file system has
    no locks, two processes are not kept apart.
    """
    if not _lock(path.resolve() / LOCK):
        process = (read_manifest(path) or {}).get("process")
        name = f"another process ({process})" if process else "another process"
        raise RunError(f"{path}: {name} is working here. Wait for it, or stop it.")


def lock_file(path: Path) -> None:
    """Keeps other processes from writing a file, by one beside it; as `lock_folder`."""
    if not _lock(_beside(path)):
        raise RunError(f"{path}: another process is writing it. Wait for it, or stop it.")


def unlock_file(path: Path) -> None:
    """Lets other processes write a file, and removes what locked it."""
    _unlock(_beside(path))
    _beside(path).unlink(missing_ok=True)


def check_not_locked(path: Path) -> None:
    """Raises RunError where another process works in a run directory; leaves no lock."""
    if (path / LOCK).exists() and path.resolve() / LOCK not in _held:
        lock_folder(path)
        unlock_folder(path)


def unlock_folder(path: Path) -> None:
    """Lets other processes work in a run directory, if this one holds its lock."""
    _unlock(path.resolve() / LOCK)


def release_locks() -> None:
    """Lets other processes work in the run directories, and at the files, that this one has opened."""
    for place in list(_held):
        _unlock(place)


def _beside(path: Path) -> Path:
    return path.resolve().with_name(f"{path.name}.{LOCK}")


def _lock(place: Path) -> bool:
    """Whether this process has the lock now, or nobody can have it."""
    if place in _held:
        return True
    lock = FileLock(place, thread_local=False)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        return False
    except (OSError, NotImplementedError):
        return True
    if isinstance(lock, SoftFileLock):  # its instead: a file that a killed process would leave
        lock.release()
    else:
        _held[place] = lock
    return True


def _unlock(place: Path) -> None:
    if (lock := _held.pop(place, None)) is not None:
        lock.release()
