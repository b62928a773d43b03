"""The report: run folders as data, figures as themed SVG, and text of models that never becomes markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import ENTRY, policy_figures, write_run

from alignment.errors import DataError, RunError
from alignment.manifests import mark_outdated
from alignment.report import answers, inputs, overview
from alignment.report.charts import Curve, curve_chart, interval_chart, smoothed
from alignment.report.drawing import PALETTE, short, shortened, style_of
from alignment.report.elements import interval
from alignment.report.page import MARK, write_report
from alignment.report.reading import distinct_labels, read_rows, read_runs

ATTACK = '</p></script><script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" ${7*7} {{ 7*7 }} \x00\ud800'


def edit_manifest(folder: Path, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_evaluation(folder: Path, texts: dict[str, str], rewards: dict[str, float]) -> Path:
    """An evaluation of policies that gave one answer each to one safety prompt."""
    policies = {name: policy_figures() for name in texts}
    rows = {
        f"answers-{name}": [
            {
                "prompt": [{"role": "user", "content": "first"}, {"role": "user", "content": ATTACK}],
                "is_safety": True,
                "source": ATTACK,
                "response": [{"role": "assistant", "content": text}],
                "reward": rewards[name],
            }
        ]
        for name, text in texts.items()
    }
    run = write_run(folder, "eval", {"prompts": 1, "policies": policies}, **rows)
    edit_manifest(run, settings={"policies": {name: {} for name in texts}})
    return run


SFT = {
    "valid_loss_before": 2.0,
    "valid_loss_after": 1.0,
    "valid_by_source": {
        "before": {"s": {"loss": 2.0, "perplexity": 7.4, "tokens": 5}},
        "after": {"s": {"loss": 1.0, "perplexity": 2.7, "tokens": 5}},
    },
}


class Tags(HTMLParser):
    """All tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# Reading


def test_a_folder_of_runs_is_read_in_the_pipelines_order_else_as_its_stages_began(tmp_path):
    write_run(tmp_path / "runs" / "b", "sft", SFT)
    write_run(tmp_path / "runs" / "a", "reject")
    (tmp_path / "runs" / "no-run").mkdir()
    assert [run.name for run in read_runs([tmp_path / "runs"])] == ["b", "a"]  # :3 before :6
    (tmp_path / "runs" / "summary.json").write_text('{"a": {}, "b": {}}')
    runs = read_runs([tmp_path / "runs", tmp_path / "runs" / "b"])
    pipeline = (tmp_path / "runs").resolve()
    assert [(run.label, run.pipeline) for run in runs] == [("a", pipeline), ("b", pipeline)]


def test_labels_are_the_shortest_tails_that_tell_paths_apart():
    assert distinct_labels([("r", "one", "sft"), ("r", "two", "ppo")]) == ["sft", "ppo"]
    assert distinct_labels([("r", "one", "sft"), ("r", "two", "sft")]) == ["one/sft", "two/sft"]


def test_an_unfinished_run_has_no_result_and_may_end_in_half_a_row(tmp_path):
    run_folder = write_run(
        tmp_path / "sft", "sft", metrics=[{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": 1.5}]
    )
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "sft/lo')
    (run_folder / "result.json").write_text("{}")  # written, but the run was not marked finished
    [run] = read_runs([run_folder])
    assert run.result is None
    assert run.series("sft/loss") == ([1, 2], [2.0, 1.5])
    assert overview.warnings([run]) == [("sft", "Unfinished (step 2): its figures are those written so far.")]
    page = write_report([run_folder]).read_text()
    assert "unfinished (step 2)" in page and 'id="sft-loss"' in page


def test_an_outdated_run_is_shown_with_its_figures_of_before(tmp_path):
    folder = write_run(tmp_path / "eval", "eval", {"prompts": 1, "policies": {"rs": policy_figures()}})
    mark_outdated(folder)
    [run] = read_runs([folder])
    [(label, sentence)] = overview.warnings([run])
    assert label == "eval" and sentence.startswith("Outdated: ")
    assert overview.facts([run])[0] == ("runs finished", "0 of 1")
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "policies on 1 held-out prompts" in page and ">outdated<" in page and "Unfinished" not in page


def test_a_result_without_some_figures_is_shown_without_them(tmp_path):
    run = write_run(tmp_path / "sft", "sft", SFT)
    (run / "result.json").write_text('{"stage": "sft"}')
    runs = read_runs([run])
    assert overview.facts(runs) == [("runs finished", "1 of 1"), ("time in all", "0:00 min"), ("peak memory", "–")]
    [table] = overview.section(runs).tables
    cells = [cell.text for cell in table.rows[0][2:6]]
    assert cells == ["finished", "its result has no 'valid_loss_before'", "–", "–"]
    assert 'id="overview"' in write_report([run]).read_text(encoding="utf-8")
    (run / "result.json").write_text('{"stage": "sft", "valid_loss_before": 2.0, "valid_loss_after": null}')
    assert overview.section(read_runs([run])).tables[0].rows[0][3].text == "one of its figures is no number"
    stopped = read_runs([write_run(tmp_path / "ppo", "ppo", {"stopped": "kl"})])
    assert overview.warnings(stopped) == [("ppo", "Stopped early (kl) at iteration unknown.")]
    gained = {"reward_gain": ENTRY, "reward_gain_ended": {"value": 0.0, "low": -0.1, "high": 0.1, "count": 4}}
    evaluated = read_runs([write_run(tmp_path / "eval", "eval", {"policies": {"base": {}, "ppo": gained}})])
    assert overview.warnings(evaluated) == []


def test_only_paths_below_the_runs_folder_lose_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/sft"), "sft", SFT)
    [run] = read_runs([Path("runs/sft")])
    shown = {
        "runs/rm/model": "rm/model", '["runs/a.jsonl", "b"]': '["a.jsonl", "b"]', "my-runs/a.jsonl": "my-runs/a.jsonl",
        "/data/runs/other/rm": "/data/runs/other/rm", f"{tmp_path}/runs/rm": "rm",
    }  # fmt: skip
    assert {value: inputs._relative(value, run) for value in shown} == shown


@pytest.mark.parametrize(
    ("ended", "cut_off", "is_doubted"),
    [((-0.2, 0.2), 0.3, True), ((-0.4, -0.1), 0.3, True), ((0.1, 0.3), 0.3, False), ((-0.2, 0.2), 0.75, False)],
)
def test_a_gain_that_may_be_of_answers_no_longer_cut_off_is_pointed_out(tmp_path, ended, cut_off, is_doubted):
    """A gain in reward that is not there where both answers ended, of a policy that ends more of its answers."""
    low, high = ended
    gained = {"value": 0.5, "low": 0.3, "high": 0.7, "count": 9}
    rest = {"value": (low + high) / 2, "low": low, "high": high, "count": 4}
    first = policy_figures() | {"truncated_rate": 0.8}
    ppo = policy_figures() | {"truncated_rate": cut_off, "reward_gain": gained, "reward_gain_ended": rest}
    result = {"prompts": 9, "policies": {"sft": first, "ppo": ppo}}
    found = overview.warnings(read_runs([write_run(tmp_path / "eval", "eval", result)]))
    assert [sentence.startswith("ppo and the first policy differ") for _, sentence in found] == [True] * is_doubted


def test_numbers_that_are_none_are_left_out_of_curves(tmp_path):
    rows = [{"step": 1, "x": float("nan")}, {"step": 2, "x": True}, {"step": 3, "x": 4}, {"step": 4, "y": 1}]
    [run] = read_runs([write_run(tmp_path / "run", "ppo", metrics=rows)])
    assert run.series("x") == ([3], [4])


def test_a_folder_that_is_no_run_is_the_users_mistake(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    write_run(tmp_path / "pipelines" / "one" / "sft", "sft")
    with pytest.raises(RunError, match=r"no manifest.json here.*folders of runs: one"):
        read_runs([tmp_path / "pipelines"])
    (tmp_path / "pipelines" / "one" / "sft" / "manifest.json").unlink()
    with pytest.raises(RunError, match="no run and no folder of runs"):
        read_runs([tmp_path / "pipelines" / "one"])


def test_the_command_ends_with_exit_code_2_and_imports_no_torch(tmp_path):
    run = write_run(tmp_path / "sft", "sft", SFT, metrics=[{"step": 1, "sft/loss": 2.0}])
    code = (
        "import sys; sys.argv = ['align', 'report', *sys.argv[1:]]\n"
        "from alignment.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    for folder, expected in ((run, 0), (tmp_path / "nowhere", 2)):
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (expected, "False"), done.stderr
        assert "Traceback" not in done.stderr
    assert "no such folder" in done.stderr and (run / "report.html").is_file()


def test_damaged_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": "\u2028 is no line break"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: no JSON object"):
        read_rows(path)
    path.write_text('{"a": 1}\n{"a": "\u2028"}\n{"cut')
    assert read_rows(path, may_be_cut=True) == [{"a": 1}, {"a": "\u2028"}]
    with pytest.raises(DataError, match=r"rows.jsonl:3"):
        read_rows(path)
    run = write_run(tmp_path / "runs" / "sft", "sft", SFT)
    for name, content in (("result.json", b"{"), ("manifest.json", b'{"stage": "\xe9"}'), ("manifest.json", b"[1]")):
        (run / name).write_bytes(content)
        for folder in (run, run.parent):
            with pytest.raises(RunError, match=rf"{name}: no JSON object"):
                write_report([folder])


def test_a_file_that_is_no_report_is_not_written_over(tmp_path):
    run = write_run(tmp_path / "sft", "sft", SFT)
    thesis = tmp_path / "thesis.html"
    thesis.write_text("years of work")
    with pytest.raises(RunError, match="is no report"):
        write_report([run], thesis)
    assert thesis.read_text() == "years of work"
    with pytest.raises(RunError, match="there is no folder"):
        write_report([run], tmp_path / "nowhere" / "report.html")
    (tmp_path / "taken.html.tmp").mkdir()  # in the way of the file that is to be renamed
    with pytest.raises(RunError, match=r"cannot be written .*--out"):
        write_report([run], tmp_path / "taken.html")
    first = write_report([run]).read_bytes()
    assert write_report([run]) == run / "report.html" and (run / "report.html").read_bytes() == first
    assert MARK.encode() in first


def test_the_report_of_a_pipeline_leaves_out_runs_that_are_no_stage_of_it(tmp_path):
    for name in ("sft", "reject-2"):
        write_run(tmp_path / "runs" / name, "sft", SFT)
    page = write_report([tmp_path / "runs"], stages=["sft"]).read_text(encoding="utf-8")
    assert "reject-2" not in page and "1 of 1" in page
    assert "reject-2" in write_report([tmp_path / "runs"]).read_text(encoding="utf-8")


def test_settings_that_differ_are_told_without_the_folders_of_the_runs(tmp_path):
    for name, rate in (("one", 1e-3), ("two", 1e-4)):
        pipeline = tmp_path / name
        write_run(pipeline / "reject", "reject")
        run = write_run(pipeline / "sft", "sft")
        settings = {"model": f"{pipeline}/reject", "optim": {"lr": rate, "eps": 1e-5}, "run": {"seed": 0}}
        edit_manifest(run, settings=settings, made_from={f"model: /old/{name}/reject/sft.jsonl": "id"})
    [table] = inputs.settings(read_runs([tmp_path / "one", tmp_path / "two"])).tables
    assert [[cell.text for cell in row] for row in table.rows] == [["optim.lr", "0.001", "0.0001"]]
    assert table.columns == ("setting", "one/sft", "two/sft")


def test_pipelines_in_folders_of_the_same_name_are_two(tmp_path):
    for place, rate in (("one", 1e-3), ("two", 1e-4)):
        for name in ("sft", "rs"):
            run = write_run(tmp_path / place / "quick" / name, "sft", SFT)
            edit_manifest(run, settings={"model": f"for {name}", "optim": {"lr": rate}})
    folders = [tmp_path / place / "quick" for place in ("one", "two")]
    tables = inputs.settings(read_runs(folders)).tables
    assert [table.columns for table in tables] == [
        ("setting", f"one/quick/{name}", f"two/quick/{name}") for name in ("rs", "sft")
    ]
    for table in tables:
        assert [[cell.text for cell in row] for row in table.rows] == [["optim.lr", "0.001", "0.0001"]]
    page = write_report(folders, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "<h1>one/quick, two/quick</h1>" in page


def test_models_of_one_name_with_other_weights_are_told(tmp_path):
    for name, digest in (("one", "a" * 64), ("two", "b" * 64)):
        run = write_run(tmp_path / name / "eval", "eval")
        rewards = {"helpfulness": {"path": f"{tmp_path}/{name}/rm"}}
        models = {"rewards.helpfulness": digest, "policies.base": "c" * 64}
        edit_manifest(run, settings={"rewards": rewards}, models=models)
    [table] = inputs.settings(read_runs([tmp_path / "one", tmp_path / "two"])).tables
    shown = [[cell.text for cell in row] for row in table.rows]
    assert shown == [["weights.rewards.helpfulness", "aaaaaaaaaa", "bbbbbbbbbb"]]


def test_counts_of_a_manifest_are_shown_where_they_are_not_zero(tmp_path):
    run = write_run(tmp_path / "rm", "rm")
    source = {"name": "pairs", "rows": 9, "kept": 7, "dropped": {"too_long": 2}, "sha256": "ab" * 32}
    edit_manifest(run, inputs=[source], train={"rows": 6, "veto": {"drop": 1}, "left_out": {"too_long": 0}})
    sources, counted = inputs.data(read_runs([run])).tables
    assert [cell.text for cell in sources.rows[0]] == ["rm", "pairs", "9", "7", "2 too long", "ababababab"]
    found = [[cell.text for cell in row[1:]] for row in counted.rows]
    assert found == [["train · rows", "6"], ["train · veto · drop", "1"]]


def write_reward_model(folder: Path, valid: dict) -> Path:
    return write_run(folder, "rm", {"valid": valid}, metrics=[{"step": 1, "rm/ranking_loss": 0.7}])


JUDGED = {
    "pairs": 10, "accuracy": ENTRY, "by_rating": {"better": ENTRY}, "by_source": {"s": ENTRY}, "by_safety_bin": {},
    "calibration": {"ece": 0.1, "bins": [{"accuracy": 0.6, "confidence": 0.7, "count": 10}]},
    "histogram": {"edges": [0, 1], "chosen": [3], "rejected": [2]}, "length_correlation": {"within_pairs": 0.1},
    "mean_chosen": 1.0, "mean_rejected": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("figure", ["calibration", "by_rating", "histogram", "length_correlation"])
def test_a_result_of_another_version_is_left_out_of_its_section_and_said_to_be(tmp_path, figure):
    old = {key: value for key, value in JUDGED.items() if key != figure}
    write_reward_model(tmp_path / "runs" / "new", JUDGED)
    write_reward_model(tmp_path / "runs" / "old", old)
    page = write_report([tmp_path / "runs"]).read_text(encoding="utf-8")
    assert f"<b>old</b> Not shown under “Reward models”: its files have no “{figure}”" in page
    assert 'id="rm-accuracy"' in page and "scores-" in page and "<b>new</b>" not in page


def test_evaluations_and_fine_tunings_of_another_version_are_left_out_too(tmp_path):
    write_run(tmp_path / "runs" / "sft", "sft", {"valid_by_source": {"after": {"s": {"loss": 1.0}}}})
    write_run(tmp_path / "runs" / "gatt", "gatt", {"dialogues": 3})
    gatt = write_run(tmp_path / "runs" / "eval", "eval", {"policies": {"p": {"by_kind": {}}}, "dialogues": 2})
    edit_manifest(gatt, settings={"kind": "gatt"})
    page = write_report([tmp_path / "runs"]).read_text(encoding="utf-8")
    for run, figure in (("sft", "tokens"), ("gatt", "kept_by_kind"), ("eval", "by_turn")):
        assert re.search(f"<b>{run}</b> Not shown under “[^”]+”: its files have no “{figure}”", page)


# Answers


def test_answers_stand_side_by_side_with_the_highest_reward_marked(tmp_path):
    rewards = {"base": 1.0, "rs": 2.0, "ppo": 2.001}  # the last two look the same
    run = write_evaluation(tmp_path / "eval", {"base": "a", "rs": "b", "ppo": "c"}, rewards)
    [found] = answers.section(read_runs([run])).answers
    [asked] = found.asked
    assert [(a.policy, a.text, a.is_best) for a in asked.answers] == [
        ("base", "a", False),
        ("rs", "b", True),
        ("ppo", "c", True),
    ]
    assert asked.earlier == [("user", "first")] and asked.is_safety
    assert asked.answers[0].scores == "reward +1.00"


def test_evaluations_of_the_same_prompts_are_one_table_of_answers(tmp_path):
    for name in ("eval-1", "eval-2"):
        write_evaluation(tmp_path / "runs" / name, {"rs": name}, {"rs": 1.0})
    [found] = answers.section(read_runs([tmp_path / "runs"])).answers
    assert [(a.policy, a.text) for a in found.asked[0].answers] == [("eval-1: rs", "eval-1"), ("eval-2: rs", "eval-2")]


SAME = {"rewards.helpfulness": "a" * 64}
OTHER = {"rewards.helpfulness": "b" * 64}


@pytest.mark.parametrize(
    ("models", "threshold", "marked"),
    [
        (SAME, 0.15, ["two/eval: ppo"]),
        (OTHER, 0.15, ["one/eval: ppo", "two/eval: ppo"]),
        (SAME, 0.2, ["one/eval: ppo", "two/eval: ppo"]),
    ],
)
def test_rewards_are_compared_where_they_are_by_the_same_models_and_gate(tmp_path, models, threshold, marked):
    for name, reward, judges, gate in (("one", 1.0, SAME, 0.15), ("two", 8.0, models, threshold)):
        run = write_evaluation(tmp_path / name / "eval", {"rs": "a", "ppo": "b"}, {"rs": reward, "ppo": reward + 1})
        rewards = {"helpfulness": {"path": "rm-h"}, "safety": {"path": "hub/rm-s"}, "threshold": gate}
        edit_manifest(run, settings={"policies": {"rs": {}, "ppo": {}}, "rewards": rewards}, models=judges)
    runs = read_runs([tmp_path / "one", tmp_path / "two"])
    [found] = answers.section(runs).answers
    assert [answer.policy for answer in found.asked[0].answers if answer.is_best] == marked
    told = [(label, sentence[:19]) for label, sentence in overview.warnings(runs)]
    if len(marked) == 1:
        assert (found.note, told) == ("", [])
    else:
        assert "different reward models" in found.note
        assert told == [("one/eval, two/eval", "Their rewards are b")]


def test_prompts_of_both_kinds_are_among_the_chosen(tmp_path):
    rows = [{"prompt": str(i), "is_safety": i >= 190, "before": "b", "after": "a"} for i in range(200)]
    run = write_run(tmp_path / "sft", "sft", SFT, answers=rows)
    [found] = answers.section(read_runs([run])).answers
    assert (len(found.asked), found.total) == (answers.NUM_PROMPTS, 200)
    assert sum(asked.is_safety for asked in found.asked) == 10
    assert [asked.prompt for asked in found.asked] == sorted((a.prompt for a in found.asked), key=int)


def test_answers_along_ppo_are_of_the_first_the_best_and_the_last_look(tmp_path):
    """By number: look 12 comes after look 6. Of a run that goes on the best is not known yet."""
    rewards = {0: (0.5, 1.0), 3: (2.0, 1.75), 6: (0.75, 1.25), 12: (1.5, 3.0)}
    looks = {
        f"answers-{look}": [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "response": [{"role": "assistant", "content": f"{prompt} at {look}"}],
                "reward": reward,
            }
            for prompt, reward in zip("ab", of_look, strict=True)
        ]
        for look, of_look in rewards.items()
    }
    run = write_run(tmp_path / "ppo", "ppo", {"held_out": {"best_iteration": 3}}, **looks)
    [found] = answers.section(read_runs([run])).answers
    assert [(asked.prompt, [(a.policy, a.text, a.scores) for a in asked.answers]) for asked in found.asked] == [
        (
            "a",
            [
                ("iteration 0", "a at 0", "reward +0.50"),
                ("iteration 3", "a at 3", "reward +2.00"),
                ("iteration 12", "a at 12", "reward +1.50"),
            ],
        ),
        (
            "b",
            [
                ("iteration 0", "b at 0", "reward +1.00"),
                ("iteration 3", "b at 3", "reward +1.75"),
                ("iteration 12", "b at 12", "reward +3.00"),
            ],
        ),
    ]
    assert [[a.is_best for a in asked.answers] for asked in found.asked] == [[False, True, False], [False, False, True]]
    edit_manifest(run, status="running")
    [found] = answers.section(read_runs([run])).answers
    assert [a.policy for a in found.asked[0].answers] == ["iteration 0", "iteration 12"]


def test_both_answers_of_a_distillation_stand_side_by_side_with_the_safer_one_marked(tmp_path):
    scores = {"distilled": (-1.0, 2.0), "plain": (1.5, 0.5), "neither": (1.0, 1.0)}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{better} is better"}],
            "is_safety": True,
            "plain": f"plain, {plain}",
            "distilled": f"distilled, {distilled}",
            "score_plain": plain,
            "score_distilled": distilled,
        }
        for better, (plain, distilled) in scores.items()
    ]
    run = write_run(tmp_path / "distil", "distil", {"prompts": 3}, scored=rows)
    [found] = answers.section(read_runs([run])).answers
    shown = [[(a.policy, a.text, a.scores, a.is_best) for a in asked.answers] for asked in found.asked]
    assert [asked.prompt for asked in found.asked] == [f"{better} is better" for better in scores]
    assert shown == [
        [
            ("plain", "plain, -1.0", "safety -1.00", False),
            ("behind the preprompt", "distilled, 2.0", "safety +2.00", True),
        ],
        [
            ("plain", "plain, 1.5", "safety +1.50", True),
            ("behind the preprompt", "distilled, 0.5", "safety +0.50", False),
        ],
        [
            ("plain", "plain, 1.0", "safety +1.00", False),
            ("behind the preprompt", "distilled, 1.0", "safety +1.00", False),
        ],
    ]


def test_every_answer_of_a_dialogue_is_marked_as_keeping_the_instruction_or_not(tmp_path):
    """The second policy holds its first dialogue only so far, and that ended before its last turn."""

    def dialogue(number: int, kept: list[bool]) -> dict:
        turns = [f"question {turn}" for turn in (1, 2, 3)]
        said = [f"answer {turn}" for turn, _ in enumerate(kept, start=1)]
        return {"instruction": f"instruction {number}", "user_turns": turns, "answers": said, "kept": kept}

    base, tuned = [dialogue(1, [True, False, False]), dialogue(2, [True, True, True])], [dialogue(1, [True, True])]
    files = {"dialogues-base": base, "dialogues-tuned": tuned}
    run = write_run(tmp_path / "eval", "eval", **files)
    edit_manifest(run, settings={"kind": "gatt", "policies": {"base": {}, "tuned": {}}})
    [found] = answers.section(read_runs([run])).answers
    [asked] = found.asked
    assert (asked.prompt, found.total) == ("instruction 1", 1)
    assert [(a.policy, a.text, a.scores) for a in asked.answers] == [
        (
            "base",
            "1. question 1\n✓ answer 1\n\n2. question 2\n✗ answer 2\n\n3. question 3\n✗ answer 3",
            "kept in 1 of 3 answers",
        ),
        ("tuned", "1. question 1\n✓ answer 1\n\n2. question 2\n✓ answer 2", "kept in 2 of 2 answers"),
    ]
    assert not any(answer.is_best for answer in asked.answers)


def test_text_of_models_and_data_never_becomes_markup(tmp_path):
    """Prompts, answers, sources and policies with tags in them: the page has the tags of a harmless one, no others."""
    pages = []
    for name, attack in (("harmless", "text"), ("attack", ATTACK)):
        policy = attack.partition("\x00")[0].replace("/", "|")  # a part of a file's name
        pipeline = tmp_path / name
        run = write_evaluation(pipeline / "eval", {policy: attack}, {policy: 1.0})
        edit_manifest(run, inputs=[{"name": attack, "rows": 1, "kept": 0, "dropped": {attack: 1}}])
        result = {**SFT, "valid_by_source": {part: {attack: {"loss": 1.0, "perplexity": 1.0, "tokens": 1}} for part in
                                             ("before", "after")}}  # fmt: skip
        write_run(pipeline / "sft", "sft", result)
        pages.append(write_report([pipeline]).read_text(encoding="utf-8"))
    harmless, attacked = (Tags(page).found for page in pages)
    drawn = {"defs", "clippath", "g", "path", "rect", "text", "use"}  # as many as labels leave room for
    assert [tag for tag, _ in attacked if tag not in drawn] == [tag for tag, _ in harmless if tag not in drawn]
    assert sum(tag == "script" for tag, _ in attacked) == 1
    assert not any(name.startswith("on") for _, attributes in attacked for name in attributes)
    assert "&lt;script&gt;alert(1)" in pages[1] and "{{ 7*7 }}" in pages[1]


def test_the_page_loads_nothing_and_has_no_id_twice(tmp_path):
    names = ("a b", "a-b", "a_b")  # which look alike once they are ids
    for name in names:
        write_evaluation(tmp_path / "runs" / name, {"p": "x"}, {"p": 1.0})
    page = write_report([tmp_path / "runs"]).read_text()
    tags = Tags(page).found
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and len(ids) > 20
    for tag, attributes in tags:
        assert tag not in ("iframe", "object", "embed")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#")[:1] == "#" or attributes[name] == "data:,", (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", page)
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert set(used) <= set(ids)


# Charts


def test_a_chart_has_the_pages_colours_and_a_label():
    curve = Curve("a < b", [1, 2, 3], [0.1, 0.2, 0.3], style_of(0))
    chart = curve_chart("name", "Title", "Look.", [curve, curve], x_label="$x_1$", y_label="share", percent=True)
    assert 'role="img"' in chart.svg and 'aria-label="Title"' in chart.svg and chart.svg.startswith("<svg")
    assert "var(--series-0)" in chart.svg and "var(--ink)" in chart.svg
    assert not any(color in chart.svg for color in PALETTE)
    assert "$x_1$" in chart.svg and "20 %" in chart.svg  # text stays text
    again = curve_chart("name", "Title", "Look.", [curve, curve], x_label="$x_1$", y_label="share", percent=True)
    assert again.svg == chart.svg


def test_fourteen_series_look_different_without_their_dashes():
    """In charts of estimates there are no lines: colour, marker and fill have to tell."""
    looks = {(style.color, style.marker, style.fill) for style in map(style_of, range(14))}
    assert len(looks) == 14
    assert len({style_of(index).fill for index in range(7, 14)}) == 1
    rows = {"row": {f"series {index}": ENTRY for index in range(14)}}
    svg = interval_chart("n", "t", "c", rows, x_label="x").svg
    assert len(set(re.findall(r"<use [^>]*?style=\"[^\"]*\"", svg))) >= 14


def test_nothing_is_drawn_where_there_is_nothing():
    options = {"x_label": "x", "y_label": "y"}
    assert curve_chart("n", "t", "c", [Curve("a", [], [], style_of(0))], **options) is None
    empty = {"value": None, "low": 0.0, "high": 1.0, "count": 0}
    assert interval_chart("n", "t", "c", {"row": {"series": empty}}, x_label="x") is None
    assert interval(empty, ".0%").text == "–" and interval(None, ".0%").text == "–"


def test_an_interval_cell_is_sorted_by_its_value():
    cell = interval(ENTRY, ".0%")
    assert (cell.text, cell.detail, cell.order) == ("50%", "[40%, 60%]", 0.5)
    alone = interval({"value": 1.0, "low": None, "high": None, "count": 1}, "+.1f")
    assert (alone.text, alone.detail) == ("+1.0", "")


def test_smoothing_is_a_centred_mean_with_fewer_values_at_the_ends():
    # (0+3)/2, (0+3+6)/3, (3+6+0)/3, (6+0)/2
    assert smoothed([0, 3, 6, 0], 3) == [1.5, 3.0, 3.0, 3.0]


def test_long_names_that_differ_in_the_middle_alone_are_told_apart():
    names = [f"smollm2-helpfulness-lr-{rate}-margin-large-one-epoch-of-all" for rate in ("1e-4", "3e-4", "1e-3")]
    assert len({short(name) for name in names}) == 1
    found = shortened(names)
    assert len(set(found)) == 3 and found[1].endswith(" (2)") and shortened(["a", "b"]) == ["a", "b"]
    curves = [Curve(name, [1, 2], [1.0, 2.0], style_of(0)) for name in names]
    chart = curve_chart("n", "t", "c", curves, x_label="x", y_label="y")
    assert all(name in chart.svg for name in found)


@given(st.text(max_size=200))
def test_labels_are_short_and_fit_into_xml(label):
    found = short(label)
    assert len(found) <= 44 and found.isprintable()
