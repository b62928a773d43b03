"""What the report says: every number of a result under its own name, and the same numbers in the figures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_folders import policy_figures, write_run

from alignment.report import evaluation, fine_tuning, overview, ppo, rejection, reward_models
from alignment.report.elements import Table
from alignment.report.reading import read_runs


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict[str, Any]]:
    """What the figures would draw, by the figure's name: its data, its caption and its labels."""
    found: dict[str, dict[str, Any]] = {}
    for section in (evaluation, fine_tuning, overview, ppo, rejection, reward_models):
        for kind in ("bar_chart", "curve_chart", "interval_chart", "path_chart", "histogram_chart", "scatter_chart"):

            def draw(name, title, caption, *data, **labels):
                found[name] = {"data": data, "caption": caption, **labels}

            if hasattr(section, kind):
                monkeypatch.setattr(section, kind, draw)
    return found


def runs_of(*folders: Path) -> list:
    return read_runs(folders)


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "count": 10}


def shown(table: Table) -> dict[str, dict[str, str]]:
    """The table's cells by the first column's text and the column's name."""
    return {
        row[0].text: {name: cell.text for name, cell in zip(table.columns[1:], row[1:], strict=True)}
        for row in table.rows
    }


def curves_of(figure: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """A figure's lines, x and y by label; the pale ones behind smoothed lines are left out."""
    [curves] = figure["data"]
    return {curve.label: (list(curve.x), list(curve.y)) for curve in curves if not curve.pale}


def test_the_overview_has_time_and_memory_of_every_run(tmp_path, drawn):
    result = {"valid_loss_before": 2.0, "valid_loss_after": 1.0}
    write_run(tmp_path / "runs" / "a", "sft", {**result, "time_seconds": 75.0, "peak_memory_gb": 1.5})
    write_run(tmp_path / "runs" / "b", "sft", {**result, "time_seconds": 7200.0, "peak_memory_gb": 3.0})
    runs = runs_of(tmp_path / "runs")
    [table] = overview.section(runs).tables
    same = {
        "stage": "sft", "status": "finished", "result": "held-out loss 2.000 -> 1.000", "seed": "3",
        "started": "2026-11-26 10:00",
    }  # fmt: skip
    assert shown(table) == {
        "a": {**same, "time": "1:15", "peak memory": "1.5 GB"},
        "b": {**same, "time": "120:00", "peak memory": "3.0 GB"},
    }
    assert drawn["time"]["data"] == ({"a": 1.25, "b": 120.0},) and drawn["time"]["x_label"] == "minutes"
    assert drawn["memory"]["data"] == ({"a": 1.5, "b": 3.0},) and drawn["memory"]["x_label"] == "GB"
    in_all = ("time in all", "2 h 1 min")  # 7275 seconds
    assert overview.facts(runs) == [("runs finished", "2 of 2"), in_all, ("peak memory", "3.0 GB")]


@pytest.mark.parametrize(
    ("seconds", "unit", "bar"), [(299.0, "seconds", 299.0), (300.0, "minutes", 5.0), (10800.0, "hours", 3.0)]
)
def test_times_are_drawn_in_the_unit_of_the_longest(tmp_path, drawn, seconds, unit, bar):
    runs = runs_of(write_run(tmp_path / "run", "sft", {"time_seconds": seconds}))
    overview.section(runs)
    assert (drawn["time"]["data"], drawn["time"]["x_label"]) == (({"run": bar},), unit)


@pytest.fixture
def evaluated(tmp_path) -> Path:
    """Three policies, in whose results no number occurs twice."""
    numbers = iter(range(1, 100))
    policies = {}
    for name in ("base", "sft", "ppo"):
        names = [key for key in policy_figures() if key not in ("truncated_rate", "mean_words")]
        others = ("guard", "guard_gain", "reward_gain_ended", "guard_gain_ended")
        row = {key: estimate(next(numbers) / 100) for key in [*names, *others]}
        row |= {"truncated_rate": next(numbers) / 100, "mean_words": next(numbers), "distinct_2": next(numbers) / 100}
        policies[name] = row | {"over_previous": {key: estimate(next(numbers) / 100) for key in OVER_PREVIOUS}}
    return write_run(tmp_path / "eval", "eval", {"prompts": 7, "policies": policies})


OVER_PREVIOUS = {
    "reward_gain": "reward gained over the one before",
    "guard_gain": "guard gained over the one before",
    "reward_gain_ended": "reward gained, both ended over the one before",
    "guard_gain_ended": "guard gained, both ended over the one before",
}
SIGNED = {
    "helpfulness": "helpfulness", "safety": "safety", "reward": "gated reward", "guard": "guard",
    "reward_gain": "reward gained", "guard_gain": "guard gained",
    "reward_gain_ended": "reward gained, both ended", "guard_gain_ended": "guard gained, both ended",
}  # fmt: skip
SHARES = {
    "win_rate": "wins", "safety_win_rate": "safer, on safety prompts", "violation_rate": "unsafe, on safety prompts",
    "refusal_rate": "refusals, on safety prompts", "false_refusal_rate": "false refusals, on others",
}  # fmt: skip


def test_an_evaluation_is_tabled_under_the_names_of_what_was_measured(evaluated, drawn):
    [run] = runs_of(evaluated)
    [table] = evaluation.section([run]).tables
    for name, cells in shown(table).items():
        row = run.result["policies"][name]
        expected = {label: f"{row[key]['value']:+.2f}" for key, label in SIGNED.items()}
        expected |= {label: f"{row['over_previous'][key]['value']:+.2f}" for key, label in OVER_PREVIOUS.items()}
        expected |= {label: f"{row[key]['value']:.0%}" for key, label in SHARES.items()}
        expected |= {
            "KL": f"{row['kl']['value']:.1f}",
            "cut off": f"{row['truncated_rate']:.0%}",
            "words": f"{row['mean_words']}",
            "distinct-2": f"{row['distinct_2']:.2f}",
        }
        assert cells == expected, name


def test_an_evaluation_is_drawn_as_it_is_tabled(evaluated, drawn):
    [run] = runs_of(evaluated)
    evaluation.section([run])
    policies = run.result["policies"]
    scores, rates, gains = (drawn[f"policies-{name}-{run.label_id}"] for name in ("scores", "rates", "gains"))
    for figure, keys in ((scores, ("helpfulness", "safety", "reward", "guard")), (rates, SHARES)):
        [rows] = figure["data"]
        labels = {key: {**SIGNED, **SHARES}[key] for key in keys}
        assert rows == {label: {name: row[key] for name, row in policies.items()} for key, label in labels.items()}
    assert "KL" in gains["x_label"] and "gain" in gains["y_label"]
    [paths] = gains["data"]
    for (label, kl, gain, names, _), (key, expected) in zip(
        paths, (("reward_gain", "gated reward"), ("guard_gain", "guard")), strict=True
    ):
        assert label == expected
        assert kl == [0.0, *(row["kl"]["value"] for row in policies.values())]
        assert gain == [0.0, *(row[key]["value"] for row in policies.values())]
        assert names == ["base", *policies]


def test_adherence_is_drawn_by_turn_for_every_policy(tmp_path, drawn):
    policies = {
        name: {"by_turn": [estimate(0.1 * turn + place) for turn in range(3)], "by_kind": {}, "gain": {}}
        for place, name in enumerate(("before", "with"))
    }
    result = {"kind": "gatt", "dialogues": 5, "report_turns": [1, 3], "policies": policies}
    [run] = runs_of(write_run(tmp_path / "memory", "eval", result))
    section = evaluation.ghost_attention([run])
    curves = curves_of(drawn[f"adherence-{run.label_id}"])
    assert curves == {name: ([1, 2, 3], [entry["value"] for entry in row["by_turn"]]) for name, row in policies.items()}
    assert section.tables


def test_the_potential_and_the_temperatures_are_those_of_the_round(tmp_path, drawn):
    temperatures = {"0.6": {"best": estimate(3.5)}, "1": {"best": estimate(3.9)}}
    result = {"prompts": 11, "candidates": 88, "kept": 10, "temperature": 1.0, "temperatures": temperatures}
    kinds = ("mean_reward", "mean_best_reward", "gain_over_median", "gain_over_baseline")
    result |= {key: estimate(place + 1) for place, key in enumerate(kinds)}
    folder = write_run(tmp_path / "reject", "reject", result)
    curve = {"n": [1, 2, 4], "best": [estimate(n) for n in (3.0, 3.2, 3.4)], "median": [estimate(2.5)] * 3}
    (folder / "potential.json").write_text(json.dumps(curve))
    [run] = runs_of(folder)
    [table] = rejection.section([run]).tables
    assert shown(table)[run.label] == {
        "prompts": "11", "candidates": "88", "kept": "10", "temperature": "1", "mean reward": "+1.00",
        "best of each prompt": "+2.00", "gain over the median": "+3.00", "gain over the baseline": "+4.00",
    }  # fmt: skip
    assert curves_of(drawn["potential"]) == {
        f"{run.label}: best of N": ([1, 2, 4], [3.0, 3.2, 3.4]),
        f"{run.label}: median of N": ([1, 2, 4], [2.5, 2.5, 2.5]),
    }
    assert curves_of(drawn["temperatures"]) == {f"{run.label} (chosen: 1)": ([0.6, 1.0], [3.5, 3.9])}


def test_rounds_beside_each_other_say_when_they_compare(tmp_path, drawn):
    curve = {"n": [1], "best": [estimate(1.0)], "median": [estimate(1.0)]}
    for name in ("one", "two"):
        folder = write_run(tmp_path / "runs" / name, "reject", {"prompts": 1})
        (folder / "potential.json").write_text(json.dumps(curve))
    runs = runs_of(tmp_path / "runs")
    rejection.section(runs[:1])
    assert "compare" not in drawn["potential"]["caption"]
    rejection.section(runs)
    assert "compare where their prompts, temperature and reward models" in drawn["potential"]["caption"]


def test_the_path_of_a_run_that_diverged_ends_with_its_last_figures(tmp_path, drawn):
    rows = [{"step": step, "ppo/kl_k3": 2.0 * step, "ppo/reward": float(step)} for step in range(1, 40)]
    rows.append({"step": 40, "ppo/kl_k3": math.nan, "ppo/reward": math.nan})
    [run] = runs_of(write_run(tmp_path / "ppo", "ppo", metrics=rows))
    ppo.section([run])
    [(_, kl, reward, texts, _)] = drawn["ppo-frontier"]["data"][0]
    # Means over five: at the start of iterations 1, 2 and 3, at the end of 37, 38 and 39.
    assert (reward[0], reward[-1], kl[0], kl[-1]) == (2.0, 38.0, 4.0, 76.0)
    assert len(kl) == len(reward) == 39 and all(map(math.isfinite, [*kl, *reward]))
    assert (texts[0], texts[-1]) == ("start", "iteration 39")
    assert drawn["ppo-frontier"]["caption"].endswith(" Points are moving means over 5 iterations.")


def test_ppo_is_tabled_and_drawn_from_its_figures(tmp_path, drawn):
    names = sorted({metric for plot in ppo._PLOTS for metric in plot.metrics})
    rows = [
        {"step": step, "stage": "ppo", **{name: 100 * place + step for place, name in enumerate(names)}}
        for step in (1, 2, 3)
    ]
    held_out = {"reward_gain": estimate(0.5), "guard_gain": estimate(-0.25)}
    held_out |= {"reward_gain_ended": estimate(0.4), "guard_gain_ended": estimate(-0.15)}
    result = {
        "iterations": 3, "reward_first": 1.0, "reward_last": 2.0, "kl": 6.5, "held_out": held_out,
        "saved_iteration": 2, "alarms": {"kl": 3},
    }  # fmt: skip
    [run] = runs_of(write_run(tmp_path / "ppo", "ppo", result, metrics=rows))
    [table] = ppo.section([run]).tables
    assert shown(table)[run.label] == {
        "iterations": "3", "reward, first quarter": "+1.00", "reward, last quarter": "+2.00", "KL at the end": "6.50",
        "held-out reward gained": "+0.50", "guard gained": "-0.25", "held-out reward gained, both ended": "+0.40",
        "guard gained, both ended": "-0.15", "saved iteration": "2", "alarms": "kl at 3",
    }  # fmt: skip
    for plot in ppo._PLOTS:
        curves = curves_of(drawn[f"ppo-{plot.name}"])
        assert curves == {
            label: ([1, 2, 3], [row[metric] for row in rows]) for metric, label in plot.metrics.items()
        }, plot.name
    [path] = drawn["ppo-frontier"]["data"][0]
    assert path[1:4] == (
        [row["ppo/kl_k3"] for row in rows], [row["ppo/reward"] for row in rows], ["start", "", "iteration 3"],
    )  # fmt: skip


def test_held_out_losses_are_those_before_and_after(tmp_path, drawn):
    def part(loss: float) -> dict:
        return {"hh": {"loss": loss, "perplexity": 10 * loss, "tokens": 1234}}

    [run] = runs_of(write_run(tmp_path / "sft", "sft", {"valid_by_source": {"before": part(2.5), "after": part(1.5)}}))
    [table] = fine_tuning.section([run]).tables
    assert shown(table)[run.label] == {
        "source": "hh", "tokens": "1,234", "loss before": "2.500", "loss after": "1.500",
        "perplexity before": "25.00", "perplexity after": "15.00",
    }  # fmt: skip
    [rows] = drawn["sft-held-out"]["data"]
    assert rows == {f"{run.label}: hh": {"before": {"value": 2.5}, "after": {"value": 1.5}}}


def test_a_reward_model_is_tabled_and_drawn_from_what_was_held_out(tmp_path, drawn):
    bins = [{"accuracy": 0.6, "confidence": 0.55, "count": 100}, {"accuracy": 0.9, "confidence": 0.8, "count": 10}]
    point = {"threshold": 0.15, "precision": estimate(0.8), "recall": estimate(0.3), "flagged": 17}
    valid = {
        "pairs": 1200, "accuracy": estimate(0.66), "safety_label_accuracy": estimate(0.77),
        "longer_wins": estimate(0.58),
        "length_correlation": {"within_pairs": 0.43}, "calibration": {"ece": 0.04, "bins": bins},
        "mean_chosen": 1.25, "mean_rejected": -0.75,
        "by_rating": {"better": estimate(0.7), "slightly_better": estimate(0.5)},
        "by_source": {"hh": estimate(0.61)}, "by_safety_bin": {"unlabelled": estimate(0.62)},
        "histogram": {"edges": [0, 1, 2], "chosen": [1, 2], "rejected": [2, 1]},
        "unsafe_detection": {"roc_auc": estimate(0.73), "at_threshold": [point]},
    }  # fmt: skip
    scores = [
        {"chosen": [{"role": "assistant", "content": "x" * 9}], "rejected": [{"role": "assistant", "content": "x" * 4}],
         "score_chosen": 1.5, "score_rejected": -0.5}
    ]  # fmt: skip
    [run] = runs_of(write_run(tmp_path / "rm", "rm", {"valid": valid}, held_out_scores=scores))
    (run.path / "held-out-scores.jsonl").rename(run.path / "held_out_scores.jsonl")
    agreement, unsafe = reward_models.section([run]).tables
    assert shown(agreement)[run.label] == {
        "pairs": "1,200", "accuracy": "66.0%", "safety label right": "77.0%", "longer wins": "58.0%",
        "correlation with length, within pairs": "+0.43", "calibration error": "0.040", "mean of chosen": "+1.25",
        "mean of rejected": "-0.75",
    }  # fmt: skip
    assert shown(unsafe)[run.label] == {
        "ROC AUC": "0.730", "flagged below P(safe)": "0.150", "precision": "80.0%", "recall": "30.0%", "flagged": "17",
    }  # fmt: skip
    assert drawn["rm-accuracy"]["data"] == ({"all held-out pairs": {run.label: valid["accuracy"]}},)
    assert drawn["rm-by-rating"]["data"] == (
        {name.replace("_", " "): {run.label: entry} for name, entry in valid["by_rating"].items()},
    )
    assert "rm-by-safety-bin" not in drawn, "no pair says what it is"
    calibration = curves_of(drawn["rm-calibration"])
    assert calibration[f"{run.label} (error 0.040)"] == ([0.55, 0.8], pytest.approx([0.6, 0.9]))
    assert drawn[f"scores-{run.label_id}"]["data"] == ([0, 1, 2], {"chosen": [1, 2], "rejected": [2, 1]})
    assert drawn[f"length-{run.label_id}"]["data"] == ({"chosen": ([9], [1.5]), "rejected": ([4], [-0.5])},)
