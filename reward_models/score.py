"""Scores of responses under a trained reward model: K responses to a prompt share one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from alignment.chat import ChatFormat, fit_prompt
from alignment.dialogue import Messages
from alignment.errors import DataError
from alignment.hardware import compute_dtype
from alignment.logprobs import branch_scores
from alignment.models import LoadedModel, load_reward_model
from alignment.prefix_batch import Branch, Tree, collate, micro_batches

MAX_TOKENS = 8192


class Scorer:
    """A frozen reward model. `Scorer.load("runs/rm-safety")`, then `score` texts or `score_trees` token ids."""

    def __init__(self, loaded: LoadedModel, *, max_tokens: int = MAX_TOKENS) -> None:
        self.model: nn.Module = loaded.model
        self.chat: ChatFormat = loaded.chat
        self.max_tokens = max_tokens

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "auto",
        chat_template: str = "auto",
        max_tokens: int = MAX_TOKENS,
    ) -> Scorer:
        """Raises ModelError where `path` is not a reward model."""
        device = torch.device(device)
        loaded = load_reward_model(path, dtype=compute_dtype(device, dtype), chat_template=chat_template)
        loaded.model.to(device).requires_grad_(False)
        return cls(loaded, max_tokens=max_tokens)

    def score(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[Sequence[str]],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Raw scores (logits), a list of K for each prompt, in order.

        Raises DataError where a prompt's last turn and a response do not fit into the model's context.
        """
        limit = self.model.config.max_position_embeddings
        trees = []
        for prompt, texts in zip(prompts, responses, strict=True):
            encoded = [self.chat.encode_response(text) for text in texts]
            ids, _ = fit_prompt(self.chat, prompt, limit - max(map(len, encoded)))
            if ids is None:
                raise DataError(f"prompt {len(trees) + 1} with its longest response is over {limit} tokens.")
            trees.append(Tree(ids, [Branch(response) for response in encoded]))
        return self.score_trees(trees, on_progress=on_progress)

    @torch.no_grad()
    def score_trees(
        self, trees: Sequence[Tree], *, on_progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raw scores of every branch of every tree, in order; read at each branch's last token."""
        device = next(self.model.parameters()).device
        results: list[list[float]] = [[] for _ in trees]
        for group in micro_batches(trees, lambda tree: tree.num_tokens, max_tokens=self.max_tokens):
            batch = collate([[trees[index]] for index in group]).to(device)
            scores = iter(branch_scores(self.model, batch).tolist())
            for index in group:
                results[index] = [next(scores) for _ in trees[index].branches]
            if on_progress:
                on_progress(len(group))
        return results


def score(model: str | Scorer, prompts: Sequence[Messages], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Raw scores of K responses for each prompt: `score("runs/rm-safety", prompts, responses)`."""
    scorer = model if isinstance(model, Scorer) else Scorer.load(model)
    return scorer.score(prompts, responses)
