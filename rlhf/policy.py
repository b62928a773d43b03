"""The models of PPO: policy, reference and critic, by adapters on frozen weights or as separate modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from alignment.adapters import Adapter, attach_frozen, fingerprint, keep_frozen_active, set_decoder
from alignment.compilation import compile_layers
from alignment.config import ModelSection
from alignment.errors import ModelError
from alignment.hardware import lent
from alignment.logprobs import unwrap
from alignment.model_folders import model_folder
from alignment.model_workers import sharing_copy
from alignment.models import (
    LoadedModel,
    add_lora,
    load_chat_model,
    load_reward_model,
    recompute_activations,
    rounded_copy,
    saved_adapter,
)
from reward_models.score import Scorer
from rlhf.config import PPOConfig
from rlhf.judges import RewardModels, check_same_ids, judges_of, load_scorer


@dataclass(frozen=True)
class PPOModels:
    """Policy and critic in training, the frozen reference and reward models.

    With LoRA the reference has the policy's own frozen weights. `separate` says why the other models do not share them
    too; None where they do. `guard` judges held-out answers, where there are any to judge.
    """

    loaded: LoadedModel
    policy: nn.Module
    critic: nn.Module
    reference: nn.Module
    rewards: RewardModels
    guard: Scorer | None
    separate: str | None

    @contextmanager
    def reference_policy(self, device: torch.device) -> Iterator[nn.Module]:
        """The frozen policy that KL is measured from, on the device that trains."""
        with lent(self.reference, device):
            yield self.reference


def load_models(config: PPOConfig, dtype: torch.dtype, device: torch.device, *, is_split: bool = False) -> PPOModels:
    """All models of a PPO run, on `device`; with `ppo.offload` reference and reward models stay on the CPU.

    With `is_split` policy and critic are on the CPU too, until FSDP brings their parts to the devices.

    With LoRA, models that differ from the policy's start by adapters are put on its weights, which all then share; the
    guard too, where it is such a model, whatever the others are.

    The critic starts from the helpfulness model, with a head of zeros. Our choice: the paper does not say where its
    critic comes from. Stiennon et al. 2020 (arXiv:2009.01325) keep the head too; but a reward model's scores have
    another scale than the whitened reward, and before an answer's end they predict it worse than its mean does.

    Raises:
        ModelError: a model cannot be loaded, a reward model is none or reads other token ids than the policy writes,
            or `ppo.share_backbone=always` and it cannot be shared.
    """
    start, lora = config.model, config.lora
    weights = dtype if lora.r else torch.float32
    loaded = load_chat_model(start.path, dtype=weights, chat_template=start.chat_template)
    begins = torch.device("cpu") if is_split else device
    loaded.model.to(begins)
    home = torch.device("cpu") if config.ppo.offload else device
    began = _began(loaded) if lora.r and config.ppo.share_backbone != "never" else None
    on_backbone, separate = _on_one_backbone(config, loaded, began, weights)
    if on_backbone is None:
        rewards = RewardModels.load(config.rewards, device, offload=config.ppo.offload)
        critic_path, critic_template = config.rewards.helpfulness.path, config.rewards.helpfulness.chat_template
        options = {"dtype": weights, "chat_template": critic_template, "for_training": is_split}
        value = load_reward_model(critic_path, **options).model.to(begins)
    else:
        rewards = RewardModels(*on_backbone, threshold=config.rewards.threshold, device=device)
        value = sharing_copy(on_backbone[0].model)
    # A weight of its own: the helpfulness model may share the old one.
    value.score.weight = nn.Parameter(torch.zeros_like(value.score.weight))
    scorers = {"rewards.helpfulness": rewards.helpfulness, "rewards.safety": rewards.safety}
    check_same_ids(loaded.chat, {name: scorer.chat for name, scorer in scorers.items()})
    guard = _guard(config, loaded, began, weights, device)
    if lora.r:
        reference = sharing_copy(loaded.model)
    elif is_split:  # FSDP gathers the policy's weights in this type, norms and embeddings as well
        reference = rounded_copy(loaded.model, dtype).to(home)
    else:
        reference = copy.deepcopy(loaded.model).to(home)
    reference.requires_grad_(False)
    policy = add_lora(loaded.model, lora, is_reward_model=False, seed=config.run.seed)
    critic = add_lora(value, lora, is_reward_model=True, seed=config.run.seed)
    keep_frozen_active(critic)
    if start.gradient_checkpointing:
        for model in (policy, critic):
            recompute_activations(unwrap(model))
    policy, critic = policy.to(begins), critic.to(begins)
    if config.train.compile:
        for model in (policy, critic, reference):
            compile_layers(model, device)
    return PPOModels(loaded, policy, critic, reference, rewards, guard, separate)


def _began(policy: LoadedModel) -> Adapter:
    """What the policy's weights are, by the ones that its adapters belong on."""
    return saved_adapter(policy.folder) or Adapter(fingerprint(policy.model.get_decoder().named_parameters()), {})


def _on_one_backbone(
    config: PPOConfig, policy: LoadedModel, began: Adapter | None, weights: torch.dtype
) -> tuple[list[Scorer] | None, str | None]:
    """Both reward models as frozen adapters on the policy's weights, or None and the reason why not."""
    sections = {"helpfulness": config.rewards.helpfulness, "safety": config.rewards.safety}
    reason = refused_by_settings(config, weights)
    if reason is None:
        assert began is not None
        adapters = {name: saved_adapter(model_folder(section.path)) for name, section in sections.items()}
        reason = _refused_by_adapters(began, adapters)
    if reason is not None:
        if config.ppo.share_backbone == "always":
            raise ModelError(f"ppo.share_backbone=always: {reason}")
        return None, reason
    tokens = config.rewards.max_tokens_per_batch
    return [_scorer_on(policy, began, sections[name], adapters[name], tokens) for name in sections], None


def _scorer_on(policy: LoadedModel, began: Adapter, section: ModelSection, adapter: Adapter, max_tokens: int) -> Scorer:
    """A reward model as a frozen adapter on the policy's weights."""
    reward = load_reward_model(section.path, chat_template=section.chat_template)
    decoder = sharing_copy(policy.model.get_decoder())
    attach_frozen(decoder, adapter + -began)
    set_decoder(reward.model, decoder)
    reward.model.to(policy.model.device).requires_grad_(False)
    return Scorer(reward, max_tokens=max_tokens)


def _guard(
    config: PPOConfig, policy: LoadedModel, began: Adapter | None, weights: torch.dtype, device: torch.device
) -> Scorer | None:
    """The guard of held-out answers, on the policy's weights where it can stand on them; None where none is asked."""
    section, tokens = config.evaluation.guard, config.rewards.max_tokens_per_batch
    if section is None or not config.evaluation.prompts:
        return None
    if refused_by_settings(config, weights, {"evaluation.guard": section}) is None:
        assert began is not None
        adapter = saved_adapter(model_folder(section.path))
        if _refused_by_adapters(began, {"guard": adapter}) is None:
            return _scorer_on(policy, began, section, adapter, tokens)
    return load_scorer(section, device, max_tokens=tokens, offload=config.ppo.offload)


def refused_by_settings(
    config: PPOConfig, dtype: torch.dtype, judges: Mapping[str, ModelSection] | None = None
) -> str | None:
    """Why the settings keep the reward models apart from a policy that computes in `dtype`; None where they do not.

    `judges` are the reward models by their settings' names, both of `rewards` if not given.
    """
    if config.ppo.share_backbone == "never":
        return "ppo.share_backbone=never"
    if not config.lora.r:
        return "the policy is trained in full (lora.r=0)."
    for name, section in (judges or judges_of(config.rewards)).items():
        if section.dtype not in ("auto", str(dtype).removeprefix("torch.")):
            return f"{name}: computes in {section.dtype}, the policy in another type."
    return None


def _refused_by_adapters(began: Adapter, adapters: Mapping[str, Adapter | None]) -> str | None:
    """Why the reward models cannot stand on the weights under the policy's adapter `began`; None where they can."""
    for name, adapter in adapters.items():
        if adapter is None:
            return f"rewards.{name}: was not fine-tuned with LoRA, or by an older version."
        if adapter.backbone != began.backbone:
            return f"rewards.{name}: was fine-tuned from other weights than the policy."
    return None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters for AdamW: no decay on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
