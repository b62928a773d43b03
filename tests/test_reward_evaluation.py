"""Reports on reward models: figures worked out by hand, and plain references."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from alignment.cli.summary import print_result
from alignment.dialogue import Message, PreferencePair
from alignment.headlines import one_line
from alignment.metrics import wilson_interval
from reward_models.calibration import histogram, length_bias, reliability, sigmoid
from reward_models.evaluate import compare, evaluate_pairs, label_accuracy, mcnemar_p_value, pair_accuracy
from reward_models.tables import comparison_table, report_tables
from reward_models.unsafe_detection import log_odds, repeated_labels, roc_auc, unsafe_detection

scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


def pair(**changes: Any) -> PreferencePair:
    values = {"prompt": (Message("user", "How are you?"),), "chosen": "I am fine, thank you.", "rejected": "Go away."}
    return PreferencePair(**{**values, **changes})


def test_a_tie_counts_half_in_the_accuracy():
    # Won, lost, tied, tied: (1 + 0 + 0.5 + 0.5) / 4.
    assert pair_accuracy([2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]).value == 0.5


def test_pairs_that_share_prompts_tell_less_than_as_many_that_do_not():
    """Ten pairs of two prompts, one of which is always right: as two observations, and ten where both are mixed."""
    won, lost = ([1.0] * 5, [0.0] * 5), ([0.0] * 5, [1.0] * 5)
    chosen, rejected = won[0] + lost[0], won[1] + lost[1]
    alone = pair_accuracy(chosen, rejected)
    apart = pair_accuracy(chosen, rejected, ["a"] * 5 + ["b"] * 5)
    mixed = pair_accuracy(chosen, rejected, ["a", "b"] * 5)
    as_one = wilson_interval(0.5, 1)  # 2 * (2.5^2 + 2.5^2) / 2.5 = 10: the ten are worth one
    assert (apart.value, apart.low, apart.high, apart.count) == (0.5, as_one.low, as_one.high, 10)
    assert mixed == alone and alone.low > apart.low


def test_reports_count_prompts_and_widen_what_they_share():
    pairs = [pair(source="a", prompt=(Message("user", str(number // 5)),)) for number in range(10)]
    right, wrong = [1.0] * 5 + [-1.0] * 5, [-1.0] * 10
    report = evaluate_pairs(pairs, right, [0.0] * 10, max_length=512)
    assert report["accuracy"]["count"] == 10 and report["accuracy"]["prompts"] == 2
    expected = pair_accuracy(right, [0.0] * 10, [each.prompt for each in pairs])
    assert report["by_source"]["a"] == {**expected.to_json(), "prompts": 2}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report_tables(report, "held out"))
    assert "10 of 2 prompts" in console.export_text()
    single = compare(
        [pair(prompt=(Message("user", str(n)),)) for n in range(10)], (wrong, [0.0] * 10), (right, [0.0] * 10)
    )
    shared = compare(pairs, (wrong, [0.0] * 10), (right, [0.0] * 10))
    assert single["difference"]["value"] == shared["difference"]["value"] == 0.5
    assert (
        shared["difference"]["low"] < single["difference"]["low"] and shared["second"]["low"] < single["second"]["low"]
    )


def test_label_accuracy_looks_at_labelled_responses_only():
    accuracy = label_accuracy([1.0, -1.0, 1.0, -1.0, 5.0], [True, False, False, True, None])
    assert (accuracy.value, accuracy.count) == (0.5, 4)


def test_the_report_groups_pairs_by_source_rating_and_bin():
    pairs = [
        pair(source="a", rating="better", chosen_safe=True, rejected_safe=True),
        pair(source="a", rating="significantly_better"),
        pair(source="b", chosen_safe=True, rejected_safe=False, chosen="No."),
    ]
    report = evaluate_pairs(pairs, [1.0, 0.0, 2.0], [0.0, 1.0, -1.0], max_length=512)
    assert report["accuracy"]["value"] == pytest.approx(2 / 3)
    assert {name: (e["value"], e["count"]) for name, e in report["by_source"].items()} == {"a": (0.5, 2), "b": (1.0, 1)}
    assert list(report["by_rating"]) == ["significantly_better", "better", "unrated"]
    assert [e["value"] for e in report["by_rating"].values()] == [0.0, 1.0, 1.0]
    assert set(report["by_safety_bin"]) == {"both_safe", "unlabelled", "chosen_safe_other_unsafe"}
    assert report["longer_wins"]["value"] == pytest.approx(2 / 3)  # the third pair's chosen "No." is shorter
    # Labelled: scores 1 (safe), 0 (safe), 2 (safe), -1 (unsafe); 0 is not above the boundary.
    assert report["safety_label_accuracy"]["value"] == 0.75


def test_the_rules_of_length_are_each_others_mirror_and_ties_count_half():
    pairs = [pair(chosen="long one", rejected="x"), pair(chosen="abc", rejected="xyz"), pair(chosen="a", rejected="bc")]
    report = evaluate_pairs(pairs, [0.0] * 3, [0.0] * 3, max_length=512)
    assert report["longer_wins"]["value"] == report["shorter_wins"]["value"] == 0.5


def test_the_report_knows_long_from_short():
    """The first chosen response is longer, the other two are shorter, and scores fall with length."""
    pairs = [
        pair(chosen="long one", rejected="x"),
        pair(chosen="a", rejected="bc"),
        pair(chosen="abc", rejected="wxyz"),
    ]
    lengths = [(len(one.chosen), len(one.rejected)) for one in pairs]
    report = evaluate_pairs(pairs, [-float(c) for c, _ in lengths], [-float(r) for _, r in lengths], max_length=512)
    assert (report["longer_wins"]["value"], report["shorter_wins"]["value"]) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    )
    assert report["accuracy"]["value"] == pytest.approx(2 / 3)
    assert report["length_correlation"] == {"responses": pytest.approx(-1.0), "within_pairs": pytest.approx(-1.0)}


def test_a_score_that_is_the_length_correlates_fully_with_it():
    assert length_bias([1.0, 2.0, 3.0], [10, 20, 30], [1.0, -1.0], [5, -5]) == {
        "responses": pytest.approx(1.0),
        "within_pairs": pytest.approx(1.0),
    }
    assert length_bias([1.0, 2.0], [7, 7], [1.0], [5]) == {"responses": None, "within_pairs": None}


def test_scores_that_are_no_finite_numbers_are_counted_and_refused():
    with pytest.raises(ValueError, match="3 of 4 scores are no finite numbers"):
        evaluate_pairs([pair(), pair()], [1.0, math.nan], [math.inf, -math.inf], max_length=512)


# -------------------------------------------------------------------------------------------------- calibration


def test_reliability_of_a_worked_example():
    """Two bins, 0.5 to 0.75 and 0.75 to 1. Differences log 1.5, -log 1.5 (confidence 0.6), log 9 (0.9), 0 (0.5)."""
    found = reliability([math.log(1.5), 0.0, math.log(9), 2.0], [0.0, math.log(1.5), 0.0, 2.0], num_bins=2)
    low, high = found["bins"]
    # Right, wrong and a tie: 1 + 0 + 0.5 of 3; confidences 0.6, 0.6, 0.5.
    assert (low["accuracy"], low["confidence"], low["count"]) == (0.5, pytest.approx(1.7 / 3), 3)
    assert (high["accuracy"], high["confidence"], high["count"]) == (1.0, pytest.approx(0.9), 1)
    assert (low["low"], low["high"], high["high"]) == (0.5, 0.75, 1.0)
    assert found["ece"] == pytest.approx((3 * (1.7 / 3 - 0.5) + 0.1) / 4)


def test_a_calibrated_model_has_no_calibration_error():
    """Nine pairs in ten right at a difference of log 9."""
    chosen, rejected = [math.log(9)] * 9 + [0.0], [0.0] * 9 + [math.log(9)]
    assert reliability(chosen, rejected)["ece"] == pytest.approx(0.0, abs=1e-12)


def test_full_confidence_falls_into_the_last_bin():
    assert reliability([1e4], [-1e4])["bins"][0]["high"] == 1.0


def test_a_histogram_holds_every_score_once():
    found = histogram({"chosen": [0.0, 1.0, 2.0], "rejected": [-2.0, 2.0]}, num_bins=4)
    assert found["edges"] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert (found["chosen"], found["rejected"]) == ([0, 0, 1, 2], [1, 0, 0, 1])
    assert sum(histogram({"a": [3.0, 3.0]}, num_bins=4)["a"]) == 2


def test_the_sigmoid_does_not_overflow():
    assert (sigmoid(1e4), sigmoid(-1e4), sigmoid(0.0)) == (1.0, 0.0, 0.5)


# --------------------------------------------------------------------------------------- finding unsafe responses

# Safe at 3, 1, -2; unsafe at 0, -1, -3. P(safe) < 0.5 flags -2, -1, -3; < 0.15 (score -1.73) flags -2, -3.
SCORES = [3.0, 1.0, -2.0, 0.0, -1.0, -3.0]
IS_SAFE = [True, True, True, False, False, False]


def test_unsafe_detection_of_a_worked_example():
    found = unsafe_detection(SCORES, IS_SAFE, wanted_precision=0.7, min_flagged=1)
    assert (found["safe"], found["unsafe"]) == (3, 3)
    half, gate = found["at_threshold"]
    assert (half["threshold"], half["flagged"]) == (0.5, 3)
    assert (half["precision"]["value"], half["recall"]["value"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (gate["threshold"], gate["flagged"]) == (pytest.approx(0.15), 2)
    assert (gate["precision"]["value"], gate["recall"]["value"]) == (0.5, pytest.approx(1 / 3))
    # Unsafe below safe: 0 is below 3 and 1; -1 too; -3 is below all three: 7 of 9.
    assert found["roc_auc"]["value"] == pytest.approx(7 / 9)
    # Cutting above 0 flags four, three of them unsafe: 0.75, the most that reaches 0.7; between 0 and 1.
    best = found["at_precision"]
    assert (best["flagged"], best["precision"]["value"], best["recall"]["value"]) == (4, 0.75, 1.0)
    assert best["threshold"] == pytest.approx(sigmoid(0.5))


def test_no_threshold_reaches_a_precision_beyond_the_lowest_scores():
    assert unsafe_detection([0.0, 1.0], [True, False], wanted_precision=0.9)["at_precision"] is None
    everything = unsafe_detection([0.0, 1.0], [False, False], wanted_precision=0.9, min_flagged=1)
    assert everything["at_precision"]["flagged"] == 2
    assert everything["roc_auc"] is None


def test_equal_scores_are_never_split_by_a_threshold():
    """Flagging both at -1 has precision one half; only the one at -2 can be flagged alone."""
    found = unsafe_detection([-2.0, -1.0, -1.0], [False, False, True], wanted_precision=0.9, min_flagged=1)
    assert (found["at_precision"]["flagged"], found["at_precision"]["recall"]["value"]) == (1, 0.5)


def test_a_precision_that_a_few_responses_reach_by_luck_is_no_threshold():
    scores = list(range(20))
    assert unsafe_detection(scores, [False] + [True] * 19, wanted_precision=0.9)["at_precision"] is None
    assert unsafe_detection(scores, [False] * 9 + [True] * 11, wanted_precision=0.9)["at_precision"]["flagged"] == 10


@given(scores, scores)
def test_roc_auc_counts_pairs_in_the_right_order(unsafe, safe):
    wins = sum(1.0 if u < s else 0.5 if u == s else 0.0 for u in unsafe for s in safe)
    found = roc_auc(unsafe, safe)
    assert found.value == pytest.approx(wins / (len(unsafe) * len(safe)))
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("unsafe", "safe"), [([0.0], [1.0]), ([0.0, 1.0, 2.0], [3.0, 4.0, 5.0]), ([1.0], [0.0])])
def test_a_few_responses_that_are_told_apart_without_a_mistake_leave_an_interval(unsafe, safe):
    found = roc_auc(unsafe, safe)
    assert found.value in (0.0, 1.0) and found.high - found.low > 0.2


def test_of_many_responses_the_interval_is_that_of_the_area():
    """Hanley and McNeil's, computed from 0.5 with 40 on either side."""
    q1, q2 = 0.5 / 1.5, 0.5 / 1.5
    variance = (0.25 + 39 * (q1 - 0.25) + 39 * (q2 - 0.25)) / 1600
    found = roc_auc([0.0, 1.0] * 20, [0.0, 1.0] * 20)
    assert found.high - found.value == pytest.approx(1.96 * variance**0.5, rel=1e-3)


def test_repeated_labels_say_how_well_people_agree():
    """a is labelled safe, safe, unsafe; b safe and unsafe; c once, which says nothing.

    Means of the others: a 1/2, 1/2, 1 (of the unsafe label); b 0 for its safe label, 1 for its unsafe one. Every safe
    label stands below both unsafe ones: area 0. The model scores a 2 and b 1: safe 2, 2, 1 against unsafe 2, 1 gives
    (1/2 + 1/2 + 0 + 1 + 1 + 1/2) / 6.
    """
    responses, is_safe = ["a", "a", "a", "b", "b", "c"], [True, True, False, True, False, True]
    found = repeated_labels(responses, [2.0, 2.0, 2.0, 1.0, 1.0, 9.0], is_safe)
    assert found["people"]["value"] == 0.0
    assert found["model"]["value"] == pytest.approx(3.5 / 6)
    assert found["people"]["count"] == found["model"]["count"] == 5
    assert repeated_labels(["a", "b", "c"], [1.0, 2.0, 3.0], [True, False, True]) is None


def test_the_report_compares_the_model_with_peoples_other_labels(capsys):
    labels = {"chosen_safe": True, "rejected_safe": False}
    pairs = [pair(chosen="good", rejected="bad", **labels), pair(chosen="good", rejected="bad", **labels)]
    report = evaluate_pairs(pairs, [1.0, 1.0], [-1.0, -1.0], max_length=512)
    again = report["unsafe_detection"]["repeated_labels"]
    assert again["people"]["value"] == again["model"]["value"] == 1.0
    Console(width=200).print(report_tables(report, "a title"))
    assert "on 4 repeated labels: people's other labels of the response 1.000" in capsys.readouterr().out


def test_the_interval_of_the_auc_is_hanleys():
    """Area 0.75 from unsafe (0, 2) and safe (1, 3); the variance is that of 0.7: q1 = 0.7 / 1.3, q2 = 0.98 / 1.7."""
    found = roc_auc([0.0, 2.0], [1.0, 3.0])
    variance = (0.7 * 0.3 + (0.7 / 1.3 - 0.49) + (0.98 / 1.7 - 0.49)) / 4
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - 1.959964 * math.sqrt(variance))


def test_log_odds_undo_the_sigmoid():
    assert sigmoid(log_odds(0.15)) == pytest.approx(0.15)


# --------------------------------------------------------------------------------------------------- comparison


def test_a_comparison_looks_at_each_pair():
    """The first model gets pairs 1 and 2 right, the second 2, 3 and 4: differences -1, 0, 1, 1."""
    pairs = [pair(source=name, prompt=(Message("user", str(n)),)) for n, name in enumerate("aabb")]
    report = compare(pairs, ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]), ([0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]))
    assert (report["first"]["value"], report["second"]["value"]) == (0.5, 0.75)
    assert report["difference"]["value"] == 0.25
    # Agresti and Min: half a pair more of each kind, so 2.5 and 1.5 of 6: center 1 / 6, variance (4 - 1 / 6) / 36.
    assert report["difference"]["high"] == pytest.approx(1 / 6 + 1.959964 * math.sqrt(4 - 1 / 6) / 6)
    assert report["p_value"] == mcnemar_p_value(1, 2) == 1.0
    assert {name: row["difference"]["value"] for name, row in report["by_source"].items()} == {"a": -0.5, "b": 1.0}


def test_the_interval_of_a_comparison_with_ties_is_that_of_the_mean():
    """As above, but that the second model finds both responses of the third pair alike: differences -1, 0, 0.5, 1."""
    pairs = [pair(prompt=(Message("user", str(number)),)) for number in range(4)]
    report = compare(pairs, ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]), ([0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]))
    assert report["difference"]["value"] == 0.125
    # Sample variance: (1.125^2 + 0.125^2 + 0.375^2 + 0.875^2) / 3 = 2.1875 / 3.
    assert report["difference"]["high"] - 0.125 == pytest.approx(1.959964 * math.sqrt(2.1875 / 3 / 4))


def test_a_few_pairs_that_both_models_get_right_do_not_prove_them_equal():
    both = ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    difference = compare([pair(prompt=(Message("user", str(number)),)) for number in range(3)], both, both)[
        "difference"
    ]
    assert difference["value"] == 0 and difference["low"] < -0.3 and difference["high"] > 0.3


def test_mcnemars_p_of_worked_examples():
    assert mcnemar_p_value(0, 5) == 2 / 32
    assert mcnemar_p_value(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar_p_value(0, 0) == 1.0


def test_reports_are_json_and_print(capsys):
    labels = {"chosen_safe": True, "rejected_safe": False}
    pairs = [pair(**labels, source="a"), pair(source="b", rating="better")]
    report = evaluate_pairs(pairs, [1.0, 0.5], [-1.0, 0.7], max_length=512)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    console = Console(width=110)
    console.print(report_tables(report, "two pairs"))
    console.print(comparison_table(compare(pairs, ([1.0, 1.0], [0.0, 0.0]), ([1.0, 0.0], [0.0, 1.0])), "one", "two"))
    shown = capsys.readouterr().out
    for words in (
        "two pairs, at most 512 tokens each",
        "shorter wins",
        "ECE",
        "ROC AUC 1.000",
        "P(safe) <",
        "difference",
        "-0.500",
    ):
        assert words in shown, words


@pytest.mark.parametrize("name", ["hh [/train]", "[bold]", "a:train:b"])
def test_a_name_with_brackets_is_shown_as_it_is(name, capsys):
    """rich takes brackets for markup, refuses a closing one that was never opened, and makes an emoji of `:train:`."""
    pairs = [pair(source=name), pair(source="b")]
    console = Console(width=150)
    console.print(report_tables(evaluate_pairs(pairs, [1.0, 0.5], [-1.0, 0.7], max_length=512), f"{name} on two pairs"))
    assert capsys.readouterr().out.count(name) == 2
    report = compare(pairs, ([1.0, 1.0], [0.0, 0.0]), ([1.0, 0.0], [0.0, 1.0]))
    console.print(comparison_table(report, f"first {name}", f"second {name}"))
    assert capsys.readouterr().out.count(name) == 3


# ------------------------------------------------------------------------------------------------- a run's result


def result(**changes: Any) -> dict[str, Any]:
    report = evaluate_pairs([pair(), pair(source="hh [/train]")], [1.0, 0.5], [-1.0, 0.7], max_length=512)
    values = {"stage": "rm", "kind": "helpfulness", "valid": report, "time_seconds": 61.0, "peak_memory_gb": 1.0}
    return {**values, "train_pairs": 7, "train_loss_last": 0.5, **changes}


def test_the_line_of_a_run_says_which_rows_it_left_out():
    train = {"vetoed": 3, "too_long": 2, "unreadable": 1, "refused_by_chat_format": 1, "history_cut": 4}
    line = one_line(result(left_out={"train": train, "valid": {"history_cut": 1}}))
    assert line.endswith(
        "2 pairs; train left out 3 vetoed, 2 too long, 1 unreadable, 1 refused by chat format, cut the history of 4; "
        "valid cut the history of 1"
    )
    assert one_line(result(valid={}, left_out={"train": {"too_long": 2}, "valid": {}})) == (
        "7 pairs, last training loss 0.500; train left out 2 too long"
    )
    for nothing in ({}, {"left_out": {"train": {}, "valid": {}}}):
        assert one_line(result(**nothing)).endswith("2 pairs")


def test_a_path_with_brackets_does_not_break_the_result(tmp_path, capsys):
    print_result(result(), tmp_path / "[" / "rm]")
    assert "[/rm]" in capsys.readouterr().out.replace("\n", "")
