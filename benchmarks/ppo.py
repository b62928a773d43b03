"""PPO: TRL's PPOTrainer and ours on the same models, the same prompts, the same tokens and optimizer steps.

    ALIGN_DATA_DIR=/path/to/data python benchmarks/ppo.py                    # full fine-tuning
    ALIGN_DATA_DIR=/path/to/data python benchmarks/ppo.py --lora 16
    ALIGN_DATA_DIR=/path/to/data python benchmarks/ppo.py --trl-python /path/to/trl-1.12/bin/python

Each measurement is a child process of its own, so that its peak memory is its own; the two sides take turns. One
iteration of 16 rollouts warms up, the following ones are timed from end to end: sampling, scoring, measuring, updating.

TRL's runs in the environment of the interpreter named, or in one that is made in the cache (TRL 1.12, all else as
here). What is the same on both sides:
  - policy, reference, value model (it starts from the helpfulness model), AdamW and its learning rate; trained weights
    are float32, those that LoRA freezes, the reference and reward models of the arithmetic type;
  - the prompts of each iteration, of 50 to 350 tokens;
  - the length of all responses: no token ends one (TRL: no stop token; ours: a sampler without stop ids);
  - optimizer steps: one a minibatch, one pass over the rollouts.
Ours scores with two reward models, helpfulness and safety, TRL with one: ours does more. Ours also clips gradients.

TRL is helped where its users would have to help themselves:
  - bf16=True does nothing in it, so ACCELERATE_MIXED_PRECISION=bf16 is set. Even so only its updates are autocast;
  - it takes an optimizer step once a batch, however many minibatches there are, where gradients are accumulated, and
    once a micro-batch in the last iteration of every pass over the prompts. It is made to take one a minibatch;
  - with LoRA its value model gets adapters too, and the reference is the policy without its own.
`trl` samples and measures all 16 rollouts at once, its default; `trl-split` as many as there are in a micro-batch;
`trl-bf16` also trains weights of bfloat16, which lose small updates, so that nothing is computed in float32;
`trl-compiled` is told torch_compile=True. Ours runs with train.compile and without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import StepClock, machine_line, peak_memory_gb, print_comparison, run_in_turn

sys.path.remove(str(Path(__file__).resolve().parent))  # where sft.py would hide the package of its name
MODEL = "smollm2-135m-instruct"
TRL_VERSION = "1.12.0"
LR = 1e-6
LORA_ALPHA = 16
NAMES = {
    "trl": "TRL, batch {}",
    "trl-split": "TRL, batch {}, rollouts as well",
    "trl-bf16": "TRL, batch {}, bfloat16 weights",
    "trl-compiled": "TRL, batch {}, torch_compile",
    "align": "ours, {} tokens",
    "align-compiled": "ours, {} tokens, train.compile",
}


def main() -> None:
    """Runs the children in turn and prints the table."""
    options = _arguments()
    if options.side:
        run_side = _iterate_with_align if options.side.startswith("align") else _iterate_with_trl
        sys.stdout.write("\n" + json.dumps(run_side(options)) + "\n")
        return
    sides = [(name, batch) for name in options.trl for batch in options.trl_batch]
    sides += [(name, tokens) for name in options.align for tokens in options.tokens]
    with tempfile.TemporaryDirectory() as folder:
        inputs = _inputs(options, Path(folder))
        (Path(folder) / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
        passed = ("lora", "dtype", "iterations", "rollouts", "rollouts_per_prompt", "minibatch", "response_tokens")
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in passed]
        arguments += [f"--inputs={folder}/inputs.json"]
        pythons = dict.fromkeys(options.trl, options.trl_python or _trl_python()) if options.trl else {}
        found = run_in_turn(
            __file__, sides, arguments, rounds=options.rounds, figure="rollouts_per_second", pythons=pythons
        )
    _print_results(options, inputs["prompts"], found)


def _print_results(options: argparse.Namespace, prompts: list[list[list[int]]], found: dict[Any, Any]) -> None:
    machine, peak = machine_line(getattr(torch, options.dtype), rounds=options.rounds)
    kind = f"LoRA r={options.lora}" if options.lora else "full fine-tuning"
    print(f"\nPPO, {kind}, SmolLM2-135M, {options.dtype}, {options.iterations} times {options.rollouts} rollouts")
    print(f"({options.rollouts_per_prompt} a prompt), {options.minibatch} a minibatch, {options.data}, seed 0,")
    print(f"{machine}\n")
    names = {side: NAMES[side[0]].format(side[1]) for side in found}
    ours = {side: row for side, row in found.items() if side[0].startswith("align") and row}
    timed = [[len(ids) for ids in batch] for batch in prompts[1:]]
    lengths = [length for batch in timed for length in batch]
    mean, longest = sum(lengths) / len(lengths), sum(map(max, timed)) / len(timed)
    share = _operations(next(iter(ours.values())), options, mean) / (peak * 1e9)
    print_comparison(found, names, figure="rollouts_per_second", unit="rollouts", share=share)
    print(f"\ntokens of a prompt: {mean:.0f}, from {min(lengths)} to {max(lengths)}; TRL pads to {longest:.0f}")
    print("reward models: TRL one, ours two")
    for side, row in found.items():
        if row:
            print(f"{names[side]}: {_details(row)}")


def _details(row: dict[str, float]) -> str:
    """The figures that both sides must share, and what is known of where the time went."""
    phases = [name for name in ("sample", "score", "measure", "update") if f"{name}_seconds" in row]
    shares = ", ".join(f"{name} {row[f'{name}_seconds'] / row['seconds']:.0%}" for name in phases)
    return (
        f"{row['tokens_per_rollout']:.2f} tokens a rollout, {row['optimizer_steps']:.1f} optimizer steps an iteration, "
        f"entropy {row['entropy']:.3f} nats a token; of the time {shares}"
    )


def _operations(ours: dict[str, float], options: argparse.Namespace, prompt_tokens: float) -> float:
    """What our products need for one rollout: two operations a weight forward, as many for each kind of gradient."""
    prompt, response = prompt_tokens / options.rollouts_per_prompt, options.response_tokens
    update = 4 if options.lora else 6
    # Sampling, two reward models, policy with critic and reference measured, policy and critic updated.
    backbone = (2 + 2 * 2 + 3 * 2 + 2 * update) * ours["backbone_parameters"] * (prompt + response)
    return backbone + (2 + 2 * 2 + update) * ours["output_parameters"] * response


def _inputs(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides get: folders of the models, and the prompts' ids of every iteration, the warming-up first."""
    from alignment.chat import encode_prompt
    from alignment.config import LoraSection
    from alignment.data import load_prompts, pick
    from alignment.model_folders import model_folder
    from alignment.models import add_lora, load_reward_model, save_model

    for seed, name in enumerate(("helpfulness", "safety")):
        loaded = load_reward_model(MODEL, chat_template="chatml", new_head_seed=seed)
        lora = LoraSection(r=options.lora, alpha=LORA_ALPHA)
        model = add_lora(loaded.model, lora, is_reward_model=True, seed=seed)
        for parameter in model.parameters():
            if options.lora and parameter.requires_grad and not parameter.any():  # an adapter's second matrix
                torch.nn.init.normal_(parameter, std=0.01)
        save_model(model, loaded, folder / name)
    per_iteration = options.rollouts // options.rollouts_per_prompt
    wanted = per_iteration * (1 + options.iterations)
    rows = pick(load_prompts([options.data]).rows, 8 * wanted, 0)
    encoded = [encode_prompt(loaded.chat, prompt.messages) for prompt in rows]
    shortest, longest = options.prompt_tokens
    fitting = [ids for ids in encoded if shortest <= len(ids) <= longest][:wanted]
    assert len(fitting) == wanted, f"too few prompts of {shortest} to {longest} tokens"
    return {
        "policy": str(model_folder(MODEL)),
        "helpfulness": str(folder / "helpfulness"),
        "safety": str(folder / "safety"),
        "prompts": [fitting[start : start + per_iteration] for start in range(0, wanted, per_iteration)],
    }


def _trl_python() -> str:
    """The interpreter of an environment in the cache that has the other TRL, and all else as here."""
    from alignment.sources import cached_folder

    others = ("torch", "transformers", "peft", "accelerate", "datasets")
    same = [f"{name}=={version(name).split('+')[0]}" for name in others]

    def make(folder: Path) -> None:
        print(f"making an environment with TRL {TRL_VERSION}, {', '.join(same)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"trl=={TRL_VERSION}", *same], check=True)

    name = f"trl-{TRL_VERSION}-transformers-{version('transformers')}"
    return str(cached_folder(name, make) / "bin" / "python")


def _iterate_with_align(options: argparse.Namespace) -> dict[str, float]:
    from accelerate import Accelerator

    from alignment.dialogue import Message, Prompt
    from alignment.sampling.prompts import Asked
    from rlhf.config import PPOConfig
    from rlhf.policy_sampler import PolicySampler
    from rlhf.ppo import PPOTrainer

    inputs = _read(options)
    names = ("policy", "helpfulness", "safety")
    model = {name: {"path": inputs[name], "dtype": options.dtype, "chat_template": "chatml"} for name in names}
    config = PPOConfig.model_validate(
        {
            "model": model.pop("policy"),
            "lora": {"r": options.lora, "alpha": LORA_ALPHA},
            "rewards": model,
            "prompts": {"prompts": "unused"},
            "sampling": {"num_candidates": options.rollouts_per_prompt, "max_new_tokens": options.response_tokens},
            "ppo": {"critic_lr": LR},
            "optim": {"lr": LR},
            "train": {
                "max_steps": 1 + options.iterations,
                "batch_size": options.rollouts,
                "minibatch_size": options.minibatch,
                "max_tokens_per_batch": options.size,
                "compile": options.side == "align-compiled",
            },
            "run": {"dir": "unused", "device": "cpu"},
        }
    )

    dtype = getattr(torch, options.dtype)
    trainer = PPOTrainer(config, Accelerator(cpu=True), dtype)
    assert (trainer.models.separate is None) == bool(options.lora), trainer.models.separate
    trainer.sampler = PolicySampler(trainer.policy, [], dtype, max_rows=config.sampling.max_rows)
    steps = _count_steps(trainer.learners["policy"].optimizer)
    asked = Prompt(messages=(Message("user", "unused"),))
    warm_up, *timed = [[Asked(asked, ids) for ids in batch] for batch in inputs["prompts"]]
    trainer.iterate(warm_up, seed=0)
    steps.clear()
    start = time.perf_counter()
    metrics = [trainer.iterate(batch, seed=seed) for seed, batch in enumerate(timed, start=1)]
    seconds = time.perf_counter() - start
    decoder, head = trainer.models.loaded.model.get_decoder(), trainer.models.loaded.model.get_output_embeddings()
    phases = (f"{name}_seconds" for name in ("sample", "score", "measure", "update"))
    return {
        **_figures(options, seconds, [found["length"] for found in metrics], [found["entropy"] for found in metrics]),
        **{name: sum(found[name] for found in metrics) for name in phases},
        "optimizer_steps": len(steps) / options.iterations,
        "backbone_parameters": sum(p.numel() for name, p in decoder.layers.named_parameters() if "lora_" not in name),
        "output_parameters": head.weight.numel(),
    }


def _iterate_with_trl(options: argparse.Namespace) -> dict[str, float]:
    """TRL with its models as their users load them; nothing of this toolkit is in its environment."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if options.dtype == "bfloat16" else "no"
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    inputs, dtype = _read(options), getattr(torch, options.dtype)
    trained = dtype if options.lora or options.side == "trl-bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(inputs["helpfulness"], padding_side="left")
    prompts = [ids for batch in inputs["prompts"] for ids in batch for _ in range(options.rollouts_per_prompt)]
    lora = {"r": options.lora, "lora_alpha": LORA_ALPHA, "target_modules": "all-linear"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.size,
            gradient_accumulation_steps=options.rollouts // options.size,
            local_rollout_forward_batch_size=options.size if options.side == "trl-split" else options.rollouts,
            num_mini_batches=options.rollouts // options.minibatch,
            num_ppo_epochs=1,
            total_episodes=len(prompts),
            num_sample_generations=0,
            response_length=options.response_tokens,
            stop_token=None,
            temperature=1.0,
            kl_coef=0.01,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            bf16=options.dtype == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            torch_compile=options.side == "trl-compiled",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = StepClock()
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(inputs["policy"], dtype=trained),
            ref_model=None if options.lora else AutoModelForCausalLM.from_pretrained(inputs["policy"], dtype=dtype),
            reward_model=_trl_classifier(inputs["helpfulness"], dtype),
            value_model=_trl_classifier(inputs["helpfulness"], trained, lora if options.lora else None),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if options.lora else None,
            callbacks=[clock],
        )
        # One optimizer step a minibatch, and the prompts in their order; accelerate's loader would end accumulation.
        trainer.accelerator.gradient_accumulation_steps = max(1, options.minibatch // options.size)
        trainer.dataloader = DataLoader(
            trainer.train_dataset, batch_size=options.rollouts, collate_fn=trainer.data_collator
        )
        steps = _count_steps(trainer.optimizer)
        generate, sampled = ppo_trainer.batch_generation, []

        def timed_generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
            start = time.perf_counter()
            ids, logits = generate(model, queries, *rest)
            responses = ids[:, queries.shape[1] :]
            length = (responses != tokenizer.pad_token_id).sum(1).float().mean().item()
            sampled.append((time.perf_counter() - start, length))
            return ids, logits

        ppo_trainer.batch_generation = timed_generation
        trainer.train()
    # Of the logits it logs a mean that counts zeros where there are several minibatches; this one is of the samples.
    summed = [found["objective/entropy"] for found in trainer.state.log_history if "objective/entropy" in found]
    entropies = [nats / options.response_tokens for nats in summed]
    return {
        **_figures(options, clock.seconds, [length for _, length in sampled[1:]], entropies[1:]),
        "sample_seconds": sum(seconds for seconds, _ in sampled[1:]),
        "optimizer_steps": len(steps) / (1 + options.iterations),
    }


def _trl_classifier(path: str, dtype: torch.dtype, lora: dict[str, Any] | None = None) -> Any:
    """A reward model or, with adapters, a value model; its head and its adapters are float32."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, num_labels=1)
    model.score.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    if lora:
        # Not get_peft_model: TRL takes the backbone of a value model by its attribute's name.
        inject_adapter_in_model(LoraConfig(**lora, task_type="SEQ_CLS"), model)
        model.score.requires_grad_(True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _count_steps(prepared: Any) -> list[int]:
    """Grows with every step of the optimizer that accelerate has wrapped, which leaves some out."""
    steps: list[int] = []
    prepared.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return steps


def _figures(
    options: argparse.Namespace, seconds: float, lengths: Sequence[float], entropies: Sequence[float]
) -> dict[str, float]:
    assert len(lengths) == len(entropies) == options.iterations
    return {
        "rollouts_per_second": options.rollouts * options.iterations / seconds,
        "seconds": seconds,
        "peak_memory_gb": peak_memory_gb(),
        "tokens_per_rollout": sum(lengths) / len(lengths),
        "entropy": sum(entropies) / len(entropies),
    }


def _read(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(Path(options.inputs).read_text(encoding="utf-8"))


def _arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="prompts_helpful.train")
    found.add_argument("--prompt-tokens", type=int, nargs=2, default=[50, 350], help="fewest and most of a prompt")
    found.add_argument("--response-tokens", type=int, default=48)
    found.add_argument("--iterations", type=int, default=3, help="timed iterations")
    found.add_argument("--rollouts", type=int, default=16, help="of an iteration")
    found.add_argument("--minibatch", type=int, default=8, help="rollouts of an optimizer step")
    found.add_argument("--rollouts-per-prompt", type=int, default=1)
    found.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    found.add_argument("--lora", type=int, default=0, help="rank; 0 is full fine-tuning")
    theirs = [name for name in NAMES if name.startswith("trl")]
    found.add_argument("--trl", nargs="*", choices=theirs, default=["trl", "trl-bf16", "trl-split"])
    ours = [name for name in NAMES if name.startswith("align")]
    found.add_argument("--align", nargs="*", choices=ours, default=ours, help="ways of running ours")
    found.add_argument("--trl-batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="per-device batches of TRL")
    found.add_argument("--trl-python", help=f"interpreter of an environment with TRL {TRL_VERSION}")
    found.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="our max_tokens_per_batch")
    found.add_argument("--rounds", type=int, default=1)
    found.add_argument("--side", choices=list(NAMES), help=argparse.SUPPRESS)
    found.add_argument("--size", type=int, help=argparse.SUPPRESS)
    found.add_argument("--inputs", help=argparse.SUPPRESS)
    options = found.parse_args()
    if options.side:
        return options
    minibatch = options.minibatch
    if options.rollouts % minibatch or minibatch % options.rollouts_per_prompt:
        found.error("--minibatch must divide --rollouts, and --rollouts-per-prompt must divide --minibatch")
    if any(options.rollouts % batch or max(batch, minibatch) % min(batch, minibatch) for batch in options.trl_batch):
        found.error("each --trl-batch must divide --rollouts, and divide --minibatch or be a multiple of it")
    return options


if __name__ == "__main__":
    main()
