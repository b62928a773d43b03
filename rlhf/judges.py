"""The reward models of a stage: loaded, behind the gate, on candidates and token ids; the guard beside them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import PartialState
from jaxtyping import Bool, Float
from torch import Tensor

from alignment.chat import ChatFormat, encode_prompt
from alignment.config import ModelSection, SamplingSection
from alignment.dialogue import Candidate, Message, Messages
from alignment.distributed import for_all, map_over_processes
from alignment.errors import DataError, ModelError
from alignment.hardware import compute_dtype, lent
from alignment.manifests import manifest_of_a_run
from alignment.model_folders import load_chat_of, model_context, reward_model_context
from alignment.prefix_batch import Tree
from alignment.progress import ProgressBar
from alignment.sampling.prompts import Judge
from alignment.sources import expanded
from reward_models.score import Scorer, fit_tree
from rlhf.config import RewardSection
from rlhf.gating import gated_logits
from rlhf.selection import by_prompt

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


def judges_context(judges: Mapping[str, ModelSection], *, untrained: Collection[str] = ()) -> int:
    """Tokens of a prompt with its response that every one of these reward models can read; no weights are loaded.

    To be asked before anything is sampled for them. Warns where one was trained for another aim than its setting's.
    Those of `untrained` are still to be made: the model that each is trained from stands for it.

    Raises:
        ModelError: one is no reward model.
    """
    contexts = []
    for name, model in judges.items():
        try:
            context = model_context if name in untrained else reward_model_context
            contexts.append(context(model.path))
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        kind = (manifest_of_a_run(expanded(model.path)) or {}).get("settings", {}).get("kind")
        aim = name.removeprefix("rewards.")
        if {kind, aim} == {"helpfulness", "safety"}:
            logger.warning("%s is %s, a reward model of %s. Is that meant?", name, model.path, kind)
    return min(contexts)


def read_judges(judges: Mapping[str, ModelSection], sampling: SamplingSection) -> dict[str, Judge]:
    """How these reward models read what is sampled, by the setting that names them; no weights are loaded."""
    found = {}
    for name, model in judges.items():
        chat, context = load_chat_of(model.path, model.chat_template)
        found[name] = Judge(chat, context, context - sampling.max_new_tokens - len(chat.closing))
    return found


def too_long_to_judge(judges: Mapping[str, Judge], candidates: Sequence[Candidate]) -> set[Messages]:
    """The prompts of `unread_prompts`. Raises DataError where no other is left."""
    found = unread_prompts(judges, candidates)
    if found and len(found) == len(by_prompt(candidates)):
        raise DataError(
            "prompts: none fits into the reward models' contexts beside its answers, which are more tokens to them than"
            " were sampled. Lower prompts.max_prompt_length or sampling.max_new_tokens."
        )
    return found


def unread_prompts(judges: Mapping[str, Judge], candidates: Sequence[Candidate]) -> set[Messages]:
    """The prompts that one of the reward models cannot read whole beside one of their candidates.

    There was room for the tokens that were sampled; the text that they make may be more tokens to a reward model.
    """

    def is_read(judge: Judge, prompt: Messages, answers: Sequence[Candidate]) -> bool:
        tree, was_cut = fit_tree(judge.chat, prompt, [answer.response for answer in answers], judge.context)
        return tree is not None and not was_cut

    return {
        prompt
        for prompt, answers in by_prompt(candidates).items()
        if not all(is_read(judge, prompt, answers) for judge in judges.values())
    }


def check_same_ids(policy: ChatFormat, judges: Mapping[str, ChatFormat]) -> None:
    """Raises ModelError where a reward model would write a dialogue in other token ids than the policy.

    PPO has them score ids as they were sampled.

    Args:
        policy: the policy's format.
        judges: those of the reward models, by the setting that names them.
    """
    for name, judge in judges.items():
        if judge.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ModelError(
                f"{name}: its tokenizer differs from the policy's. PPO scores token ids as they were sampled: train the"
                " reward model from a checkpoint of the policy's family."
            )
        if _written(judge) != _written(policy):
            raise ModelError(
                f"{name}: writes dialogues in another format than the policy (model.chat_template). PPO scores token"
                " ids as they were sampled: train both with the same chat template."
            )


def _written(chat: ChatFormat) -> list[int]:
    """A dialogue with both kinds of turn that every format has."""
    return encode_prompt(chat, (Message("user", "a"), Message("assistant", "b"), Message("user", "c")))


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

    def gated_logits(
        self, helpfulness: Float[Tensor, " B"], safety: Float[Tensor, " B"], is_safety: Bool[Tensor, " B"]
    ) -> Tensor:
        """LOGIT(R_c) of Llama 2 Sec. 3.2.3."""
        return gated_logits(helpfulness, safety, is_safety, threshold=self.threshold)

    def score_trees(self, trees: Sequence[Tree]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Raw helpfulness and safety scores of every branch of every tree, in order."""
        found = []
        for scorer in (self.helpfulness, self.safety):
            with lent(scorer.model, self.device):
                found.append(torch.tensor([score for scores in scorer.score_trees(trees) for score in scores]))
        return found[0], found[1]

    def score(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with both scores and the gated reward."""
        scores = [_scores(scorer, candidates, self.device) for scorer in (self.helpfulness, self.safety)]
        return _rewarded(candidates, *scores, self.gated_logits)


def score_candidates(
    section: RewardSection, candidates: Sequence[Candidate], device: torch.device, *, title: str
) -> list[Candidate]:
    """The candidates with both scores and the gated reward; one reward model at a time is in memory.

    Raises ModelError where one of them is not a reward model.
    """
    if not candidates:
        return []
    scores = []
    for name, model in (("helpfulness", section.helpfulness), ("safety", section.safety)):
        scorer = load_scorer(model, device, max_tokens=section.max_tokens_per_batch)
        scores.append(_scores(scorer, candidates, device, title=f"{title}: {name}"))
        del scorer  # before the next one is loaded
    return _rewarded(candidates, *scores, partial(gated_logits, threshold=section.threshold))


def guard_scores(
    scorer: Scorer, candidates: Sequence[Candidate], device: torch.device, *, title: str = ""
) -> list[Candidate]:
    """The candidates with the score of one more reward model, computed on `device`."""
    scores = _scores(scorer, candidates, device, title=title)
    return [replace(candidate, guard=score) for candidate, score in zip(candidates, scores, strict=True)]


def _scores(scorer: Scorer, candidates: Sequence[Candidate], device: torch.device, *, title: str = "") -> list[float]:
    """Scores of the candidates; those of a prompt share its prefill, whoever gave them. With a title progress shows.

    Equal answers to a prompt are scored once: in bfloat16 their scores would differ by what is computed beside them,
    and one of two policies that say the same would win. Every process scores a share of the prompts; all get all
    scores.
    """
    answers: dict[Messages, dict[str, float]] = {}
    for candidate in candidates:
        answers.setdefault(candidate.prompt.messages, {})[candidate.response] = math.nan

    def work(mine: Sequence[Messages]) -> list[list[float]]:
        with lent(scorer.model, device):
            return scorer.score(mine, [list(answers[prompt]) for prompt in mine], on_progress=for_all(bar.advance))

    with ProgressBar(title, len(answers), shown=bool(title) and PartialState().is_main_process) as bar:
        for texts, scores in zip(answers.values(), map_over_processes(work, list(answers)), strict=True):
            texts.update(zip(texts, scores, strict=True))
    return [answers[candidate.prompt.messages][candidate.response] for candidate in candidates]


def _rewarded(
    candidates: Sequence[Candidate],
    helpfulness: Sequence[float],
    safety: Sequence[float],
    gate: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> list[Candidate]:
    """The candidates with their scores and the reward that the gate makes of these."""
    is_safety = torch.tensor([candidate.prompt.is_safety for candidate in candidates])
    rewards = gate(torch.tensor(helpfulness), torch.tensor(safety), is_safety).tolist()
    return [
        replace(candidate, helpfulness=h, safety=s, reward=r)
        for candidate, h, s, r in zip(candidates, helpfulness, safety, rewards, strict=True)
    ]
