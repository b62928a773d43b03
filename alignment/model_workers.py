"""A frozen model on several micro-batches at once: on a CPU, threads that share its weights and split its cores.

Few products of a forward pass are large enough for all cores; what is not a product (softmax, norms) uses them worse. A
micro-batch for each core, or for each few, keeps them busy.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")

# Tokens of a micro-batch below which its products get slow.
MIN_TOKENS = 2048


def num_workers(device: torch.device, num_tokens: int, *, max_tokens: int) -> int:
    """How many micro-batches to compute at once: as many as there are threads, as long as each is worth it.

    Args:
        device: of the model; one at a time everywhere but on a CPU.
        num_tokens: of all micro-batches.
        max_tokens: of those computed at the same time.
    """
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), num_tokens // MIN_TOKENS, max_tokens // MIN_TOKENS))


def map_in_workers(
    function: Callable[[nn.Module, Item], Result], model: nn.Module, items: Sequence[Item], *, workers: int
) -> Iterator[Result]:
    """`function(model, item)` of every item, in order, up to `workers` at a time.

    Each worker has a copy of the model's modules (a forward pass may hook into them) over the same weights, and an
    equal share of torch's threads. Nothing may train the model meanwhile. Gradient mode and autocast are per thread:
    set them inside `function`. Context variables, in which torch keeps the settings of its compiler, are the caller's.
    An error stops what has not begun.
    """
    if workers == 1:
        yield from (function(model, item) for item in items)
        return
    idle: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
    for twin in (model, *(sharing_copy(model) for _ in range(workers - 1))):
        idle.put(twin)

    def work(item: Item) -> Result:
        twin = idle.get()
        try:
            return function(twin, item)
        finally:
            idle.put(twin)

    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        for future in [pool.submit(copy_context().run, work, item) for item in items]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def sharing_copy(model: nn.Module) -> nn.Module:
    """Modules of its own over the same weights and configuration."""
    shared = [*model.parameters(), *model.buffers(), *{id(c): c for c in map(_config, model.modules()) if c}.values()]
    return copy.deepcopy(model, {id(value): value for value in shared})


def _config(module: nn.Module) -> object | None:
    return getattr(module, "config", None)
