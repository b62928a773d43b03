"""How far a policy has moved: its KL divergence from another model, on answers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState

from alignment.chat import fit_prompt
from alignment.config import ModelSection
from alignment.dialogue import Candidate
from alignment.distributed import for_all, map_over_processes
from alignment.hardware import compute_dtype
from alignment.logprobs import response_logprobs
from alignment.models import load_chat_model
from alignment.prefix_batch import Branch, PrefixBatch, Tree
from alignment.progress import ProgressBar
from rlhf.rollout import tabulate


def answer_logprobs(
    section: ModelSection,
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    max_prompt_length: int,
    temperature: float,
    max_tokens: int,
    title: str,
) -> list[float]:
    """Log-probability of each answer under a model at a sampling temperature, in nats.

    Its text is encoded anew; the end of turn counts where the answer ended by itself. Every process takes a share.
    The mean difference between the model that sampled the answers and another, D_KL(first || other), is estimated
    without bias (k1) where nothing cut the distribution off.

    Args:
        section: a chat model.
        candidates: answers to prompts that fit.
        device: where to compute.
        max_prompt_length: prompts over this many tokens lose their oldest turns, as when they were answered.
        temperature: that of the sampling, above 0.
        max_tokens: tokens in a micro-batch.
        title: of the progress bar.
    """
    dtype = compute_dtype(device, section.dtype)
    loaded = load_chat_model(section.path, dtype=dtype, chat_template=section.chat_template)
    model = loaded.model.to(device)

    def tree(candidate: Candidate) -> Tree:
        prompt, _ = fit_prompt(loaded.chat, candidate.prompt.messages, max_prompt_length)
        answer = loaded.chat.encode_response(candidate.response)
        is_cut = candidate.finish_reason == "length" and len(answer) > 1
        return Tree(prompt, [Branch(answer[:-1] if is_cut else answer)])

    def measure(batch: PrefixBatch) -> list[torch.Tensor]:
        return [response_logprobs(model, batch, temperature=temperature)]

    def work(mine: Sequence[Candidate]) -> list[float]:
        if not mine:
            return []
        trees, advance = [tree(each) for each in mine], for_all(bar.advance)
        [table] = tabulate(trees, measure, max_tokens=max_tokens, device=device, on_progress=advance)
        return table.double().sum(1).tolist()

    with ProgressBar(title, len(candidates), shown=PartialState().is_main_process) as bar:
        return map_over_processes(work, candidates)
