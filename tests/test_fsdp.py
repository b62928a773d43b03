"""Models that FSDP has split over two processes on a CPU: gathered, saved, trained and resumed as in one."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import fsdp, launch_two
from processes import SERVER
from safetensors.torch import load_file
from short_runs import STAGE_SETTINGS, run_here
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from alignment.config import LoraSection
from alignment.distributed import gets_weights_later, whole_weights
from alignment.errors import RunError
from alignment.model_folders import model_folder
from alignment.models import add_lora, load_chat_model, load_reward_model, save_model

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[1]
KINDS = ("full", "lora", "reward model, lora")
FILES = ("model.safetensors", "adapter/adapter_model.safetensors")


def made(kind: str):
    """A model in bfloat16 with random adapters, or float32 without, the same in every process."""
    is_reward_model, dtype = kind.startswith("reward"), torch.float32 if kind == "full" else torch.bfloat16
    options = {"new_head_seed": 1} if is_reward_model else {}
    loaded = (load_reward_model if is_reward_model else load_chat_model)("toy", dtype=dtype, **options)
    lora = LoraSection(r=0 if kind == "full" else 3, alpha=5.0)
    model = add_lora(loaded.model, lora, is_reward_model=is_reward_model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return loaded, model


def save_split(rank: int, folder: str) -> None:
    """What each of two processes does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind in KINDS:
        loaded, model = made(kind)
        for layer in loaded.model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        weights = whole_weights(model)
        assert bool(weights) == (rank == 0)
        assert not any(isinstance(weight, DTensor) for weight in weights.values())
        save_model(model, loaded, Path(folder) / kind)
        dist.barrier()
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for efficient in (False, True):
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(efficient)
        assert gets_weights_later() == (efficient and rank == 1)
    dist.destroy_process_group()


def test_a_split_model_is_saved_as_the_whole_one_bit_for_bit(tmp_path):
    model_folder("toy")  # made once, before two processes want it
    processes = [SERVER.Process(target=save_split, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    for kind in KINDS:
        loaded, model = made(kind)
        save_model(model, loaded, tmp_path / f"{kind}, whole")
        for file in FILES[: 1 if kind == "full" else 2]:
            found, expected = (load_file(tmp_path / name / file) for name in (kind, f"{kind}, whole"))
            assert found.keys() == expected.keys()
            assert all(found[name].equal(weight) for name, weight in expected.items()), (kind, file)
        files = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in (kind, f"{kind}, whole")]
        assert files[0] == files[1]
        configs = [(tmp_path / name / "config.json").read_text() for name in (kind, f"{kind}, whole")]
        assert configs[0] == configs[1]


def ppo_settings(folder: Path) -> list[str]:
    """PPO in full on reward models with fresh heads. In most minibatches one process has more micro-batches."""
    for seed, name in enumerate(("helpfulness", "safety")):
        reward = load_reward_model("toy", new_head_seed=seed)
        save_model(reward.model, reward, folder / name)
    rewards = [f"rewards.{name}={{path: {folder / name}, dtype: float32}}" for name in ("helpfulness", "safety")]
    return [
        *rewards, "model={path: toy, dtype: float32}", "run.device=cpu", "run.seed=3", "optim.lr=1e-3",
        "prompts.prompts=toy:prompts.train", "sampling={max_new_tokens: 8, num_candidates: 2}",
        "train={max_steps: 3, batch_size: 16, minibatch_size: 8, max_tokens_per_batch: 60, save_every: 1}",
        "evaluation={prompts: toy:prompts.heldout, max_prompts: 5, every: 1, patience: 3}",
    ]  # fmt: skip


def ppo_figures(run_dir: Path, *more: str) -> list[list[float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("reward", "kl", "length", "entropy", "sampler_gap", "policy_loss", "value_loss", "policy_grad_norm",
             "critic_grad_norm", "first_ratio_error", "held_out_reward")  # fmt: skip
    return [[row.get(f"ppo/{name}", 0.0) for name in (*names, *more)] for row in rows]


@pytest.mark.parametrize(("efficient", "resumes_in"), [("true", 2), ("false", 1)])
def test_ppo_on_split_models_takes_the_same_steps_as_one_process(efficient, resumes_in, tmp_path):
    """Sampling from gathered weights, the best policy kept and put back, all figures; also after a kill.

    At first the critic alone learns, and FSDP never sees a backward pass of the policy.
    """
    settings = [*ppo_settings(tmp_path), "ppo.critic_warmup=1", "train.max_steps=4"]
    run_here("ppo", settings, tmp_path / "one", resume=False)
    split, options = tmp_path / "split", fsdp(efficient=efficient)
    launch_two(options, "ppo", settings, split, dies=True)
    assert [path.parent.name for path in split.glob("checkpoints/*/complete")] == ["checkpoint-1"]
    if resumes_in == 2:
        launch_two(options, "ppo", settings, split, "--resume")
    else:
        run_here("ppo", settings, split, resume=True)
    assert_same_model(tmp_path / "one", split, atol=1e-5)
    spread = ("reward_std", "reward_length_correlation", "gated_rate", "gated_unsafe_rate", "explained_variance")
    one, two = ppo_figures(tmp_path / "one", *spread), ppo_figures(split, *spread)
    assert len(one) == len(two) == 5
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    found = [json.loads((path / "result.json").read_text()) for path in (tmp_path / "one", split)]
    assert found[0]["saved_iteration"] == found[1]["saved_iteration"] > 0


def test_ppo_on_split_models_in_bfloat16_differs_by_rounding_alone(tmp_path):
    """Where FSDP gathers weights in bfloat16. Some samples differ, so what is learned is alike, not the same."""
    settings = [each.replace("toy, dtype: float32", "toy, dtype: bfloat16") for each in ppo_settings(tmp_path)]
    settings += ["train.max_steps=1", "evaluation.patience=null"]
    run_here("ppo", settings, tmp_path / "one", resume=False)
    launch_two(fsdp(efficient="true"), "ppo", settings, tmp_path / "split")
    start = dict(load_chat_model("toy").model.named_parameters())
    one, split = (load_file(tmp_path / name / "model" / FILES[0]) for name in ("one", "split"))
    learned = torch.cat([(one[name] - start[name].detach()).flatten() for name in one])
    off = torch.cat([(split[name] - one[name]).flatten() for name in one])
    assert learned.norm() > 0.1 and off.norm() < 0.6 * learned.norm(), (off.norm(), learned.norm())
    first, second = (ppo_figures(tmp_path / name)[1] for name in ("one", "split"))
    assert second == pytest.approx(first, rel=0.1, abs=0.02)
    [_, row] = (tmp_path / "split" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["ppo/kl_k3"] < 1e-6  # policy and reference compute alike


def test_a_policy_that_only_answers_keeps_its_float32_weights(tmp_path):
    """While the critic alone learns, FSDP gathers the policy's in bfloat16 for forward passes and no backward one."""
    settings = [each.replace("toy, dtype: float32", "toy, dtype: bfloat16") for each in ppo_settings(tmp_path)]
    launch_two(fsdp(efficient="true"), "ppo", [*settings, "ppo.critic_warmup=1"], tmp_path / "run", dies=True)
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "policy.pt", weights_only=True)
    start, kept = dict(load_chat_model("toy").model.named_parameters()), state["parameters"]
    assert start.keys() == kept.keys() and all(kept[name].equal(start[name]) for name in start)


def assert_same_model(first: Path, second: Path, *, atol: float) -> None:
    adapters = [(path / "model" / FILES[1]).exists() for path in (first, second)]
    assert adapters[0] == adapters[1]
    for file in FILES[: 1 + adapters[0]]:
        one, two = (load_file(path / "model" / file) for path in (first, second))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


FEW = ["data.max_rows=44", "train.max_tokens_per_batch=256"]  # several micro-batches a step


@pytest.mark.parametrize("efficient", ["true", "false"])
@pytest.mark.parametrize("name", ["sft", "rm-lora"])
def test_fsdp_trains_and_saves_the_same_model_as_one_process(name, efficient, tmp_path):
    """With and without the weights read by the main process alone; with one held-out row, and with many."""
    stage, *lora = name.split("-")
    settings = [*STAGE_SETTINGS[name], *FEW, *(["lora.dropout=0"] if lora else ["evaluation.num_answers=2"])]
    settings += ["data.max_valid_rows=1"] if efficient == "true" else []
    run_here(stage, settings, tmp_path / "one", resume=False)
    as_users_do = (name, efficient) == ("sft", "true")
    launch_two(fsdp(efficient=efficient), stage, settings, tmp_path / "split", by_torchrun=as_users_do)
    assert_same_model(tmp_path / "one", tmp_path / "split", atol=1e-5)
    one, split = (json.loads((tmp_path / count / "result.json").read_text()) for count in ("one", "split"))
    figures = {"sft": ("valid_loss_before", "valid_loss_after"), "rm": ("accuracy",)}
    for key in figures[stage]:
        assert split[key] == pytest.approx(one[key], abs=1e-5), key
    if stage == "sft":
        assert (tmp_path / "split" / "answers.jsonl").read_text() == (tmp_path / "one" / "answers.jsonl").read_text()


def test_a_reward_model_is_split_in_bfloat16_with_its_head_in_float32(tmp_path):
    """What FSDP computes in differs from one process's autocast by bfloat16's rounding alone.

    Where a gradient is next to nothing rounding decides its sign, and Adam moves a weight by a step either way.
    """
    settings = [*STAGE_SETTINGS["rm-lora"], *FEW, "lora.dropout=0", "model.dtype=bfloat16"]
    run_here("rm", settings, tmp_path / "one", resume=False)
    launch_two(fsdp(), "rm", settings, tmp_path / "split")
    assert_same_model(tmp_path / "one", tmp_path / "split", atol=4e-3)
    one, split = ((tmp_path / count / "metrics.jsonl").read_text().splitlines() for count in ("one", "split"))
    losses, expected = ([json.loads(row)["rm/loss"] for row in rows] for rows in (split, one))
    assert len(losses) == 6 and losses == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(("name", "kind"), [("sft", "SHARDED_STATE_DICT"), ("sft-lora", "FULL_STATE_DICT")])
def test_a_split_run_that_was_killed_resumes(name, kind, tmp_path):
    """With both kinds of checkpoint that accelerate writes: gathered, and a part by each process."""
    lora = ["lora.dropout=0", "data.valid=toy:sft.valid", "evaluation.num_answers=2"]
    settings = [*STAGE_SETTINGS[name], *FEW, *(lora if name == "sft-lora" else [])]
    run_here("sft", settings, tmp_path / "one", resume=False)
    killed = tmp_path / "killed"
    launch_two(fsdp(state_dict=kind), "sft", settings, killed, dies=True)
    assert [path.parent.name for path in killed.glob("checkpoints/*/complete")] == ["checkpoint-3"]
    with pytest.raises(RunError, match=f"checkpoints of FSDP with {kind}, .* of one process or DDP"):
        run_here("sft", settings, killed, resume=True)
    launch_two(fsdp(state_dict=kind), "sft", settings, killed, "--resume")
    assert_same_model(tmp_path / "one", killed, atol=1e-5)
    if name == "sft-lora":
        one, split = ((folder / "answers.jsonl").read_text() for folder in (tmp_path / "one", killed))
        assert one == split and one.count("\n") == 2
