"""Settings of every stage but PPO reach what they are for: one that is read and then dropped is noticed."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from typing import Any

import judged
import pytest
import torch
from pairs import configured, pair, prepared, write
from scripted import Interrupted, ScriptedSpeaker, distil_config, gatt_config, scored_by_length
from tiny_training import TinyConfig, arguments

from alignment.config import OptimSection, RunSection, SamplingSection, load_config
from alignment.data import load_dialogues, load_rows
from alignment.dialogue import Candidate, Message
from alignment.runs import open_run
from alignment.sampling.prompts import sampling_params
from alignment.sampling.protocol import SamplingParams
from alignment.training import build_scheduler
from reward_models import trainer as reward_trainer
from reward_models.config import RewardModelConfig
from rlhf import rejection_sampling
from rlhf.selection import select_best
from sft import context_distillation, conversation, gatt
from sft import trainer as sft_trainer
from sft.config import GattEvalInstructions, GattInstructions, GattPrompts, SFTConfig
from sft.conversation import Plan, load_own, load_seeds, make_plans
from sft.instructions import TEMPLATES
from sft.prepare import prepare_dialogues

# --------------------------------------------------------------------------------------- training and its optimizer


@pytest.mark.parametrize(("num_steps", "expected"), [(100, 5), (1000, 30)])
def test_warm_up_is_a_share_of_the_steps_or_the_least_number_of_them(tmp_path, num_steps, expected):
    run = open_run(TinyConfig(run=RunSection(dir=str(tmp_path / "run"))))
    assert arguments(run, num_steps, warmup_fraction=0.03, min_warmup_steps=5).warmup_steps == expected


def test_warm_up_of_our_own_loops_has_the_least_number_of_steps_too():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    build_scheduler(optimizer, OptimSection(warmup_fraction=0.0, min_warmup_steps=4), num_steps=100)
    assert optimizer.param_groups[0]["lr"] == 0.0


STAGES = {
    "sft": (SFTConfig, sft_trainer, sft_trainer.MaskedSFTTrainer, ["data.train=toy:sft.train"]),
    "rm": (
        RewardModelConfig,
        reward_trainer,
        reward_trainer.RewardTrainer,
        ["kind=helpfulness", "data.train=toy:helpfulness.train"],
    ),
}


@pytest.mark.parametrize(("stage", "drawn"), [("sft", {"lora_A"}), ("rm", {"lora_A", "score"})])
def test_the_seed_decides_the_order_of_rows_the_first_weights_and_dropout(tmp_path, monkeypatch, stage, drawn):
    config_class, module, trainer_class, settings = STAGES[stage]

    def begun(seed: int) -> tuple[list[list[int]], int, dict[str, torch.Tensor]]:
        found = []

        def note(trainer: Any, schedule: Any, *_: Any) -> None:
            named = trainer.model.named_parameters()
            weights = {name: p.detach() for name, p in named if p.requires_grad and "lora_B" not in name}
            found.append((schedule.steps, trainer.args.seed, weights))
            raise Interrupted

        monkeypatch.setattr(trainer_class, "use_steps", note)
        common = ["model={path: toy, dtype: float32}", "lora.r=2", "data.max_rows=8", "train.batch_size=2"]
        common += ["run.device=cpu", f"run.seed={seed}", f"run.dir={tmp_path / str(seed)}"]
        with pytest.raises(Interrupted):
            module.run(load_config(config_class, None, [*settings, *common]))
        return found[0]

    (steps, dropout, weights), (other_steps, other_dropout, other_weights) = begun(0), begun(1)
    assert steps != other_steps
    assert (dropout, other_dropout) == (0, 1)
    assert {part for part in ("lora_A", "score") if any(part in name for name in weights)} == drawn
    assert not any(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_demonstrations_are_drawn_by_source_then_of_all_and_by_the_seed(tmp_path, write_file):
    def rows(name: str) -> str:
        asked = ({"role": "user", "content": f"{name}{index:02}"} for index in range(40))
        answer = {"role": "assistant", "content": "ok"}
        return "".join(json.dumps({"messages": [question, answer]}) + "\n" for question in asked)

    a, b, held_out = (write_file(f"{name}.jsonl", rows(name)) for name in "abv")

    def drawn(*extra: str) -> tuple[list[str], list[str]]:
        files = [f"data.train=[{a},{b}]", f"data.max_rows_of={{{b}: 6}}", f"data.valid={held_out}"]
        settings = ["model=toy", *files, "data.max_valid_rows=5", f"run.dir={tmp_path / 'run'}", *extra]
        found = prepare_dialogues(load_config(SFTConfig, None, settings))
        train, valid = ([each.messages[0].content for each in part.dialogues] for part in (found.train, found.valid))
        return train, valid

    train, valid = drawn()
    assert Counter(text[0] for text in train) == {"a": 40, "b": 6} and len(valid) == 5
    assert train == sorted(train) and valid == sorted(valid), "in the order of the files"
    assert drawn("data.max_rows=46") == (train, valid)
    few, _ = drawn("data.max_rows=10")
    assert len(few) == 10 and set(few) < set(train)
    others, other_valid = drawn("run.seed=1")
    assert len(others) == 46 and others != train and other_valid != valid
    assert drawn("data.max_rows=10", "run.seed=1")[0] != few


# ------------------------------------------------------------------------------------------------- reward models


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [2 / 3, 0.0]),  # Llama 2 Table 27, small
        (["margin=large", "unrated_margin=0.5"], [2.0, 0.5]),
        (["margin=none", "unrated_margin=0.5"], [0.0, 0.0]),
        (["margin={significantly_better: 9, better: 7, slightly_better: 5, negligibly_better: 3}"], [7.0, 0.0]),
    ],
)
def test_margins_are_those_of_the_table_or_of_ones_own(tmp_path, settings, expected):
    train = write(tmp_path / "a.jsonl", [pair(0, rating="better"), pair(1)])
    found = prepared(tmp_path, "kind=helpfulness", f"data.train={train}", *settings)
    assert [encoded.margin for encoded in found.train] == expected


@pytest.mark.parametrize(
    ("settings", "safety", "centering"),
    [
        (["kind=safety"], 1.0, 0.0),
        (["kind=helpfulness"], 0.0, 0.0),
        (["kind=helpfulness", "safety_loss_weight=0.25", "centering_weight=0.1"], 0.25, 0.1),
        (["kind=safety", "safety_loss_weight=0"], 0.0, 0.0),
    ],
)
def test_the_parts_of_the_loss_are_weighed_by_the_settings_and_the_kind(
    tmp_path, monkeypatch, settings, safety, centering
):
    train = write(tmp_path / "a.jsonl", [pair(0, chosen_safe=True, rejected_safe=False)])
    given = {}

    def noted(**weights: float) -> None:
        given.update(weights)
        raise Interrupted

    monkeypatch.setattr(reward_trainer, "pair_loss", noted)
    with pytest.raises(Interrupted):
        reward_trainer.run(configured(tmp_path, f"data.train={train}", "run.device=cpu", *settings))
    assert given == {"safety_weight": safety, "centering_weight": centering}


# ----------------------------------------------------------------------------- sampling and selection of candidates


def test_every_setting_of_sampling_reaches_the_engine():
    numbers = {"num_candidates": 3, "temperature": 0.7, "top_p": 0.6, "top_k": 4, "max_new_tokens": 9}
    assert sampling_params(SamplingSection(**numbers), 5) == SamplingParams(**numbers, seed=5)


def test_gains_are_over_the_median():
    rows = [judged.candidate("a", reward) for reward in (0, 0, 9)]
    assert select_best(rows, accumulate="best").gains == [9.0]  # over the mean, 3, it would be 6


def test_candidates_of_every_temperature_that_was_tried_can_be_chosen(tmp_path, monkeypatch):
    """The bests of both prompts are 5 and 5 at 1.0, which is chosen, and 9 and 0 at 0.1, where alpha's gold is."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [judged.candidate(name, 0.0).prompt.to_json() for name in ("alpha", "beta")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reward(each: Any) -> float:
        return 5.0 if each.temperature == 1.0 else 9.0 * (each.prompt.messages[0].content == "alpha")

    judged.judged_by(monkeypatch, reward)
    sampling = {"num_candidates": 3, "max_new_tokens": 6, "temperature_grid": [0.1, 1.0]}
    result = rejection_sampling.run(judged.config_of(tmp_path / "run", prompts, sampling=sampling))
    assert (result["temperature"], result["kept"]) == (1.0, 2)
    sampled = load_rows([str(tmp_path / "run" / "candidates.jsonl")], Candidate.from_json).rows
    reward_of = {(*each.prompt.messages, Message("assistant", each.response)): each.reward for each in sampled}
    assert len(reward_of) == 12, "no answer is drawn twice"
    gold = load_dialogues([str(tmp_path / "run" / "sft.jsonl")]).rows
    assert [reward_of[dialogue.messages] for dialogue in gold] == [9.0, 5.0]


# --------------------------------------------------------------------- Ghost Attention and context distillation


def speaker_of(monkeypatch: pytest.MonkeyPatch, answer: Any) -> ScriptedSpeaker:
    """A scripted speaker in the place of the model."""
    speaker = ScriptedSpeaker(answer)
    monkeypatch.setattr(conversation.Speaker, "open", classmethod(lambda cls, *_, **__: nullcontext(speaker)))
    return speaker


def plans_of(instructions: GattInstructions) -> list[Plan]:
    prompts = GattPrompts(prompts="toy:prompts.train", max_prompts=20)
    own = load_own(instructions)
    return make_plans(load_seeds(prompts), prompts, own, instructions, turns=(2, 2), seed=0)


@pytest.mark.parametrize(
    ("instructions", "values"),
    [
        (GattInstructions(kinds=["hobby"]), TEMPLATES["hobby"].train),
        (GattInstructions(kinds=["hobby"], part="held_out"), TEMPLATES["hobby"].held_out),
        (GattEvalInstructions(kinds=["keyword"]), TEMPLATES["keyword"].held_out),
    ],
)
def test_adherence_is_trained_and_measured_with_different_values(instructions, values):
    drawn = {constraint.value for plan in plans_of(instructions) for constraint in plan.instruction.constraints}
    assert len(drawn) > 1 and drawn <= set(values)


@pytest.mark.parametrize("rate", [0, 1])
def test_rates_of_joined_and_of_shortened_instructions_are_kept(rate):
    plans = plans_of(GattInstructions(kinds=["hobby", "figure"], combine_rate=rate, shorten_rate=rate))
    assert {len(plan.instruction.constraints) for plan in plans} == {1 + rate}
    assert {plan.is_shortened for plan in plans} == {bool(rate)}


def test_answers_are_sampled_with_the_full_form_where_the_short_one_is_trained(tmp_path, monkeypatch):
    speaker = speaker_of(monkeypatch, lambda messages: ["OK"])
    gatt.run(gatt_config(tmp_path / "run", "instructions.shorten_rate=1"))
    asked = [message.content for messages in speaker.asked for message in messages if message.role == "user"]
    full = "In the whole conversation, you write only in capital letters.\n"
    assert asked and all(text.startswith(full) for text in asked)
    dialogues = load_dialogues([str(tmp_path / "run" / "dialogues.jsonl")]).rows
    assert len(dialogues) == 6
    assert all(dialogue.messages[0].content.startswith("Style: capital letters.\n") for dialogue in dialogues)


def test_preprompts_and_templates_of_ones_own_stand_before_the_prompts(tmp_path, monkeypatch, write_file):
    """The template goes behind the preprompt where the prompt's category has one."""
    kinds = {"lonely": "self_harm", "bored": ""}
    rows = [{"prompt": [{"role": "user", "content": text}], "category": kind} for text, kind in kinds.items()]
    path = write_file("prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    speaker = speaker_of(monkeypatch, lambda messages: ["longer" if messages[0].role == "system" else "four"])
    own = ["preprompts=[Be careful.]", "templates={self_harm: Call a friend.}"]
    config = distil_config(tmp_path / "run", f"prompts.prompts={path}", *own)
    context_distillation.run(config, lambda config, device: scored_by_length)
    behind = {messages[-1].content: messages[0].content for messages in speaker.asked if messages[0].role == "system"}
    assert behind == {"lonely": "Be careful. Call a friend.", "bored": "Be careful."}
