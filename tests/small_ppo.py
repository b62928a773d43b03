"""PPO small enough for a test: its settings, models and prompts."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from alignment.config import load_config
from alignment.data import load_prompts
from alignment.prefix_batch import Branch, Tree
from rlhf.config import PPOConfig
from rlhf.policy import PPOModels, load_models
from rlhf.ppo import PPOTrainer

SMALL = [
    "model={path: toy, dtype: float32}", "prompts.prompts=toy:prompts.train", "prompts.max_prompts=16",
    "sampling.max_new_tokens=6", "train.batch_size=8", "train.minibatch_size=4", "train.max_steps=2",
    "optim.lr=1e-3", "run.device=cpu",
]  # fmt: skip


def trainer_of(settings: list[str], *extra: str) -> PPOTrainer:
    config = load_config(PPOConfig, None, [*settings, *extra, "run.dir=unused"])
    return PPOTrainer(config, Accelerator(cpu=True), torch.float32)


TREES = [Tree([5, 6, 7], [Branch([8, 9, 10])]), Tree([5, 6], [Branch([11, 12])]), Tree([7], [Branch([13])])]


def toy_prompts():
    return load_prompts(["toy:prompts.train"]).rows[:4]


def config_of(runs, *extra: str, policy: str = "rs", helpfulness: str = "helpfulness") -> PPOConfig:
    model = policy if policy == "toy" else runs / policy
    return load_config(PPOConfig, None, [
        f"rewards.helpfulness={{path: {runs / helpfulness}, dtype: float32}}",
        f"rewards.safety={{path: {runs / 'safety'}, dtype: float32}}",
        f"model={{path: {model}, dtype: float32}}", "prompts.prompts=toy:prompts.train", "lora.r=2",
        "sampling.max_new_tokens=6", "train.batch_size=8", "train.minibatch_size=4", "train.max_steps=2",
        "optim.lr=1e-3", "ppo.critic_lr=1e-3", "run.device=cpu", "run.dir=unused", *extra,
    ])  # fmt: skip


def models_of(config: PPOConfig) -> PPOModels:
    return load_models(config, torch.float32, torch.device("cpu"))
