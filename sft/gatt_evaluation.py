"""Does an instruction stated in the first turn only still hold turns later? `align eval kind=gatt` (Llama 2 Table 30).

Every model holds the same dialogues, each with its own answers as history; a program judges every answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.table import Table

from alignment.data import SourceReport
from alignment.errors import DataError
from alignment.files import save_figure
from alignment.hardware import compute_dtype, process_state
from alignment.isolation import isolated
from alignment.metrics import paired_rate_interval, show, wilson_interval
from alignment.model_folders import check_is_chat_model, load_chat_of
from alignment.models import load_chat_model
from alignment.progress import ProgressBar
from alignment.runs import Run, open_run
from sft.answer_log import Answering, NoAnswer, RowLog
from sft.attention_mass import attention_picture, is_readable
from sft.checkers import CHECKERS
from sft.config import GattEvalConfig
from sft.conversation import (
    Plan,
    Speaker,
    describe_openings,
    load_own,
    load_seeds,
    make_plans,
    why_unanswered,
)
from sft.ghost_attention import Answer, context, first_turn

Row = Mapping[str, Any]
logger = logging.getLogger(__name__)


@isolated()
def run(config: GattEvalConfig, *, resume: bool = False) -> dict[str, Any]:
    """Holds the dialogues with every policy, judges them; writes dialogues, table, curve and attention picture."""
    state = process_state(config.run.device)
    plans, sources = _plan(config)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(sources)

    options = {"max_prompt_length": config.prompts.max_prompt_length, "seed": config.run.seed}
    rows: dict[str, list[Row]] = {}
    attention: dict[str, list[list[float]]] = {}
    pictured: list[Row] | None = None
    for name, section in config.policies.items():
        path, max_rows = run_dir.path / f"dialogues-{name}.jsonl", config.sampling.max_rows
        log = RowLog(
            path,
            total=len(plans),
            max_rows=max_rows,
            writes=run_dir.writes,
            resume=resume,
            on_append=run_dir.note_elapsed_now_and_then,
        )
        state.wait_for_everyone()
        if missing := log.missing():
            num_turns = sum(len(plans[index].user_turns) for lot in missing for index in lot)
            with (
                Speaker.open(section, config.sampling, device=state.device, **options) as speaker,
                ProgressBar(f"eval: {name} answers", num_turns, shown=run_dir.writes) as bar,
            ):
                for lot in missing:
                    log.append(hold_dialogues(log.recorded(speaker, lot), [plans[index] for index in lot], bar))
        rows[name] = log.rows
        if not any(row["answers"] for row in log.rows):
            reasons = {row.get("ended") for row in log.rows}
            why = why_unanswered(reasons, section, config.prompts, config.sampling)
            raise DataError(f"policies.{name}: no dialogue has an answer. prompts: {why}.")
        if pictured is None:
            pictured = list(islice(_readable_by_all(config, log.rows), config.num_attention_dialogues))
        if pictured:
            dtype = compute_dtype(state.device, section.dtype)
            loaded = load_chat_model(section.path, dtype=dtype, chat_template=section.chat_template, keep_adapter=True)
            loaded.model.to(state.device)
            attention[name] = attention_picture(loaded, pictured)
            del loaded  # its memory, before the next one's
    if config.num_attention_dialogues and not pictured:
        logger.warning("no dialogue of the first policy fits into all of them: there is no picture of attention")
    policies = adherence_table(rows, config.report_turns)
    if state.is_main_process:
        _draw(run_dir, policies, attention)
    return run_dir.finish(
        {
            "stage": "eval",
            "kind": "gatt",
            "dialogues": len(plans),
            "report_turns": config.report_turns,
            "policies": policies,
            "attention": attention,
        }
    )


def check(config: GattEvalConfig) -> str:
    """What `align eval kind=gatt --dry-run` says: reads rows and chat formats, loads no weights, writes nothing."""
    plans, _ = _plan(config)
    turns = [first_turn(plan.stated, plan.user_turns) for plan in plans]
    for name, policy in config.policies.items():
        try:
            describe_openings(policy, config.prompts, config.sampling, turns)
        except DataError as error:
            raise DataError(f"policies.{name}: {error}") from None
    return f"{len(plans)} dialogues, {len(config.policies)} policies."


def _plan(config: GattEvalConfig) -> tuple[list[Plan], list[SourceReport]]:
    """The dialogues to hold, and the files that they come from."""
    for policy in config.policies.values():
        check_is_chat_model(policy.path)
    data = load_seeds(config.prompts)
    own = load_own(config.instructions)
    turns = (config.prompts.turns, config.prompts.turns)
    plans = make_plans(data, config.prompts, own, config.instructions, turns=turns, seed=config.run.seed)
    _check_verifiable(plans)
    return plans, [*data.sources, *own.sources]


def hold_dialogues(speaker: Answering, plans: Sequence[Plan], bar: ProgressBar) -> list[dict[str, Any]]:
    """Every dialogue with the instruction in its first turn only, and whether each answer kept it.

    A dialogue ends where it no longer fits into the model, or its chat format refuses what the model wrote: `ended` is
    then `too_long` or `refused`, null otherwise. `finished` says which answers ended by themselves.
    """
    asked = [first_turn(plan.stated, plan.user_turns) for plan in plans]
    answers: list[list[Answer]] = [[] for _ in plans]
    ended: dict[int, NoAnswer] = {}
    for turn in range(max(map(len, asked))):
        contexts = {
            index: context(turns, [answer.text for answer in answers[index]])
            for index, turns in enumerate(asked)
            if turn < len(turns) and index not in ended
        }
        answered = speaker.answer(contexts, turn=turn, bar=bar)
        ended |= answered.missing
        for index, [answer] in answered.candidates.items():
            answers[index].append(answer)
    return [
        {
            "instruction": plan.stated,
            "kinds": [constraint.kind for constraint in plan.instruction.constraints],
            "user_turns": turns,
            "answers": [answer.text for answer in found],
            "finished": [answer.is_finished for answer in found],
            "kept": [plan.instruction.holds(answer.text, is_finished=answer.is_finished) for answer in found],
            "ended": ended.get(index),
        }
        for index, (plan, turns, found) in enumerate(zip(plans, asked, answers, strict=True))
    ]


def _readable_by_all(config: GattEvalConfig, rows: Sequence[Row]) -> Iterator[Row]:
    """The dialogues that every policy's format can write and its context holds."""
    formats = [load_chat_of(policy.path, policy.chat_template) for policy in config.policies.values()]
    for row in rows:
        if row["answers"] and all(is_readable(chat, length, row) for chat, length in formats):
            yield row


def adherence_table(rows: Mapping[str, Sequence[Row]], report_turns: Sequence[int]) -> dict[str, Any]:
    """For every policy: share of answers that keep the instruction, by turn, by kind, and against the first policy.

    `by_turn` has Wilson intervals, turn 1 first, and `cut_off_by_turn` the share of answers that were cut off at the
    length limit; both over the dialogues that reached the turn. `gain` is the paired difference from the first policy
    at the turns to report, over the dialogues of which both have that turn, with Agresti and Min's interval.
    """
    baseline = next(iter(rows.values()))
    table = {}
    for name, dialogues in rows.items():
        num_turns = max(len(row["kept"]) for row in dialogues)
        reported = [turn for turn in report_turns if turn <= num_turns]
        kinds = sorted({kind for row in dialogues for kind in row["kinds"]})
        table[name] = {
            "by_turn": [_rate(dialogues, turn) for turn in range(1, num_turns + 1)],
            "cut_off_by_turn": [1 - _rate(dialogues, turn, "finished")["value"] for turn in range(1, num_turns + 1)],
            "by_kind": {
                kind: {str(turn): _rate([r for r in dialogues if kind in r["kinds"]], turn) for turn in reported}
                for kind in kinds
            },
            "gain": {str(turn): _gain(dialogues, baseline, turn) for turn in reported},
        }
    return table


def reported(result: Row) -> tuple[list[int], dict[str, list[str]]]:
    """The turns to report that were reached, and each policy's adherence at them in words."""
    longest = max(len(row["by_turn"]) for row in result["policies"].values())
    turns = [turn for turn in result["report_turns"] if turn <= longest]
    return turns, {
        name: [_in_words(row["by_turn"], turn, result["dialogues"]) for turn in turns]
        for name, row in result["policies"].items()
    }


def _in_words(by_turn: Sequence[Row], turn: int, num_dialogues: int) -> str:
    """Adherence at a turn, with the number of dialogues where some had ended before."""
    if turn > len(by_turn):
        return "-"
    entry = by_turn[turn - 1]
    of = "" if entry["count"] == num_dialogues else f", {entry['count']} dialogues"
    return show(entry, ".0%", bounds=True) + of


def report_table(result: Row) -> Table:
    """Adherence at the turns to report, with 95 % intervals, for a terminal."""
    turns, cells = reported(result)
    title = f"{result['dialogues']} dialogues, instruction in the first turn only: share of answers that keep it"
    table = Table("policy", *(f"turn {turn}" for turn in turns), title=title)
    for name, row in cells.items():
        table.add_row(name, *row)
    return table


def _check_verifiable(plans: Sequence[Plan]) -> None:
    """Raises DataError where no program can judge an instruction: every answer would count as keeping it."""
    if unknown := next((plan for plan in plans if not plan.instruction.is_verifiable), None):
        raise DataError(
            f"instructions: no program can judge {unknown.instruction.full!r}. Give kinds that have a checker "
            f"({', '.join(CHECKERS)}), rows of your own with `kind` and `value`."
        )


def _rate(dialogues: Sequence[Row], turn: int, of: str = "kept") -> dict[str, float | int | None]:
    flags = [row[of][turn - 1] for row in dialogues if len(row[of]) >= turn]
    return wilson_interval(sum(flags), len(flags)).to_json()


def _gain(ours: Sequence[Row], theirs: Sequence[Row], turn: int) -> dict[str, float | int | None]:
    both = [
        (a["kept"][turn - 1], b["kept"][turn - 1])
        for a, b in zip(ours, theirs, strict=True)
        if min(len(a["kept"]), len(b["kept"])) >= turn
    ]
    return paired_rate_interval([kept for kept, _ in both], [kept for _, kept in both]).to_json()


def _draw(run_dir: Run, policies: Mapping[str, Any], attention: Mapping[str, Sequence[Sequence[float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="user turn", ylabel="answers that keep the instruction", ylim=(-0.03, 1.03))
    for name, row in policies.items():
        turns = range(1, len(row["by_turn"]) + 1)
        axes.plot(turns, [entry["value"] for entry in row["by_turn"]], marker="o", markersize=3, label=name)
        bounds = ([entry[side] for entry in row["by_turn"]] for side in ("low", "high"))
        axes.fill_between(turns, *bounds, alpha=0.2)
    axes.legend()
    save_figure(figure, run_dir.path / "adherence.png")
    if not attention:
        return
    assert all(attention.values()), "every picture is of dialogues with answers"
    figure = Figure(figsize=(3.2 * len(attention) + 1, 4), layout="constrained")
    top = max(value for table in attention.values() for row in table for value in row)
    panels = figure.subplots(1, len(attention), sharey=True, squeeze=False)[0]
    for axes, (name, table) in zip(panels, attention.items(), strict=True):
        num_turns = len(table[0])
        image = axes.imshow(table, aspect="auto", vmin=0, vmax=top, extent=(0.5, num_turns + 0.5, len(table), 0))
        axes.set(title=name, xlabel="turn of the answer")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="attention on the instruction")
    save_figure(figure, run_dir.path / "attention.png")
