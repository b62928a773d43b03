"""Several micro-batches at once: the same results in the same order, shared weights, and errors that come out."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from alignment import model_workers
from alignment.logprobs import branch_scores
from alignment.model_workers import map_in_workers, num_workers
from alignment.models import load_reward_model
from alignment.prefix_batch import Branch, Tree, collate
from reward_models.score import Scorer

TREES = [Tree(range(1, 4 + n), [Branch(range(5, 7 + n)), Branch([n + 1])]) for n in range(9)]


@torch.no_grad()
def scores(model, tree):
    return branch_scores(model, collate([[tree]])).tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_those_of_one_at_a_time_in_order(make_reward_model, workers):
    model = make_reward_model()
    threads = torch.get_num_threads()
    found = list(map_in_workers(scores, model, TREES, workers=workers))
    for ours, tree in zip(found, TREES, strict=True):
        assert ours == pytest.approx(scores(model, tree), abs=1e-6)
    assert torch.get_num_threads() == threads


def test_workers_share_weights_and_threads_and_have_modules_of_their_own(make_reward_model):
    model = make_reward_model()
    both_are_here = threading.Barrier(2, timeout=60)

    def look(worker_model, _):
        both_are_here.wait()
        return worker_model, torch.get_num_threads()

    (first, first_threads), (second, second_threads) = map_in_workers(look, model, [0, 1], workers=2)
    assert first is not second and model in (first, second)
    assert first.model.layers[-1].mlp is not second.model.layers[-1].mlp
    assert first.config is second.config
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is other
    assert first_threads == second_threads == max(1, torch.get_num_threads() // 2)


def test_workers_compile_with_the_callers_settings(make_reward_model):
    """A lower limit in a worker's thread would leave kernels uncompiled without an error."""
    config = torch._dynamo.config
    before, config.recompile_limit = config.recompile_limit, 77
    try:
        found = map_in_workers(lambda _model, _item: config.recompile_limit, make_reward_model(), range(3), workers=2)
        assert list(found) == [77, 77, 77]
    finally:
        config.recompile_limit = before


def test_an_error_comes_out_and_the_threads_are_given_back(make_reward_model):
    threads = torch.get_num_threads()

    def fail(_model, item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(map_in_workers(fail, make_reward_model(), range(20), workers=2))
    assert torch.get_num_threads() == threads


def test_there_is_one_worker_on_a_gpu_and_for_little_work(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    cpu = torch.device("cpu")
    assert num_workers(torch.device("cuda"), 10**6, max_tokens=10**6) == 1
    assert num_workers(cpu, 10**6, max_tokens=10**6) == 4
    assert num_workers(cpu, 3 * model_workers.MIN_TOKENS, max_tokens=10**6) == 3
    assert num_workers(cpu, 10**6, max_tokens=2 * model_workers.MIN_TOKENS) == 2
    assert num_workers(cpu, 7, max_tokens=20) == 1


def test_a_scorer_gives_the_same_scores_with_workers(monkeypatch):
    scorer = Scorer(load_reward_model("toy", new_head_seed=0), max_tokens=40)
    alone = scorer.score_trees(TREES)
    monkeypatch.setattr("reward_models.score.num_workers", lambda *_, **__: 3)
    seen = set()
    monkeypatch.setattr(
        "reward_models.score.branch_scores",
        lambda model, batch: seen.add(id(model)) or time.sleep(0.01) or branch_scores(model, batch),
    )
    heard: list[int] = []
    together = scorer.score_trees(TREES, on_progress=heard.append)
    assert len(seen) == 3 and sum(heard) == len(TREES)
    for ours, expected in zip(together, alone, strict=True):
        assert ours == pytest.approx(expected, abs=1e-5)
