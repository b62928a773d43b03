"""`align score` and `align rm compare`: reward models on files of pairs or responses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from alignment.data import file_sha256, load_pairs, load_rows, read_lines, stream_rows, write_rows
from alignment.dialogue import Candidate, PreferencePair
from alignment.errors import DataError, RunError
from alignment.models import model_folder
from alignment.progress import ProgressBar
from alignment.runs import check_new_file, weights_sha256, write_json
from alignment.sources import find_data
from reward_models.calibration import sigmoid
from reward_models.evaluate import compare, evaluate_pairs, scored_row
from reward_models.score import Scorer
from reward_models.tables import comparison_table, report_tables

# Prompts scored between two writes: what an interrupted call loses at most.
PROMPTS_PER_WRITE = 256

Scores = tuple[list[float], list[float]]
Row = dict[str, Any]


def score_files(model: str, files: list[str], *, out: Path | None, as_json: bool, resume: bool) -> None:
    """Pairs: agreement with people. Responses: score and sigmoid(score), which is P(safe) for a safety model.

    With `out`, rows are written as they are scored; an interrupted call goes on with `resume` and ends with the same
    file. Raises DataError where files mix pairs and responses or hold a bad row, before anything is scored, and
    RunError where `out` exists or another call's rows are in its way.
    """
    kinds = {name: _has_pairs(name) for name in files}
    if len(set(kinds.values())) > 1:
        mixed = ", ".join(f"{name} ({'pairs' if pairs else 'responses'})" for name, pairs in kinds.items())
        raise DataError(f"pairs and responses in one call: {mixed}. Score them in two.")
    is_pairs = all(kinds.values())
    pairs = load_pairs(files).rows if is_pairs else []
    count = len(pairs) if is_pairs else len(load_rows(files, _checked).rows)
    partial = PartialFile.open(out, {"model": _model_hash(model), "data": _data_hashes(files)}, resume=resume)
    if is_pairs:
        scorer = Scorer.load(model, device=PartialState().device)
        rows = list(_resumed(partial, _scored_pairs(scorer, pairs[partial.num_prompts :], partial.num_prompts)))
        report = evaluate_pairs(pairs, [row["score_chosen"] for row in rows], [row["score_rejected"] for row in rows])
        console = Console(highlight=False)
        if as_json:
            console.print(json.dumps(report, indent=2), markup=False)
        else:
            console.print(report_tables(report, f"{model} on {len(pairs)} pairs"))
    else:
        scorer = Scorer.load(model, device=PartialState().device)
        prompts = groupby(stream_rows(files, _as_response), key=lambda candidate: candidate.prompt.messages)
        groups = (list(group) for _, group in prompts)
        mean = _print_responses(
            _resumed(partial, _scored_responses(scorer, islice(groups, partial.num_prompts, None), partial, count)),
            shown=out is None and not as_json,
        )
        if out is not None or as_json:
            sys.stdout.write(json.dumps({"responses": count, "mean_score": mean}, indent=2) + "\n")
    partial.finish()


def compare_models(first: str, second: str, files: Sequence[str], *, as_json: bool) -> None:
    """Paired accuracy of two reward models on the same pairs; by default, those the first one was validated on.

    Either may also be a file that `align score --out` wrote; its rows are then the pairs.
    """
    if not files:
        files = _validation_files(first)
    pairs = load_pairs(files).rows
    scores = [_scores_of(model, pairs) for model in (first, second)]
    report = compare(pairs, *scores)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        Console(highlight=False).print(comparison_table(report, first, second))


class PartialFile:
    """Rows scored so far, beside the file they will become: `F.jsonl.partial`, and what they were made from.

    Without `out` nothing is kept.
    """

    def __init__(self, out: Path | None, rows: list[Row], num_prompts: int) -> None:
        self.out, self.rows, self.num_prompts = out, rows, num_prompts

    @classmethod
    def open(cls, out: Path | None, made_from: Row, *, resume: bool) -> PartialFile:
        """Raises RunError where `out` exists, or unfinished rows are there that may not be gone on with."""
        if out is None:
            return cls(None, [], 0)
        check_new_file(out)
        data, about = _partial_paths(out)
        if not about.exists():
            write_json(about, made_from)
            data.write_text("", encoding="utf-8")
            return cls(out, [], 0)
        if not resume:
            raise RunError(f"{data}: an unfinished call's rows. Add --resume to go on, or remove it and {about}.")
        if json.loads(about.read_text(encoding="utf-8")) != made_from:
            raise RunError(f"{data}: was made with another model or other data. Remove it and {about}.")
        rows, num_prompts = _whole_blocks(data)
        return cls(out, rows, num_prompts)

    def append(self, rows: Iterable[Row], num_prompts: int) -> None:
        """Writes the rows of `num_prompts` more prompts."""
        self.num_prompts += num_prompts
        if self.out is None:
            return
        with _partial_paths(self.out)[0].open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.write(json.dumps({"prompts_done": self.num_prompts}) + "\n")

    def finish(self) -> None:
        """Turns the partial file into the final one."""
        if self.out is None:
            return
        data, about = _partial_paths(self.out)
        with data.open(encoding="utf-8") as lines:
            write_rows(self.out, (row for row in map(json.loads, lines) if "prompts_done" not in row))
        data.unlink()
        about.unlink()


def _resumed(partial: PartialFile, fresh: Iterator[tuple[list[Row], int]]) -> Iterator[Row]:
    """Earlier rows, then fresh ones, each block written before it is handed on."""
    yield from partial.rows
    for rows, num_prompts in fresh:
        partial.append(rows, num_prompts)
        yield from rows


def _scored_pairs(scorer: Scorer, pairs: Sequence[PreferencePair], done: int) -> Iterator[tuple[list[Row], int]]:
    with ProgressBar("score", done + len(pairs), start=done) as bar:
        for start in range(0, len(pairs), PROMPTS_PER_WRITE):
            block = pairs[start : start + PROMPTS_PER_WRITE]
            scores = _score_pairs(scorer, block, bar)
            yield [scored_row(pair, *both) for pair, both in zip(block, scores, strict=True)], len(block)


def _score_pairs(scorer: Scorer, pairs: Sequence[PreferencePair], bar: ProgressBar) -> list[list[float]]:
    """(chosen, rejected) of each pair."""
    texts = [[pair.chosen, pair.rejected] for pair in pairs]
    return scorer.score([pair.prompt for pair in pairs], texts, on_progress=bar.advance)


def _scored_responses(
    scorer: Scorer, groups: Iterator[list[Candidate]], partial: PartialFile, count: int
) -> Iterator[tuple[list[Row], int]]:
    """Neighbouring rows with the same prompt share its prefill."""
    done = len(partial.rows)
    with ProgressBar("score", count, start=done) as bar:
        while block := list(islice(groups, PROMPTS_PER_WRITE)):
            prompts = [group[0].prompt.messages for group in block]
            scores = scorer.score(prompts, [[candidate.response for candidate in group] for group in block])
            rows = [
                {**candidate.to_json(), "score": score, "probability": sigmoid(score)}
                for group, values in zip(block, scores, strict=True)
                for candidate, score in zip(group, values, strict=True)
            ]
            bar.advance(len(rows))
            yield rows, len(block)


def _print_responses(rows: Iterable[Row], *, shown: bool) -> float:
    total, count = 0.0, 0
    for row in rows:
        total, count = total + row["score"], count + 1
        if shown:
            text = row["response"][0]["content"][:90]
            sys.stdout.write(f"{row['score']:+.3f}  {row['probability']:.3f}  {text!r}\n")
    return total / count


def _scores_of(model: str, pairs: Sequence[PreferencePair]) -> Scores:
    """Scores of a model, or those in a file that `align score` wrote."""
    if model.endswith((".jsonl", ".jsonl.gz")):
        rows = [line.row or {} for line in read_lines(find_data(model))]
        if not all("score_chosen" in row for row in rows):
            raise DataError(f"{model}: its rows have no scores. Make it with `align score MODEL PAIRS --out`.")
        if [(row["chosen"], row["rejected"]) for row in rows] != [_responses(pair) for pair in pairs]:
            raise DataError(f"{model}: holds other pairs than the data to compare on. Score the same file.")
        return [row["score_chosen"] for row in rows], [row["score_rejected"] for row in rows]
    scorer = Scorer.load(model, device=PartialState().device)
    with ProgressBar(f"score {model}", len(pairs)) as bar:
        scores = _score_pairs(scorer, pairs, bar)
    return [both[0] for both in scores], [both[1] for both in scores]


def _responses(pair: PreferencePair) -> tuple[Any, Any]:
    row = pair.to_json()
    return row["chosen"], row["rejected"]


def _validation_files(model: str) -> list[str]:
    if model.endswith((".jsonl", ".jsonl.gz")):
        return [model]
    from alignment.config import read_yaml

    config = Path(model) / "config.yaml"
    files = read_yaml(config).get("data", {}).get("valid") if config.is_file() else None
    if not files:
        raise DataError(f"{model}: no run with validation data. Name the pairs to compare on after the two models.")
    return files


def _model_hash(model: str) -> str:
    folder = model_folder(model)
    return weights_sha256(folder) if isinstance(folder, Path) else model


def _data_hashes(files: Sequence[str]) -> list[str]:
    return [file_sha256(found) if isinstance(found := find_data(name), Path) else str(name) for name in files]


def _partial_paths(out: Path) -> tuple[Path, Path]:
    return out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")


def _whole_blocks(path: Path) -> tuple[list[Row], int]:
    """The rows up to the last complete block, to which the file is cut, and the prompts they cover."""
    kept: list[Row] = []
    block: list[Row] = []
    end = num_prompts = position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                break
            if "prompts_done" in row:
                kept, block, end, num_prompts = kept + block, [], position, row["prompts_done"]
            else:
                block.append(row)
    with path.open("rb+") as file:
        file.truncate(end)
    return kept, num_prompts


def _has_pairs(name: str) -> bool:
    first = next(iter(read_lines(find_data(name))), None)
    return first is not None and first.row is not None and "chosen" in first.row


def _as_response(row: Mapping[str, Any]) -> Candidate:
    """A row with `prompt` and `response`, or a dialogue whose last turn is the response."""
    if "messages" in row and "response" not in row:
        *prompt, last = row["messages"]
        row = {**row, "prompt": prompt, "response": [last]}
    return Candidate.from_json({"index": 0, **row})


def _checked(row: Mapping[str, Any]) -> None:
    """For a first pass that finds every bad row and keeps none of the good ones."""
    _as_response(row)
