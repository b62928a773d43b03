"""What is measured on sampled responses before anything is learned: scores, gated reward, log-probabilities, values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignment.config import ModelSection
from alignment.dialogue import Candidate
from alignment.distributed import for_all, map_over_processes, most_over_processes
from alignment.errors import ModelError
from alignment.hardware import compute_dtype, lent
from alignment.models import LoadedModel, reward_model_context
from alignment.prefix_batch import PrefixBatch, Tree, collate, micro_batches
from alignment.progress import ProgressBar
from alignment.runs import read_manifest
from alignment.sampling.protocol import Sample
from alignment.tensor_ops import masked_mean, masked_var
from reward_models.score import Scorer
from rlhf.config import RewardSection
from rlhf.gating import gated_logits
from rlhf.rewards import kl_k1, kl_k3

logger = logging.getLogger(__name__)


def load_scorer(model: ModelSection, device: torch.device, *, max_tokens: int, offload: bool = False) -> Scorer:
    """A reward model as its section describes it, in the type for `device`; with `offload` it is put on the CPU.

    Raises ModelError where it is no reward model.
    """
    dtype = str(compute_dtype(device, model.dtype)).removeprefix("torch.")
    home = "cpu" if offload else device
    return Scorer.load(model.path, device=home, dtype=dtype, chat_template=model.chat_template, max_tokens=max_tokens)


def judges_of(rewards: RewardSection, **guard: ModelSection | None) -> dict[str, ModelSection]:
    """The reward models of a stage by the setting that names them; a guard, where there is one, by its own."""
    judges = {"rewards.helpfulness": rewards.helpfulness, "rewards.safety": rewards.safety}
    return {**judges, **{name: model for name, model in guard.items() if model is not None}}


def judges_context(judges: Mapping[str, ModelSection]) -> int:
    """Tokens of a prompt with its response that every one of these reward models can read; no weights are loaded.

    To be asked before anything is sampled for them. Warns where one was trained for another aim than its setting's.

    Raises:
        ModelError: one is no reward model.
    """
    contexts = []
    for name, model in judges.items():
        try:
            contexts.append(reward_model_context(model.path))
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        kind = (read_manifest(Path(model.path)) or {}).get("settings", {}).get("kind")
        aim = name.removeprefix("rewards.")
        if {kind, aim} == {"helpfulness", "safety"}:
            logger.warning("%s is %s, a reward model of %s. Is that meant?", name, model.path, kind)
    return min(contexts)


class RewardModels:
    """Both reward models behind the gate. They compute on `device`, wherever they are kept."""

    def __init__(self, helpfulness: Scorer, safety: Scorer, *, threshold: float, device: torch.device) -> None:
        self.helpfulness, self.safety, self.threshold, self.device = helpfulness, safety, threshold, device

    @classmethod
    def load(cls, section: RewardSection, device: torch.device, *, offload: bool = False) -> RewardModels:
        """With `offload` each is in CPU memory and on `device` only to score.

        Raises ModelError where one of them is not a reward model.
        """
        models, tokens = (section.helpfulness, section.safety), section.max_tokens_per_batch
        scorers = (load_scorer(model, device, max_tokens=tokens, offload=offload) for model in models)
        return cls(*scorers, threshold=section.threshold, device=device)

    def gate(
        self, helpfulness: Float[Tensor, " B"], safety: Float[Tensor, " B"], is_safety: Bool[Tensor, " B"]
    ) -> Tensor:
        """LOGIT(R_c) of Llama 2 Sec. 3.2.3."""
        return gated_logits(helpfulness, safety, is_safety, threshold=self.threshold)

    def check_vocabulary(self, policy: LoadedModel) -> None:
        """Raises ModelError where a reward model reads other token ids than the policy writes."""
        for name, scorer in (("helpfulness", self.helpfulness), ("safety", self.safety)):
            if scorer.chat.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
                raise ModelError(
                    f"rewards.{name}: its tokenizer differs from the policy's. PPO scores token ids as they were "
                    "sampled: train the reward model from a checkpoint of the policy's family."
                )

    def score_trees(self, trees: Sequence[Tree]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Raw helpfulness and safety scores of every branch of every tree, in order."""
        found = []
        for scorer in (self.helpfulness, self.safety):
            with lent(scorer.model, self.device):
                found.append(torch.tensor([score for scores in scorer.score_trees(trees) for score in scores]))
        return found[0], found[1]

    def score(self, candidates: Sequence[Candidate], *, title: str = "") -> list[Candidate]:
        """The candidates with both scores and the gated reward; those of one prompt in a row share its prefill.

        With a title there is a progress bar.

        Every process scores a share of the prompts; all get all candidates.
        """
        if not candidates:
            return []
        groups: list[list[Candidate]] = []
        for candidate in candidates:
            if groups and groups[-1][0].prompt == candidate.prompt:
                groups[-1].append(candidate)
            else:
                groups.append([candidate])

        def work(mine: Sequence[Sequence[Candidate]]) -> list[tuple[list[float], ...]]:
            prompts = [group[0].prompt.messages for group in mine]
            texts = [[candidate.response for candidate in group] for group in mine]
            by_model = []
            for scorer in (self.helpfulness, self.safety):
                with lent(scorer.model, self.device):
                    by_model.append(scorer.score(prompts, texts, on_progress=for_all(bar.advance)))
            return list(zip(*by_model, strict=True))

        with ProgressBar(title, 2 * len(groups), shown=bool(title) and PartialState().is_main_process) as bar:
            scored = map_over_processes(work, groups)
        by_model = [[score for scores in by_group for score in scores] for by_group in zip(*scored, strict=True)]
        helpfulness, safety = map(torch.tensor, by_model)
        is_safety = torch.tensor([candidate.prompt.is_safety for candidate in candidates])
        rewards = self.gate(helpfulness, safety, is_safety).tolist()
        return [
            replace(candidate, helpfulness=h, safety=s, reward=r)
            for candidate, h, s, r in zip(candidates, *by_model, rewards, strict=True)
        ]


def guard_scores(scorer: Scorer, candidates: Sequence[Candidate], *, title: str = "") -> list[Candidate]:
    """The candidates with the score of one more reward model; every process takes a share of them."""

    def work(mine: Sequence[Candidate]) -> list[float]:
        asked, texts = [each.prompt.messages for each in mine], [[each.response] for each in mine]
        return [score for [score] in scorer.score(asked, texts, on_progress=for_all(bar.advance))]

    with ProgressBar(title, len(candidates), shown=bool(title) and PartialState().is_main_process) as bar:
        scores = map_over_processes(work, candidates)
    return [replace(candidate, guard=score) for candidate, score in zip(candidates, scores, strict=True)]


@dataclass(frozen=True)
class Rollouts:
    """One process's share of an iteration: trees of prompts with sampled responses, and tables over them.

    N responses in the order of trees and branches, T tokens in the longest.

    Attributes:
        trees: a prompt each, with its sampled responses.
        mask: (N, T) True on sampled tokens, the end-of-turn token included.
        logprobs: (N, T) under the policy that sampled, by the trainer's own forward at sampling temperature.
        ref_logprobs: (N, T) under the reference.
        entropy: (N, T) of the policy's distribution, in nats.
        rewards: (N, T) per token: the KL penalty, and the response's whitened reward on its last token.
        values: (N, T) the critic's value before each token.
        trained: (N, T) True on the tokens that are learned from.
        advantages: (N, T) whitened over those of the global batch.
        returns: (N, T) the critic's targets.
    """

    trees: list[Tree]
    mask: Bool[Tensor, "N T"]
    logprobs: Float[Tensor, "N T"]
    ref_logprobs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    rewards: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    trained: Bool[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]


def reward_metrics(
    gated: Float[Tensor, " B"],
    helpfulness: Float[Tensor, " B"],
    safety: Float[Tensor, " B"],
    is_safety: Bool[Tensor, " B"],
    gate: Bool[Tensor, " B"],
    lengths: Int[Tensor, " B"],
) -> dict[str, Tensor]:
    """Figures of one process's scores; `gate` is True where the safety model speaks.

    `gated_unsafe_rate` is its share among responses to ordinary prompts, where it speaks because the response is
    unsafe. `reward_length_correlation` is Pearson's, 0 where one of the two is constant.
    """
    ordinary = ~is_safety
    centred = [x.double().cpu() - x.double().mean().cpu() for x in (gated, lengths)]
    norms = centred[0].norm() * centred[1].norm()
    return {
        "reward": gated.mean(),
        "reward_std": gated.std(correction=0),
        "helpfulness": helpfulness.mean(),
        "safety": safety.mean(),
        "gated_rate": gate.float().mean(),
        "gated_unsafe_rate": (gate & ordinary).sum() / ordinary.sum().clamp_min(1),
        "reward_length_correlation": (centred[0] @ centred[1]) / norms.clamp_min(1e-12),
    }


def rollout_metrics(rollouts: Rollouts) -> dict[str, Tensor]:
    """Figures of one process's rollouts, sums over a response's tokens and means over responses.

    `kl` is the estimate whose mean is exact (k1), `kl_k3` the one that is never negative; nats a response.
    `explained_variance` is 1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant one.
    """
    mask = rollouts.mask

    def per_response(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum(1).mean()

    error = masked_var(rollouts.returns - rollouts.values, mask)
    return {
        "kl": per_response(kl_k1(rollouts.logprobs, rollouts.ref_logprobs)),
        "kl_k3": per_response(kl_k3(rollouts.logprobs, rollouts.ref_logprobs)),
        "entropy": masked_mean(rollouts.entropy, mask),
        "length": mask.sum(1).float().mean(),
        "return": per_response(rollouts.rewards),
        "explained_variance": 1 - error / masked_var(rollouts.returns, mask).clamp_min(1e-8),
    }


def sampler_gap(rollouts: Rollouts, drawn: Sequence[Sequence[Sample]]) -> Tensor:
    """Mean over tokens of |log-probability by the engine that drew them - by the trainer|, both at its temperature.

    Samples are those of the rollouts, in their order. In nats a token.
    """
    reported = torch.tensor([value for samples in drawn for sample in samples for value in sample.logprobs])
    return (reported - rollouts.logprobs[rollouts.mask].cpu()).abs().mean()


def tabulate(
    trees: Sequence[Tree],
    measure: Callable[[PrefixBatch], Sequence[Tensor]],
    *,
    max_tokens: int,
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
    collective: Accelerator | None = None,
) -> list[Float[Tensor, "N T"]]:
    """Token measurements of all branches as tables, computed in micro-batches without gradients.

    `measure` maps a batch with M counted tokens to tensors of shape (M,). `on_progress` hears of trees that are done.
    `collective` is given where FSDP has split the model: all processes run as many passes as the one that has most.
    """
    first = branch_offsets(trees)
    longest = max(len(branch.ids) for tree in trees for branch in tree.branches)
    tables: list[Tensor] = []
    groups = list(micro_batches(trees, lambda tree: tree.num_tokens, max_tokens=max_tokens))
    count = len(groups) if collective is None else most_over_processes(len(groups), collective)
    for group in groups + groups[-1:] * (count - len(groups)):  # what is measured again is the same
        batch = collate([[trees[index]] for index in group]).to(device)
        with torch.no_grad():
            measured = measure(batch)
        if not tables:
            tables = [torch.zeros(first[-1], longest, device=device) for _ in measured]
        rows = branch_rows(group, first, device)[batch.target_branches]
        for table, values in zip(tables, measured, strict=True):
            table[rows, batch.target_offsets] = values.float()
        if on_progress:
            on_progress(len(group))
    return tables


def branch_offsets(trees: Sequence[Tree]) -> list[int]:
    """Index of the first branch of each tree among all branches, and the number of branches at the end."""
    offsets = [0]
    for tree in trees:
        offsets.append(offsets[-1] + len(tree.branches))
    return offsets


def branch_rows(group: Sequence[int], first: Sequence[int], device: torch.device) -> Tensor:
    """Table rows of the branches of the trees in `group`, in the order in which a batch of them counts branches."""
    return torch.tensor([row for index in group for row in range(first[index], first[index + 1])], device=device)
