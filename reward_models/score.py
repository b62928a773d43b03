"""Scores of responses under a trained reward model: K responses to a prompt share one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from alignment.chat import ChatFormat, fit_prompt
from alignment.dialogue import Message, Messages, RowError, parse_messages
from alignment.distributed import equal_passes, holds_parts
from alignment.errors import AlignError, DataError, ModelError
from alignment.hardware import autocast_to, compute_dtype
from alignment.logprobs import branch_scores
from alignment.model_folders import context_length
from alignment.model_workers import map_in_workers, num_workers
from alignment.models import LoadedModel, load_reward_model
from alignment.prefix_batch import Branch, Tree, collate, even_groups, micro_batches, split_tree

MAX_TOKENS = 8192

# One user turn as text, or turns that end with a user turn.
PromptLike = str | Sequence[Message | Mapping[str, str]]


class Scorer:
    """A frozen reward model. `Scorer.load("runs/rm-safety")`, then `score` texts or `score_trees` token ids."""

    def __init__(self, loaded: LoadedModel, *, max_tokens: int = MAX_TOKENS, name: str = "the reward model") -> None:
        """`name` is what messages call it."""
        self.model: nn.Module = loaded.model
        self.chat: ChatFormat = loaded.chat
        self.max_tokens, self.name = max_tokens, name

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
        loaded = load_reward_model(
            path, dtype=compute_dtype(device, dtype), chat_template=chat_template, keep_adapter=True
        )
        loaded.model.to(device).requires_grad_(False)
        return cls(loaded, max_tokens=max_tokens, name=path)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt with one response at most."""
        return context_length(self.model.config)

    def score(
        self,
        prompts: Sequence[PromptLike],
        responses: Sequence[Sequence[str]],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Raw scores (logits), a list of K for each prompt, in order.

        Raises DataError where an argument is of the wrong form, or a prompt's last turn and a response do not fit into
        the model's context, and ModelError where a score is not a finite number.
        """
        trees = []
        for prompt, texts in zip(_parsed_prompts(prompts), _checked_responses(prompts, responses), strict=True):
            tree, _ = fit_tree(self.chat, prompt, texts, self.context_length)
            if tree is None:
                raise DataError(
                    f"prompt {len(trees) + 1} with its longest response is over {self.context_length} tokens."
                )
            trees.append(tree)
        scores = self.score_trees(trees, on_progress=on_progress)
        if wrong := sum(not math.isfinite(score) for row in scores for score in row):
            raise ModelError(f"{self.name} gave {wrong} scores that are no finite numbers. Look at its training.")
        return scores

    def score_trees(
        self, trees: Sequence[Tree], *, on_progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raw scores of every branch of every tree, in order."""
        return score_trees(self.model, trees, max_tokens=self.max_tokens, on_progress=on_progress)


def score_trees(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    max_tokens: int,
    autocast: torch.dtype = torch.float32,
    spare: Tree | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Raw scores of every branch of every tree, in order; read at each branch's last token.

    Args:
        model: a reward model, not to be trained meanwhile.
        trees: prompts with their responses.
        max_tokens: of all that is computed at one time; a tree that is longer by itself is split, its trunk repeated.
        autocast: the type to compute in where the weights are of another; float32 takes the weights as they are.
        spare: what a process with fewer passes than another goes through, where FSDP has split the model.
        on_progress: told how many trees are done since it was called last.
    """
    device = next(model.parameters()).device
    num_tokens = sum(tree.num_tokens for tree in trees)
    workers = 1 if holds_parts(model) else num_workers(device, num_tokens, max_tokens=max_tokens)
    budget = max_tokens // workers
    results = [[0.0] * len(tree.branches) for tree in trees]
    parts = [(index, start, part) for index, tree in enumerate(trees) for start, part in split_tree(tree, budget)]
    lengths = [part.num_tokens for *_, part in parts]
    if workers == 1:
        chosen = micro_batches(lengths, int, max_tokens=budget)
    else:
        chosen = even_groups(lengths, workers=workers, max_tokens=budget)
    groups = [[parts[row] for row in group] for group in chosen]
    todo = list(equal_passes(groups, [(0, 0, spare)], model))

    @torch.no_grad()
    def scores(twin: nn.Module, item: tuple[Sequence[tuple[int, int, Tree]], bool]) -> list[float]:
        group, _ = item
        batch = collate([[part] for *_, part in group]).to(device)
        with autocast_to(autocast, device):
            return branch_scores(twin, batch).tolist()

    for (group, counts), values in zip(todo, map_in_workers(scores, model, todo, workers=workers), strict=True):
        if not counts:
            continue
        found = iter(values)
        for index, start, part in group:
            stop = start + len(part.branches)
            results[index][start:stop] = [next(found) for _ in part.branches]
        if on_progress:
            on_progress(sum(start == 0 for _, start, _ in group))
    return results


def score(model: str | Scorer, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Raw scores of K responses for each prompt: `score("runs/rm-safety", ["How are you?"], [["Fine.", "Go away."]])`.

    A prompt is a text (one user turn) or turns, as Message objects or `{"role", "content"}`, the last one a user's.
    """
    scorer = model if isinstance(model, Scorer) else Scorer.load(model)
    return scorer.score(prompts, responses)


def fit_tree(
    chat: ChatFormat, prompt: Messages, responses: Sequence[str], context_length: int
) -> tuple[Tree | None, bool]:
    """A prompt with its responses, and whether it lost its oldest turns to fit; None where it cannot fit."""
    encoded = [chat.encode_response(text) for text in responses]
    ids, was_cut = fit_prompt(chat, prompt, context_length - max(map(len, encoded)))
    return (None if ids is None else Tree(ids, [Branch(response) for response in encoded])), was_cut


def check_fits(chat: ChatFormat, context_length: int, prompt: Messages, responses: Sequence[str]) -> bool:
    """Whether a prompt loses its oldest turns beside its responses.

    Raises RowError where its last turn with one of them does not fit, or cannot be written in the model's format.
    """
    try:
        chat.check([Message("assistant", text) for text in responses])
        tree, was_cut = fit_tree(chat, prompt, responses, context_length)
    except AlignError as error:
        raise RowError(str(error)) from None
    if tree is None:
        problem = f"the prompt's last turn with its response is over the model's {context_length} tokens"
        raise RowError(f"{problem}. Shorten or remove the row.")
    return was_cut


def _parsed_prompts(prompts: Sequence[PromptLike]) -> list[Messages]:
    if isinstance(prompts, str):
        raise DataError(f"prompts is the text {prompts!r:.60}. Give a list of prompts, one entry each.")
    found = []
    for index, prompt in enumerate(prompts):
        turns = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        if isinstance(turns, Sequence):
            turns = [turn.to_json() if isinstance(turn, Message) else turn for turn in turns]
        try:
            found.append(parse_messages(turns, f"prompts[{index}]", last_role="user"))
        except RowError as error:
            raise DataError(error.problem) from None
    return found


def _checked_responses(prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    if isinstance(responses, str) or len(responses) != len(prompts):
        found = f"the text {responses!r:.60}" if isinstance(responses, str) else f"{len(responses)} lists"
        raise DataError(f"responses is {found} for {len(prompts)} prompts. Give a list of texts for each prompt.")
    for index, texts in enumerate(responses):
        if isinstance(texts, str):
            raise DataError(
                f"responses[{index}] is the text {texts!r:.60}. Put it into a list, also where it is alone."
            )
        if not len(texts):
            raise DataError(f"responses[{index}] is empty. Give at least one text for each prompt.")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise DataError(f"responses[{index}] holds {wrong[0]!r:.60}. It must be a list of texts.")
    return responses
