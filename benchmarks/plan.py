"""`align plan` against measured peaks: SmolLM2-135M on this machine's CPU, small runs of stages that train or sample.

    python benchmarks/plan.py                                  # some minutes
    python benchmarks/plan.py --cases sft-lora reject --tokens 4096
    python benchmarks/plan.py --as-run                         # with the allocator's settings of the align command only

Every case is a stage's own run in a child process, so that its peak is its own (resident memory, `VmHWM`), on rows made
as long as the settings let them be: the plan is for such. Stages with reward models take the one that the case before
them has trained. Exit code 1 where a needed peak is more than 15 % away from its plan, or a child was killed.

Each case is measured twice. *Needed*: freed memory goes back to the system at once, so that the peak is what tensors
need; this is what is planned. *As run*: `align` keeps freed memory, for speed (alignment/hardware.py), and its process
grows by the gaps between tensors.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import ALLOCATOR, Side, machine_line, run_in_turn

sys.path.remove(str(Path(__file__).resolve().parent))  # where this file would hide the package of its name
MODEL = "smollm2-135m-instruct"
LENGTH, NEW_TOKENS, ROWS = 256, 32, 16
TOLERANCE = 0.15
Measured = dict[Side, float | None]
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
    "reject": ("reject", []),
    "eval": ("eval", []),
}
NEED_JUDGES = ("ppo", "reject", "eval")


def main() -> None:
    """Runs the children in turn, plans the same settings, prints all."""
    options = _arguments()
    if options.side:
        sys.stdout.write(json.dumps(run_side(options)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        cases = list(options.cases)
        if any(CASES[case][0] in NEED_JUDGES for case in cases):
            cases = ["rm-lora", *(case for case in cases if case != "rm-lora")]
        sides = [(case, options.tokens) for case in cases]
        needed = {} if options.as_run else measure(sides, folder, GIVE_BACK, [])
        as_run = {} if options.needed else measure(sides, folder, ALLOCATOR, ["--as-run"])
        planned = {side: plan(side[0], settings(*side, Path(folder))) for side in sides}
    dtype = _dtype()
    print(f"\nSmolLM2-135M, micro-batches of {options.tokens} tokens, rows of {LENGTH}, {str(dtype)[6:]}, seed 0,")
    print(f"{machine_line(dtype, rounds=1)[0]}\n")
    if print_table(planned, needed, as_run):
        raise SystemExit(1)


def measure(sides: Sequence[Side], folder: str, allocator: Mapping[str, str], extra: Sequence[str]) -> Measured:
    """The peak of every side in GB, None where the kernel killed it for want of memory."""
    arguments = ["--folder", folder, *extra]
    allocators = {name: allocator for name, _ in sides}
    found = run_in_turn(__file__, sides, arguments, rounds=1, figure="peak_memory_gb", allocators=allocators)
    return {side: None if row is None else row["peak_memory_gb"] for side, row in found.items()}


def print_table(planned: Mapping[Side, Mapping[str, Any]], needed: Measured, as_run: Measured) -> bool:
    """Plans and peaks; returns whether a child was killed or a needed peak is too far from its plan."""
    print(f"{'':10} {'planned GB':>11} {'in':>20} {'needed GB':>10} {'planned / needed':>17} {'as run GB':>10}")
    is_off = False
    for side, found in planned.items():
        cells = [f"{side[0]:10} {found['peak_gb']:11.2f} {found['peak_phase']:>20}"]
        for peaks, ratio_too in ((needed, True), (as_run, False)):
            peak = peaks.get(side)
            is_off |= side in peaks and peak is None
            shown = "killed" if side in peaks and peak is None else "-" if peak is None else f"{peak:.2f}"
            cells.append(f"{shown:>10}")
            if ratio_too:
                ratio = None if peak is None else found["peak_gb"] / peak
                is_off |= ratio is not None and abs(ratio - 1) > TOLERANCE
                cells.append(f"{'-' if ratio is None else f'{ratio:.2f}':>17}")
        print(" ".join(cells))
    if is_off:
        print(f"\na child was killed, or a plan is more than {TOLERANCE:.0%} from what was needed", file=sys.stderr)
    return is_off


def settings(case: str, tokens: int, folder: Path) -> list[str]:
    """The case's settings as on the command line; prompts and responses fill the rows."""
    stage, extra = CASES[case]
    rows = 2 * max(1, tokens // LENGTH)  # two micro-batches a step
    model = f"{{path: {MODEL}, chat_template: chatml}}"
    found = [f"policies.base={model}" if stage == "eval" else f"model={model}"]
    # Anew: a case is run once for what is needed and once as it is run.
    found += [f"run={{dir: {folder / case}, device: cpu, overwrite: true}}", *extra]
    judge = folder / "rm-lora"
    judged = [
        f"rewards={{helpfulness: {judge}, safety: {judge}, max_tokens_per_batch: {tokens}}}",
        f"prompts={{prompts: {folder}/prompts.jsonl, max_prompt_length: {LENGTH - NEW_TOKENS}}}",
    ]
    if stage in ("reject", "eval"):  # 64 rows at once: keys and values are a good part of the peak
        candidates = ", num_candidates: 4" if stage == "reject" else ""
        return [*found, *judged, f"sampling={{max_new_tokens: {NEW_TOKENS}, max_rows: 64{candidates}}}"]
    if stage == "ppo":
        return [
            *found,
            *judged,
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
    from alignment.manifests import read_result

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
    from alignment.cli.plan_stages import plan_stage
    from alignment.cli.planner import Planner
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
    from alignment.model_folders import load_chat_of

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

    half, short = LENGTH // 2, overhead + 2  # a short prompt leaves most to both responses of a pair
    sft = [{"messages": [*user(half), assistant(half - 1)]} for _ in range(ROWS)]
    long = LENGTH - short - 1
    pairs = [{"prompt": user(short), "chosen": [assistant(long)], "rejected": [assistant(long)]} for _ in range(ROWS)]
    prompts = [{"prompt": user(LENGTH - NEW_TOKENS)} for _ in range(4 * ROWS)]
    for name, rows in (("sft", sft), ("rm", pairs), ("prompts", prompts)):
        write_rows(folder / f"{name}.jsonl", rows)


def _dtype() -> torch.dtype:
    from alignment.hardware import compute_dtype

    return compute_dtype(torch.device("cpu"))


def _arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    found.add_argument("--tokens", type=int, default=1024, help="max_tokens_per_batch")
    ways = found.add_mutually_exclusive_group()
    ways.add_argument("--as-run", action="store_true", help="measure only with freed memory kept, as align keeps it")
    ways.add_argument("--needed", action="store_true", help="measure only with freed memory given back at once")
    found.add_argument("--side", choices=list(CASES), help=argparse.SUPPRESS)
    found.add_argument("--size", type=int, help=argparse.SUPPRESS)
    found.add_argument("--folder", help=argparse.SUPPRESS)
    return found.parse_args()


if __name__ == "__main__":
    main()
