"""What a stage changes of the process that it runs in is put back, for the next stage or a notebook's next cell."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from alignment.hardware import reset_peak_memory, unsettle_auto
from alignment.locks import release_locks

# By which transformers' Trainer and its callbacks are told things.
_TOLD_BY_ENVIRONMENT = ("ACCELERATE_MIXED_PRECISION", "TENSORBOARD_LOGGING_DIR")


@contextmanager
def isolated() -> Iterator[None]:
    """Decorates a stage: its peak memory is its own, and what it changes of the process is as before at its end.

    That is the states of Python's, numpy's and torch's random generators (Trainer seeds all of them), the number of
    torch's threads, what `dtype: auto` means, the environment variables that training sets, and the locks of run
    directories, of which an error leaves none.
    """
    reset_peak_memory()
    python, arrays, num_threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    environment = {name: os.environ.get(name) for name in _TOLD_BY_ENVIRONMENT}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        release_locks()
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_num_threads(num_threads)
        unsettle_auto()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
