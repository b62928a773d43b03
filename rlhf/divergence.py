"""How far a policy has moved: its KL divergence from another model, on answers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState

from alignment.config import ModelSection
from alignment.distributed import for_all, map_over_processes
from alignment.hardware import compute_dtype
from alignment.logprobs import response_logprobs
from alignment.models import load_chat_model
from alignment.prefix_batch import PrefixBatch, Tree
from alignment.progress import ProgressBar
from rlhf.tree_tables import tabulate


def answer_logprobs(
    section: ModelSection,
    trees: Sequence[Tree],
    device: torch.device,
    *,
    temperature: float,
    max_tokens: int,
    title: str,
    merged: bool = False,
) -> list[float]:
    """Log-probability of each answer under a model at a sampling temperature, in nats.

    Less that under another model, and averaged over answers that the first one sampled, it estimates D_KL(first ||
    other) without bias (k1). Every process takes a share.

    Args:
        section: a chat model.
        trees: a prompt each with one answer, the tokens as they were sampled.
        device: where to compute.
        temperature: that of the sampling, above 0.
        max_tokens: tokens in a micro-batch.
        title: of the progress bar.
        merged: takes a LoRA model's merged weights, as an engine samples from that cannot keep the adapter apart.
    """
    dtype = compute_dtype(device, section.dtype)
    template = section.chat_template
    loaded = load_chat_model(section.path, dtype=dtype, chat_template=template, keep_adapter=not merged)
    model = loaded.model.to(device)

    def measure(batch: PrefixBatch) -> list[torch.Tensor]:
        return [response_logprobs(model, batch, temperature=temperature)]

    def work(mine: Sequence[Tree]) -> list[float]:
        if not mine:
            return []
        [table] = tabulate(mine, measure, max_tokens=max_tokens, device=device, on_progress=for_all(bar.advance))
        return table.cpu().double().sum(1).tolist()

    with ProgressBar(title, len(trees), shown=PartialState().is_main_process) as bar:
        return map_over_processes(work, trees)
