"""The models of PPO: policy, reference and critic, by adapters on frozen weights or as separate modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from alignment.config import LoraSection
from alignment.logprobs import unwrap
from alignment.models import LoadedModel, add_lora, load_chat_model, load_reward_model


@dataclass(frozen=True)
class ActorCritic:
    """Policy and critic in training, and the frozen reference.

    With LoRA the reference is the policy with its adapters off, so `reference` is None.
    """

    loaded: LoadedModel
    policy: nn.Module
    critic: nn.Module
    reference: nn.Module | None

    @contextmanager
    def reference_policy(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The frozen policy that KL is measured from; `policy` is the trained one as wrapped for training."""
        if self.reference is not None:
            yield self.reference
        else:
            inner = policy.module if hasattr(policy, "module") else policy
            with inner.disable_adapter():
                yield inner


def load_actor_critic(
    policy_path: str,
    critic_path: str,
    *,
    dtype: torch.dtype,
    chat_template: str,
    lora: LoraSection,
    seed: int,
    device: torch.device,
    gradient_checkpointing: bool = False,
) -> ActorCritic:
    """Loads the policy, and a critic that starts from a reward model.

    Our choice: the paper does not say where its critic comes from; the helpfulness model already predicts most of
    the return (Stiennon et al. 2020, arXiv:2009.01325, do the same).
    """
    weights = dtype if lora.r else torch.float32
    loaded = load_chat_model(policy_path, dtype=weights, chat_template=chat_template)
    value = load_reward_model(critic_path, dtype=weights, chat_template=chat_template)
    reference = None if lora.r else copy.deepcopy(loaded.model).to(device).requires_grad_(False)
    policy = add_lora(loaded.model, lora, is_reward_model=False, seed=seed)
    critic = add_lora(value.model, lora, is_reward_model=True, seed=seed)
    if gradient_checkpointing:
        for model in (policy, critic):
            unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
            unwrap(model).enable_input_require_grads()
    return ActorCritic(loaded, policy.to(device), critic.to(device), reference)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters for AdamW: no decay on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
