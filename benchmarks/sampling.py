"""Sampling K responses a prompt: transformers' generate, vLLM and our engine on the same prompts and weights.

    ALIGN_DATA_DIR=/path/to/data python benchmarks/sampling.py
    ALIGN_DATA_DIR=/path/to/data python benchmarks/sampling.py --vllm-python /path/to/vllm/bin/python

Each measurement is a child process of its own, the sides in turn. Every process first answers as many other prompts,
which is not timed: a run goes on for longer than it takes to touch memory for the first time. Prompts
are real ones of 50 to 350 tokens, sampled at temperature 1 from the whole distribution until the end of the turn or the
limit. `generate` gets prompts sorted by length, so that its batches hold little padding. The mean number of
tokens and the mean log-probability must agree, for all sample from the same distribution. Between our row counts the
samples that rounding in bfloat16 changed are counted. vLLM runs in the environment of the interpreter named, eager,
without what compiling might gain, and with prefix caching; its memory holds a cache of 2 GiB. It runs in one process,
whose memory is measured, in two ways: as it is, and with Intel's OpenMP preloaded (`vllm-omp`), as vLLM does for
workers of its own. Such workers (`vllm-workers`) are bound to cores too; their memory is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Side, machine_line, peak_memory_gb, run_in_turn

sys.path.remove(str(Path(__file__).resolve().parent))
MODEL = "smollm2-135m-instruct"
NAMES = {
    "generate": "transformers, generate, {} rows",
    "vllm": "vLLM (eager), {} rows",
    "vllm-omp": "vLLM, Intel OpenMP, {} rows",
    "vllm-workers": "vLLM, own workers, {} rows",
    "align": "ours, {} rows",
}


def main() -> None:
    """Runs the children in turn and prints the table."""
    options = _arguments()
    if options.side:
        sides = {"align": _sample_with_align, "generate": _sample_with_generate}
        sys.stdout.write("\n" + json.dumps(sides.get(options.side, _sample_with_vllm)(options)) + "\n")
        return
    sides: list[Side] = [("generate", rows) for rows in options.generate_rows]
    sides += [(way, rows) for way in options.vllm for rows in options.vllm_rows if options.vllm_python]
    sides += [("align", rows) for rows in options.rows]
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.json"
        inputs.write_text(json.dumps(_inputs(options)), encoding="utf-8")
        arguments = [f"--k={options.k}", f"--max-new-tokens={options.max_new_tokens}", f"--inputs={inputs}"]
        pythons = dict.fromkeys(options.vllm, options.vllm_python) if options.vllm_python else {}
        found = run_in_turn(
            __file__, sides, arguments, rounds=options.rounds, figure="samples_per_second", pythons=pythons
        )
        drawn = {size: json.loads(path.read_text()) for size in options.rows if (path := _drawn(inputs, size)).exists()}
    machine, peak = machine_line(torch.bfloat16, rounds=options.rounds)
    print(f"\nSampling, SmolLM2-135M, bfloat16, {options.prompts} prompts of {options.data}, K={options.k}, at most")
    print(f"{options.max_new_tokens} new tokens, seed 0, {machine}\n")
    print(f"{'':34} {'samples/s':>9} {'tokens/s':>9} {'peak GB':>8} {'tokens':>7} {'logprob':>8} {'matrix share':>13}")
    for side, row in found.items():
        name = NAMES[side[0]].format(side[1])
        if row is None:
            print(f"{name:34} does not fit into memory")
            continue
        share = f"{row['operations'] / row['seconds'] / (peak * 1e9):.0%}" if side[0] == "align" else ""
        print(
            f"{name:34} {row['samples_per_second']:9.2f} {row['tokens_per_second']:9.0f} {row['peak_memory_gb']:8.2f} "
            f"{row['mean_tokens']:7.1f} {row['mean_logprob']:8.3f} {share:>13}"
        )
    _print_ratios({side: row for side, row in found.items() if row is not None})
    _print_rounding(drawn)


def _print_rounding(drawn: dict[int, list[list[int]]]) -> None:
    """Each sample has its own random numbers: with another number of rows only rounding can change its tokens."""
    base, *others = drawn
    for size in others:
        pairs = list(zip(drawn[base], drawn[size], strict=True))
        count = sum(one != two for one, two in pairs)
        share = f"{count} of {len(pairs)} samples ({count / len(pairs):.0%})"
        print(f"{share} with {size} rows are not those with {base} rows")


def _drawn(inputs: Path, size: int) -> Path:
    return inputs.with_name(f"drawn-{size}.json")


def _print_ratios(found: dict[Side, dict[str, float]]) -> None:
    ours = max((row for side, row in found.items() if side[0] == "align"), key=lambda row: row["samples_per_second"])
    print(f"\nrunning prompts takes {ours['prefill_seconds'] / ours['seconds']:.0%} of our time")
    for name, shown in (("generate", "generate"), ("vllm", "vLLM (eager)")):
        theirs = [row["samples_per_second"] for side, row in found.items() if side[0].startswith(name)]
        if theirs:
            print(
                f"against the fastest of {shown}: {ours['samples_per_second'] / max(theirs):.2f}x the samples a second"
            )


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    """What all sides get: the model's folder, where a turn ends, what pads, and the prompts' token ids."""
    from alignment.chat import encode_prompt
    from alignment.data import load_prompts, pick
    from alignment.model_folders import load_chat, model_folder

    folder = model_folder(MODEL)
    chat = load_chat(folder, "chatml")
    rows = load_prompts([options.data]).rows
    encoded = [encode_prompt(chat, prompt.messages) for prompt in pick(rows, 8 * options.prompts, 0)]
    fitting = [ids for ids in encoded if 50 <= len(ids) <= 350]
    assert len(fitting) >= 2 * options.prompts, "too few prompts of 50 to 350 tokens"
    return {
        "model": str(folder),
        "stop": chat.end_of_turn_id,
        "pad": chat.tokenizer.pad_token_id,
        "prompts": fitting[: options.prompts],
        "others": fitting[options.prompts : 2 * options.prompts],
    }


def _sample_with_align(options: argparse.Namespace) -> dict[str, float]:
    from alignment.models import load_chat_model
    from alignment.sampling import SamplingParams
    from alignment.sampling.torch_engine import TorchSampler

    inputs = _read(options)
    model = load_chat_model(inputs["model"], dtype=torch.bfloat16, chat_template="chatml").model
    sampler = TorchSampler(model, stop_ids=[inputs["stop"]], max_rows=options.size)
    params = SamplingParams(num_candidates=options.k, max_new_tokens=options.max_new_tokens)
    sampler.sample(inputs["others"], params)
    run_prompts, prefill = sampler._start, []

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        started = run_prompts(*arguments)
        prefill.append(time.perf_counter() - start)
        return started

    sampler._start = timed
    start = time.perf_counter()
    found = [sample for of_prompt in sampler.sample(inputs["prompts"], params) for sample in of_prompt]
    seconds = time.perf_counter() - start
    _drawn(Path(options.inputs), options.size).write_text(json.dumps([sample.token_ids for sample in found]))
    backbone = sum(p.numel() for p in model.get_decoder().layers.parameters())
    tokens = sum(len(sample.token_ids) for sample in found)
    computed = backbone * (sum(map(len, inputs["prompts"])) + tokens) + model.lm_head.weight.numel() * tokens
    lengths = [len(sample.token_ids) for sample in found]
    logprob = sum(sum(sample.logprobs) for sample in found)
    return {
        **_figures(lengths, logprob, seconds, peak_memory_gb()),
        "prefill_seconds": sum(prefill),
        "operations": 2 * computed,
    }


def _sample_with_generate(options: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    inputs = _read(options)
    pad = inputs["pad"]
    model = AutoModelForCausalLM.from_pretrained(inputs["model"], dtype=torch.bfloat16).eval()

    @torch.no_grad()
    def lengths_of_samples(prompts: list[list[int]]) -> list[int]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        output = model.generate(
            ids,
            attention_mask=(ids != pad).long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=options.max_new_tokens,
            num_return_sequences=options.k,
            eos_token_id=inputs["stop"],
            pad_token_id=pad,
        )
        return (output[:, longest:] != pad).sum(1).tolist()

    def sample(prompts: list[list[int]]) -> list[int]:
        ordered = sorted(prompts, key=len, reverse=True)
        size = max(1, options.size // options.k)
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        return [length for batch in batches for length in lengths_of_samples(batch)]

    torch.manual_seed(0)
    sample(inputs["others"])
    start = time.perf_counter()
    lengths = sample(inputs["prompts"])
    return _figures(lengths, None, time.perf_counter() - start, peak_memory_gb())


def _sample_with_vllm(options: argparse.Namespace) -> dict[str, float]:
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if options.side == "vllm-omp" and str(openmp) not in os.environ.get(
        "LD_PRELOAD", ""
    ):  # read where a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(openmp)})
    if options.side == "vllm-workers":
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # it would keep one of the cores for its scheduler
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # this script cannot be imported again
    else:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, whose memory is measured
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    inputs = _read(options)
    limit = max(map(len, [*inputs["prompts"], *inputs["others"]])) + options.max_new_tokens
    engine = LLM(
        inputs["model"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=limit,
        max_num_seqs=options.size,
        seed=0,
    )

    def sample(prompts: list[list[int]]) -> list[Any]:
        params = SamplingParams(
            n=options.k,
            temperature=1.0,
            max_tokens=options.max_new_tokens,
            stop_token_ids=[inputs["stop"]],
            logprobs=0,
            detokenize=False,
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [one for result in engine.generate(requests, params, use_tqdm=False) for one in result.outputs]

    sample(inputs["others"])
    start = time.perf_counter()
    found = sample(inputs["prompts"])
    seconds = time.perf_counter() - start
    logprob = sum(one.cumulative_logprob for one in found)
    memory = float("nan") if options.side == "vllm-workers" else peak_memory_gb()
    return _figures([len(one.token_ids) for one in found], logprob, seconds, memory)


def _figures(lengths: list[int], logprob: float | None, seconds: float, memory: float) -> dict[str, float]:
    tokens = sum(lengths)
    return {
        "samples_per_second": len(lengths) / seconds,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_gb": memory,
        "mean_tokens": tokens / len(lengths),
        "mean_logprob": float("nan") if logprob is None else logprob / tokens,
    }


def _read(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(Path(options.inputs).read_text(encoding="utf-8"))


def _arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="prompts_helpful.train")
    found.add_argument("--prompts", type=int, default=32)
    found.add_argument("--k", type=int, default=8, help="samples a prompt")
    found.add_argument("--max-new-tokens", type=int, default=128)
    found.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256], help="our max_rows")
    found.add_argument("--generate-rows", type=int, nargs="*", default=[32, 64, 128, 256], help="rows of a batch")
    found.add_argument("--vllm-rows", type=int, nargs="+", default=[64, 256], help="vLLM's max_num_seqs")
    found.add_argument("--vllm", nargs="+", choices=["vllm", "vllm-omp", "vllm-workers"], default=["vllm", "vllm-omp"])
    found.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    found.add_argument("--rounds", type=int, default=1)
    found.add_argument("--side", choices=list(NAMES), help=argparse.SUPPRESS)
    found.add_argument("--size", type=int, help=argparse.SUPPRESS)
    found.add_argument("--inputs", help=argparse.SUPPRESS)
    return found.parse_args()


if __name__ == "__main__":
    main()
