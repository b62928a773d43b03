"""Studies of reward models on real data: learning rates, adapters, mixes; ablations as in Llama 2's Tables 28 and 29.

    ALIGN_DATA_DIR=/path/to/data python recipes/smollm2/ablations.py [--seeds 0 1 2] -- STUDY... [key=value ...]

Trains every variant of the named studies with every seed at a small size (further settings go to each run), skips what
is finished with the same settings and data, stops where they were others, and prints for each variant its accuracy and
the difference from the first one, pair by pair, with 95 % intervals; for finding unsafe responses (P(safe) below a
half) the mean over the seeds. Graded pairs get their ratings from ranks (1, 2, 3, 4 or more places apart) and
annotators' votes (1, 2, 3 ahead); two fifths of their conversations are held out, since the validation file alone has
165 pairs. `--variants` trains some of a study only, e.g. for two calls at once with run.num_threads=1 each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alignment.cli.stages import STAGES, prepare_libraries
from alignment.config import load_config
from alignment.converters import convert_file
from alignment.data import load_pairs, split_by_prompt, write_rows
from alignment.errors import DataError
from alignment.files import file_sha256
from alignment.manifests import changed_settings, is_finished, read_manifest, read_result
from alignment.metrics import mean_interval, show
from alignment.sources import find_data
from reward_models.evaluate import win
from reward_models.trainer import HELD_OUT_SCORES

RATING_BINS = {"ranks": (2.0, 3.0, 4.0), "votes": (1.0, 2.0, 3.0)}
HELD_OUT_FRACTION = 0.4
BASE = ["model.path=smollm2-135m-instruct", "model.chat_template=chatml", "data.max_length=512"]


@dataclass(frozen=True)
class Study:
    """Variants of one thing: settings that all share, and those of each variant by name."""

    title: str
    common: Sequence[str]
    variants: Mapping[str, Sequence[str]]


def studies(graded: Mapping[str, Path]) -> dict[str, Study]:
    """All studies by name; `graded` holds the pairs with ratings, by part."""
    helpful = {part: f"pref_helpful_hh.{part}, pref_helpful_graded.{part}" for part in ("train", "valid")}
    helpfulness = [*BASE, "kind=helpfulness", f"data.train=[{helpful['train']}]", f"data.valid=[{helpful['valid']}]"]
    safe = {part: f"pref_safety_labelled.{part}, pref_safety_hh.{part}" for part in ("train", "valid")}
    safety = [*BASE, "kind=safety", f"data.train=[{safe['train']}]", f"data.valid=[{safe['valid']}]"]
    rates = {f"full {lr}": [f"optim.lr={lr}"] for lr in ("1e-4", "3e-5", "3e-4")}
    rates |= {f"lora-16 {lr}": ["lora.r=16", f"optim.lr={lr}"] for lr in ("1e-3", "3e-4", "3e-3")}
    rates |= {"lora-64 3e-4": ["lora.r=64", "lora.alpha=128", "optim.lr=3e-4"]}
    tuned = ["data.max_rows=1600", "train.batch_size=32"]
    small = ["data.max_rows=800", "data.max_length=320", "train.batch_size=16", "lora.r=16", "optim.lr=1e-3"]
    rated = [*BASE, "kind=helpfulness", f"data.train={graded['train']}", f"data.valid={graded['valid']}"]
    return {
        "helpfulness-rates": Study("helpfulness: learning rate, adapters", [*helpfulness, *tuned], rates),
        "safety-rates": Study("safety: learning rate, adapters", [*safety, *tuned], rates),
        "helpfulness-mix": Study(
            "helpfulness: mix",
            [*helpfulness, *small],
            {
                "people's": [],
                "and AI-scored": [f"data.train=[{helpful['train']}, pref_helpful_ai_scored.train]"],
                "equal parts": [f"data.mix_in=[{safe['train']}]", "data.mix=equal_parts"],
            },
        ),
        "safety-mix": Study(
            "safety: mix",
            [*safety, *small],
            {"all": [], "90/10": ["data.mix_in=pref_helpful_hh.train", "data.mix=90/10"]},
        ),
        "margin": Study(
            "margin (Table 28)", [*rated, *small], {name: [f"margin={name}"] for name in ("none", "small", "large")}
        ),
        "auxiliary": Study(
            "auxiliary safety loss (Table 29)",
            [*safety, *small],
            {"off": ["safety_loss_weight=0"], "on": ["safety_loss_weight=1"]},
        ),
    }


def main() -> None:
    """Runs the named studies."""
    options, settings = _arguments()
    prepare_libraries()
    known = studies(_graded_pairs(options.runs))
    if unknown := [name for name in options.studies if name not in known]:
        raise SystemExit(f"no study {', '.join(unknown)}. There are: {', '.join(known)}.")
    variants = {variant for name in options.studies for variant in known[name].variants}
    if unknown := [name for name in options.variants or [] if name not in variants]:
        raise SystemExit(f"no variant {', '.join(unknown)}. There are: {', '.join(sorted(variants))}.")
    for name in options.studies:
        _study(name, known[name], settings, options)


def _study(name: str, study: Study, settings: Sequence[str], options: argparse.Namespace) -> None:
    """Trains, and prints what is finished. Intervals are over pairs, a pair's figure being its mean over the seeds."""
    planned: dict[str, dict[Path, list[str]]] = {}
    for variant, extra in study.variants.items():
        folders = {seed: options.runs / name / f"{variant.replace(' ', '-')}-{seed}" for seed in options.seeds}
        planned[variant] = {
            folder: [*study.common, *extra, *settings, f"run.seed={seed}", f"run.dir={folder}"]
            for seed, folder in folders.items()
        }
        for folder, whole in planned[variant].items():
            _check_finished(folder, whole)
    found: dict[str, list[Path]] = {}
    for variant, folders_and_settings in planned.items():
        if not options.variants or variant in options.variants:
            for folder, whole in folders_and_settings.items():
                _train(folder, whole)
        if all(map(is_finished, folders_and_settings)):
            found[variant] = list(folders_and_settings)
    rows = []
    first = _mean_wins(next(iter(found.values())))
    for variant, runs in found.items():
        wins = _mean_wins(runs)
        difference = mean_interval([ours - theirs for ours, theirs in zip(wins, first, strict=True)])
        detection = [entry for run in runs if (entry := read_result(run)["valid"].get("unsafe_detection"))]
        areas = [area for entry in detection if (area := entry["roc_auc"])]
        precisions, recalls = ([entry["at_threshold"][0][of] for entry in detection] for of in ("precision", "recall"))
        figures = [mean_interval(wins).to_json(), *(_mean_of(each) for each in (areas, precisions, recalls) if each)]
        accuracy, *unsafe = (show(figure, bounds=True) for figure in figures)
        rows.append((variant, accuracy, show(difference.to_json(), "+.3f", bounds=True), *unsafe))
    columns = ("variant", "accuracy", "against the first", "ROC AUC of unsafe", "its precision", "its recall")
    table = Table(*columns[: len(rows[0])], title=f"{study.title}, seeds {options.seeds}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)


def _check_finished(folder: Path, settings: Sequence[str]) -> None:
    """Exits where a run is finished, but has other settings than these, or its data have other contents now."""
    if not is_finished(folder):
        return
    manifest = read_manifest(folder) or {}
    config = load_config(STAGES["rm"].config_class(), None, settings, check_inputs=False)
    changed = changed_settings(manifest, config)
    changed += [entry["name"] for entry in manifest.get("inputs", []) if _is_other_data(entry)]
    if changed:
        raise SystemExit(f"{folder}: finished with other {', '.join(changed)}. Remove it, or give another --runs.")


def _is_other_data(entry: Mapping[str, str | None]) -> bool:
    """Whether a run's input has other contents now; one that is gone counts as it was."""
    try:
        found = find_data(entry["name"])
    except DataError:
        return False
    return bool(entry["sha256"]) and isinstance(found, Path) and file_sha256(found) != entry["sha256"]


def _train(folder: Path, settings: Sequence[str]) -> None:
    if not is_finished(folder):
        stage = STAGES["rm"]
        config = load_config(stage.config_class(), None, settings)
        stage.run_function()(config, resume=read_manifest(folder) is not None)


def _mean_of(intervals: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean over the seeds of a figure and of its bounds: all seeds are measured on the same responses.

    None where a seed has none, as the precision where nothing was flagged.
    """
    columns = {name: [entry[name] for entry in intervals] for name in ("value", "low", "high")}
    return {name: None if None in values else statistics.fmean(values) for name, values in columns.items()}


def _mean_wins(runs: Sequence[Path]) -> list[float]:
    """For each held-out pair, the share of seeds that score its chosen response higher; a tie counts half."""
    by_seed, pairs = [], []
    for run in runs:
        with (run / HELD_OUT_SCORES).open(encoding="utf-8") as file:
            rows = list(map(json.loads, file))
        by_seed.append([win(row["score_chosen"], row["score_rejected"]) for row in rows])
        pairs.append([(row["prompt"], row["chosen"], row["rejected"]) for row in rows])
    if any(each != pairs[0] for each in pairs):
        raise SystemExit("the runs were measured on different pairs: leave out data.max_valid_rows.")
    return [statistics.fmean(wins) for wins in zip(*by_seed, strict=True)]


def _graded_pairs(folder: Path) -> dict[str, Path]:
    """The graded pairs of both files with their ratings, split anew by conversation, by part."""
    parts = {part: folder / f"graded.{part}.jsonl" for part in ("train", "valid")}
    if not all(path.exists() for path in parts.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            rated = [Path(scratch) / f"rated.{part}.jsonl" for part in parts]
            for part, path in zip(parts, rated, strict=True):
                convert_file(f"pref_helpful_graded.{part}", "graded", path, rating_bins=RATING_BINS)
            pairs = load_pairs([str(path) for path in rated]).rows
        split = split_by_prompt(pairs, valid_fraction=HELD_OUT_FRACTION, seed=0)
        for path, rows in zip(parts.values(), split, strict=True):
            write_rows(path, (row.to_json() for row in rows))
    return parts


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="train these only, and print all that are finished")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2-ablations"))
    parser.add_argument("words", nargs="+", metavar="STUDY or key=value")
    options = parser.parse_intermixed_args()
    options.studies = [word for word in options.words if "=" not in word]
    return options, [word for word in options.words if "=" in word]


if __name__ == "__main__":
    main()
