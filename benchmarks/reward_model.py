"""Reward-model training: TRL's RewardTrainer and ours on the same pairs, the same token ids, the same optimizer steps.

    ALIGN_DATA_DIR=/path/to/data python benchmarks/reward_model.py                    # full fine-tuning
    ALIGN_DATA_DIR=/path/to/data python benchmarks/reward_model.py --lora 16

Each measurement is a child process of its own, so that its peak memory is its own; the two sides take turns. One
optimizer step of 16 pairs warms up, the following ones are timed. Both sides run with the same allocator settings, the
same arithmetic type and AdamW; trained weights are float32, those that LoRA freezes are of the arithmetic type. Prints
pairs a second, peak memory, ratios, and the share of the machine's matrix throughput that our side's tokens need.
`trl-sorted` has the pairs of each optimizer step sorted by length, so that its batches pad less; `trl-glibc` runs with
glibc's own allocator settings; `trl-compiled` is told torch_compile=True. Ours runs without and with train.compile,
compiled within the first step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import StepClock, machine_line, parser, print_comparison, rows_in_order, run_in_turn

STEP_PAIRS = 16
NAMES = {
    "trl": "TRL, batch {}",
    "trl-sorted": "TRL, batch {}, sorted",
    "trl-glibc": "TRL, batch {}, glibc's allocator",
    "trl-compiled": "TRL, batch {}, torch_compile",
    "align": "ours, {} tokens",
    "align-compiled": "ours, {} tokens, train.compile",
}


def main() -> None:
    """Runs the children in turn and prints the table."""
    options = _arguments()
    if options.side:
        sys.stdout.write(json.dumps(run_side(options)) + "\n")
        return
    sides = [(name, batch) for name in options.trl for batch in options.trl_batch]
    sides += [(name, tokens) for name in options.align for tokens in options.tokens]
    arguments = ["--lora", str(options.lora), "--pairs", str(options.pairs), "--data", options.data]
    arguments += ["--dtype", options.dtype, "--max-length", str(options.max_length)]
    arguments += ["--trl-attention", options.trl_attention]
    found = run_in_turn(
        __file__,
        sides,
        arguments,
        rounds=options.rounds,
        figure="pairs_per_second",
        allocators={"trl-glibc": {}},
    )

    machine, peak = machine_line(getattr(torch, options.dtype), rounds=options.rounds)
    kind = f"LoRA r={options.lora}" if options.lora else "full fine-tuning"
    print(f"\nReward model, {kind}, SmolLM2-135M, {options.dtype}, {options.pairs} pairs of {options.data}, max length")
    print(f"{options.max_length}, {STEP_PAIRS} pairs a step, seed 0, {machine}\n")
    names = {side: NAMES[side[0]].format(side[1]) for side in sides}
    ours = next(row for side, row in found.items() if side[0].startswith("align") and row)
    # Forward, gradients of activations and, where weights are trained, of weights: 2 operations each.
    operations = (4 if options.lora else 6) * ours["backbone_parameters"] * ours["tokens_per_pair"]
    print_comparison(found, names, figure="pairs_per_second", unit="pairs", share=operations / (peak * 1e9))
    print(
        f"\ntokens a pair: {ours['tokens_per_pair']:.0f} ours, {ours['separate_tokens_per_pair']:.0f} in separate rows"
    )


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """One measurement: trains, and times all steps but the first."""
    from alignment.hardware import peak_memory_gb
    from alignment.models import load_reward_model
    from reward_models.preferences import encode_pairs

    dtype = getattr(torch, options.dtype)
    loaded = load_reward_model(
        "smollm2-135m-instruct",
        dtype=dtype if options.lora else torch.float32,
        chat_template="chatml",
        new_head_seed=0,
    )
    pairs = encode_pairs(
        loaded.chat, _pairs(options), margins={}, unrated_margin=0.0, max_length=options.max_length, overlong="drop"
    )
    fitting = [pair for pair in pairs.encoded if _separate_length(pair) <= options.max_length]
    encoded = fitting[: STEP_PAIRS + options.pairs]
    assert len(encoded) == STEP_PAIRS + options.pairs, "too few pairs fit into max_length"
    with tempfile.TemporaryDirectory() as folder:
        if options.side.startswith("trl"):
            loaded.model.set_attn_implementation(options.trl_attention)
        make_trainer = _trl_trainer if options.side.startswith("trl") else _align_trainer
        trainer = make_trainer(options, loaded, encoded, Path(folder))
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    timed = encoded[STEP_PAIRS:]
    tree_tokens = sum(pair.tree.num_tokens for pair in timed)
    return {
        "pairs_per_second": len(timed) / clock.seconds,
        "peak_memory_gb": peak_memory_gb(),
        "tokens_per_pair": tree_tokens / len(timed),
        "separate_tokens_per_pair": sum(map(_separate_tokens, timed)) / len(timed),
        "backbone_parameters": sum(p.numel() for p in loaded.model.get_decoder().layers.parameters()),
    }


def _trl_trainer(options: argparse.Namespace, loaded: Any, encoded: list[Any], folder: Path) -> Any:
    """TRL as its users run it, fed ready ids so that both sides see the same tokens."""
    import datasets
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    if options.side == "trl-sorted":
        steps = [encoded[start : start + STEP_PAIRS] for start in range(0, len(encoded), STEP_PAIRS)]
        encoded = [pair for step in steps for pair in sorted(step, key=_separate_length, reverse=True)]
    rows = {
        name: [[*pair.tree.trunk, *pair.tree.branches[index].ids] for pair in encoded]
        for index, name in enumerate(("chosen_ids", "rejected_ids"))
    }
    arguments = RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=options.size,
        gradient_accumulation_steps=STEP_PAIRS // options.size,
        num_train_epochs=1,
        max_length=None,
        bf16=options.dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        torch_compile=options.side == "trl-compiled",
        save_strategy="no",
        logging_steps=1000,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    lora = LoraConfig(r=options.lora, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
    return RewardTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=loaded.tokenizer,
        peft_config=lora if options.lora else None,
    )


def _align_trainer(options: argparse.Namespace, loaded: Any, encoded: list[Any], folder: Path) -> Any:
    from transformers import TrainingArguments

    from alignment.compilation import compile_layers
    from alignment.config import LoraSection
    from alignment.models import add_lora
    from reward_models.config import RewardModelConfig
    from reward_models.preferences import pair_batches
    from reward_models.trainer import RewardTrainer, pair_loss

    config = RewardModelConfig.model_validate(
        {
            "kind": "helpfulness",
            "model": "smollm2-135m-instruct",
            "data": {"train": "unused"},
            "train": {"batch_size": STEP_PAIRS},
            "run": {"dir": str(folder / "run")},
        }
    )
    schedule, arguments = rows_in_order(config, len(encoded), getattr(torch, options.dtype))
    model = add_lora(loaded.model, LoraSection(r=options.lora, alpha=16), is_reward_model=True, seed=0)
    if options.side == "align-compiled":
        compile_layers(model)
    trainer = RewardTrainer(model=model, args=TrainingArguments(**arguments), processing_class=loaded.tokenizer)
    batcher = lambda rows: pair_batches(encoded, rows, max_tokens=options.size)  # noqa: E731
    trainer.use_steps(schedule, batcher, pair_loss(safety_weight=0.0, centering_weight=0.0))
    return trainer


def _arguments() -> argparse.Namespace:
    found = parser(
        __doc__, data="pref_helpful_hh.train", unit="pairs", count=48, trl_batch=[1, 2, 4, 8, 16], sides=list(NAMES)
    )
    theirs, default = [name for name in NAMES if name.startswith("trl")], ["trl", "trl-sorted"]
    found.add_argument("--trl", nargs="*", choices=theirs, default=default, help="ways of running TRL")
    found.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="our max_tokens_per_batch")
    found.add_argument("--trl-attention", choices=["sdpa", "eager"], default="sdpa", help="sdpa is what users get")
    return found.parse_args()


def _pairs(options: argparse.Namespace) -> list[Any]:
    from alignment.data import load_pairs, pick

    return pick(load_pairs([options.data]).rows, 4 * (STEP_PAIRS + options.pairs), 0)


def _separate_tokens(pair: Any) -> int:
    return sum(len(pair.tree.trunk) + len(branch.ids) for branch in pair.tree.branches)


def _separate_length(pair: Any) -> int:
    return max(len(pair.tree.trunk) + len(branch.ids) for branch in pair.tree.branches)


if __name__ == "__main__":
    main()
