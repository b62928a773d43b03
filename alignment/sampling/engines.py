"""A sampling engine on a model, both by name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext

import torch
from accelerate import PartialState

from alignment.config import ModelSection, SamplingSection
from alignment.errors import ConfigError, SamplerError
from alignment.hardware import compute_dtype
from alignment.model_folders import check_is_chat_model, load_chat_of, model_folder
from alignment.models import load_chat_model
from alignment.progress import console
from alignment.sampling.memory import CPU_MAX_ROWS
from alignment.sampling.protocol import Sampler
from alignment.sampling.torch_engine import TorchSampler
from alignment.sampling.vllm_engine import VllmSampler


@contextmanager
def open_sampler(
    model: ModelSection, sampling: SamplingSection, device: torch.device, *, max_prompt_length: int
) -> Iterator[Sampler]:
    """The engine that `sampling` names, with the model's weights in memory until the end of the block.

    Args:
        model: a chat model; responses end with its format's end of turn.
        sampling: its settings of engines and sizes; what is drawn is given to `Sampler.sample`.
        device: of the torch engine. vLLM takes all GPUs it is told to.
        max_prompt_length: tokens of the longest prompt: vLLM allocates by it.

    Raises:
        ConfigError: vLLM is asked for in several processes.
        ModelError: the model cannot be loaded.
        SamplerError: vLLM cannot be imported or started, and `sampling.fall_back` is off.
    """
    dtype = compute_dtype(device, model.dtype)
    with open_vllm(model, sampling, dtype, max_prompt_length=max_prompt_length) as vllm:
        if vllm is not None:
            yield vllm
            return
    loaded = load_chat_model(model.path, dtype=dtype, chat_template=model.chat_template, keep_adapter=True)
    loaded.model.to(device)
    yield TorchSampler(loaded.model, stop_ids=[loaded.chat.end_of_turn_id], max_rows=sampling.max_rows)


@contextmanager
def open_vllm(
    model: ModelSection, sampling: SamplingSection, dtype: torch.dtype, *, max_prompt_length: int
) -> Iterator[VllmSampler | None]:
    """vLLM on a model until the end of the block, or None: `sampling` names the torch engine or falls back to it.

    Raises as `open_sampler` does.
    """
    sampler = _start_vllm(model, sampling, dtype, max_prompt_length) if sampling.engine == "vllm" else None
    with nullcontext() if sampler is None else closing(sampler):
        yield sampler


def check_one_process(sampling: SamplingSection, num_processes: int) -> None:
    """Raises ConfigError where several processes would each start vLLM."""
    if sampling.engine == "vllm" and num_processes > 1:
        raise ConfigError(
            "sampling.engine=vllm runs in one process and spreads the model itself. Start the stage without "
            "accelerate launch, and set sampling.vllm.tensor_parallel_size to the number of GPUs."
        )


def _start_vllm(
    model: ModelSection, sampling: SamplingSection, dtype: torch.dtype, max_prompt_length: int
) -> VllmSampler | None:
    """None where it cannot start and `sampling.fall_back` is on."""
    check_one_process(sampling, PartialState().num_processes)
    chat, _ = load_chat_of(model.path, model.chat_template)
    check_is_chat_model(model.path)
    gc.collect()
    torch.cuda.empty_cache()  # vLLM's own processes find only what this one has given back
    try:
        return VllmSampler(
            model_folder(model.path),
            stop_ids=[chat.end_of_turn_id],
            dtype=dtype,
            max_rows=sampling.max_rows or CPU_MAX_ROWS,
            max_length=max_prompt_length + sampling.max_new_tokens,
            engine_args=sampling.vllm,
        )
    except SamplerError as error:
        if not sampling.fall_back:
            raise
        console.print(f"{error} Sampling with the torch engine instead (sampling.fall_back).")
        return None
