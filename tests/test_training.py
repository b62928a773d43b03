"""Training on whole global batches: every row once an epoch, and steps that no token budget changes."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import TinyConfig, arguments
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import LlamaForCausalLM, TrainerState, TrainingArguments

from alignment.chat import EncodedDialogue
from alignment.config import ModelSection, OptimSection, RunSection, TrainSection
from alignment.errors import ConfigError, RunError, TrainingError
from alignment.models import CHECKPOINTING, recompute_activations
from alignment.prefix_batch import Branch, Tree
from alignment.runs import Run, newest_checkpoint, open_run
from alignment.training import (
    GlobalBatchMixin,
    MicroBatch,
    RunCallback,
    StepSchedule,
    build_scheduler,
    num_steps,
    num_warmup_steps,
    training_arguments,
    use_run,
)
from reward_models.preferences import EncodedPair, pair_batches
from reward_models.trainer import RewardTrainer, pair_loss
from sft.evaluate import response_loss
from sft.examples import dialogue_batches

# ----------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("kind", "version", "recomputes", "message"),
    [
        (DistributedType.FSDP, 1, False, "FSDP 1.*--fsdp_version 2"),
        (DistributedType.FSDP, 2, True, "activation checkpointing is not supported.*model.gradient_checkpointing=true"),
        (DistributedType.DEEPSPEED, 2, False, "DEEPSPEED is not supported"),
        (DistributedType.FSDP, 2, False, None),
        (DistributedType.MULTI_GPU, 1, False, None),
    ],
)
def test_what_cannot_be_saved_whole_is_refused_before_training(kind, version, recomputes, message):
    plugin = SimpleNamespace(fsdp_version=version, mixed_precision_policy=None, activation_checkpointing=recomputes)
    trainer = object.__new__(GlobalBatchMixin)
    trainer.accelerator = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        trainer.use_steps(StepSchedule(1, TrainSection(), seed=0), lambda rows: rows, lambda model, part: part)


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_row_comes_once_in_every_epoch(rows, batch_size, epochs, seed):
    train = TrainSection(batch_size=batch_size, epochs=epochs)
    schedule = StepSchedule(rows, train, seed=seed)
    order = [row for step in schedule for row in step]
    for epoch in range(epochs):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert len(order) == rows * epochs
    assert all(len(step) == batch_size for step in schedule.steps[:-1])
    assert 1 <= len(schedule[len(schedule) - 1]) <= batch_size
    assert len(schedule) == num_steps(rows, train) == math.ceil(rows * epochs / batch_size)


def test_the_schedule_is_a_function_of_the_seed():
    torch.manual_seed(1)
    first = StepSchedule(30, TrainSection(batch_size=4, epochs=2), seed=3).steps
    torch.manual_seed(2)
    assert StepSchedule(30, TrainSection(batch_size=4, epochs=2), seed=3).steps == first
    assert StepSchedule(30, TrainSection(batch_size=4, epochs=2), seed=4).steps != first


def test_epochs_are_shuffled_differently():
    order = [row for step in StepSchedule(30, TrainSection(batch_size=5, epochs=2), seed=0) for row in step]
    assert order[:30] != order[30:] != list(range(30))


def test_half_an_epoch_takes_half_of_the_rows_and_max_steps_cuts():
    half = StepSchedule(9, TrainSection(batch_size=2, epochs=0.5), seed=0)
    assert [len(step) for step in half] == [2, 2, 1]  # 4.5 rows, rounded up
    assert (
        StepSchedule(9, TrainSection(batch_size=2, epochs=3, max_steps=2), seed=0).steps
        == StepSchedule(9, TrainSection(batch_size=2, epochs=3), seed=0).steps[:2]
    )


def test_steps_that_max_steps_cuts_off_are_not_drawn(monkeypatch):
    whole = StepSchedule(9, TrainSection(batch_size=4, epochs=50), seed=0).steps
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *sizes, **options: drawn.append(sizes) or randperm(*sizes, **options))
    assert StepSchedule(9, TrainSection(batch_size=4, epochs=50, max_steps=5), seed=0).steps == whole[:5]
    assert len(drawn) == 3  # epochs of nine rows for 20
    assert len(StepSchedule(9, TrainSection(batch_size=4, epochs=1, max_steps=5), seed=0)) == 3


def test_numbers_of_steps_of_worked_examples():
    assert num_steps(9, TrainSection(batch_size=4, epochs=2)) == 5  # 18 rows: four steps of 4 and one of 2
    assert num_steps(9, TrainSection(batch_size=2, epochs=0.5)) == 3  # 4.5 rows, rounded up to 5
    assert num_steps(9, TrainSection(batch_size=4, epochs=2, max_steps=3)) == 3
    assert num_steps(9, TrainSection(batch_size=4, epochs=2, max_steps=6)) == 5
    assert num_steps(0, TrainSection(batch_size=4)) == 0


def test_warmup_steps_of_worked_examples():
    assert num_warmup_steps(1000, 0.03, 5) == 30
    assert num_warmup_steps(1001, 0.03, 5) == 31  # 30.03 rounded up
    assert num_warmup_steps(100, 0.03, 5) == 5  # 3, but at least 5 (Llama 2 Sec. 3.2.2)
    assert num_warmup_steps(8, 0.03, 5) == 4  # never more than half
    assert num_warmup_steps(1, 0.03, 5) == 0
    assert num_warmup_steps(100, 0.0, 0) == 0


def test_the_cosine_rises_to_its_peak_and_ends_at_a_tenth():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    optim = OptimSection(schedule="cosine", final_lr_fraction=0.1, warmup_fraction=0.2, min_warmup_steps=0)
    scheduler = build_scheduler(optimizer, optim, num_steps=10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # Two steps of warm-up: 0, 1, 2. Half-way down after four more of eight: 2 (0.1 + 0.9 / 2) = 1.1. End: 2 * 0.1.
    assert rates[:3] == pytest.approx([0.0, 1.0, 2.0], abs=1e-9)
    assert rates[6] == pytest.approx(1.1, abs=1e-9)
    assert rates[10] == pytest.approx(0.2, abs=1e-9)


# ------------------------------------------------------------------------------------------------ global batches


@pytest.fixture
def open_tiny_run(tmp_path: Path) -> Callable[[str], Run]:
    return lambda name: open_run(TinyConfig(run=RunSection(dir=str(tmp_path / name))))


def test_every_setting_of_the_optimizer_reaches_the_trainer(open_tiny_run):
    found = arguments(open_tiny_run("run"), 10, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.3, max_grad_norm=2.0)
    assert (found.learning_rate, found.adam_beta1, found.adam_beta2, found.adam_epsilon) == (1e-3, 0.7, 0.8, 1e-3)
    assert (found.weight_decay, found.max_grad_norm) == (0.3, 2.0)


def test_checkpointing_is_asked_of_transformers_without_a_warning(make_llama, open_tiny_run):
    """Scripts that use the library see what the command line hides: an old name would warn them in every training."""
    run, model = open_tiny_run("run"), make_llama()
    section = ModelSection(path="toy", gradient_checkpointing=True)
    config = TinyConfig(model=section, run=RunSection(dir=str(run.path)))
    with warnings.catch_warnings(action="error", category=FutureWarning):
        recompute_activations(model)
        values = training_arguments(run, config, num_steps=1, dtype=torch.float32, device=torch.device("cpu"))
        found = TrainingArguments(**values)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert getattr(found, CHECKPOINTING)
    assert getattr(found, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}


def test_a_resumed_training_saves_as_often_as_it_is_told_now(open_tiny_run):
    """Trainer takes the number from the checkpoint, and `--resume` may change it."""
    callback, state = RunCallback(open_tiny_run("run"), "tiny", "tiny", None), TrainerState(save_steps=50, max_steps=9)
    callback.on_train_begin(arguments(open_tiny_run("other"), 9), state, None)
    callback.close()
    assert state.save_steps == 1000


def test_dropout_is_on_in_training(reward_llama, open_tiny_run):
    """Where it were off, two steps with it would end where two steps without it end."""
    plain = copy.deepcopy(reward_llama)
    reward_llama.model.layers[0].mlp.down_proj = nn.Sequential(reward_llama.model.layers[0].mlp.down_proj, nn.Dropout())
    train(plain, open_tiny_run("plain"), rm_batcher(30), PAIR_LOSS)
    train(reward_llama, open_tiny_run("dropout"), rm_batcher(30), PAIR_LOSS)
    assert (plain.score.weight - reward_llama.score.weight).abs().max() > 1e-4


def random_dialogues(count: int) -> list[EncodedDialogue]:
    """Very unequal in length and in trained tokens, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for index in range(count):
        length = 4 + 3 * index
        tokens = torch.randint(64, (length,), generator=generator).tolist()
        trained = 1 + index % 3 if index % 2 else length - 2
        found.append(EncodedDialogue(tokens, [False] * (length - trained) + [True] * trained))
    return found


def random_pairs(count: int) -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(6)

    def draw(length: int) -> list[int]:
        return torch.randint(64, (length,), generator=generator).tolist()

    return [
        EncodedPair(
            Tree(draw(2 + 2 * index), [Branch(draw(3 + index)), Branch(draw(9 - index))]),
            margin=index / 3,
            chosen_safe=[True, None, False][index % 3],
            rejected_safe=[False, True, None][index % 3],
            pair=None,  # not looked at in training
        )
        for index in range(count)
    ]


DIALOGUES, PAIRS = random_dialogues(8), random_pairs(8)
PAIR_LOSS = pair_loss(safety_weight=0.5, centering_weight=0.1)


def sft_batcher(max_tokens: int) -> Callable[[Sequence[int]], Iterator[MicroBatch]]:
    return lambda rows: dialogue_batches(DIALOGUES, rows, max_tokens=max_tokens)


def packed_batcher(max_tokens: int) -> Callable[[Sequence[int]], Iterator[MicroBatch]]:
    return lambda rows: dialogue_batches(DIALOGUES, rows, max_tokens=max_tokens, row_tokens=min(max_tokens, 60))


def rm_batcher(max_tokens: int) -> Callable[[Sequence[int]], Iterator[MicroBatch]]:
    return lambda rows: pair_batches(PAIRS, rows, max_tokens=max_tokens)


def train(model: nn.Module, run: Run, batcher: Any, loss: Any, *, steps: int = 2, **changes: Any) -> RewardTrainer:
    """Two optimizer steps of four rows each."""
    schedule = StepSchedule(8, TrainSection(batch_size=4, epochs=steps / 2), seed=1)
    trainer = RewardTrainer(model=model, args=arguments(run, len(schedule), **changes))
    trainer.use_steps(schedule, batcher, loss)
    use_run(trainer, run, "tiny", "tiny")
    trainer.train()
    return trainer


STAGES = {
    "sft": (sft_batcher, response_loss, "make_llama"),
    "sft-packed": (packed_batcher, response_loss, "make_llama"),
    "rm": (rm_batcher, PAIR_LOSS, "make_reward_model"),
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> tuple[Any, Any, nn.Module]:
    """How to batch, the loss, and a fresh model, of all that train this way."""
    batcher, loss, make = STAGES[request.param]
    return batcher, loss, request.getfixturevalue(make)()


def logged(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_weights_after_two_steps_do_not_depend_on_the_token_budget(stage, open_tiny_run):
    batcher, loss, model = stage
    weights, metrics = [], []
    for budget in (20, 60, 100_000):
        twin, run = copy.deepcopy(model), open_tiny_run(f"run-{budget}")
        train(twin, run, batcher(budget), loss)
        weights.append(dict(twin.named_parameters()))
        metrics.append(logged(run))
    assert len(list(batcher(20)(range(8)))) >= 5 > len(list(batcher(100_000)(range(8)))) == 1
    for other, rows in zip(weights[1:], metrics[1:], strict=True):
        for name, parameter in weights[0].items():
            torch.testing.assert_close(parameter, other[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        for found, expected in zip(rows, metrics[0], strict=True):
            assert found.keys() == expected.keys()
            for name in found.keys() - {"stage"}:
                assert found[name] == pytest.approx(expected[name], abs=1e-4), name
    moved = max((p - model.get_parameter(name)).abs().max().item() for name, p in weights[0].items())
    assert moved > 5e-4  # the steps were real: AdamW moves a weight by about the learning rate


def test_a_step_has_the_gradient_of_the_mean_over_the_global_batch(stage, open_tiny_run):
    """Reference: one row at a time through the loss, summed, divided by the tokens (or pairs) of all rows."""
    batcher, loss, model = stage
    rows = [6, 1, 3, 4, 0]
    parts = [part for row in rows for part in batcher(100_000)([row])]
    total_weight = sum(part.weight for part in parts)
    if loss is response_loss:
        assert total_weight == sum(DIALOGUES[row].num_trained for row in rows)
    else:
        assert total_weight == len(rows)
    expected_loss = sum(loss(model, part)[0] for part in parts) / total_weight
    expected_loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    trainer = RewardTrainer(model=model, args=arguments(open_tiny_run("run"), 1))
    trainer.use_steps(StepSchedule(8, TrainSection(batch_size=4, epochs=1), seed=0), batcher(30), loss)
    found = trainer.training_step(model, rows)
    assert found.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    assert trainer.step_metrics["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_step_metrics_are_means_over_the_pairs_of_the_step(reward_llama, open_tiny_run):
    trainer = RewardTrainer(model=reward_llama, args=arguments(open_tiny_run("run"), 1))
    trainer.use_steps(StepSchedule(8, TrainSection(batch_size=8, epochs=1), seed=0), rm_batcher(30), PAIR_LOSS)
    trainer.training_step(reward_llama, list(range(8)))
    reward_llama.eval()
    wins, lead = 0, 0.0
    for pair in PAIRS:
        chosen, rejected = (
            reward_llama(input_ids=torch.tensor([[*pair.tree.trunk, *branch.ids]])).logits.item()
            for branch in pair.tree.branches
        )
        wins += chosen > rejected
        lead += chosen - rejected
    assert trainer.step_metrics["accuracy"] == wins / 8
    assert trainer.step_metrics["score_difference"] == pytest.approx(lead / 8, abs=1e-5)


def test_every_step_is_logged_with_its_rate_and_gradient_norm(llama, open_tiny_run):
    run = open_tiny_run("run")
    train(llama, run, sft_batcher(100), response_loss, steps=4)
    rows = logged(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["stage"] == "tiny" and math.isfinite(row["tiny/loss"]) for row in rows)
    assert rows[0]["tiny/lr"] == pytest.approx(1e-3)
    assert all(row["tiny/grad_norm"] > 0 for row in rows)


def test_a_loss_that_is_no_number_stops_the_training(llama, open_tiny_run):
    run = open_tiny_run("run")

    def diverging(model: nn.Module, part: MicroBatch) -> Any:
        loss, metrics = response_loss(model, part)
        return loss * (math.nan if logged_steps(run) == 2 else 1.0), metrics

    def logged_steps(run: Run) -> int:
        return len(logged(run)) if (run.path / "metrics.jsonl").exists() else 0

    message = r"step 3: the loss is nan.*optim\.lr \(now 0\.001\).*, in a pipeline --from STAGE"
    with pytest.raises(TrainingError, match=message):
        train(llama, run, sft_batcher(100), diverging, steps=4)
    assert len(logged(run)) == 2


def test_a_gradient_that_is_no_number_stops_the_training_before_it_is_saved(llama, open_tiny_run):
    """Clipping makes all weights NaN, and no loss is computed with those of the last step."""
    run = open_tiny_run("run")

    def steep(model: nn.Module, part: MicroBatch) -> Any:
        loss, metrics = response_loss(model, part)
        return loss + (0 * loss).sqrt(), metrics  # the slope of a root is infinite at 0

    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is nan.*optim\.lr \(now 0\.001\)"):
        train(llama, run, sft_batcher(100), steep, steps=1)
    assert not (run.path / "metrics.jsonl").exists() and newest_checkpoint(run) is None


def test_gradients_are_clipped_to_the_norm_that_is_set(llama, open_tiny_run):
    """With a clip far below the true norm the step of plain SGD has exactly that length."""
    run = open_tiny_run("run")
    trainer = RewardTrainer(
        model=llama, args=arguments(run, 1, max_grad_norm=0.01, weight_decay=0.0, schedule="constant")
    )
    trainer.use_steps(StepSchedule(8, TrainSection(batch_size=8, epochs=1), seed=0), sft_batcher(100), response_loss)
    trainer.optimizer = torch.optim.SGD(llama.parameters(), lr=1.0)
    use_run(trainer, run, "tiny", "tiny")
    before = copy.deepcopy(llama)
    trainer.train()
    (row,) = logged(run)
    assert row["tiny/grad_norm"] > 0.1
    squares = [((p - before.get_parameter(name)) ** 2).sum() for name, p in llama.named_parameters()]
    assert math.sqrt(sum(squares).item()) == pytest.approx(0.01, rel=1e-3)


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(make_llama, open_tiny_run):
    def build(model: LlamaForCausalLM, run: Run, steps: int) -> GlobalBatchMixin:
        args = arguments(run, 4)
        args.save_steps = 2
        args.max_steps = steps
        trainer = RewardTrainer(model=model, args=args)
        schedule = StepSchedule(8, TrainSection(batch_size=4, epochs=2), seed=1)
        trainer.use_steps(schedule, sft_batcher(60), response_loss)
        use_run(trainer, run, "tiny", "tiny")
        return trainer

    whole, whole_run = make_llama(), open_tiny_run("whole")
    build(whole, whole_run, 4).train()

    cut_run = open_tiny_run("cut")
    trainer = build(make_llama(), cut_run, 4)
    real_step, calls = trainer.training_step, []

    def dies_in_the_fourth_step(*inputs: Any, **more: Any) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_step(*inputs, **more)

    trainer.training_step = dies_in_the_fourth_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    checkpoint = newest_checkpoint(cut_run)
    assert checkpoint.name == "checkpoint-2"
    resumed = make_llama(seed=9)  # what it holds is replaced by the checkpoint
    build(resumed, cut_run, 4).train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert logged(cut_run) == logged(whole_run)


def test_checkpoints_of_another_kind_of_launch_are_refused(llama, open_tiny_run):
    run = open_tiny_run("run")
    train(llama, run, sft_batcher(100), response_loss)
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    message = "checkpoints of one process or DDP, .* reads those of FSDP with SHARDED_STATE_DICT. Launch it as before"
    with pytest.raises(RunError, match=message):
        use_run(SimpleNamespace(accelerator=accelerator), run, "tiny", "tiny")


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    budget=st.integers(1, 200),
    row_tokens=st.none() | st.integers(1, 200),
)
def test_micro_batches_of_dialogues_hold_each_row_once_and_weigh_its_trained_tokens(rows, budget, row_tokens):
    parts = list(dialogue_batches(DIALOGUES, rows, max_tokens=budget, row_tokens=row_tokens))
    assert sum(part.weight for part in parts) == sum(DIALOGUES[row].num_trained for row in rows)
    lengths = Counter(length for part in parts for length in part.batch.branch_lengths.tolist())
    assert lengths == Counter(len(DIALOGUES[row].input_ids) for row in rows)
    for part in parts:
        num_rows, length = part.batch.input_ids.shape
        assert part.batch.num_tokens <= budget or num_rows == 1
        if row_tokens:
            assert length <= row_tokens or part.batch.branch_lengths.max() > row_tokens
        else:
            assert part.batch.num_branches == num_rows
        if row_tokens is None or row_tokens <= budget:
            assert part.batch.num_tokens <= budget or part.batch.num_branches == 1
