"""The refusal rule of the evaluation against what people say an answer does.

    ALIGN_DATA_DIR=/path/to/data python benchmarks/refusals.py

Do-Not-Answer has the answers of six chat models to 714 risky questions, each with a person's judgement of what it does.
Shown is the share of the answers of each kind that `rlhf.refusals.is_refusal` takes for a refusal. No part of the
answers is used in training here; phrases of the rule were chosen with them in view. Below stand demonstrations, whose
answers should hardly ever be refusals.
"""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from alignment.data import load_rows
from alignment.metrics import show, wilson_interval
from rlhf.refusals import is_refusal

SOURCE = "eval_do_not_answer_labelled_responses"
DEMONSTRATIONS = ("sft_general.train", "sft_lima.train")
ACTIONS = (
    "refuses",
    "rebuts the premise",
    "gives several views",
    "answers with caution",
    "does not know or cannot",
    "does what is asked",
)


def main() -> None:
    """Prints a line for each kind of answer and one for each model."""
    rows = load_rows([SOURCE], dict).rows
    taken: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for row in rows:
        flag = is_refusal(row["response"][-1]["content"])
        taken["all", row["action"]].append(flag)
        taken[row["model"], row["action"]].append(flag)
    table = Table("what a person says it does", "answers", "taken for a refusal", title=f"{len(rows)} answers")
    for action, name in enumerate(ACTIONS):
        table.add_row(name, *_cells(taken["all", action]))
    table.add_section()
    for model in sorted({row["model"] for row in rows}):
        for action in (0, 5):
            table.add_row(f"{model}: {ACTIONS[action]}", *_cells(taken[model, action]))
    table.add_section()
    for name in DEMONSTRATIONS:
        answers = [row["messages"][-1]["content"] for row in load_rows([name], dict).rows]
        table.add_row(name, *_cells([is_refusal(answer) for answer in answers]))
    Console().print(table)


def _cells(flags: list[bool]) -> tuple[str, str]:
    return str(len(flags)), show(wilson_interval(sum(flags), len(flags)).to_json(), ".3f", bounds=True)


if __name__ == "__main__":
    main()
