"""`align plan` against measured peaks: SmolLM2-135M on this machine's CPU, small steps of every kind of training.

    python benchmarks/plan.py                                  # about three minutes on two idle cores
    python benchmarks/plan.py --cases sft-lora --tokens 4096
    python benchmarks/plan.py --as-run                         # with the allocator's settings of the align command

Every case is a stage's own run in a child process, so that its peak is its own (resident memory, `VmHWM`), on rows made
as long as the settings let them be: the plan is for such. PPO takes the reward model that the case before it has
trained. Exit code 1 where a peak is more than 15 % away from its plan.

The children give freed memory back at once, so that their peak is what is needed. `align` itself keeps it, for speed
(alignment/hardware.py), and its process grows by the gaps between tensors; `--as-run` shows by how much.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import ALLOCATOR, machine_line, run_in_turn

sys.path.remove(str(Path(__file__).resolve().parent))  # where this file would hide the package of its name
MODEL = "smollm2-135m-instruct"
LENGTH, NEW_TOKENS, ROWS = 256, 32, 16
TOLERANCE = 0.15
# glibc maps every tensor of 64 KB or more by itself and unmaps it when it is freed.
GIVE_BACK = {
    **{"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"},
    **{"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"},
}
CASES = {
    "sft-lora": ("sft", ["lora.r=16"]),
    "sft-full": ("sft", []),
    "rm-full": ("rm", []),
    "rm-lora": ("rm", ["lora.r=16"]),
    "ppo-lora": ("ppo", ["lora.r=16"]),
    "ppo-full": ("ppo", []),
}


def main() -> None:
    """Runs the children in turn, plans the same settings, prints both."""
    options = _arguments()
    if options.side:
        sys.stdout.write(json.dumps(run_side(options)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        cases = list(options.cases)
        if any(case.startswith("ppo") for case in cases) and "rm-lora" not in cases:
            cases.insert(0, "rm-lora")
        sides = [(case, options.tokens) for case in cases]
        arguments = ["--folder", folder, *(["--as-run"] if options.as_run else [])]
        allocator = ALLOCATOR if options.as_run else GIVE_BACK
        found = run_in_turn(__file__, sides, arguments, rounds=1, figure="peak_memory_gb", allocator=allocator)
        planned = {side: plan(side[0], settings(*side, Path(folder))) for side in sides}
    dtype = _dtype()
    print(f"\nSmolLM2-135M, micro-batches of {options.tokens} tokens, rows of {LENGTH}, {str(dtype)[6:]}, seed 0,")
    print(f"{machine_line(dtype, rounds=1)[0]}\n")
    print(f"{'':12} {'planned GB':>11} {'in':>20} {'measured GB':>12} {'planned / measured':>19}")
    worst = 0.0
    for side, row in found.items():
        peak, phase = planned[side]["peak_gb"], planned[side]["peak_phase"]
        ratio = peak / row["peak_memory_gb"]
        worst = max(worst, abs(ratio - 1))
        print(f"{side[0]:12} {peak:11.2f} {phase:>20} {row['peak_memory_gb']:12.2f} {ratio:19.2f}")
    if worst > TOLERANCE and not options.as_run:
        raise SystemExit(f"a plan is {worst:.0%} from its peak, more than {TOLERANCE:.0%}")


def settings(case: str, tokens: int, folder: Path) -> list[str]:
    """The case's settings as on the command line; prompts and responses fill the rows."""
    stage, extra = CASES[case]
    rows = 2 * max(1, tokens // LENGTH)  # two micro-batches a step
    found = [f"model={{path: {MODEL}, chat_template: chatml}}", f"run.dir={folder / case}", "run.device=cpu", *extra]
    if stage == "ppo":
        judge = folder / "rm-lora"
        return [
            *found,
            f"rewards={{helpfulness: {judge}, safety: {judge}, max_tokens_per_batch: {tokens}}}",
            f"prompts={{prompts: {folder}/prompts.jsonl, max_prompt_length: {LENGTH - NEW_TOKENS}}}",
            f"sampling={{max_new_tokens: {NEW_TOKENS}, max_rows: 16}}",
            f"train={{max_steps: 2, batch_size: {rows}, minibatch_size: {rows}, max_tokens_per_batch: {tokens}}}",
        ]
    return [
        *found,
        *(["kind=helpfulness"] if stage == "rm" else []),
        f"data={{train: {folder}/{stage}.jsonl, max_length: {LENGTH}}}",
        f"train={{max_steps: 2, batch_size: {rows}, max_tokens_per_batch: {tokens}}}",
    ]


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """One measurement: the stage as its command runs it or, to give memory back, without the command's allocator."""
    from alignment.cli.main import run_stage
    from alignment.cli.stages import STAGES
    from alignment.config import load_config
    from alignment.runs import read_result

    folder, stage = Path(options.folder), STAGES[CASES[options.side][0]]
    arguments = settings(options.side, options.size, folder)
    if options.as_run:
        run_stage(stage.name, arguments)
    else:
        stage.run_function()(load_config(stage.config_class(), overrides=arguments))
    result = read_result(folder / options.side)
    return {"peak_memory_gb": result["peak_memory_gb"], "seconds": result["time_seconds"]}


def plan(case: str, arguments: list[str]) -> dict[str, Any]:
    """The plan of the same settings for this machine."""
    from alignment.cli.plan import load_stages
    from alignment.cli.plan_stages import Planner, plan_stage
    from alignment.plan.devices import find_device
    from alignment.plan.training import Setting

    configs, origins = load_stages(None, CASES[case][0], arguments)
    [(name, config)] = configs.items()
    return plan_stage(config, name, Planner(Setting(find_device("cpu")), origins)).to_json()


def make_data(folder: Path) -> None:
    """Rows as long as `LENGTH` lets them be, of random words."""
    from alignment.chat import encode_prompt
    from alignment.data import write_rows
    from alignment.dialogue import Message
    from alignment.models import load_chat_of

    chat, _ = load_chat_of(MODEL, "chatml")
    rng = random.Random(0)
    words = ["river", "stone", "letter", "window", "garden", "music", "number", "winter", "paper", "engine"]
    overhead = len(encode_prompt(chat, (Message("user", "river"),))) - 1

    def text(tokens: int) -> str:
        return " ".join(rng.choice(words) for _ in range(tokens))

    def user(tokens: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": text(tokens - overhead)}]

    def assistant(tokens: int) -> dict[str, str]:
        return {"role": "assistant", "content": text(tokens - 2)}

    half = LENGTH // 2
    sft = [{"messages": [*user(half), assistant(half - 1)]} for _ in range(ROWS)]
    pairs = [
        {"prompt": user(half), "chosen": [assistant(half - 1)], "rejected": [assistant(half - 1)]} for _ in range(ROWS)
    ]
    prompts = [{"prompt": user(LENGTH - NEW_TOKENS)} for _ in range(ROWS)]
    for name, rows in (("sft", sft), ("rm", pairs), ("prompts", prompts)):
        write_rows(folder / f"{name}.jsonl", rows)


def _dtype() -> torch.dtype:
    from alignment.hardware import compute_dtype

    return compute_dtype(torch.device("cpu"))


def _arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    found.add_argument("--tokens", type=int, default=1024, help="max_tokens_per_batch")
    found.add_argument("--as-run", action="store_true", help="keep freed memory, as the align command does")
    found.add_argument("--side", choices=list(CASES), help=argparse.SUPPRESS)
    found.add_argument("--size", type=int, help=argparse.SUPPRESS)
    found.add_argument("--folder", help=argparse.SUPPRESS)
    return found.parse_args()


if __name__ == "__main__":
    main()
