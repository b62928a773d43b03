"""Reductions over processes, with one process here; tests/test_resume.py runs two."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from alignment import distributed
from alignment.cli.main import run_pipeline, run_stage
from alignment.cli.stages import Stage
from alignment.distributed import (
    compute_in,
    equal_passes,
    map_over_processes,
    mean_over_processes,
    passes,
    shares,
    whiten_over_processes,
)
from alignment.errors import DataError
from alignment.tensor_ops import whiten
from sft import gatt_evaluation


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_whitening_over_one_process_is_plain_whitening(accelerator):
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, -3.0, 1e30]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    torch.testing.assert_close(whiten_over_processes(values, mask, accelerator), whiten(values, mask))


def test_equal_values_whiten_to_zero(accelerator):
    values = torch.full((3,), 2.5)
    assert whiten_over_processes(values, torch.ones(3, dtype=torch.bool), accelerator).tolist() == [0.0] * 3


def test_means_keep_their_names(accelerator):
    found = mean_over_processes({"reward": torch.tensor(0.5), "length": 3}, accelerator)
    assert found == {"reward": 0.5, "length": 3.0}


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.bfloat16, MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)),
    (torch.float32, None),
])  # fmt: skip
def test_split_models_add_gradients_up_in_float32(dtype, expected):
    accelerator = SimpleNamespace(
        native_amp=True,
        scaler=object(),
        distributed_type=DistributedType.FSDP,
        gradient_state=SimpleNamespace(_set_sync_gradients=lambda _: None),
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)),
    )
    compute_in(accelerator, dtype)
    assert accelerator.state.fsdp_plugin.mixed_precision_policy == expected


def test_processes_pass_equally_often_through_a_split_model_alone(monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda count: [count, 3])
    model = nn.Linear(1, 1)
    assert list(equal_passes(["a"], "spare", model)) == [("a", True)]
    monkeypatch.setattr(distributed, "holds_parts", lambda _: True)
    assert list(equal_passes(["a"], "spare", model)) == [("a", True), ("spare", False), ("spare", False)]
    assert list(equal_passes([], "spare", model)) == [("spare", False)] * 3


def test_shares_hold_every_item_once_and_keep_equal_ones_together_in_order():
    items = ["a", "b", "a", "c", "d", "b", "a"]
    parts = shares(items, 3, together=str)
    assert parts == [[0, 2, 4, 6], [1, 5], [3]]
    assert shares(items, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares(items[:1], 3) == [[0], [], []]


@pytest.mark.parametrize(("kind", "exchanges"), [("MULTI_CPU", [False, False, True]), ("FSDP", [True, True, True])])
def test_the_last_part_stands_for_those_that_another_process_has_more(kind, exchanges):
    """This process has two parts, the other three; without FSDP gradients are exchanged once."""
    two = SimpleNamespace(
        num_processes=2,
        device=torch.device("cpu"),
        distributed_type=DistributedType[kind],
        gather=lambda mine: torch.cat([mine, torch.tensor([3])]),
    )
    found = list(passes(["a", "b"], two))
    assert [(part, counts) for part, counts, _ in found] == [("a", True), ("b", True), ("b", False)]
    assert [exchanged for *_, exchanged in found] == exchanges


def test_one_process_does_all_of_the_work_itself():
    assert map_over_processes(lambda items: [2 * item for item in items], [3, 1]) == [6, 2]


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


WORK = (
    "kind: gatt, policies: {base: toy}, instructions: {kinds: [capitals]}, sampling: {max_new_tokens: 2},"
    "prompts: {prompts: 'toy:prompts.heldout', max_prompts: 3, turns: 2}, run: {device: cpu}"
)


def evaluate_with(command: str, work: str, folder: Path) -> None:
    path = folder / "settings.yaml"
    if command == "eval":
        path.write_text(f"{{{work}}}")
        run_stage("eval", [str(path), f"run.dir={folder / 'runs' / 'last'}"])
    else:
        path.write_text(f"{{stages: {{last: {{stage: eval, {work}}}}}}}")
        run_pipeline(path, [f"runs={folder / 'runs'}"])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("command", ["eval", "run"])
def test_commands_leave_the_process_group_when_their_work_is_done(command, tmp_path):
    """Threads of gloo that are still there when the interpreter ends abort the process now and then."""
    evaluate_with(command, WORK, tmp_path)
    assert (tmp_path / "runs" / "last" / "result.json").exists()
    assert (tmp_path / "runs" / "summary.json").exists() == (command == "run")
    assert not dist.is_initialized()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("command", ["eval", "run"])
def test_after_an_error_the_process_group_stays_for_the_launcher_to_end(command, tmp_path, monkeypatch):
    """The other processes may be in a collective, and to leave would wait for them."""

    def fail(*_arguments):
        raise DataError("found while it runs")

    monkeypatch.setattr(gatt_evaluation, "hold_dialogues", fail)
    with pytest.raises(DataError, match="found while it runs"):
        evaluate_with(command, WORK, tmp_path)
    assert dist.is_initialized()


def test_the_main_process_alone_prints_the_result(tmp_path, monkeypatch, capsys):
    """Another may not see the files that its figures come from."""
    monkeypatch.setattr(Stage, "run_function", lambda _: lambda config, *, resume: {"stage": "sft", "steps": None})
    monkeypatch.setattr(PartialState, "is_main_process", False)
    run_stage("sft", ["model=toy", "data.train=toy:sft.train", f"run.dir={tmp_path / 'run'}"])
    assert capsys.readouterr().out == ""
