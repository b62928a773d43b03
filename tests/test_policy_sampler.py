"""Sampling from PPO's policy: when vLLM is handed its weights, how it is started and ended; the built-in engine."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from merging import merged_copy, share_kept, small_change
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from alignment.config import load_config
from alignment.errors import ConfigError, SamplerError
from alignment.prefix_batch import Branch, Tree
from alignment.sampling import Sample, SamplingParams, engines
from alignment.sampling.torch_engine import TorchSampler
from rlhf import ppo, ppo_run
from rlhf.config import PPOConfig
from rlhf.ppo import PPOTrainer
from rlhf.rollout import Rollouts, sampler_gap

WITH_LOOKS = ["evaluation.prompts=toy:prompts.heldout", "evaluation.max_prompts=4", "evaluation.every=2"]


class FakeVllm:
    """Stands for vLLM: samples from the weights it was started with or last handed, and takes down what it is told."""

    started: list[FakeVllm]

    def __init__(
        self, folder: Path | str, *, stop_ids: Sequence[int], dtype: torch.dtype, engine_args: dict[str, Any], **_: int
    ) -> None:
        self.stop_ids, self.dtype, self.engine_args = stop_ids, dtype, engine_args
        self.model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        self.calls: list[str] = []
        self.started.append(self)

    def refresh(self, model: nn.Module) -> None:
        self.calls.append("refresh")
        twin = copy.deepcopy(model)
        self.model = twin.get_base_model() if isinstance(twin, PeftModel) else twin

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, **hooks: Any) -> list[list[Sample]]:
        assert "close" not in self.calls
        self.calls.append("sample")
        return TorchSampler(self.model, stop_ids=self.stop_ids).sample(prompts, params, **hooks)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[FakeVllm]:
    """The engines that were started."""
    monkeypatch.setattr(engines, "VllmSampler", FakeVllm)
    monkeypatch.setattr(FakeVllm, "started", [], raising=False)
    return FakeVllm.started


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, save_judges) -> list[str]:
    judges = save_judges(tmp_path_factory.mktemp("rewards"))
    return [
        *judges, "model={path: toy, dtype: float32}", "prompts.prompts=toy:prompts.train", "prompts.max_prompts=16",
        "sampling.max_new_tokens=6", "train.batch_size=4", "train.minibatch_size=2", "train.max_steps=2",
        "train.save_every=1", "optim.lr=1e-2", "run.device=cpu",
    ]  # fmt: skip


@pytest.fixture
def run(settings: list[str], tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """`run("a.b=value", name="run", resume=False)`: the stage; its metrics but for times."""

    def run(*extra: str, name: str = "run", resume: bool = False) -> list[dict[str, float]]:
        folder = tmp_path / name
        ppo_run.run(load_config(PPOConfig, None, [*settings, *extra, f"run.dir={folder}"]), resume=resume)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [{key: value for key, value in row.items() if "_second" not in key} for row in rows]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("lora", ["lora.r=0", "lora.r=4"])
def test_vllm_is_handed_the_weights_where_they_have_changed_and_closed_at_the_end(run, vllm, tmp_path, lora):
    """The looks before the first iteration and after the second share the weights of the iteration that follows."""
    extra = [lora, *WITH_LOOKS, "train.max_steps=3"]
    metrics = run(*extra, "sampling.engine=vllm")
    [engine] = vllm
    first, second, third = ["refresh", "sample", "sample"], ["refresh", "sample"], ["refresh", "sample", "sample"]
    assert engine.calls == [*first, *second, *third, "refresh", "sample", "close"]
    assert metrics == run(*extra, name="torch")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "torch")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_engine_that_keeps_old_weights_shows_and_can_end_the_run(run, vllm, monkeypatch, capsys):
    monkeypatch.setattr(FakeVllm, "refresh", lambda *_: None)
    limits = ["alarms.max_sampler_gap=1e-3", "alarms.action=stop"]
    first, second = run("sampling.engine=vllm", "train.max_steps=5", *limits)
    assert first["ppo/sampler_gap"] < 1e-5 and second["ppo/sampler_gap"] > 1e-3
    assert "ppo: iteration 2: sampler_gap is" in capsys.readouterr().err


def test_a_resumed_run_hands_over_the_checkpoints_weights_first(run, vllm, tmp_path, monkeypatch):
    extra = ["sampling.engine=vllm", "train.max_steps=3"]
    whole = run(*extra, name="whole")
    iterate = PPOTrainer.iterate

    def killed(trainer: PPOTrainer, prompts: Sequence[object], *, seed: int, **options: bool) -> dict[str, float]:
        if seed == ppo.iteration_seed(0, 2):
            raise KeyboardInterrupt
        return iterate(trainer, prompts, seed=seed, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPOTrainer, "iterate", killed)
        run(*extra)
    assert vllm[-1].calls == ["refresh", "sample", "refresh", "sample", "close"]
    assert run(*extra, resume=True) == whole
    assert vllm[-1].calls == ["refresh", "sample", "close"]
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["load_models", "sample_shared", "response_logprobs"])
def test_vllm_is_closed_where_a_run_breaks_down(run, vllm, monkeypatch, name):
    """While models are loaded, responses sampled, losses computed."""

    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ppo, name, breaks)
    with pytest.raises(ZeroDivisionError):
        run("sampling.engine=vllm")
    assert vllm[0].calls.count("close") == 1 and vllm[0].calls[-1] == "close"


def test_several_processes_are_refused_before_a_model_is_loaded(run, vllm, monkeypatch):
    monkeypatch.setattr(engines, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(ppo_run, "PPOTrainer", None)
    with pytest.raises(ConfigError, match=r"without accelerate launch.*tensor_parallel_size"):
        run("sampling.engine=vllm", "sampling.fall_back=true")
    assert not vllm


def test_without_vllm_a_run_ends_or_samples_with_the_built_in_engine(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with monkeypatch.context() as patch, pytest.raises(SamplerError, match="cannot be imported"):
        patch.setattr(ppo_run, "PPOTrainer", None)  # no model is loaded before
        run("sampling.engine=vllm", name="ends")
    assert run("sampling.engine=vllm", "sampling.fall_back=true") == run(name="torch")
    assert "torch engine instead (sampling.fall_back)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], {}),
        (["lora.r=4"], {"enable_lora": True, "max_lora_rank": 8}),
        (["lora.r=64"], {"enable_lora": True, "max_lora_rank": 64}),
        (["lora.r=65"], {"enable_lora": True, "max_lora_rank": 128}),
        (["lora.r=513"], {"enable_lora": True, "max_lora_rank": 513}),  # vLLM says that it is too much
        (
            ["lora.r=4", "sampling.vllm={gpu_memory_utilization: 0.5, max_lora_rank: 16}"],
            {"enable_lora": True, "max_lora_rank": 16, "gpu_memory_utilization": 0.5},
        ),
    ],
    ids=str,
)
def test_vllm_is_started_with_room_for_the_training_and_its_adapters(run, vllm, monkeypatch, extra, expected):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo_run, "PPOTrainer", stop)
    with pytest.raises(KeyboardInterrupt):
        run("sampling.engine=vllm", *extra)
    assert vllm[0].engine_args == {"gpu_memory_utilization": 0.3, **expected}
    assert vllm[0].dtype == torch.float32


def test_the_built_in_engine_samples_from_the_present_weights_without_being_told(settings):
    config = load_config(PPOConfig, None, [*settings, "lora.r=4", "run.dir=unused"])
    trainer = PPOTrainer(config, Accelerator(cpu=True), torch.float32)
    greedy = SamplingParams(temperature=0, max_new_tokens=6)
    before = trainer.sampler.sample([[5, 6, 7]], greedy)
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                parameter += 1
    after = trainer.sampler.sample([[5, 6, 7]], greedy)
    assert before[0][0].logprobs != after[0][0].logprobs
    merged = merged_copy(trainer.policy, torch.float32)
    stop_ids = [trainer.models.loaded.chat.end_of_turn_id]
    [[expected]] = TorchSampler(merged, stop_ids=stop_ids).sample([[5, 6, 7]], greedy)
    assert after[0][0].token_ids == expected.token_ids
    assert after[0][0].logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_what_an_iteration_teaches_a_bfloat16_policy_is_sampled_from(settings):
    """The weights' changes are below half the last of their 8 bits; merged, most of them would be lost."""
    types = ["model.dtype=bfloat16", "rewards.helpfulness.dtype=bfloat16", "rewards.safety.dtype=bfloat16"]
    config = load_config(PPOConfig, None, [*settings, *types, "lora.r=4", "run.dir=unused"])
    trainer = PPOTrainer(config, Accelerator(cpu=True), torch.bfloat16)
    before = merged_copy(trainer.policy)
    small_change(trainer.policy, 2e-5)
    sampled: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchSampler, "sample", lambda sampler, *_, **__: sampled.append(sampler.model))
        trainer.sampler.sample([[5, 6, 7]], SamplingParams())
    after = trainer.policy.get_base_model()
    assert share_kept(sampled[0], before, after) == pytest.approx(1, abs=1e-3)
    assert share_kept(merged_copy(trainer.policy, torch.bfloat16), before, after) < 0.6


def test_the_gap_between_sampler_and_trainer_by_hand():
    """Tokens of three responses: |-1 + 1.5|, |-2 + 2|, then |-0.5 + 0.25|, then |-3 + 2.75|, |-1 + 1|, |-4 + 3|."""
    drawn = [
        [Sample([5, 6], [-1.0, -2.0], "stop"), Sample([7], [-0.5], "stop")],
        [Sample([8, 9, 10], [-3.0, -1.0, -4.0], "length")],
    ]
    nan = float("nan")
    table = torch.tensor([[-1.5, -2.0, nan], [-0.25, nan, nan], [-2.75, -1.0, -3.0]])
    tables = dict.fromkeys(
        ("ref_logprobs", "entropy", "rewards", "values", "trained", "advantages", "returns"), torch.zeros(3, 3)
    )
    trees = [Tree([1], [Branch([5, 6]), Branch([7])]), Tree([2], [Branch([8, 9, 10])])]
    rollouts = Rollouts(trees=trees, mask=~table.isnan(), logprobs=table, **tables)
    assert sampler_gap(rollouts, drawn).item() == pytest.approx(2 / 6)
