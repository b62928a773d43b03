"""Fine-tuning: training loss and held-out loss by source; what Ghost Attention and distillation made."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.headlines import counted
from alignment.report.charts import curve_chart, interval_chart, metric_curves
from alignment.report.drawing import Chart
from alignment.report.elements import Section, Table, interval, number, present, text
from alignment.report.reading import Row, RunFolder


def section(runs: Sequence[RunFolder]) -> Section:
    """Loss curves of all fine-tunings together, held-out losses of each."""
    tuned = [run for run in runs if run.stage == "sft"]
    loss = curve_chart(
        "sft-loss",
        "Training loss",
        "It should fall and then level off; a rise means that the learning rate is too high.",
        metric_curves(tuned, {"sft/loss": "loss"}),
        x_label="optimizer step",
        y_label="loss (nats a token)",
    )
    columns = ("run", "source", "tokens", "loss before", "loss after", "perplexity before", "perplexity after")
    rows = []
    for run in tuned:
        before_and_after = _held_out_figures(run)
        for source, after in before_and_after.get("after", {}).items():
            before = before_and_after.get("before", {}).get(source, {})
            losses = [number(part.get("loss"), ".3f") for part in (before, after)]
            perplexities = [number(part.get("perplexity"), ".2f") for part in (before, after)]
            rows.append([text(run.label, "name"), text(source), number(after["tokens"], ","), *losses, *perplexities])
    charts = present([loss, _held_out(tuned)])
    return Section("sft", "Supervised fine-tuning", charts=charts, tables=[Table("Held-out loss", columns, rows)])


def made_data(runs: Sequence[RunFolder]) -> Section:
    """Which dialogues of Ghost Attention and which distilled answers were kept, and why others were not."""
    charts, rows = [], []
    for number_, run in enumerate(runs):
        if run.result is None or run.stage not in ("gatt", "distil"):
            continue
        is_gatt = run.stage == "gatt"
        kept = run.result["kept_by_kind" if is_gatt else "kept_by_category"]
        caption = (
            "A kind of instruction that is rarely kept is too hard for the model: its dialogues will be few."
            if is_gatt
            else "Where few are kept, the preprompt does not make safer answers: such prompts need another template."
        )
        charts.append(
            interval_chart(
                f"kept-{number_}",
                f"{run.label}: kept by {'kind of instruction' if is_gatt else 'category of prompt'}",
                caption,
                {name: {"kept": entry} for name, entry in kept.items()},
                x_label="share kept, with 95 % interval",
                percent=True,
            )
        )
        reasons = run.result.get("dropped") or {}
        left_out = counted(reasons)
        gain = interval(run.result.get("score_gain"), "+.2f")
        count = run.result["dialogues"] if is_gatt else run.result["prompts"]
        rows.append([text(run.label, "name"), text(run.stage), number(count), text(left_out or "–"), gain])
    columns = ("run", "stage", "dialogues or prompts", "left out", "safety score gained by the preprompt")
    table = Table("Made for training", columns, rows)
    return Section("made", "Ghost Attention and distillation data", charts=present(charts), tables=[table])


def _held_out(tuned: Sequence[RunFolder]) -> Chart | None:
    rows: dict[str, dict[str, Row]] = {}
    for run in tuned:
        for part, by_source in _held_out_figures(run).items():
            for source, figures in by_source.items():
                rows.setdefault(f"{run.label}: {source}", {})[part] = {"value": figures["loss"]}
    caption = "After should lie left of before for every source; one that moves right is being forgotten."
    return interval_chart("sft-held-out", "Held-out loss by source", caption, rows, x_label="loss (nats a token)")


def _held_out_figures(run: RunFolder) -> dict[str, Row]:
    """Of `before` and `after`, those that were measured: by source, loss, perplexity and tokens."""
    measured = (run.result or {}).get("valid_by_source") or {}
    return {part: by_source for part, by_source in measured.items() if by_source}
