"""Supervised fine-tuning: TRL's SFTTrainer and ours on the same rows, the same token ids, the same optimizer steps.

    ALIGN_DATA_DIR=/path/to/data python benchmarks/sft.py                    # full fine-tuning
    ALIGN_DATA_DIR=/path/to/data python benchmarks/sft.py --lora 16

Each measurement is a child process of its own, so that its peak memory is its own; the two sides take turns. One
optimizer step of 16 dialogues warms up, the following ones are timed. TRL gets ready ids with a completion mask and
computes the loss on completions only. Besides its defaults it is tried with the rows of every step sorted by length, so
that its micro-batches hold as little padding as they can (`trl-sorted`), and without padding (`trl-flat`, its
padding_free, which it documents for FlashAttention and which transformers' mask makes exact with SDPA as well) or told
torch_compile=True (`trl-compiled`); ours runs without and with train.compile, compiled within the step that warms up.
Both sides run with the same allocator settings, the same arithmetic type and AdamW; trained weights are float32, those
that LoRA freezes are of the arithmetic type. The mean loss of each side is printed: it must be nearly the same (the
learning rates' schedules differ).
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

sys.path.remove(str(Path(__file__).resolve().parent))  # where this file would hide the package of its name
STEP_ROWS = 16
MODEL = "smollm2-135m-instruct"
NAMES = {
    "trl": "TRL, batch {}",
    "trl-sorted": "TRL, batch {}, sorted",
    "trl-flat": "TRL, batch {}, padding_free",
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
    arguments = ["--lora", str(options.lora), "--rows", str(options.rows), "--data", options.data]
    arguments += ["--dtype", options.dtype, "--max-length", str(options.max_length)]
    found = run_in_turn(__file__, sides, arguments, rounds=options.rounds, figure="examples_per_second")

    machine, peak = machine_line(getattr(torch, options.dtype), rounds=options.rounds)
    kind = f"LoRA r={options.lora}" if options.lora else "full fine-tuning"
    print(f"\nSFT, {kind}, SmolLM2-135M, {options.dtype}, {options.rows} rows of {options.data}, max length")
    print(f"{options.max_length}, {STEP_ROWS} rows a step, seed 0, {machine}\n")
    names = {side: NAMES[side[0]].format(side[1]) for side in sides}
    ours = next(row for side, row in found.items() if side[0].startswith("align") and row)
    # Forward, gradients of activations and, where weights are trained, of weights: 2 operations each.
    passes = 4 if options.lora else 6
    backbone = passes * ours["backbone_parameters"] * ours["tokens_per_row"]
    head = passes * ours["output_parameters"] * ours["trained_tokens_per_row"]
    share = (backbone + head) / (peak * 1e9)
    print_comparison(found, names, figure="examples_per_second", unit="examples", share=share)
    print(f"\ntokens a row: {ours['tokens_per_row']:.0f}, of them {ours['trained_tokens_per_row']:.0f} trained")
    losses = (f"{names[side]} {row['loss']:.3f}" for side, row in found.items() if row)
    print(f"mean loss of all steps: {'; '.join(losses)}")


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """One measurement: trains, and times all steps but the first."""
    from alignment.data import load_dialogues, pick
    from alignment.hardware import peak_memory_gb
    from alignment.models import load_chat_model
    from sft.examples import make_examples

    dtype = getattr(torch, options.dtype)
    loaded = load_chat_model(MODEL, dtype=dtype if options.lora else torch.float32, chat_template="chatml")
    dialogues = pick(load_dialogues([options.data]).rows, 4 * (STEP_ROWS + options.rows), 0)
    fitting = make_examples(loaded.chat, dialogues, max_length=options.max_length, overlong="drop").encoded
    encoded = fitting[: STEP_ROWS + options.rows]
    assert len(encoded) == STEP_ROWS + options.rows, "too few rows fit into max_length"
    with tempfile.TemporaryDirectory() as folder:
        if options.side.startswith("align"):
            trainer = _align_trainer(options, loaded, encoded, Path(folder))
        else:
            loaded.model.set_attn_implementation("sdpa")
            trainer = _trl_trainer(options, loaded, encoded, Path(folder))
        clock = StepClock()
        trainer.add_callback(clock)
        loss = trainer.train().training_loss
    timed = encoded[STEP_ROWS:]
    return {
        "loss": loss,
        "examples_per_second": len(timed) / clock.seconds,
        "peak_memory_gb": peak_memory_gb(),
        "tokens_per_row": sum(len(example.input_ids) for example in timed) / len(timed),
        "trained_tokens_per_row": sum(example.num_trained for example in timed) / len(timed),
        "backbone_parameters": sum(p.numel() for p in loaded.model.get_decoder().layers.parameters()),
        "output_parameters": loaded.model.get_output_embeddings().weight.numel(),
    }


def _trl_trainer(options: argparse.Namespace, loaded: Any, encoded: list[Any], folder: Path) -> Any:
    """TRL as its users run it, fed ready ids so that both sides see the same tokens."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    steps = [encoded[start : start + STEP_ROWS] for start in range(0, len(encoded), STEP_ROWS)]
    if options.side == "trl-sorted":
        steps = [sorted(step, key=lambda example: -len(example.input_ids)) for step in steps]
    rows = [example for step in steps for example in step]
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=options.size,
        gradient_accumulation_steps=STEP_ROWS // options.size,
        num_train_epochs=1,
        max_length=None,
        completion_only_loss=True,
        padding_free=options.side == "trl-flat",
        torch_compile=options.side == "trl-compiled",
        bf16=options.dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1000,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    lora = LoraConfig(r=options.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(
            {
                "input_ids": [example.input_ids for example in rows],
                "completion_mask": [[int(trained) for trained in example.loss_mask] for example in rows],
            }
        ),
        processing_class=loaded.tokenizer,
        peft_config=lora if options.lora else None,
    )


def _align_trainer(options: argparse.Namespace, loaded: Any, encoded: list[Any], folder: Path) -> Any:
    import trl

    from alignment.compilation import compile_layers
    from alignment.config import LoraSection
    from alignment.models import add_lora
    from sft.config import SFTConfig
    from sft.evaluate import response_loss
    from sft.examples import dialogue_batches
    from sft.trainer import MaskedSFTTrainer, as_dataset

    config = SFTConfig.model_validate(
        {
            "model": MODEL,
            "data": {"train": "unused"},
            "train": {"batch_size": STEP_ROWS},
            "run": {"dir": str(folder / "run")},
        }
    )
    schedule, arguments = rows_in_order(config, len(encoded), getattr(torch, options.dtype))
    model = add_lora(loaded.model, LoraSection(r=options.lora, alpha=16), is_reward_model=False, seed=0)
    if options.side == "align-compiled":
        compile_layers(model)
    trainer = MaskedSFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=as_dataset(encoded),
        data_collator=list,
        processing_class=loaded.tokenizer,
    )
    sizes = {"max_tokens": options.size, "row_tokens": options.max_length}
    batcher = lambda rows: dialogue_batches(encoded, rows, **sizes)  # noqa: E731
    trainer.use_steps(schedule, batcher, response_loss)
    return trainer


def _arguments() -> argparse.Namespace:
    found = parser(
        __doc__,
        data="sft_general.train",
        unit="rows",
        count=64,
        trl_batch=[1, 2, 4, 8],
        sides=list(NAMES),
    )
    theirs, default = [name for name in NAMES if name.startswith("trl")], ["trl", "trl-sorted", "trl-flat"]
    found.add_argument("--trl", nargs="*", choices=theirs, default=default, help="ways of running TRL")
    found.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="our max_tokens_per_batch")
    return found.parse_args()


if __name__ == "__main__":
    main()
