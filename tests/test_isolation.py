"""What one stage, another training or a launcher has set in the process decides nothing in the next stage."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainingArguments

from alignment.cli.stages import STAGES
from alignment.config import load_config
from alignment.distributed import compute_in
from alignment.hardware import compute_dtype, process_state, settle_auto
from alignment.isolation import isolated
from alignment.training import GlobalBatchMixin
from sft import trainer as sft_trainer
from sft.config import SFTConfig


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def sft_config(folder: Path, *extra: str) -> SFTConfig:
    settings = ["model.path=toy", "data.train=toy:sft.train", "data.max_rows=8", "train.max_steps=1", "run.device=cpu"]
    return load_config(SFTConfig, None, [*settings, "train.batch_size=4", f"run.dir={folder}", *extra])


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_threads_and_environment_are_put_back(monkeypatch, fails):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", set_to := [].append)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    @isolated()
    def stage(*, resume: bool) -> str:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1)
        settle_auto(torch.device("cpu"), torch.float64)
        os.environ |= {"TENSORBOARD_LOGGING_DIR": "ours", "ACCELERATE_MIXED_PRECISION": "bf16"}
        if fails:
            raise KeyboardInterrupt
        return f"resume: {resume}"

    if fails:
        with pytest.raises(KeyboardInterrupt):
            stage(resume=True)
    else:
        assert stage(resume=True) == "resume: True"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "mine" and "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert compute_dtype(torch.device("cpu")) != torch.float64
    assert set_to.__self__ == [torch.get_num_threads()]
    found = drawn()
    random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])
    assert found == drawn()


def test_a_loop_over_trainings_draws_anew_each_time_and_keeps_its_threads(tmp_path):
    """transformers' Trainer seeds Python's, numpy's and torch's generators."""
    num_threads, found = torch.get_num_threads(), []
    for trial in range(2):
        found.append(drawn())
        sft_trainer.run(sft_config(tmp_path / str(trial), f"run.num_threads={num_threads + 1}"))
        assert torch.get_num_threads() == num_threads
    assert all(one != two for one, two in zip(*found, strict=True))


def test_a_training_computes_in_its_own_type_whatever_the_launcher_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = []
    monkeypatch.setattr(GlobalBatchMixin, "use_steps", lambda trainer, *_: found.append(trainer.accelerator))
    monkeypatch.setattr(GlobalBatchMixin, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sft_trainer.run(sft_config(tmp_path / "run", "model.dtype=float32"))
    assert found[0].mixed_precision == "no" and not found[0].native_amp


def test_one_of_several_gpus_is_used_without_a_launcher(tmp_path, monkeypatch, capsys):
    """Trainer would wrap the model in torch's DataParallel; TRL's refuses that as soon as it is made."""
    found, prepare = [], TrainingArguments.__post_init__

    def with_three_gpus(arguments: TrainingArguments) -> None:
        prepare(arguments)
        assert arguments.n_gpu == 0
        arguments._n_gpu = 3
        found.append(arguments)

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_three_gpus)
    sft_trainer.run(sft_config(tmp_path / "run"))
    assert found[0].n_gpu == 1 and "3 GPUs are here, one is used" in capsys.readouterr().err


def test_losses_are_not_scaled_and_steps_not_held_back_by_another_training():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = SimpleNamespace(scale=lambda loss: loss * 2**16)
    accelerator.gradient_state._set_sync_gradients(False)
    weight = torch.nn.Parameter(torch.ones(1))
    compute_in(accelerator, torch.float32)
    optimizer = accelerator.prepare(torch.optim.SGD([weight], lr=0.5))
    accelerator.backward(weight.sum())
    assert weight.grad.item() == 1
    optimizer.step()
    assert weight.item() == 0.5


def test_the_device_is_the_settings_whatever_the_process_used_before():
    assert PartialState(cpu=True).device.type == "cpu"
    PartialState._shared_state["device"] = torch.device("cuda")
    assert process_state("cpu").device.type == "cpu"
    PartialState._shared_state.update(device=torch.device("cuda"), num_processes=2)
    assert process_state("cpu").device.type == "cuda", "a launcher's processes stay where they are"


def test_a_saved_model_answers_with_a_cache(tmp_path):
    sft_trainer.run(sft_config(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_isolated(name):
    for kind in (None, *STAGES[name].kinds):
        run = STAGES[name].of_kind(kind).run_function()
        [manager] = [cell.cell_contents for cell in run.__closure__ if hasattr(cell.cell_contents, "gen")]
        assert manager.func is isolated.__wrapped__
