"""Where planned models come from: what `align plan` says of runs on disk is what a run does with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.cli.plan import load_stages
from alignment.cli.plan_stages import plan_stage
from alignment.cli.planner import Planner
from alignment.model_folders import model_folder
from alignment.models import load_chat_model, load_reward_model, save_model
from alignment.plan.devices import find_device
from alignment.plan.origins import known_base, origin_on_disk
from alignment.plan.training import Setting
from rlhf.config import PPOConfig
from rlhf.policy import load_models


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_tuned):
    """Reward models with adapters on the plain toy model and on a copy of it with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    save_tuned(load_reward_model("toy", new_head_seed=1), folder / "rm" / "model", seed=1, rank=2)
    other = load_chat_model("toy")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.5)
    save_model(other.model, other, folder / "other")
    reward = load_reward_model(str(folder / "other"), new_head_seed=1)
    save_tuned(reward, folder / "rm-of-other" / "model", seed=1, rank=2)
    return folder


@pytest.mark.parametrize(("policy", "judge", "safety_dtype", "is_shared"), [
    ("toy", "rm", "float32", True), ("toy", "rm-of-other", "float32", False),
    ("other", "rm", "float32", False), ("other", "rm-of-other", "float32", True),
    ("toy", "rm", "auto", True), ("toy", "rm", "bfloat16", False),
])  # fmt: skip
def test_a_plain_policy_shares_its_weights_where_the_run_will(runs, policy, judge, safety_dtype, is_shared):
    model = policy if policy == "toy" else str(runs / policy)
    settings = [
        f"model={{path: {model}, dtype: float32}}", "lora.r=2", "prompts.prompts=toy:prompts.train",
        *(f"rewards.{name}={{path: {runs / judge}, dtype: float32}}" for name in ("helpfulness", "safety")),
        f"rewards.safety.dtype={safety_dtype}", "sampling.max_new_tokens=6",
        "train={batch_size: 8, minibatch_size: 4}", "run.dir=unused",
    ]  # fmt: skip
    configs, origins = load_stages(None, "ppo", settings)
    plan = plan_stage(configs["ppo"], "ppo", Planner(Setting(find_device("cpu")), origins))
    config = configs["ppo"]
    assert isinstance(config, PPOConfig)
    held = load_models(config, torch.float32, torch.device("cpu"))
    assert (held.separate is None) == is_shared
    assert plan.notes[0].startswith("rewards and critic share the policy's weights" if is_shared else "models of their")


def test_the_fingerprint_of_files_is_the_one_in_an_adapter(runs, tmp_path):
    backbone = origin_on_disk(str(runs / "rm")).base
    assert known_base("toy") == backbone
    assert known_base(str(runs / "other")) == origin_on_disk(str(runs / "rm-of-other")).base != backbone
    plain = model_folder("toy")
    halves = tmp_path / "halves"  # the same weights in two files
    halves.mkdir()
    (halves / "config.json").write_text((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    where = {name: f"{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, halves / file)
    (halves / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert known_base(str(halves)) == backbone


@pytest.mark.parametrize("name", ["llama-2-7b", "nobody/has-this-model", "no such thing", 64 * "a"])
def test_what_is_not_on_disk_stays_a_name(name):
    assert known_base(name) == name


def test_a_folder_without_all_weights_stays_a_name(tmp_path):
    plain = model_folder("toy")
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    assert known_base(str(tmp_path)) == str(tmp_path)
    tensors = load_file(plain / "model.safetensors")
    tensors.popitem()
    tensors.pop("model.layers.0.mlp.up_proj.weight", None)
    save_file(tensors, tmp_path / "model.safetensors")
    assert known_base(str(tmp_path)) == str(tmp_path)
