"""How an evaluation's judges score answers that were cut off, against answers to the same prompt that ended.

    python benchmarks/cut_off.py runs/smollm2-full/versions

For every prompt to which some policies' answers ended by themselves and some were cut off: the mean score of the
latter less that of the former, and its mean over prompts with a 95 % interval. Policies differ in how many
answers they end, so a difference between policies is part of it; `guard_gain_ended` of the evaluation has none.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from alignment.dialogue import Candidate, Messages
from alignment.line_log import as_object, whole_lines
from alignment.metrics import mean_interval, show

JUDGES = ("reward", "helpfulness", "safety", "guard")


def main() -> None:
    """Prints a line for each judge that scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the directory of an evaluation")
    folder = parser.parse_args().run
    files = sorted(folder.glob("answers-*.jsonl"))
    if not files:
        raise SystemExit(f"{folder}: no answers-*.jsonl. Name the directory of an evaluation.")
    answers: dict[Messages, list[Candidate]] = defaultdict(list)
    for file in files:
        for answer, _ in whole_lines(file, lambda row: Candidate.from_json(as_object(row))):
            answers[answer.prompt.messages].append(answer)
    for judge in JUDGES:
        found = mean_interval(list(_differences(answers.values(), judge)))
        print(f"{judge}: {show(found.to_json(), '+.2f', bounds=True)} on {found.count} prompts")


def _differences(prompts: Iterable[list[Candidate]], judge: str) -> Iterator[float]:
    for answers in prompts:
        scored = [(answer.finish_reason, getattr(answer, judge)) for answer in answers]
        cut, ended = (
            [score for reason, score in scored if reason == how and score is not None] for how in ("length", "stop")
        )
        if cut and ended:
            yield sum(cut) / len(cut) - sum(ended) / len(ended)


if __name__ == "__main__":
    main()
