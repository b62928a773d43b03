"""`align score` and `align rm compare`: reward models on files of pairs or responses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from alignment.chat import ChatFormat
from alignment.cli.partial_file import PartialFile, Row, data_hashes, model_hash
from alignment.config import build_section
from alignment.data import load_pairs, load_rows, raise_together, read_lines, stream_rows
from alignment.dialogue import Candidate, Messages, PreferencePair, RowError, as_response, optional_number
from alignment.errors import DataError
from alignment.hardware import check_no_launcher
from alignment.model_folders import load_chat_of
from alignment.progress import ProgressBar
from alignment.sources import expanded, find_data
from reward_models.calibration import sigmoid
from reward_models.config import EvaluationSection
from reward_models.evaluate import compare, evaluate_pairs, scored_row
from reward_models.score import Scorer, check_fits
from reward_models.tables import comparison_table, report_tables

# Prompts scored between two writes: what an interrupted call loses at most.
PROMPTS_PER_WRITE = 256
# How the name of a file of scores ends, where it stands for a model.
SCORE_FILES = (".jsonl", ".jsonl.gz")

Scores = tuple[list[float], list[float]]  # of the chosen responses, of the rejected ones


def score_files(
    model: str, files: list[str], *, out: Path | None, as_json: bool, resume: bool, wanted_precision: float
) -> None:
    """Pairs: agreement with people. Responses: score and sigmoid(score), which is P(safe) for a safety model.

    With `out`, rows are written as they are scored; an interrupted call goes on with `resume` and ends with the same
    file. Raises DataError where files mix pairs and responses, or hold a bad row or one too long for the model, before
    anything is scored, and RunError where `out` exists or another call's rows are in its way.
    """
    check_no_launcher("align score")
    evaluation = build_section(EvaluationSection, {"wanted_precision": wanted_precision})
    kinds = {name: _has_pairs(name) for name in files}
    if len(set(kinds.values())) > 1:
        mixed = ", ".join(f"{name} ({'pairs' if pairs else 'responses'})" for name, pairs in kinds.items())
        raise DataError(f"pairs and responses in one call: {mixed}. Score them in two.")
    is_pairs = all(kinds.values())
    partial = PartialFile.open(out, {"model": model_hash(model), "data": data_hashes(files)}, resume=resume)
    context = _Context(*load_chat_of(model))
    pairs = load_pairs(files).rows if is_pairs else []
    context.check_pairs(pairs)
    count = len(pairs) if is_pairs else len(load_rows(files, context.checked_response).rows)
    scorer = Scorer.load(model, device=PartialState().device, dtype=partial.dtype)
    partial.begin(str(scorer.model.dtype).removeprefix("torch."))
    if is_pairs:
        rows = list(partial.resumed(_scored_pairs(scorer, pairs[partial.num_prompts :], partial.num_prompts)))
        partial.finish()
        chosen, rejected = ([row[name] for row in rows] for name in ("score_chosen", "score_rejected"))
        report = evaluate_pairs(
            pairs,
            chosen,
            rejected,
            max_length=context.length,
            wanted_precision=evaluation.wanted_precision,
        )
        if as_json:
            sys.stdout.write(json.dumps(report, indent=2) + "\n")
        else:
            Console(highlight=False).print(report_tables(report, f"{model} on {len(pairs)} pairs"))
    else:
        prompts = groupby(stream_rows(files, _Given.parse), key=lambda given: given.candidate.prompt.messages)
        groups = (list(group) for _, group in prompts)
        mean = _print_responses(
            partial.resumed(_scored_responses(scorer, islice(groups, partial.num_prompts, None), partial, count)),
            shown=out is None and not as_json,
        )
        partial.finish()
        if out is not None or as_json:
            sys.stdout.write(json.dumps({"responses": count, "mean_score": mean}, indent=2) + "\n")
    context.report_cut()


def compare_models(first: str, second: str, files: Sequence[str], *, as_json: bool) -> None:
    """Paired accuracy of two reward models on the same pairs.

    Either may also be a file that `align score --out` wrote. Without `files`, the pairs are the first one's: those of
    its file, or those its run was measured on, with the scores found there; a run as second gives the scores it left
    where they are of the same pairs.
    """
    check_no_launcher("align rm compare")
    pairs = load_pairs(files).rows if files else _read_scores(_score_file(first))[0]
    stored = [_stored_scores(model, pairs, held_out=not files) for model in (first, second)]
    scores = [found or _score_now(model, pairs) for model, found in zip((first, second), stored, strict=True)]
    report = compare(pairs, *scores)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        Console(highlight=False).print(comparison_table(report, first, second))


@dataclass(frozen=True, slots=True)
class _Given:
    """A response to score, and the row that it stands in, which goes to the result with its scores."""

    row: Row
    candidate: Candidate

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> _Given:
        """Raises RowError where the row has no response."""
        return cls(dict(row), as_response(row))


class _Context:
    """A model's context, into which a prompt's last turn and each of its responses must fit."""

    def __init__(self, chat: ChatFormat, length: int) -> None:
        self.chat, self.length = chat, length
        self.cut: set[int] = set()  # hashes of prompts

    def check(self, prompt: Messages, responses: Sequence[str]) -> None:
        """Raises RowError where they do not fit, or cannot be written in the model's format."""
        if check_fits(self.chat, self.length, prompt, responses):
            self.cut.add(hash(prompt))

    def check_pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Raises DataError with the place of every pair that does not fit."""
        problems = []
        for pair in pairs:
            try:
                self.check(pair.prompt, (pair.chosen, pair.rejected))
            except RowError as error:
                problems.append(f"{pair.where}: {error.problem}")
        raise_together(problems)

    def checked_response(self, row: Mapping[str, Any]) -> None:
        """For a first pass that finds every bad row and keeps none of the good ones."""
        candidate = as_response(row)
        self.check(candidate.prompt.messages, [candidate.response])

    def report_cut(self) -> None:
        """Says how many prompts were scored without their oldest turns."""
        if self.cut:
            count = "1 prompt" if len(self.cut) == 1 else f"{len(self.cut)} prompts"
            sys.stderr.write(
                f"{count} lost the oldest turns: with the response over the model's {self.length} tokens.\n"
            )


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
    scorer: Scorer, groups: Iterator[list[_Given]], partial: PartialFile, count: int
) -> Iterator[tuple[list[Row], int]]:
    """Neighbouring rows with the same prompt share its prefill."""
    done = len(partial.rows)
    with ProgressBar("score", count, start=done) as bar:
        while block := list(islice(groups, PROMPTS_PER_WRITE)):
            prompts = [group[0].candidate.prompt.messages for group in block]
            scores = scorer.score(prompts, [[given.candidate.response for given in group] for group in block])
            rows = [
                {**given.row, "score": score, "probability": sigmoid(score)}
                for group, values in zip(block, scores, strict=True)
                for given, score in zip(group, values, strict=True)
            ]
            bar.advance(len(rows))
            yield rows, len(block)


def _print_responses(rows: Iterable[Row], *, shown: bool) -> float:
    total, count = 0.0, 0
    for row in rows:
        total, count = total + row["score"], count + 1
        if shown:
            text = as_response(row).response[:90]
            sys.stdout.write(f"{row['score']:+.3f}  {row['probability']:.3f}  {text!r}\n")
    return total / count


def _stored_scores(model: str, pairs: Sequence[PreferencePair], *, held_out: bool) -> Scores | None:
    """Scores in a file, or those a run left where they are of these pairs; None where a model is to compute them.

    Raises DataError where a file holds other pairs.
    """
    if model.endswith(SCORE_FILES):
        found, scores = _read_scores(model)
        if problem := _difference(found, pairs):
            raise DataError(f"{model}: holds other pairs than those to compare on: {problem}. Score the same file.")
        return scores
    if held_out and (file := _held_out_scores(model)):
        found, scores = _read_scores(file)
        return None if _difference(found, pairs) else scores
    return None


def _score_now(model: str, pairs: Sequence[PreferencePair]) -> Scores:
    scorer = Scorer.load(model, device=PartialState().device)
    context = _Context(scorer.chat, scorer.context_length)
    context.check_pairs(pairs)
    with ProgressBar(f"score {model}", len(pairs)) as bar:
        scores = _score_pairs(scorer, pairs, bar)
    context.report_cut()
    return [both[0] for both in scores], [both[1] for both in scores]


def _read_scores(file: str) -> tuple[list[PreferencePair], Scores]:
    """Pairs with their scores, as `align score --out` and runs write them. Raises DataError with every bad row."""
    scores: Scores = ([], [])

    def parse(row: Mapping[str, Any]) -> PreferencePair:
        pair = PreferencePair.from_json(row)
        for name, column in zip(("score_chosen", "score_rejected"), scores, strict=True):
            if (score := optional_number(row, name)) is None:
                raise RowError(f'"{name}" is missing. Make the file with `align score MODEL PAIRS --out`.')
            column.append(score)
        return pair

    return load_rows([file], parse).rows, scores


def _difference(found: Sequence[PreferencePair], pairs: Sequence[PreferencePair]) -> str | None:
    """Where two lists of pairs part ways, or None where they are the same in the same order."""
    for theirs, ours in zip(found, pairs, strict=False):
        for name in ("prompt", "chosen", "rejected"):
            if getattr(theirs, name) != getattr(ours, name):
                return f'"{name}" of {theirs.where} is not that of {ours.where}'
    return None if len(found) == len(pairs) else f"it has {len(found)}, they are {len(pairs)}"


def _score_file(model: str) -> str:
    """The file with a model's own pairs and scores: the model is that file, or a run that was measured."""
    file = model if model.endswith(SCORE_FILES) else _held_out_scores(model)
    if file is None:
        raise DataError(f"{model}: no run with held-out scores. Name the pairs to compare on after the two models.")
    return file


def _held_out_scores(model: str) -> str | None:
    from reward_models.trainer import HELD_OUT_SCORES

    file = expanded(model) / HELD_OUT_SCORES
    return str(file) if file.is_file() and file.stat().st_size else None


def _has_pairs(name: str) -> bool:
    """By the first row that can be read."""
    row = next((line.row for line in read_lines(find_data(name)) if line.row is not None), {})
    return row.get("chosen") is not None
