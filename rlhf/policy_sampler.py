"""Sampling from a policy in training: by vLLM, which is handed its new weights, or the built-in engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from alignment.models import rounded_copy
from alignment.sampling.engines import open_vllm
from alignment.sampling.protocol import Sample, Sampler, SamplingParams
from alignment.sampling.torch_engine import TorchSampler
from alignment.sampling.vllm_engine import VllmSampler
from rlhf.config import PPOConfig

# Of a GPU's memory for vLLM's weights and cache; policy, critic, reward models and their training need the rest.
VLLM_MEMORY_SHARE = 0.3
# What vLLM takes as `max_lora_rank`.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def open_policy_vllm(config: PPOConfig, dtype: torch.dtype) -> AbstractContextManager[VllmSampler | None]:
    """vLLM on the weights that the policy starts from, ready for its adapters; see `open_vllm`."""
    arguments: dict[str, Any] = {"gpu_memory_utilization": VLLM_MEMORY_SHARE}
    if rank := config.lora.r:
        fitting = min((taken for taken in VLLM_RANKS if taken >= rank), default=rank)
        arguments |= {"enable_lora": True, "max_lora_rank": fitting}
    sampling = config.sampling.model_copy(update={"vllm": arguments | config.sampling.vllm})
    return open_vllm(config.model, sampling, dtype, max_prompt_length=config.prompts.max_prompt_length)


class PolicySampler:
    """A Sampler on the policy's present weights, as long as it hears of every change of them."""

    def __init__(
        self,
        policy: nn.Module,
        stop_ids: Sequence[int],
        dtype: torch.dtype,
        *,
        max_rows: int | None,
        vllm: VllmSampler | None = None,
    ) -> None:
        """Without vLLM the built-in engine samples in `dtype`; see TorchSampler for `max_rows`."""
        self._policy = policy.module if hasattr(policy, "module") else policy
        self._stop_ids, self._dtype, self._max_rows = stop_ids, dtype, max_rows
        self._vllm = vllm
        self._is_handed_over = False

    def weights_changed(self) -> None:
        """Whatever samples next is handed the policy's weights first."""
        self._is_handed_over = False

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
        on_prompt: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """See Sampler."""
        return self._engine().sample(prompts, params, on_progress=on_progress, on_prompt=on_prompt)

    def _engine(self) -> Sampler:
        if self._vllm is None:
            return self._torch_sampler()
        if not self._is_handed_over:
            self._vllm.refresh(self._policy)
            self._is_handed_over = True
        return self._vllm

    def _torch_sampler(self) -> TorchSampler:
        """On the policy itself, or on a copy in the fast type, which lives while it samples.

        Adapters stay apart: merged into rounded weights, most of what an iteration or two have taught would be lost.
        Making a copy is collective where FSDP has split the policy: all processes sample, if only nothing.
        """
        policy = self._policy
        if isinstance(policy, PeftModel):
            model = policy.get_base_model()
        elif isinstance(policy, FSDPModule) or next(policy.parameters()).dtype != self._dtype:
            model = rounded_copy(policy, self._dtype)
        else:
            model = policy
        return TorchSampler(model, stop_ids=self._stop_ids, max_rows=self._max_rows)
