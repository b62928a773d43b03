"""Answers to the same prompts side by side: of evaluated policies, before and after fine-tuning, along PPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignment.report.elements import Answer, Answers, Asked, Section
from alignment.report.reading import Row, RunFolder, is_number

NUM_PROMPTS = 60
_TIE = 0.005  # rewards that look the same when two decimals are shown
_SCORES = {"reward": "+.2f", "helpfulness": "+.2f", "safety": "+.2f", "guard": "+.2f", "kl": ".1f"}
_OTHER_SCALES = (
    "The rewards are by different reward models or thresholds and do not compare across them: “highest” is among the "
    "answers that were judged alike."
)


def section(runs: Sequence[RunFolder]) -> Section:
    """Every set of answers that the runs left."""
    evaluated = [run for run in runs if run.stage == "eval" and run.kind != "gatt"]
    sets = [
        *_of_policies(evaluated),
        *(_along_ppo(run) for run in runs if run.stage == "ppo"),
        *(_before_and_after(run) for run in runs if run.stage == "sft"),
        *(_distilled(run) for run in runs if run.stage == "distil"),
        *(_dialogues(run) for run in runs if run.stage == "eval" and run.kind == "gatt"),
    ]
    intro = "All text below was written by models or taken from data; some of it is wrong, and some is offensive."
    return Section("answers", "Answers side by side", intro, answers=[found for found in sets if found])


def _of_policies(runs: Sequence[RunFolder]) -> list[Answers | None]:
    """One set for every list of prompts; evaluations of the same prompts stand beside each other."""
    groups: dict[tuple[str, ...], list[tuple[RunFolder, dict[str, list[Row]]]]] = {}
    for run in runs:
        names = run.settings.get("policies", {})
        by_policy = {name: rows for name in names if (rows := run.rows(f"answers-{name}.jsonl"))}
        if by_policy:
            key = tuple(str(row["prompt"]) for row in next(iter(by_policy.values())))
            groups.setdefault(key, []).append((run, by_policy))
    return [_of_evaluations(members) for members in groups.values()]


def _of_evaluations(members: Sequence[tuple[RunFolder, Mapping[str, list[Row]]]]) -> Answers | None:
    """Evaluations of the same prompts, each with its rows by policy."""
    labelled, judges = {}, {}
    for run, by_policy in members:
        for policy, rows in by_policy.items():
            label = policy if len(members) == 1 else f"{run.label}: {policy}"
            labelled[label], judges[label] = rows, run.judges
    title = "Held-out prompts: " + ", ".join(run.label for run, _ in members)
    return _scored_set(f"answers-{members[0][0].label_id}", title, labelled, judges)


def _along_ppo(run: RunFolder) -> Answers | None:
    """At the start, at the best and at the last look at the held-out prompts."""
    looks = sorted(int(n) for f in run.path.glob("answers-*.jsonl") if (n := f.stem.partition("-")[2]).isdigit())
    if not looks:
        return None
    best = ((run.result or {}).get("held_out") or {}).get("best_iteration")
    shown = [look for look in looks if look in (looks[0], best, looks[-1])]
    by_policy = {f"iteration {look}": run.rows(f"answers-{look}.jsonl") for look in shown}
    return _scored_set(f"answers-{run.label_id}", f"Held-out prompts along {run.label}", by_policy)


def _scored_set(
    name: str, title: str, by_policy: Mapping[str, list[Row]], judges: Mapping[str, Any] | None = None
) -> Answers | None:
    """Rows with a prompt, a response and scores; the same prompts in the same order for every policy.

    `judges` says by policy what its rewards are by; without it, all are by the same.
    """
    judges = judges or dict.fromkeys(by_policy)
    shortest = min(map(len, by_policy.values()))  # of a run that is not finished some may lack answers

    def answers_of(index: int) -> list[Answer]:
        rows = {policy: rows[index] for policy, rows in by_policy.items()}
        best = _highest({policy: row.get("reward") for policy, row in rows.items()}, judges)
        return [Answer(policy, _response(row), _scores(row), policy in best) for policy, row in rows.items()]

    first = next(iter(by_policy.values()))[:shortest]
    note = _OTHER_SCALES if len(set(judges.values())) > 1 else ""
    return _chosen(name, title, first, answers_of, note)


def _highest(rewards: Mapping[str, Any], judges: Mapping[str, Any]) -> set[str]:
    """Who has the highest of the rewards by the same judges; nobody where all of these look the same."""
    found: set[str] = set()
    for judge in set(judges.values()):
        alike = {policy: reward for policy, reward in rewards.items() if judges[policy] == judge and is_number(reward)}
        best = {policy for policy, reward in alike.items() if reward > max(alike.values()) - _TIE}
        found |= best if len(best) < len(alike) else set()
    return found


def _before_and_after(run: RunFolder) -> Answers | None:
    rows = run.rows("answers.jsonl")

    def answers_of(index: int) -> list[Answer]:
        row = rows[index]
        parts = ("reference", "before", "after")
        return [Answer(part, str(row[part])) for part in parts if row.get(part) is not None]

    return _chosen(f"answers-{run.label_id}", f"Before and after {run.label}", rows, answers_of)


def _distilled(run: RunFolder) -> Answers | None:
    rows = run.rows("scored.jsonl")

    def answers_of(index: int) -> list[Answer]:
        row = rows[index]
        plain, distilled = row["score_plain"], row["score_distilled"]
        return [
            Answer("plain", row["plain"], f"safety {plain:+.2f}", plain > distilled),
            Answer("behind the preprompt", row["distilled"], f"safety {distilled:+.2f}", distilled > plain),
        ]

    return _chosen(f"answers-{run.label_id}", f"Both answers of {run.label}", rows, answers_of)


def _dialogues(run: RunFolder) -> Answers | None:
    """Whole dialogues, one policy beside the other, a mark before every answer, whether it keeps the instruction."""
    names = run.settings.get("policies", {})
    by_policy = {name: rows for name in names if (rows := run.rows(f"dialogues-{name}.jsonl"))}
    if not by_policy:
        return None
    shortest = min(map(len, by_policy.values()))

    def answers_of(index: int) -> list[Answer]:
        return [Answer(name, _turns(rows[index]), _kept(rows[index])) for name, rows in by_policy.items()]

    first = [{"prompt": row["instruction"]} for row in next(iter(by_policy.values()))[:shortest]]
    return _chosen(f"answers-{run.label_id}", f"Dialogues of {run.label}", first, answers_of)


def _turns(row: Row) -> str:
    marks = {True: "✓", False: "✗"}
    asked = zip(row["user_turns"], row["answers"], row["kept"], strict=False)
    return "\n\n".join(
        f"{turn}. {user}\n{marks[bool(kept)]} {answer}" for turn, (user, answer, kept) in enumerate(asked, start=1)
    )


def _kept(row: Row) -> str:
    return f"kept in {sum(map(bool, row['kept']))} of {len(row['kept'])} answers"


def _chosen(
    name: str, title: str, rows: Sequence[Row], answers_of: Callable[[int], list[Answer]], note: str = ""
) -> Answers | None:
    """The first prompts of each kind with their answers; nothing where there are none."""
    kinds = [[index for index, row in enumerate(rows) if bool(row.get("is_safety")) == kind] for kind in (True, False)]
    safety = kinds[0][: max(NUM_PROMPTS // 2, NUM_PROMPTS - len(kinds[1]))]
    chosen = sorted([*safety, *kinds[1][: NUM_PROMPTS - len(safety)]])
    asked = [_asked(rows[index], answers_of(index)) for index in chosen]
    return Answers(name, title, asked, total=len(rows), note=note) if asked else None


def _asked(row: Row, answers: list[Answer]) -> Asked:
    messages: Any = row["prompt"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    earlier = [(str(message["role"]), str(message["content"])) for message in messages[:-1]]
    is_safety, source = bool(row.get("is_safety")), str(row.get("source") or "")
    return Asked(str(messages[-1]["content"]), earlier, answers, is_safety, source)


def _response(row: Row) -> str:
    response = row["response"]
    return response if isinstance(response, str) else "\n".join(str(message["content"]) for message in response)


def _scores(row: Row) -> str:
    return ", ".join(f"{name} {row[name]:{spec}}" for name, spec in _SCORES.items() if is_number(row.get(name)))
