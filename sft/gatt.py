"""The `gatt` stage: samples dialogues that keep an instruction and writes them as SFT rows (Llama 2 Sec. 3.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data import SourceReport, write_rows
from alignment.errors import DataError
from alignment.hardware import process_state
from alignment.headlines import counted
from alignment.isolation import isolated
from alignment.metrics import wilson_interval
from alignment.model_folders import check_is_chat_model
from alignment.progress import ProgressBar
from alignment.runs import open_run
from sft.answer_log import Answering, RowLog
from sft.config import GattConfig
from sft.conversation import Plan, Speaker, describe_openings, load_own, load_seeds, make_plans
from sft.ghost_attention import choose_answer, context, every_turn, first_turn, training_dialogue

# What helps where no dialogue was finished, by the reason.
_REMEDIES = {
    "too_long": (
        "lower prompts.turns or sampling.max_new_tokens, or raise prompts.max_prompt_length where the model's context "
        "has room"
    ),
    "refused": 'the chat format refuses turns or answers, see "align data preview"; set another model.chat_template',
    "empty": "raise sampling.num_candidates, or take another model",
    "cut_off": "raise sampling.max_new_tokens",
    "instruction_not_kept": "raise sampling.num_candidates or prompts.max_prompts, or name other instructions.kinds",
}


@isolated()
def run(config: GattConfig, *, resume: bool = False) -> dict[str, Any]:
    """Samples the dialogues and writes them.

    `sampled.jsonl` has all with what became of them, `dialogues.jsonl` the rows for SFT, and `as_sampled.jsonl` the
    same dialogues with the instruction in every turn: training on them is training without Ghost Attention.
    """
    state = process_state(config.run.device)
    plans, sources = _plan(config)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources(sources)

    log = RowLog(
        run_dir.path / "sampled.jsonl",
        total=len(plans),
        max_rows=config.sampling.max_rows,
        answers_a_row=config.sampling.num_candidates,
        writes=run_dir.writes,
        resume=resume,
        on_append=run_dir.note_elapsed_now_and_then,
    )
    state.wait_for_everyone()
    if missing := log.missing():
        length = config.prompts.max_prompt_length
        options = {"device": state.device, "max_prompt_length": length, "seed": config.run.seed}
        num_turns = sum(len(plans[index].user_turns) for lot in missing for index in lot)
        with (
            Speaker.open(config.model, config.sampling, **options) as speaker,
            ProgressBar("gatt: answers", num_turns * config.sampling.num_candidates, shown=run_dir.writes) as bar,
        ):
            for lot in missing:
                log.append(sample_dialogues(log.recorded(speaker, lot), [plans[index] for index in lot], bar))

    kept = [(plan, row) for plan, row in zip(plans, log.rows, strict=True) if not row["dropped"]]
    dropped = dict(Counter(row["dropped"] for row in log.rows if row["dropped"]))
    if not kept:
        raise DataError(
            "no dialogue was finished: "
            + "; ".join(f"{counted({reason: count})}: {_REMEDIES[reason]}" for reason, count in dropped.items())
            + "."
        )
    run_dir.note(dropped=dropped)
    if state.is_main_process:
        for name, where, source in (
            ("dialogues", first_turn, "ghost_attention"),
            ("as_sampled", every_turn, "instruction_in_every_turn"),
        ):
            dialogues = (
                training_dialogue(where(plan.stated, plan.user_turns), row["answers"], source) for plan, row in kept
            )
            write_rows(run_dir.path / f"{name}.jsonl", (dialogue.to_json() for dialogue in dialogues))
    return run_dir.finish(
        {"stage": "gatt", "dialogues": len(kept), "dropped": dropped, "kept_by_kind": _kept_by_kind(plans, log.rows)}
    )


def check(config: GattConfig) -> str:
    """What `align gatt --dry-run` says: reads rows and the chat format, loads no weights, writes nothing."""
    plans, _ = _plan(config)
    turns = [every_turn(plan.instruction.full, plan.user_turns) for plan in plans]
    count, others = describe_openings(config.model, config.prompts, config.sampling, turns)
    return f"{count} dialogues.{others}"


def _plan(config: GattConfig) -> tuple[list[Plan], list[SourceReport]]:
    """The dialogues to hold, and the files that they come from."""
    check_is_chat_model(config.model.path)
    data = load_seeds(config.prompts)
    own = load_own(config.instructions)
    turns = (config.prompts.min_turns, config.prompts.turns)
    plans = make_plans(data, config.prompts, own, config.instructions, turns=turns, seed=config.run.seed)
    return plans, [*data.sources, *own.sources]


def sample_dialogues(speaker: Answering, plans: Sequence[Plan], bar: ProgressBar) -> list[dict[str, Any]]:
    """The answers of every dialogue, the instruction joined to each user turn; a dialogue ends where none may stand.

    `dropped` says why a dialogue ended early: `too_long`, `refused` (the chat format refuses a turn or every answer),
    `empty`, `cut_off` (its last answer, or one that may not have kept the instruction for that reason alone) or
    `instruction_not_kept`; null otherwise.
    """
    asked = [every_turn(plan.instruction.full, plan.user_turns) for plan in plans]
    answers: list[list[str]] = [[] for _ in plans]
    dropped: dict[int, str] = {}
    for turn in range(max(map(len, asked))):
        contexts = {
            index: context(turns, answers[index])
            for index, turns in enumerate(asked)
            if index not in dropped and turn < len(turns)
        }
        answered = speaker.answer(contexts, turn=turn, bar=bar)
        dropped |= answered.missing
        for index, found in answered.candidates.items():
            is_last = turn == len(asked[index]) - 1
            answer, reason = choose_answer(found, plans[index].instruction, is_last=is_last)
            if answer is None:
                dropped[index] = reason
            else:
                answers[index].append(answer)
    return [
        {
            "instruction": plan.instruction.full,
            "kinds": [constraint.kind for constraint in plan.instruction.constraints],
            "user_turns": plan.user_turns,
            "answers": answers[index],
            "dropped": dropped.get(index),
        }
        for index, plan in enumerate(plans)
    ]


def _kept_by_kind(plans: Sequence[Plan], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of dialogues that were finished, of those whose instruction has a constraint of each kind."""
    by_kind: dict[str, list[bool]] = {}
    for plan, row in zip(plans, rows, strict=True):
        for constraint in plan.instruction.constraints:
            by_kind.setdefault(constraint.kind, []).append(not row["dropped"])
    return {kind: wilson_interval(sum(found), len(found)).to_json() for kind, found in sorted(by_kind.items())}
