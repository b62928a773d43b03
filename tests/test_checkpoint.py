"""PPO's checkpoints: what is put back, and which are kept."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from alignment.config import RunSection, StageConfig
from alignment.errors import RunError
from alignment.runs import newest_checkpoint, open_run
from rlhf.checkpoint import Learner, load_checkpoint, save_checkpoint


class TinyConfig(StageConfig):
    stage: ClassVar[str] = "tiny"


@pytest.fixture
def run(tmp_path):
    return open_run(TinyConfig(run=RunSection(dir=str(tmp_path / "run"))))


def learner() -> Learner:
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.bias).requires_grad_(False)  # frozen weights come from the model a run starts from
    optimizer = torch.optim.AdamW([model.weight], lr=0.1)
    return Learner(model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10))


def step(one: Learner, seed: int) -> torch.Tensor:
    """A step whose gradient is drawn by this seed; the weights after it."""
    one.model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).pow(2).mean().backward()
    one.optimizer.step()
    one.optimizer.zero_grad()
    one.scheduler.step()
    return one.model.weight.detach().clone()


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(run):
    first = {"policy": learner(), "critic": learner()}
    for one in first.values():
        step(one, 0)
    save_checkpoint(run, 7, first, {"beta": 0.25})
    expected = [step(one, seed) for one in first.values() for seed in range(1, 4)]
    again = {"policy": learner(), "critic": learner()}
    assert load_checkpoint(newest_checkpoint(run), again) == (7, {"beta": 0.25})
    found = [step(one, seed) for one in again.values() for seed in range(1, 4)]
    assert all(ours.equal(theirs) for ours, theirs in zip(expected, found, strict=True))
    assert again["critic"].scheduler.get_last_lr() == first["critic"].scheduler.get_last_lr()


def test_frozen_parameters_are_not_written(run):
    assert list(learner().state()["parameters"]) == ["weight"]


def test_the_last_two_checkpoints_are_kept(run):
    for number in (2, 4, 10):
        save_checkpoint(run, number, {"policy": learner()}, {})
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-4"]
    assert newest_checkpoint(run).name == "checkpoint-10"


def test_a_save_that_was_killed_does_not_stop_later_ones_of_other_steps(run):
    save_checkpoint(run, 50, {"policy": learner()}, {})
    (run.path / "checkpoints" / "checkpoint-60.tmp").mkdir()
    again = open_run(TinyConfig(run=RunSection(dir=str(run.path))), resume=True)
    save_checkpoint(again, 55, {"policy": learner()}, {})
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["checkpoint-50", "checkpoint-55"]


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(run, damage):
    save_checkpoint(run, 7, {"policy": learner()}, {})
    folder = newest_checkpoint(run)
    file = folder / "policy.pt"
    content = file.read_bytes()
    file.write_bytes({"cut off": content[: len(content) // 2], "other bytes": b"x" * 100}.get(damage, b""))
    if damage == "missing":
        file.unlink()
    with pytest.raises(RunError, match=r"-7/policy\.pt: the checkpoint is damaged \(.+\)\. Remove its folder"):
        load_checkpoint(folder, {"policy": learner()})


def test_a_parameter_that_the_model_lacks_is_an_error():
    state = learner().state()
    state["parameters"]["other"] = torch.zeros(1)
    with pytest.raises(KeyError, match="other"):
        learner().load_state(state)
