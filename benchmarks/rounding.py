"""What merged weights in bfloat16 keep of what a training with LoRA changed.

    python benchmarks/rounding.py runs/smollm2-full/rs-2 runs/smollm2-full/ppo

Each run is given behind the model that it was trained from. The first began from rounded weights W and ends with the
merged float32 ones W + D. Shown is <round(W + D) - W, D> / <D, D> over all layers that have an adapter: 1 where
nothing is lost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from alignment.model_folders import model_folder
from alignment.models import saved_adapter
from alignment.weight_files import read_weight, weight_files


def main() -> None:
    """Prints a line for each pair of models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="START RUN [START RUN ...]")
    models = parser.parse_args().models
    if len(models) % 2:
        parser.error("every run needs the model that it was trained from before it")
    for start, run in zip(models[::2], models[1::2], strict=True):
        print(f"{run} from {start}: {share_kept(start, run):.3f}")


def share_kept(start: str, run: str) -> float:
    """See above. Raises SystemExit where a run was not trained with LoRA."""
    adapter = saved_adapter(model_folder(run))
    if adapter is None:
        raise SystemExit(f"{run}: has no adapter. Name a run with lora.r above 0.")
    first, last = (weight_files(Path(model_folder(each))) for each in (start, run))
    kept = whole = 0.0
    for layer in adapter.layers:
        name = f"model.{layer}.weight"
        before = read_weight(first[name], name).bfloat16().float()
        merged = read_weight(last[name], name)
        change, left = merged - before, merged.to(torch.bfloat16).float() - before
        kept, whole = kept + float((left * change).sum()), whole + float(change.square().sum())
    return kept / whole


if __name__ == "__main__":
    main()
