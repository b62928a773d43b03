"""Scoring K responses to a prompt: one padded row a response against ours, where they share the prompt's row.

    ALIGN_DATA_DIR=/path/to/data python benchmarks/scoring.py

The peer is the plain transformers classifier on rows sorted by length and padded to the right, at each batch size
given. Prompts are those of a preference file, each with K responses drawn from the file's own, so that lengths are
real; what the responses say does not matter for speed. Both sides compute in one process, in turn, in the same
arithmetic type, and their scores are compared.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from datetime import date
from typing import Any

import torch

from alignment.chat import fit_prompt
from alignment.data import load_pairs, pick
from alignment.hardware import tune_allocator
from alignment.models import load_reward_model
from alignment.prefix_batch import Branch, Tree
from reward_models.score import Scorer


def main() -> None:
    """Times both sides and prints the ratio."""
    options = _arguments()
    tune_allocator()
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    loaded = load_reward_model("smollm2-135m-instruct", dtype=dtype, chat_template="chatml", new_head_seed=0)
    scorer = Scorer(loaded, max_tokens=options.tokens)
    trees = _trees(loaded.chat, options)
    count = sum(len(tree.branches) for tree in trees)
    times: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):  # the first round warms up
        for batch_size in options.batch:
            name = f"one padded row a response, batch {batch_size}"
            loaded.model.set_attn_implementation("sdpa")
            _timed(times, scores, name, lambda size=batch_size: _padded(loaded.model, trees, size))
        loaded.model.set_attn_implementation("align_tree")
        ours = f"ours, {options.tokens} tokens"
        _timed(times, scores, ours, lambda: [s for row in scorer.score_trees(trees) for s in row])
    machine = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads, median of {options.rounds}"
    print(f"\nScoring {count} responses, K={options.k}, SmolLM2-135M, {options.dtype}, {options.data}, seed 0")
    print(f"{date.today()}, {machine}\n")
    speeds = {name: count / sorted(found[1:])[len(found[1:]) // 2] for name, found in times.items()}
    for name, speed in speeds.items():
        print(f"{name:42} {speed:8.2f} responses/s")
    best = max(speed for name, speed in speeds.items() if name != ours)
    apart = max(abs(a - b) for a, b in zip(scores[ours], next(iter(scores.values())), strict=True))
    print(f"\nagainst the fastest batch: {speeds[ours] / best:.2f}x; largest difference of a score {apart:.3f}")
    together = sum(tree.num_tokens for tree in trees) / count
    apart_tokens = sum(len(tree.trunk) + len(branch.ids) for tree in trees for branch in tree.branches) / count
    print(f"tokens a response: {together:.0f} with the prompt held once, {apart_tokens:.0f} in rows of their own")


def _timed(times: dict[str, list[float]], scores: dict[str, list[float]], name: str, run: Any) -> None:
    start = time.perf_counter()
    scores[name] = run()
    times.setdefault(name, []).append(time.perf_counter() - start)


@torch.no_grad()
def _padded(model: Any, trees: list[Tree], batch_size: int) -> list[float]:
    rows = [[*tree.trunk, *branch.ids] for tree in trees for branch in tree.branches]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    found = [0.0] * len(rows)
    for start in range(0, len(rows), batch_size):
        members = order[start : start + batch_size]
        longest = len(rows[members[0]])
        ids = torch.full((len(members), longest), model.config.pad_token_id)
        mask = torch.zeros(len(members), longest, dtype=torch.long)
        for place, index in enumerate(members):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
            mask[place, : len(rows[index])] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        for index, value in zip(members, logits.tolist(), strict=True):
            found[index] = value
    return found


def _trees(chat: Any, options: argparse.Namespace) -> list[Tree]:
    pairs = pick(load_pairs([options.data]).rows, 4 * options.prompts, 0)
    texts = sorted({text for pair in pairs for text in (pair.chosen, pair.rejected)})
    rng = random.Random(0)
    trees = []
    for pair in pairs:
        ids, _ = fit_prompt(chat, pair.prompt, options.max_length, may_cut=False)
        branches = [Branch(chat.encode_response(text)) for text in rng.sample(texts, options.k)]
        if ids is not None and max(len(branch.ids) for branch in branches) + len(ids) <= options.max_length:
            trees.append(Tree(ids, branches))
    assert len(trees) >= options.prompts, "too few prompts fit into max_length"
    return trees[: options.prompts]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pref_helpful_hh.valid")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="batch sizes of the padded rows")
    parser.add_argument("--tokens", type=int, default=8192, help="our max_tokens_per_batch")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
