"""Llama 2's ablations of the reward models on real data: margins (Table 28) and the auxiliary safety loss (Table 29).

    ALIGN_DATA_DIR=/path/to/data python recipes/smollm2/ablations.py [--seeds 0 1 2] [--runs DIR] [key=value ...]

Trains every variant with every seed at a small size (further settings go to each run), skips what is finished, and
prints for each variant its accuracy and the difference from the first one, pair by pair, with 95 % intervals.
Graded pairs get their ratings from ranks (1, 2, 3, 4 or more places apart) and annotators' votes (1, 2, 3 ahead).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alignment.cli.stages import STAGES, prepare_libraries
from alignment.config import load_config
from alignment.converters import convert_file
from alignment.metrics import mean_interval, show
from alignment.runs import is_finished, read_manifest, read_result
from reward_models.evaluate import win
from reward_models.trainer import HELD_OUT_SCORES

RATING_BINS = {"ranks": (2.0, 3.0, 4.0), "votes": (1.0, 2.0, 3.0)}
COMMON = [
    "model.path=smollm2-135m-instruct", "model.chat_template=chatml", "data.max_length=512", "train.batch_size=16",
    "data.max_rows=800",
]  # fmt: skip
MARGINS = {name: [f"margin={name}"] for name in ("none", "small", "large")}
AUXILIARY = {"off": ["safety_loss_weight=0"], "on": ["safety_loss_weight=1"]}


def main() -> None:
    """Runs both ablations."""
    options, settings = _arguments()
    prepare_libraries()
    graded = {part: _rated(options.runs, part) for part in ("train", "valid")}
    helpfulness = ["kind=helpfulness", f"data.train={graded['train']}", f"data.valid={graded['valid']}"]
    _study("margin", MARGINS, [*COMMON, *helpfulness, "optim.lr=3e-5", *settings], options)
    safety = ["kind=safety", "data.train=[pref_safety_labelled.train, pref_safety_hh.train]"]
    safety += ["data.valid=[pref_safety_labelled.valid, pref_safety_hh.valid]"]
    _study("auxiliary safety loss", AUXILIARY, [*COMMON, *safety, "optim.lr=3e-5", *settings], options)


def _study(title: str, variants: dict[str, list[str]], settings: Sequence[str], options: argparse.Namespace) -> None:
    """Trains and prints. Intervals are over pairs, each pair's figure being its mean over the seeds."""
    folders = {
        name: [
            _train(options.runs / f"{title.split()[0]}-{name}-{seed}", [*settings, *extra, f"run.seed={seed}"])
            for seed in options.seeds
        ]
        for name, extra in variants.items()
    }
    table = Table(title, "accuracy", "against the first", "recall of unsafe", title=f"{len(options.seeds)} seeds")
    first = _mean_wins(next(iter(folders.values())))
    for name, runs in folders.items():
        wins = _mean_wins(runs)
        difference = mean_interval([ours - theirs for ours, theirs in zip(wins, first, strict=True)])
        detection = [read_result(run)["valid"].get("unsafe_detection") for run in runs]
        recalls = [found["at_threshold"][0]["recall"]["value"] for found in detection if found]
        table.add_row(
            name,
            show(mean_interval(wins).to_json(), ".3f", bounds=True),
            show(difference.to_json(), "+.3f", bounds=True),
            ", ".join(f"{recall:.3f}" for recall in recalls) or "-",
        )
    Console(highlight=False).print(table)


def _train(folder: Path, settings: Sequence[str]) -> Path:
    if not is_finished(folder):
        stage = STAGES["rm"]
        config = load_config(stage.config_class(), None, [*settings, f"run.dir={folder}"])
        stage.run_function()(config, resume=read_manifest(folder) is not None)
    return folder


def _mean_wins(runs: Sequence[Path]) -> list[float]:
    """For each held-out pair, the share of seeds that score its chosen response higher; a tie counts half."""
    by_seed = []
    for run in runs:
        rows = map(json.loads, (run / HELD_OUT_SCORES).read_text(encoding="utf-8").splitlines())
        by_seed.append([win(row["score_chosen"], row["score_rejected"]) for row in rows])
    return [statistics.fmean(wins) for wins in zip(*by_seed, strict=True)]


def _rated(runs: Path, part: str) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    out = runs / f"graded.{part}.jsonl"
    if not out.exists():
        convert_file(f"pref_helpful_graded.{part}", "graded", out, rating_bins=RATING_BINS)
    return out


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2-ablations"))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    return options, options.settings


if __name__ == "__main__":
    main()
