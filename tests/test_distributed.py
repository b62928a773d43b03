"""Reductions over processes, with one process here; tests/test_resume.py runs two."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from alignment.cli.main import run_pipeline, run_stage
from alignment.distributed import map_over_processes, mean_over_processes, shares, whiten_over_processes
from alignment.tensor_ops import whiten


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


def test_shares_hold_every_item_once_and_keep_equal_ones_together_in_order():
    items = ["a", "b", "a", "c", "d", "b", "a"]
    parts = shares(items, 3, together=str)
    assert parts == [[0, 2, 4, 6], [1, 5], [3]]
    assert shares(items, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares(items[:1], 3) == [[0], [], []]


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


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["eval", "run"])
def test_commands_leave_the_process_group_when_their_work_is_done(name, tmp_path):
    """Threads of gloo that are still there when the interpreter ends abort the process now and then."""
    path = tmp_path / "settings.yaml"
    if name == "eval":
        path.write_text(f"{{{WORK}}}")
        run_stage("eval", [str(path), f"run.dir={tmp_path / 'run'}"])
        assert (tmp_path / "run" / "result.json").exists()
    else:
        path.write_text(f"{{stages: {{last: {{stage: eval, {WORK}}}}}}}")
        run_pipeline(path, [f"runs={tmp_path / 'runs'}"])
        assert (tmp_path / "runs" / "summary.json").exists()
    assert not dist.is_initialized()
