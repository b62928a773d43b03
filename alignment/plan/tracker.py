"""Bytes alive and floating-point operations of code that runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class Part:
    """A part of what is watched: bytes alive where it begins and at most, and floating-point operations."""

    began: int
    peak: int
    flops: int = 0


class MemoryTracker(TorchDispatchMode):
    """Watches every operation in its block: memory comes with the first tensor on a storage and goes with the last.

    Forward and backward pass, saved tensors, autocast's copies of weights and what lives only within a layer count as
    they come and go, for the real code runs. Tensors made before the block count only where they are not `known`.

    Attributes:
        live: bytes alive now.
        parts: of the block, in order; `next_part` begins another. Operations are those of matrix products and
            attention, by torch's own formulas.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.parts = [Part(0, 0)]
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def next_part(self) -> None:
        """What is alive from here on counts as the next part's."""
        self.parts.append(Part(self.live, self.live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.parts[-1].flops += formula(*args, **kwargs, out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, FakeTensor):
                self._see(leaf)
        return output

    def _see(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self.parts[-1].peak = max(self.parts[-1].peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
