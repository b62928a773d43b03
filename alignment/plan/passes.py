"""What a forward or training pass needs beside weights, gradients and optimizer state: the real code on fake tensors.

Layers are alike, so three of them are run, and the middle one stands for every further one: what it keeps is added at
each place, since the peak of a few layers may be elsewhere (where the embedding gets its gradient, say) than that of
many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alignment.logprobs import CHUNK_TOKENS, CPU_ROWS, branch_scores, response_logprobs, token_values
from alignment.plan.shapes import DeviceKind, ModelSpec, fake_model, weights
from alignment.plan.tracker import MemoryTracker, Part
from alignment.prefix_batch import Branch, PrefixBatch, Tree, collate

# What is read from a batch: log-probabilities of its counted tokens, a score a branch, or a value a counted token.
READERS: dict[str, Callable[[nn.Module, PrefixBatch], Tensor]] = {
    "logprobs": response_logprobs,
    "scores": branch_scores,
    "values": token_values,
}


@dataclass(frozen=True)
class Rows:
    """A micro-batch in which all rows are alike: `count` rows of a prompt and its responses, tokens each."""

    count: int
    trunk: int
    branches: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return self.count * (self.trunk + sum(self.branches))

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted, at most."""
        return self.count * sum(self.branches)


@dataclass(frozen=True)
class Pass:
    """Bytes at most beside what is there before, and floating-point operations."""

    peak: int
    flops: int


@functools.cache
def run_pass(spec: ModelSpec, rows: Rows, reader: str, *, device: DeviceKind, train: bool = False) -> Pass:
    """A forward pass without gradients or, with `train`, one that learns, with gradients of an earlier one there.

    Args:
        spec: the model.
        rows: the micro-batch.
        reader: a key of READERS.
        device: on a CPU our own attention runs on the real tokens side by side; elsewhere SDPA on padded rows.
        train: whether there is a backward pass.
    """
    depth = spec.adapted_layers
    run = _run(spec, min(depth, 3), rows, reader, device, train)
    if depth > 3:
        _add_layers(run, depth - 3)
    if device == "gpu" and spec.head == "lm":
        for part in (run.forward[-1], *run.backward[:1]):
            part.peak += _extra_logits(spec, rows)
    peak, flops = max(part.peak for part in run.parts), sum(part.flops for part in run.parts)
    frozen_below = max(0, spec.shape.num_hidden_layers - depth - 1)
    layer = weights(spec).parameters // max(1, spec.shape.num_hidden_layers)
    return Pass(peak, flops + 2 * frozen_below * layer * rows.num_tokens)


@dataclass(frozen=True)
class _Run:
    """The parts of a pass: embedding, every layer, head and loss; where it learns, head and loss, every layer."""

    forward: list[Part]
    backward: list[Part]

    @property
    def parts(self) -> list[Part]:
        """In order."""
        return self.forward + self.backward


def _add_layers(run: _Run, further: int) -> None:
    """Makes a pass of three layers that of so many more, all like the middle one.

    What a layer keeps is not the same in both directions: with checkpointing, weights that autocast has rounded are
    there until the forward pass ends.
    """
    _, middle, last, head = run.forward[-4:]
    for part in (middle, last, head):
        part.peak += further * (last.began - middle.began)
    middle.flops += further * middle.flops
    if run.backward:
        loss, last, middle, first = run.backward
        for part in (loss, last, middle):
            part.peak += further * (middle.began - first.began)
        middle.flops += further * middle.flops


def _run(spec: ModelSpec, layers: int, rows: Rows, reader: str, device: DeviceKind, train: bool) -> _Run:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(spec, mode, layers=layers, device=device)
    known = [*model.parameters(), *model.buffers()]
    if train:
        for parameter in model.parameters():
            if parameter.requires_grad:
                with mode:
                    parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                known.append(parameter.grad)
    batch = collate([[Tree([0] * rows.trunk, [Branch([0] * length) for length in rows.branches])]] * rows.count)
    if device == "gpu":  # nothing there depends on what the ids are; on a CPU the blocks of attention do
        batch = replace(batch, **{f.name: mode.from_tensor(getattr(batch, f.name)) for f in fields(batch)})
    autocast = spec.is_trained and spec.arithmetic != torch.float32  # frozen models compute in their weights' type
    tracker = MemoryTracker(known)
    _mark_layers(model, tracker)
    attention = memory_efficient_attention() if device == "gpu" else nullcontext()
    with tracker, attention, torch.set_grad_enabled(train):
        with torch.autocast("cpu", dtype=spec.arithmetic, enabled=autocast):
            found = READERS[reader](model, batch).sum()
        if train:
            tracker.next_part()
            found.backward()
    forward = model.config.num_hidden_layers + 2
    return _Run(tracker.parts[:forward], tracker.parts[forward:])


def _mark_layers(model: nn.Module, tracker: MemoryTracker) -> None:
    """A part of the pass begins where a layer is entered, where the last is left, and where the gradient of a layer's
    output is there.
    """
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    is_backward = False

    def gradient_is_there(_: Tensor) -> None:
        nonlocal is_backward
        is_backward = True
        tracker.next_part()

    def layer_is_entered(_: nn.Module, __: Any) -> None:
        if not is_backward:  # checkpointing computes it again: with hooks in transformers 5.19, not in 5.23
            tracker.next_part()

    def layer_is_done(layer: nn.Module, _: Any, output: Any) -> None:
        if is_backward:
            return
        if layer is layers[-1]:
            tracker.next_part()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(gradient_is_there)

    for layer in layers:
        layer.register_forward_pre_hook(layer_is_entered)
        layer.register_forward_hook(layer_is_done)


@contextmanager
def memory_efficient_attention() -> Iterator[None]:
    """SDPA as the memory-efficient kernel of a GPU, the one that takes masks: it keeps its inputs, its output, a sum a
    query and the mask as numbers of the inputs' type.

    The function itself is replaced meanwhile: a mode would not be there when checkpointing computes layers again.
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, **_: Any) -> Tensor:
        on = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if on else value.dtype
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        bias = query.new_zeros(attn_mask.shape).expand(-1, query.shape[1], -1, -1)
        keep = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, keep)[0]

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _extra_logits(spec: ModelSpec, rows: Rows) -> int:
    """A GPU normalises a whole chunk of logits at once, where a CPU takes `CPU_ROWS`: two tables in float32."""
    chunk = min(CHUNK_TOKENS, rows.num_targets)
    return 2 * 4 * spec.shape.vocab_size * max(0, chunk - CPU_ROWS)
