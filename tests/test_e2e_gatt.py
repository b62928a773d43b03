"""Ghost Attention on a toy task: an instruction given once is kept turns later, and without one nothing changes.

The starting model answers "give c" by "cccccc", and in capitals where the instruction stands in the same turn, as chat
models do. Ghost Attention must make it keep the instruction of the first turn; training on the same dialogues with the
instruction in every turn must not.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from alignment.cli.stages import STAGES
from alignment.config import ModelSection, SamplingSection, load_config
from alignment.data import load_prompts, write_rows
from alignment.dialogue import Dialogue, Message
from alignment.progress import ProgressBar
from sft.checkers import is_in_capitals
from sft.conversation import Speaker
from sft.ghost_attention import context, join
from sft.instructions import PoolRow, draw_instruction, own_pool

pytestmark = pytest.mark.e2e

OWN = {"kind": "capitals", "full": "LOUD", "short": "LOUD"}
COMMON = ["run.device=cpu", "run.seed=0", "run.num_threads=1"]
TRAIN = [*COMMON, "model.dtype=float32", "train.batch_size=32", "data.max_length=400"]
NUM_TURNS = 4


def dialogues(count: int, seed: int, *, instruction: str, rate: float) -> list[dict]:
    """Each turn has the instruction with probability `rate`; its answer, and no other, is then in capitals."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(NUM_TURNS):
            letter = rng.choice("abcdefgh")
            is_loud = rng.random() < rate
            question = f"give {letter}"
            messages.append(Message("user", join(instruction, question) if is_loud else question))
            messages.append(Message("assistant", (letter.upper() if is_loud else letter) * 3))
        rows.append(Dialogue(messages=tuple(messages)).to_json())
    return rows


def prompts(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        turns = [message for _ in range(NUM_TURNS) for message in (f"give {rng.choice('abcdefgh')}", "a")][:-1]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        rows.append({"prompt": messages})
    return rows


def run(stage: str, folder: Path, *settings: str, kind: str | None = None) -> dict:
    found = STAGES[stage].of_kind(kind)
    config = load_config(found.config_class(), None, [*settings, f"run.dir={folder}"])
    return found.run_function()(config)


@pytest.fixture(scope="module")
def adherence(tmp_path_factory) -> dict[str, list]:
    """By policy and turn, the instruction in the first; `unasked`: capitals without any, after Ghost Attention."""
    folder = tmp_path_factory.mktemp("gatt")
    own = folder / "own.jsonl"
    own.write_text(json.dumps(OWN) + "\n")
    full = draw_instruction(own_pool([PoolRow.from_json(OWN)]), random.Random(0)).full
    write_rows(folder / "base.jsonl", dialogues(1500, 0, instruction=full, rate=0.5))
    write_rows(folder / "plain.jsonl", dialogues(200, 1, instruction=full, rate=0.0))
    write_rows(folder / "prompts.jsonl", prompts(200, 2))
    write_rows(folder / "heldout.jsonl", prompts(60, 3))
    base = folder / "base"
    run("sft", base, *TRAIN, "model=toy", f"data.train={folder}/base.jsonl", "optim.lr=5e-3", "train.epochs=3")
    sampled = run(
        "gatt", folder / "gatt", *COMMON, f"model={base}", "model.dtype=float32", f"instructions.own={own}",
        "instructions.shorten_rate=0", f"prompts.prompts={folder}/prompts.jsonl", "prompts.max_prompts=200",
        f"prompts.turns={NUM_TURNS}", "sampling.max_new_tokens=8", "sampling.num_candidates=2",
    )  # fmt: skip
    assert sampled["dialogues"] > 150, sampled
    for name in ("dialogues", "as_sampled"):
        data = f"data.train=[{folder}/gatt/{name}.jsonl, {folder}/plain.jsonl]"
        run("sft", folder / name, *TRAIN, f"model={base}", data, "optim.lr=2e-3", "train.epochs=6")
    ask = [
        *COMMON, f"prompts.prompts={folder}/heldout.jsonl", f"prompts.turns={NUM_TURNS}", "prompts.max_prompts=60",
        "sampling.max_new_tokens=8", "num_attention_dialogues=2",
    ]  # fmt: skip
    policies = {"base": base, "with": folder / "dialogues", "without": folder / "as_sampled"}
    named = [f"policies.{name}.{key}" for name, path in policies.items() for key in (f"path={path}", "dtype=float32")]
    told = run("eval", folder / "eval", *ask, *named, f"instructions.own={own}", kind="gatt")
    return {
        **{name: row["by_turn"] for name, row in told["policies"].items()},
        "unasked": capitals_without_instruction(folder / "dialogues", folder / "heldout.jsonl"),
        "attention": told["attention"],
    }


def capitals_without_instruction(model: Path, file: Path) -> list[float]:
    """The share of answers in capitals by turn, where nothing asks for them."""
    asked = [[m.content for m in p.messages if m.role == "user"] for p in load_prompts([str(file)]).rows]
    model, sampling = ModelSection(path=str(model), dtype="float32"), SamplingSection(max_new_tokens=8, temperature=0.0)
    options = {"device": torch.device("cpu"), "max_prompt_length": 400, "seed": 0}
    bar = ProgressBar("", 0, shown=False)
    answers: list[list[str]] = [[] for _ in asked]
    with Speaker.open(model, sampling, **options) as speaker:
        for turn in range(NUM_TURNS):
            contexts = {index: context(turns, answers[index]) for index, turns in enumerate(asked)}
            for index, [answer] in speaker.answer(contexts, turn=turn, bar=bar).candidates.items():
                answers[index].append(answer.text)
    return [sum(is_in_capitals(row[turn]) for row in answers) / len(answers) for turn in range(NUM_TURNS)]


def test_everybody_keeps_the_instruction_in_the_turn_that_states_it(adherence):
    for name in ("base", "with", "without"):
        print(f"adherence by turn, {name}: {[round(turn['value'], 2) for turn in adherence[name]]}")
    assert all(adherence[name][0]["value"] > 0.9 for name in ("base", "with", "without"))


def test_ghost_attention_keeps_it_in_later_turns_and_the_same_dialogues_without_it_do_not(adherence):
    """By at least 0.5 at every later turn, and outside the 95 % intervals."""
    for turn in range(1, NUM_TURNS):
        ours, theirs, base = (adherence[name][turn] for name in ("with", "without", "base"))
        assert ours["low"] > theirs["high"] and ours["value"] > theirs["value"] + 0.5, turn
        assert ours["low"] > base["high"], turn


def test_without_an_instruction_it_answers_as_before(adherence):
    assert max(adherence["unasked"]) < 0.05


def test_later_answers_attend_to_the_instruction_more_than_before(adherence):
    """The sum over layers of the share of attention, at the last turn."""
    last = {name: sum(layer[-1] for layer in adherence["attention"][name]) for name in ("base", "with")}
    assert last["with"] > last["base"]
