"""The models of PPO: one backbone for all of them, or separate ones, wherever they are kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from small_ppo import TREES, config_of, models_of

from alignment.data import load_prompts
from alignment.dialogue import Message, Prompt
from alignment.errors import AlignError
from alignment.hardware import lent
from alignment.models import load_chat_model, load_reward_model, save_model
from alignment.sampling.prompts import Asked
from rlhf import judges
from rlhf.policy import PPOModels
from rlhf.ppo import PPOTrainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_tuned):
    """The way of a pipeline: reward models from SFT, the policy from the base model; and one tuned in full."""
    folder = tmp_path_factory.mktemp("runs")
    save_tuned(load_chat_model("toy"), folder / "sft", seed=1, rank=2)
    for seed, name in enumerate(("helpfulness", "safety"), start=2):
        save_tuned(load_reward_model(str(folder / "sft"), new_head_seed=seed), folder / name, seed=seed, rank=2)
    save_tuned(load_chat_model("toy"), folder / "rs", seed=4, rank=3)
    in_full = load_reward_model("toy", new_head_seed=5)
    save_model(in_full.model, in_full, folder / "full")
    return folder


def weights_held(models: PPOModels) -> int:
    """Numbers in all frozen weights, those that models share counted once."""
    parts = (models.policy, models.critic, models.rewards.helpfulness.model, models.rewards.safety.model)
    found = {p.data_ptr(): p.numel() for part in parts for p in part.parameters() if not p.requires_grad}
    return sum(found.values())


def test_models_tuned_from_the_same_weights_hold_them_once(runs):
    shared = models_of(config_of(runs))
    separate = models_of(config_of(runs, "ppo.share_backbone=never"))
    one = sum(parameter.numel() for parameter in load_chat_model("toy").model.parameters())
    assert shared.separate is None and separate.separate == "ppo.share_backbone=never"
    assert weights_held(separate) > 3.5 * one
    assert weights_held(shared) < 2.5 * one  # adapters of rank 7 on matrices of 64 columns are half of it


def test_a_guard_stands_on_the_policys_weights_where_it_can(runs, save_tuned, tmp_path):
    """The scores are those of a guard of its own; one that was tuned in full has weights of its own."""
    save_tuned(load_reward_model(str(runs / "sft"), new_head_seed=8), tmp_path / "guard", seed=9, rank=2)
    held_out = ["evaluation.prompts=toy:prompts.heldout"]
    for path, is_shared in ((tmp_path / "guard", True), (runs / "full", False)):
        asked = f"evaluation.guard={{path: {path}, dtype: float32}}"
        shared, apart = (
            models_of(config_of(runs, *held_out, asked, f"ppo.share_backbone={share}")) for share in ("auto", "never")
        )
        one = {p.data_ptr() for p in shared.policy.parameters() if not p.requires_grad}
        assert any(p.data_ptr() in one for p in shared.guard.model.parameters()) == is_shared
        assert shared.separate is None
        torch.testing.assert_close(
            torch.tensor(shared.guard.score_trees(TREES)), torch.tensor(apart.guard.score_trees(TREES))
        )
    assert models_of(config_of(runs, asked)).guard is None, "without held-out prompts it has nothing to judge"


@pytest.mark.parametrize("policy", ["rs", "toy"])
def test_an_iteration_is_the_same_on_one_backbone_and_on_separate_ones(runs, policy):
    """The figures, and what is learned from them, float32 rounding apart."""
    prompts = load_prompts(["toy:prompts.train"]).rows[:8]

    def iterate(*extra: str) -> tuple[dict[str, float], list[torch.Tensor]]:
        trainer = PPOTrainer(config_of(runs, *extra, policy=policy), Accelerator(cpu=True), torch.float32)
        encoded = [Asked(prompt, [5, 6, 7 + number]) for number, prompt in enumerate(prompts)]
        metrics = trainer.iterate(encoded, seed=0)
        models = (trainer.policy, trainer.critic)
        return metrics, [p.detach() for model in models for p in model.parameters() if p.requires_grad]

    (shared, learned), (separate, expected) = iterate("ppo.share_backbone=always"), iterate("ppo.share_backbone=never")
    assert shared["first_ratio_error"] < 1e-5
    for name, value in separate.items():
        if "second" not in name:  # of a clock
            assert shared[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name
    for found, wanted in zip(learned, expected, strict=True):
        assert (found - wanted).abs().mean() < 1e-5 < wanted.abs().mean()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"helpfulness": "full"}, "rewards.helpfulness: was not fine-tuned with LoRA"),
        ({"policy": "sft", "extra": ["lora.r=0"]}, "trained in full"),
        ({"extra": ["rewards.safety.dtype=bfloat16"]}, "rewards.safety: computes in bfloat16"),
    ],
)
def test_what_cannot_share_a_backbone_is_separate_or_refused(runs, options, reason):
    options = dict(options)
    extra = options.pop("extra", [])
    assert reason in models_of(config_of(runs, *extra, **options)).separate
    with pytest.raises(AlignError, match=r"ppo\.share_backbone=always: "):
        models_of(config_of(runs, *extra, "ppo.share_backbone=always", **options))


def test_a_model_tuned_from_other_weights_is_separate(runs, tmp_path, save_tuned):
    other = load_reward_model("toy", new_head_seed=5)
    with torch.no_grad():
        other.model.get_decoder().norm.weight.mul_(1.5)
    save_model(other.model, other, tmp_path / "other")
    save_tuned(load_reward_model(str(tmp_path / "other")), tmp_path / "tuned", seed=7, rank=2)
    found = models_of(config_of(runs, f"rewards.helpfulness={tmp_path / 'tuned'}"))
    assert found.separate == "rewards.helpfulness: was fine-tuned from other weights than the policy."


def test_prompts_leave_room_for_a_response_in_every_models_context(runs):
    trainer = PPOTrainer(config_of(runs), Accelerator(cpu=True), torch.float32)
    context = trainer.models.loaded.model.config.max_position_embeddings
    assert trainer.context == context
    trainer.rewards.safety.model.config.max_position_embeddings = context - 100
    assert trainer.context == context - 100
    prompts = [Prompt(messages=(Message("user", "a" * count),)) for count in range(context - 130, context - 90)]
    noted = SimpleNamespace(note=lambda **_: None)
    kept = [len(prompt.ids) for prompt in trainer.encode(prompts, noted)]
    assert max(kept) == context - 107, "the longest leaves room for a response of six tokens and its end"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_lent_model_comes_back_without_a_copy_after_an_error_too(monkeypatch, in_place):
    """Weights and buffers are those that it went with, however it was moved; what was on the device is thrown away."""
    model = load_chat_model("toy").model.requires_grad_(False)
    tensors = lambda: [*model.named_parameters(), *model.named_buffers()]  # noqa: E731
    before = {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors()}
    if in_place:  # as to a GPU
        move = lambda _: [setattr(parameter, "data", parameter.data.clone()) for parameter in model.parameters()]  # noqa: E731
        monkeypatch.setattr(model, "to", move)
    with pytest.raises(ZeroDivisionError), lent(model, torch.device("meta")):
        assert in_place or all(tensor.device.type == "meta" for _, tensor in tensors())
        assert before != {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors()}
        raise ZeroDivisionError
    assert before == {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors()}


def test_offloaded_models_are_lent_to_the_device_to_work_and_nothing_else_changes(runs, monkeypatch):
    """Reference and reward models are sent to the device, each for its phase; the figures stay as they are."""
    prompts = load_prompts(["toy:prompts.train"]).rows[:8]
    encoded = [Asked(prompt, [5, 6, 7 + number]) for number, prompt in enumerate(prompts)]

    def figures(*extra: str) -> dict[str, float]:
        trainer = PPOTrainer(config_of(runs, "lora.r=0", *extra), Accelerator(cpu=True), torch.float32)
        names = {id(trainer.models.reference): "reference"}
        names |= {id(trainer.rewards.helpfulness.model): "helpfulness", id(trainer.rewards.safety.model): "safety"}
        lends.clear()
        metrics = trainer.iterate(encoded, seed=0)
        assert [names[each] for each in lends] == ["helpfulness", "safety", "reference"]
        return {name: value for name, value in metrics.items() if "second" not in name}

    lends: list[int] = []

    def noted(model, device):
        lends.append(id(model))
        return lent(model, device)

    monkeypatch.setattr(judges, "lent", noted)
    monkeypatch.setattr("rlhf.policy.lent", noted)
    assert figures("ppo.offload=true") == figures("ppo.offload=false")


def test_an_offloaded_reward_model_is_kept_in_cpu_memory_in_the_devices_type(runs, monkeypatch):
    """Asked of the computing device, which is not where it is kept."""
    asked = []

    def dtype_for(device, name):
        asked.append((device.type, name))
        return torch.bfloat16

    monkeypatch.setattr(judges, "compute_dtype", dtype_for)
    section = config_of(runs, "rewards.helpfulness.dtype=auto", "rewards.safety.dtype=auto").rewards
    found = judges.RewardModels.load(section, torch.device("meta"), offload=True)
    assert asked == [("meta", "auto"), ("meta", "auto")] and found.device.type == "meta"
    weight = found.safety.model.get_decoder().layers[0].mlp.up_proj.weight
    assert weight.device.type == "cpu" and weight.dtype == torch.bfloat16
