"""How many responses are decoded side by side: as many as the device has memory for their keys and values."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from alignment.sampling.own_tokens import whole_columns

# Responses side by side on a CPU: more fill no more of its cores.
CPU_MAX_ROWS = 128
# On a GPU: at most as many as have been measured to help, and keys and values in a share of what is free. The rest is
# for running prompts, logits, copies of tables that grow, and gaps between the allocator's blocks.
GPU_MAX_ROWS = 512
KV_SHARE = 0.7


def rows_that_fit(
    free: int | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    candidates: int,
    prompt_tokens: int,
    new_tokens: int,
) -> int:
    """Responses side by side where `sampling.max_rows` does not say: whole prompts, as far as one fits.

    Args:
        free: bytes on the device, or None for a CPU.
        config: of the model.
        dtype: of keys and values.
        candidates: responses to each prompt.
        prompt_tokens: of the longest prompt.
        new_tokens: of a response at most.

    Returns:
        At least 1, on a CPU the same for all models.
    """
    room = tokens_that_fit(free, config, dtype)
    if room is None:
        return CPU_MAX_ROWS
    columns = whole_columns(new_tokens)
    prompts = room // (prompt_tokens + candidates * columns)
    if prompts and candidates <= GPU_MAX_ROWS:
        return min(prompts, GPU_MAX_ROWS // candidates) * candidates
    return max(1, min(GPU_MAX_ROWS, (room - prompt_tokens) // columns))


def tokens_that_fit(free: int | None, config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    """Tokens whose keys and values there is room for, of prompts and responses; None for a CPU.

    `rows_that_fit` supposes that a prompt leaves with its responses; one whose last response is long stays.
    """
    if free is None:
        return None
    return max(0, int(KV_SHARE * free)) // _token_bytes(config, dtype)


def kv_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, *, prompts: int, rows: int, prompt_tokens: int, new_tokens: int
) -> int:
    """Bytes of keys and values of prompts and responses at their full lengths, in every layer."""
    return (prompts * prompt_tokens + rows * whole_columns(new_tokens)) * _token_bytes(config, dtype)


def kv_width(config: PreTrainedConfig) -> int:
    """Numbers in a token's keys in a layer."""
    config = config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size


def free_memory(device: torch.device) -> int | None:
    """Bytes that a CUDA device has left, what torch keeps there without using it included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers."""
    return config.get_text_config(decoder=True).num_hidden_layers * 2 * kv_width(config) * dtype.itemsize
