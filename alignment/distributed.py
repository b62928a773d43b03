"""Sums, means, whitening, weights and shares of work over the processes of a run; with one process, its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from alignment.errors import ConfigError
from alignment.tensor_ops import masked_sum, standardize

Item = TypeVar("Item")
Result = TypeVar("Result")


def mean_over_processes(values: Mapping[str, float | Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The mean of each figure over the processes, which all give the same names in the same order."""
    stacked = torch.tensor([float(value) for value in values.values()], device=accelerator.device)
    return dict(zip(values, accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))


def whiten_over_processes(
    values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], accelerator: Accelerator
) -> Float[Tensor, "*s"]:
    """`tensor_ops.whiten` with mean and variance over the True entries of all processes, whose shapes may differ."""
    count = accelerator.reduce(mask.sum().to(values.dtype), reduction="sum")
    mean = accelerator.reduce(masked_sum(values, mask), reduction="sum") / count
    var = accelerator.reduce(masked_sum((values - mean) ** 2, mask), reduction="sum") / count
    return standardize(values, mask, mean, var)


def map_over_processes(
    work: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    *,
    together: Callable[[Item], Hashable] | None = None,
) -> list[Result]:
    """`work(items)` with every process at a share of the items; all processes get all results, in the items' order.

    Items for which `together` is the same go to the same process, in their order.
    """
    state = PartialState()
    if state.num_processes == 1:
        return list(work(items))
    parts = shares(items, state.num_processes, together=together)
    mine = [items[index] for index in parts[state.process_index]]
    found = dict[int, Result]()
    for part, results in zip(parts, gather_objects(list(work(mine))), strict=True):
        found.update(zip(part, results, strict=True))
    return [found[index] for index in range(len(items))]


def for_all(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Counts what this process has done of its share as if the others had done as much."""
    num_processes = PartialState().num_processes
    return lambda count: advance(num_processes * count)


def shares(items: Sequence[Item], count: int, *, together: Callable[[Item], Hashable] | None = None) -> list[list[int]]:
    """The indices of every share, in order; see `map_over_processes`."""
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(index if together is None else together(item), []).append(index)
    parts: list[list[int]] = [[] for _ in range(count)]
    for rank, group in enumerate(groups.values()):
        parts[rank % count] += group
    return [sorted(part) for part in parts]


def most_over_processes(count: int, accelerator: Accelerator) -> int:
    """The largest of the processes' counts: how many passes all of them run, where these are collective."""
    if accelerator.num_processes == 1:
        return count
    return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())


def is_split(accelerator: Accelerator) -> bool:
    """Whether FSDP holds a part of each trained model on each process, so that every pass is collective."""
    return accelerator.distributed_type == DistributedType.FSDP


def passes(parts: Sequence[Item], accelerator: Accelerator) -> Iterator[tuple[Item, bool, bool]]:
    """The parts of a step, equally many on every process, which DDP and FSDP count on.

    A process that has fewer goes through its last one again, which is to weigh nothing there.

    Yields:
        The part, whether it counts, and whether gradients are exchanged in its pass: in the last one, or where FSDP
        holds parts of the models in all, since each process would otherwise keep whole gradients, as with DDP.
    """
    count, collective = most_over_processes(len(parts), accelerator), is_split(accelerator)
    for index in range(count):
        yield parts[min(index, len(parts) - 1)], index < len(parts), collective or index == count - 1


def equal_passes(parts: Sequence[Item], spare: Item, model: nn.Module) -> Iterator[tuple[Item, bool]]:
    """The parts of this process, each with True; where FSDP has split the model, then `spare` with False.

    As often as makes the passes through the model as many on every process. Collective there.
    """
    most = max(gather_objects(len(parts))) if holds_parts(model) else len(parts)
    yield from ((part, True) for part in parts)
    yield from ((spare, False) for _ in range(most - len(parts)))


def holds_parts(model: nn.Module) -> bool:
    """Whether FSDP has split this model, so that all processes must take part in every pass through it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_split(accelerator: Accelerator) -> None:
    """FSDP 2 alone: what it splits can be gathered and written whole. Raises ConfigError for anything else."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{kind.value} is not supported. Launch with --multi_gpu or with --use_fsdp --fsdp_version 2."
        )
    if is_split(accelerator) and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("FSDP 1, accelerate's default, is not supported. Add --fsdp_version 2 to accelerate launch.")
    if is_split(accelerator) and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ConfigError(
            "FSDP's own activation checkpointing is not supported. Leave --fsdp_activation_checkpointing out, and set "
            "model.gradient_checkpointing=true."
        )


def compute_in(accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Lets the caller's own autocast decide, and FSDP gather weights in this type, which it does not reach.

    Call before `prepare`: accelerate would wrap models, and scale losses, by what it was told when the process first
    used it, by a launcher or another training, whose unfinished accumulation of gradients would hold back steps.
    """
    accelerator.native_amp, accelerator.scaler = False, None
    accelerator.gradient_state._set_sync_gradients(True)
    if is_split(accelerator):
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None
        if dtype == torch.bfloat16:
            plugin.set_mixed_precision("bf16", override=True)
    add_in_float32(accelerator)


def add_in_float32(accelerator: Accelerator) -> None:
    """Has FSDP add up the processes' gradients in float32, where it gathers weights in fewer bits.

    accelerate would have it add in these, once for every micro-batch. Call before `prepare`.
    """
    if is_split(accelerator) and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def drop_gathered(model: nn.Module) -> None:
    """Leaves each process its parts alone of what FSDP has gathered: after a forward pass without a backward one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def from_main_process(value: Tensor) -> Tensor:
    """The main process's tensor; the others give one of its shape, type and device. Collective."""
    if dist.is_initialized():
        dist.broadcast(value, src=0)
    return value


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP may have split, on its device; then collective. Another is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as `like` is; every process has the whole one. Not collective."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name, on the CPU in their own types, of a model that FSDP may have split over the processes.

    Collective: every process calls it. The main process gets them, the others an empty dictionary. They are gathered
    one by one, so that a device holds no more than one of them whole. Tied weights come once, under their first name;
    what is on the CPU already is not copied.
    """
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.is_initialized() and dist.get_rank():
        return {}
    first = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first}
    return {name: weight for name, weight in found.items() if name not in tied}


def save_alone(model: PreTrainedModel, folder: Path) -> None:
    """A plain Hugging Face folder, by whichever process calls: `save_pretrained` writes weights in the first one only.

    Tied weights are written once, as there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def gets_weights_later() -> bool:
    """Whether FSDP is going to hand this process the weights of the main one, so that it need not load them itself.

    That is accelerate's `--fsdp_cpu_ram_efficient_loading true`.
    """
    return is_fsdp_enabled() and dist.get_rank() > 0


def leave_process_group() -> None:
    """Ends this process's part in its group, if it has one; call when all work is done, and not after an error.

    Left to the interpreter's exit, threads of gloo may abort the process, which fails the whole launch. After an error
    the other processes may wait in a collective, which would hold this one up: there the launcher ends them.
    """
    PartialState().destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # which still says that there is one


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in their order; collective where there is a process group."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
