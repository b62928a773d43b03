"""What `align data check` and `preview` find in files, counted by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from alignment.chat_formats import CHATML
from alignment.cli.data import app
from alignment.data import write_rows
from alignment.data_report import FileReport, check_files, lengths, some
from alignment.errors import DataError, ModelError

Row = dict[str, Any]
WriteFile = Callable[[str, str], Path]


def lines(*rows: Row) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def pair(prompt: str, chosen: str, rejected: str, **extra: Any) -> Row:
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **extra}


def demo(*texts: str) -> Row:
    return {"messages": [(user, assistant)[index % 2](text) for index, text in enumerate(texts)]}


def report_on(write_file: WriteFile, *rows: Row) -> FileReport:
    return check_files([str(write_file("data.jsonl", lines(*rows)))]).files[0]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (pair("q", "a", "b"), "pairs"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "pairs"),
        (demo("q", "a"), "demonstrations"),
        ({"prompt": [user("q")]}, "prompts"),
        ({"prompt": [user("q")], "response": [assistant("a")], "reward": 0.5}, "candidates"),
        ({"prompt": [user("q")], "chosen": None, "messages": None}, "prompts"),
    ],
)
def test_the_kind_of_rows_is_read_off_their_fields(write_file: WriteFile, row: Row, kind: str) -> None:
    report = report_on(write_file, row)
    assert (report.kind, report.num_rows, report.num_bad, report.problems) == (kind, 1, 0, [])


def test_every_bad_row_is_listed_with_file_and_line(write_file: WriteFile) -> None:
    bad = [{**pair("q", "a", "b"), "chosen": ""}] * 40
    report = report_on(write_file, pair("q", "a", "b"), *bad, demo("q", "a"), {"prompts": "q"})
    assert (report.num_rows, report.num_bad, len(report.problems)) == (43, 42, 42)
    assert [int(problem.split(":")[1]) for problem in report.problems] == list(range(2, 44))
    assert report.problems[0].endswith('data.jsonl:2: "chosen" is empty. Every response needs text.')
    assert report.problems[40].endswith(":42: one of demonstrations among pairs. Keep one kind of row in a file.")
    assert "not one of our rows" in report.problems[41]
    assert report.problems[41].endswith("the row has: prompts.")


def test_unreadable_lines_are_listed_too_and_an_empty_file_is_a_problem(write_file: WriteFile) -> None:
    files = [write_file("a.jsonl", "{\n"), write_file("b.jsonl", "\n")]
    broken, empty = check_files([str(file) for file in files]).files
    assert "a.jsonl:1: not JSON" in broken.problems[0]
    assert (broken.kind, broken.num_bad, broken.lengths, broken.chosen_longer_rate) == ("", 1, {}, None)
    assert (empty.num_rows, empty.problems) == (0, [f"{files[1]}: has no rows."])


def test_words_of_prompts_and_responses_are_counted(write_file: WriteFile) -> None:
    report = report_on(
        write_file,
        {**demo("one two", "a b c", "three", "x"), "train_on": "last"},  # prompt 2 + 3 + 1, response 1
        demo("one", "a\nb  c d"),
    )
    assert (report.lengths["prompt"].min, report.lengths["prompt"].max) == (1, 6)
    assert (report.lengths["response"].min, report.lengths["response"].max) == (1, 4)
    assert report.user_turns == {1: 1, 2: 1}


def test_percentiles_are_values_that_occur() -> None:
    hundred = lengths(range(1, 101))
    assert (hundred.min, hundred.median, hundred.p95, hundred.max) == (1, 50, 95, 100)
    one = lengths([7])
    assert (one.min, one.median, one.p95, one.max) == (7, 7, 7, 7)
    assert lengths([1] * 19 + [9]).p95 == 1  # rank ceil(0.95 * 20) = 19
    assert lengths([1] * 18 + [9, 9]).p95 == 9


def test_bins_double_in_width_and_hold_every_text_once() -> None:
    assert lengths([0, 3, 4, 7, 8, 33]).histogram == {0: 2, 4: 2, 8: 1, 16: 0, 32: 1}
    assert lengths([5]).histogram == {4: 1}
    assert lengths([64, 127, 128]).histogram == {64: 2, 128: 1}


def test_ratings_labels_and_lengths_of_pairs_are_counted(write_file: WriteFile) -> None:
    report = report_on(
        write_file,
        pair("q1", "longer text", "b", rating="better", chosen_safe=True, rejected_safe=False, is_safety=True),
        pair("q2", "a", "same length here", rating="better", chosen_safe=False, rejected_safe=True),
        pair("q3", "two words", "two words!", chosen_safe=True),
        pair("q4", "a b c", "d", rating="significantly_better"),
    )
    assert report.ratings == {"significantly_better": 1, "better": 2, "unrated": 1}
    assert report.safety_bins == {"unlabelled": 2, "chosen_safe_other_unsafe": 1, "veto": 1}
    assert report.chosen_longer_rate == 0.5
    assert report.num_safety == 1
    assert [warning.split(":")[0] for warning in report.warnings] == [
        "1 pairs prefer an unsafe response to a safe one; the safety label has the veto (align rm veto=...).",
        "1 pairs have a safety label on one response only.",
        "1 pairs have no rating, though others have one.",
    ]


def test_a_length_bias_is_pointed_out(write_file: WriteFile) -> None:
    rows = [pair(str(index), "a b", "c") for index in range(3)] + [
        pair(str(index), "a", "b c") for index in range(3, 5)
    ]
    assert "in 60% of the pairs: a reward model may learn length" in report_on(write_file, *rows).warnings[0]
    assert report_on(write_file, *rows, rows[-1] | {"prompt": [user("x")]}).warnings == []


def test_repeats_shared_prompts_and_contradictions_are_found(write_file: WriteFile) -> None:
    report = report_on(
        write_file,
        pair("q", "a", "b"),
        pair("q", "a", "b", rating="better"),  # the same texts again
        pair("q", "b", "a"),  # the reverse of both
        pair("q", "a", "c"),
        pair("r", "a", "b"),
        pair("r", "c", "d"),
        pair("alone", "a", "b"),
    )
    second, exchanged = f"{report.name}:2", [f"{report.name}:{line}" for line in (1, 2, 3)]
    assert (report.duplicates, report.num_shared_prompts, report.contradictions) == ([second], 6, exchanged)
    assert f"1 rows repeat an earlier row, so their texts count twice: {second}." in report.warnings
    assert f"3 pairs also occur with chosen and rejected exchanged: {', '.join(exchanged)}." in report.warnings


def test_of_many_places_some_are_named() -> None:
    assert some(["a:1", "{a}:2"]) == ": a:1, {a}:2."
    assert some([f"a:{line}" for line in range(1, 1008)]) == ": a:1, a:2, a:3, a:4, a:5 and 1,002 more."


def test_fields_that_nobody_reads_are_listed_and_misspelt_ones_are_bad_rows(write_file: WriteFile) -> None:
    report = report_on(
        write_file,
        pair("q", "a", "b", ratings="better", license="MIT"),
        pair("r", "a", "b", license="MIT", margin=0.5, where="here"),
    )
    assert report.unread_fields == {"license": 1, "where": 1}
    (problem,) = report.problems
    assert problem.endswith('data.jsonl:1: unknown field "ratings": did you mean "rating"? Rename or remove it.')


def test_fields_of_messages_that_nobody_reads_are_listed_once_a_row(write_file: WriteFile) -> None:
    named = {"messages": [turn | {"name": "x", "id": None, "weight": 1} for turn in demo("q", "a")["messages"]]}
    assert report_on(write_file, named, demo("r", "a")).unread_fields == {"messages[].name": 1}
    judged = pair("q", "a", "b", messages=[user("q") | {"name": "x"}])
    judged["chosen"][0]["model"] = "m"
    assert report_on(write_file, judged).unread_fields == {"messages": 1, "chosen[].model": 1}


def test_the_rest_of_a_damaged_archive_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    write_rows(path, [pair(str(number), "a", "b") for number in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    assert "The rest of the file is lost" in check_files([str(path)]).files[0].problems[-1]


def test_foreign_rows_are_told_which_layout_they_look_like(write_file: WriteFile) -> None:
    path = write_file("alpaca.jsonl", lines({"instruction": "a", "input": "", "output": "b"}))
    assert check_files([str(path)]).files[0].looks_like == "alpaca"
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    assert f"align data convert {path} --from alpaca --out NEW.jsonl" in result.stdout


def test_prompts_that_two_files_share_are_found(write_file: WriteFile) -> None:
    train = write_file("train.jsonl", lines(pair("q", "a", "b"), pair("r", "a", "b")))
    valid = write_file(
        "valid.jsonl", lines(pair("q", "c", "d"), pair("q", "e", "f"), pair("s", "a", "b"), demo_pair("r", "x", "y"))
    )
    prompts = write_file("prompts.jsonl", lines({"prompt": [user("s")]}))
    overlaps = check_files([str(path) for path in (train, valid, prompts)]).overlaps
    # Both pairs of "q" have a whole prompt of train; the conversation that opens with "r" goes on from there.
    found = [(o.first, o.second, o.same_prompt, o.same_first_message) for o in overlaps]
    assert found == [
        (str(train), str(valid), [f"{valid}:1", f"{valid}:2"], [f"{valid}:1", f"{valid}:2", f"{valid}:4"]),
        (str(train), str(prompts), [], []),
        (str(valid), str(prompts), [f"{prompts}:1"], [f"{prompts}:1"]),
    ]


def demo_pair(*texts: str) -> Row:
    return {"prompt": demo(*texts)["messages"], "chosen": "a", "rejected": "b"}


def test_the_check_prints_the_report_and_exits_with_zero_where_all_is_good(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(pair("Why [so]?", "a b c d", "b", rating="better", source="mine")))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0
    for part in (f"{path}: 1 rows of pairs", "better: 1", "unlabelled: 1", "chosen is longer    100.0%", "mine: 1"):
        assert part in result.stdout
    assert re.search(r"median +2 +4 +1", result.stdout)
    assert re.search(r"4 and more +#+ 1", result.stdout)


def test_the_check_prints_every_bad_line_whole_and_exits_with_two(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(pair("q", "a", "b"), *[pair("q", "[bold]", "")] * 30))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    assert "31 rows of pairs, 30 of them bad" in result.stdout
    for line in range(2, 32):
        assert f'{path}:{line}: "rejected" is empty. Every response needs text.\n' in result.stdout


def test_the_check_names_the_overlap_of_files(write_file: WriteFile) -> None:
    one, two = write_file("one.jsonl", lines(demo("q", "a"))), write_file("two.jsonl", lines(demo("q", "b")))
    other = write_file("other.jsonl", lines(demo("r", "a")))
    result = CliRunner().invoke(app, ["check", str(one), str(two)])
    found = f"{two}: 1 rows open with the same user message as a row of {one}, 1 have its whole prompt: {two}:1."
    assert found in result.stdout
    result = CliRunner().invoke(app, ["check", str(one), str(other)])
    assert "No prompt of one file opens with the same user message" in result.stdout


def test_the_check_as_json_is_the_whole_report(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(pair("q", "ä", "b"), {}))
    result = CliRunner().invoke(app, ["check", "--json", str(path)])
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert report["is_good"] is False
    assert report["overlaps"] == []
    assert report["files"][0]["lengths"]["chosen"] == {"min": 1, "median": 1, "p95": 1, "max": 1, "histogram": {"0": 1}}
    assert len(report["files"][0]["problems"]) == report["files"][0]["num_bad"] == 1


def test_the_check_of_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(tmp_path / "no.jsonl")])
    assert isinstance(result.exception, DataError)
    assert "no such file" in str(result.exception)


def test_the_check_needs_no_torch(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(pair("q", "a", "b")))
    program = (
        "import sys; from alignment.cli.data import app; app(['check', sys.argv[1]], standalone_mode=False); "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.fixture
def model_dir(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A folder that passes for a model where only its tokenizer is loaded."""
    tokenizer.chat_template = CHATML
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def preview_of(path: Path, model: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["preview", str(path), "--model", str(model), *options])
    if result.exception:
        raise result.exception
    return result.stdout


def text_of(printed: str) -> str:
    return printed.replace("|", "")


def test_the_preview_shows_a_dialogue_with_its_trained_tokens(write_file: WriteFile, model_dir: Path) -> None:
    path = write_file("sft.jsonl", lines(demo("Hi", "Yo"), demo("second", "row")))
    printed = preview_of(path, model_dir, "--rows", "1")
    # "Yo" is two bytes no merge joins, and the end of the turn is trained with them.
    assert re.search(r"dialogue \(\d+ tokens, 3 trained\)", printed)
    assert "<im_start>user\nHi<im_end>\n<im_start>assistant\n[[Yo<im_end>]]\n" in text_of(printed)
    assert "second" not in text_of(printed)


def test_the_preview_colours_trained_tokens_green(
    write_file: WriteFile, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for row in (demo("Hi", "Yo"), pair("Hi", "Yo", "No")):
        printed = preview_of(write_file("rows.jsonl", lines(row)), model_dir)
        assert "\x1b[32mY" in printed
        assert "\x1b[2mH" in printed


def test_the_preview_shows_the_prompt_and_both_responses_of_a_pair(write_file: WriteFile, model_dir: Path) -> None:
    printed = preview_of(write_file("pairs.jsonl", lines(pair("Hi", "Yo", "Go away"))), model_dir)
    for part in ("prompt (", "chosen (3 tokens)", "rejected (", "pairs.jsonl:1"):
        assert part in printed
    assert "<im_start>assistant\n\nchosen" in text_of(printed)
    assert "[[Go away<im_end>]]" in text_of(printed)


def test_the_preview_shows_prompts_and_candidates(write_file: WriteFile, model_dir: Path) -> None:
    assert "prompt (" in preview_of(write_file("p.jsonl", lines({"prompt": [user("Hi")]})), model_dir)
    candidate = {"prompt": [user("Hi")], "response": "Yo"}
    assert "response (3 tokens)" in preview_of(write_file("c.jsonl", lines(candidate)), model_dir)


def test_the_preview_takes_another_chat_template(write_file: WriteFile, model_dir: Path) -> None:
    template = write_file("chat.jinja", CHATML.replace("<|im_start|>", "<|im_start|>the "))
    path = write_file("sft.jsonl", lines(demo("Hi", "Yo")))
    assert "the user\nHi" in text_of(preview_of(path, model_dir, "--chat-template", str(template)))
    with pytest.raises(ModelError, match=r"no_such\.jinja is no file"):
        preview_of(path, model_dir, "--chat-template", "no_such.jinja")


def test_the_preview_names_the_row_it_cannot_show(write_file: WriteFile, model_dir: Path) -> None:
    with pytest.raises(DataError, match=r'sft\.jsonl:2: "messages" ends with a user turn'):
        preview_of(write_file("sft.jsonl", lines(demo("a", "b"), demo("a"))), model_dir)
    with pytest.raises(DataError, match=r"It looks like alpaca"):
        preview_of(write_file("alpaca.jsonl", lines({"instruction": "a", "output": "b"})), model_dir)
    with pytest.raises(DataError, match="has no rows"):
        preview_of(write_file("empty.jsonl", ""), model_dir)
    tagged = write_file("tagged.jsonl", lines(demo("a [INST]", "b")))
    with pytest.raises(DataError, match=r"tagged\.jsonl:1: a user turn contains \[INST\]"):
        preview_of(tagged, model_dir, "--chat-template", "llama2")


def test_the_preview_of_an_unknown_model_is_a_model_error(write_file: WriteFile) -> None:
    path = write_file("sft.jsonl", lines(demo("a", "b")))
    result = CliRunner().invoke(app, ["preview", str(path), "--model", "smollm"])
    assert isinstance(result.exception, ModelError)
