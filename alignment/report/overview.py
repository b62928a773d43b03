"""The runs at a glance: what each reached, its time and memory, and what to be careful about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.headlines import clock, one_line
from alignment.metrics import side_of_zero
from alignment.report.charts import bar_chart
from alignment.report.elements import Cell, Section, Table, number, text
from alignment.report.reading import Row, RunFolder, is_number

CUT_OFF_DIFFERENCE = 0.1  # in the share of answers cut off, from which on it may explain a change in reward


def section(runs: Sequence[RunFolder]) -> Section:
    """The table of all runs, and their time and memory as bars."""
    columns = ("run", "stage", "status", "result", "time", "peak memory", "seed", "started")
    table = Table("Runs", columns, [_row(run) for run in runs])
    times = {run.label: seconds for run in runs if (seconds := _seconds(run)) is not None}
    memory = {run.label: peak for run in runs if (peak := _peak_memory(run)) is not None}
    charts = []
    if times:
        longest = max(times.values())
        unit, size = ("seconds", 1) if longest < 300 else ("minutes", 60) if longest < 3 * 3600 else ("hours", 3600)
        bars = {label: seconds / size for label, seconds in times.items()}
        caption = "Look for the stage that takes most of the time: it is the one worth shortening."
        charts.append(bar_chart("time", "Time by run", caption, bars, x_label=unit, spec=".1f"))
    if memory:
        caption = (
            "Look for the longest bar: a machine needs more than that. Each is the peak of a run's main process, all "
            "parts of a resumed run together: resident memory on a CPU, allocated memory on a GPU."
        )
        charts.append(bar_chart("memory", "Peak memory by run", caption, memory, x_label="GB", spec=".1f"))
    return Section("overview", "Overview", charts=charts, tables=[table])


def facts(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """What stands at the top of the page: names and figures."""
    finished = [run for run in runs if run.result is not None and not run.is_outdated]
    memory = max((peak for run in runs if (peak := _peak_memory(run)) is not None), default=None)
    return [
        ("runs finished", f"{len(finished)} of {len(runs)}"),
        ("time in all", _duration(sum(_seconds(run) or 0 for run in runs))),
        ("peak memory", "–" if memory is None else f"{memory:.1f} GB"),
    ]


def warnings(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """Run and sentence: what is unfinished or outdated, alarms, early stops, gains that the guard does not see.

    Then, for runs that stand beside each other, rewards that do not compare.
    """
    return [*((run.label, sentence) for run in runs for sentence in _warnings(run)), *_other_scales(runs)]


def _warnings(run: RunFolder) -> Iterator[str]:
    if run.result is None:
        yield f"Unfinished{_last_step(run)}: its figures are those written so far."
        return
    if run.is_outdated:
        yield "Outdated: the next `align run` makes it again; its figures are those of before."
    for name, iteration in (run.result.get("alarms") or {}).items():
        yield f"The alarm “{name}” rang at iteration {iteration}; docs/ppo.md says what it means and what helps."
    if stopped := run.result.get("stopped"):
        yield f"Stopped early ({stopped}) at iteration {run.result.get('iterations', 'unknown')}."
    policies = (run.result.get("policies") or {}) if run.stage == "eval" else {}
    doubted = [name for name, row in policies.items() if row.get("guard_agrees") is False]
    if doubted:
        yield (
            f"The guard, a reward model of other pairs, does not confirm the change in reward of {', '.join(doubted)}: "
            "it may be learned from the reward models' errors."
        )
    first = next(iter(policies.values()), {})
    if cut := [name for name, row in policies.items() if _is_of_cut_off_answers(row, first)]:
        yield (
            f"{', '.join(cut)} and the first policy differ in how many answers are cut off, and where both answers "
            "ended by themselves the change in reward is not seen: reward models may judge that answers break off, not "
            "what they say. A higher sampling.max_new_tokens shows it."
        )


def _other_scales(runs: Sequence[RunFolder]) -> Iterator[tuple[str, str]]:
    """Runs of one stage whose rewards are by different judges."""
    for stage in dict.fromkeys(run.stage for run in runs):
        judged = [run for run in runs if run.stage == stage and run.judges is not None]
        if len({run.judges for run in judged}) > 1:
            yield (
                ", ".join(run.label for run in judged),
                "Their rewards are by different reward models or thresholds, on different scales: compare policies, "
                "iterations and samples within a run, not rewards between these.",
            )


def _is_of_cut_off_answers(row: Row, first: Row) -> bool:
    """Whether more or fewer answers are cut off, and a change in reward is not there among those that ended."""
    every, ended = row.get("reward_gain"), row.get("reward_gain_ended")
    rates = [policy.get("truncated_rate") for policy in (row, first)]
    if not every or not ended or not all(map(is_number, rates)) or abs(rates[0] - rates[1]) < CUT_OFF_DIFFERENCE:
        return False
    sides = [side_of_zero(entry.get("low"), entry.get("high")) for entry in (every, ended)]
    return sides[0] != 0 and sides[1] != sides[0]


def _row(run: RunFolder) -> list[Cell]:
    kind = f"{run.stage} ({run.kind})" if run.kind else run.stage
    seconds = _seconds(run)
    started = str(run.manifest.get("started", ""))[:16].replace("T", " ")
    commit = (run.manifest.get("git_commit") or "")[:10]
    return [
        text(run.label, "name"),
        text(kind),
        _status(run),
        text(_reached(run), "long"),
        Cell("–") if seconds is None else Cell(clock(seconds), seconds),
        number(_peak_memory(run), ".1f", " GB"),
        number(run.manifest.get("seed")),
        Cell(started, mark="when", detail=f"commit {commit}" if commit else ""),
    ]


def _status(run: RunFolder) -> Cell:
    if run.is_outdated:
        return text("outdated", "bad")
    return text(f"unfinished{_last_step(run)}", "bad") if run.result is None else text("finished", "good")


def _reached(run: RunFolder) -> str:
    if run.result is None:
        return ""
    try:
        return one_line(run.result)
    except KeyError as missing:  # a report of old runs shows what they have
        return f"its result has no {missing}"
    except TypeError:
        return "one of its figures is no number"


def _seconds(run: RunFolder) -> float | None:
    found = run.manifest.get("elapsed_seconds") if run.result is None else run.result.get("time_seconds")
    return found if is_number(found) else None


def _peak_memory(run: RunFolder) -> float | None:
    found = (run.result or {}).get("peak_memory_gb")
    return found if is_number(found) else None


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{clock(seconds)} min"


def _last_step(run: RunFolder) -> str:
    return f" (step {run.metrics[-1].get('step')})" if run.metrics else ""
