"""Files into typed rows: every message a wrong file gives, what loads in spite of looking odd, and splits."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from alignment.cli.data import app
from alignment.data import load_dialogues, load_pairs, load_prompts, load_rows, read_lines, split_by_prompt, write_rows
from alignment.dialogue import Candidate, Message, PreferencePair, Prompt
from alignment.errors import DataError, RunError

Row = dict[str, Any]
WriteFile = Callable[[str, str], Path]

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Air scatters blue light most."}
BAD = {"role": "assistant", "content": "It mirrors the sea."}
PAIR: Row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TABLE = "a table. Write its rows as JSON lines: docs/data-formats.md, Your own layout."


def problems_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_pairs([str(path)])
    return str(caught.value)


def lines(*rows: Row) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_all_bad_lines_are_reported_together_with_file_and_line(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(PAIR, {**PAIR, "chosen": ""}, PAIR, {**PAIR, "rating": "bad"}))
    first, second = problems_of(path).splitlines()
    assert first == f'{path}:2: "chosen" is empty. Every response needs text.'
    assert second.startswith(f"{path}:4: \"rating\" is 'bad'.")


def test_more_than_twenty_bad_lines_are_cut_short_with_a_pointer_to_the_check(write_file: WriteFile) -> None:
    shown = problems_of(write_file("pairs.jsonl", lines(*[{"chosen": ""}] * 23))).splitlines()
    assert len(shown) == 21
    assert shown[-1] == "... and 3 more. `align data check FILE` lists all."


def test_lines_that_are_no_json_objects_say_so(write_file: WriteFile) -> None:
    deep, digits = "[" * 100_000, '{"a": ' + "1" * 5000 + "}"
    text = f'{{"prompt": \n[1, 2]\n"text"\n{{\'a\': 1}}\n{deep}\n{digits}\n'
    found = problems_of(write_file("pairs.jsonl", text)).splitlines()
    for line, part in zip(
        found,
        ["not JSON: Expecting value at column", "a list, not an object", "a str, not an object", "not JSON", "", ""],
        strict=True,
    ):
        assert part in line
        assert "One object a line." in line


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"a": "caf\xe9"}\n\xef\xbb\xbf{"a": "\xe9"}\n')
    first, second = problems_of(path).splitlines()
    assert first == f"{path}:1: not UTF-8 at byte 10 (0xe9). Save it as UTF-8."
    assert "(0xe9)" in second


def test_a_byte_order_mark_blank_lines_and_windows_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n   \r\n" + json.dumps(PAIR).encode())
    assert len(load_pairs([str(path)]).rows) == 2


def test_a_line_of_ten_megabytes_is_refused_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 10_000_000 + b'"}\n' + json.dumps(PAIR).encode() + b"\n")
    loaded = load_pairs([str(path)], on_error="skip")
    assert loaded.sources[0].errors == [f"{path}:1: the line is longer than 4 MiB. Split or drop it."]
    assert len(loaded.rows) == 1


def test_a_truncated_archive_is_reported_and_never_half_loaded(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    write_rows(path, [PAIR] * 50)
    assert len(load_pairs([str(path)]).rows) == 50
    path.write_bytes(path.read_bytes()[:-20])
    assert "the archive is damaged or cut off" in problems_of(path)


def test_a_long_line_in_a_truncated_archive_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    long = random.Random(0).randbytes(4_000_000).hex()  # does not pack, so that the cut falls into this line
    write_rows(path, [PAIR, {"text": long}])
    path.write_bytes(path.read_bytes()[:-1000])
    first, second = read_lines(path)
    assert (first.row, first.rest_is_lost) == (PAIR, False)
    assert second.where == f"{path}:2" and second.rest_is_lost
    assert "the archive is damaged or cut off" in problems_of(path)


@pytest.mark.parametrize("num_kept", [0, 30])
def test_a_damaged_archive_stops_the_run_even_where_bad_rows_are_skipped(tmp_path: Path, num_kept: int) -> None:
    """Not one row is lost but nobody knows how many."""
    path = tmp_path / "pairs.jsonl.gz"
    rows = [{"text": random.Random(number).randbytes(10_000).hex()} for number in range(5)]
    write_rows(path, [PAIR] * num_kept + [{}] + rows)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        load_pairs([str(path)], on_error="skip")
    (message,) = str(caught.value).splitlines()
    assert message.startswith(f"{path}:{num_kept + 6}: the archive is damaged or cut off")
    assert "The rest of the file is lost, so on_error=skip does not help: fetch or write the file again." in message


def test_a_file_that_only_claims_to_be_an_archive_is_reported(write_file: WriteFile) -> None:
    assert "the archive is damaged or cut off" in problems_of(write_file("pairs.jsonl.gz", lines(PAIR)))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("pairs.parquet", b"PAR1\x15\x04 and so on", "a Parquet file. Write its rows as JSON lines: python -c "),
        ("pairs.jsonl", b"PAR1\x15\x04 and so on", "a Parquet file. "),
        ("pairs.jsonl", b"\x1f\x8b\x08 and so on", "packed with gzip, which its name must say. Rename it so that"),
        ("pairs.json", b"\x1f\x8b\x08 and so on", "packed with gzip, "),
        ("pairs.csv", b"prompt,chosen,rejected\nHi,Hello.,No.\nBye,Goodbye.,No.\n", TABLE),
        ("Pairs.TSV", b"prompt\tchosen\trejected\n", TABLE),
        ("pairs.csv.gz", b"\x1f\x8b\x08 and so on", TABLE),
        ("pairs.csv", b"\x1f\x8b\x08 and so on", TABLE),
        ("pairs.csv", b"", TABLE),
    ],
)
def test_a_file_of_another_format_is_one_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError) as caught:
            load_pairs([str(path)], on_error=on_error)
        assert str(caught.value).startswith(f"{path}: {problem}") and "\n" not in str(caught.value)


HH_ROW: Row = {
    side: f"\n\nHuman: Hi\n\nAssistant: {text}" for side, text in (("chosen", "Hello."), ("rejected", "No."))
}
PKU_ROW: Row = {"prompt": "Hi", "response_0": "Hello.", "response_1": "No.", "better_response_id": 0}


@pytest.mark.parametrize(
    ("load", "row", "problem", "layout"),
    [
        (load_pairs, HH_ROW, '"prompt" is missing; the row has: chosen, rejected.', "hh-rlhf"),
        (load_dialogues, HH_ROW, '"messages" is missing; the row has: chosen, rejected.', "hh-rlhf"),
        (load_pairs, PKU_ROW, '"prompt" is \'Hi\'. It must be a list of {"role", "content"} objects.', "pku-saferlhf"),
        (load_prompts, {"prompt": "Hi"}, "\"prompt\" is 'Hi'. It must be a list", "trl"),
        (load_dialogues, {"instruction": "Hi", "output": "a"}, '"messages" is missing; the row has: ', "alpaca"),
    ],
)
def test_the_first_row_of_a_file_in_another_layout_is_told_how_to_convert_it(
    write_file: WriteFile, load: Callable[..., Any], row: Row, problem: str, layout: str
) -> None:
    names = [str(write_file(name, lines(row, row, row))) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError) as caught:
        load(names)
    found = str(caught.value).splitlines()
    for name, (first, *others) in zip(names, (found[:3], found[3:]), strict=True):
        assert first.startswith(f"{name}:1: {problem}")
        assert first.endswith(f' It looks like {layout}: "align data convert {name} --from {layout} --out NEW.jsonl".')
        assert len(others) == 2 and not any("looks like" in other for other in others)


def test_rows_of_no_known_layout_point_to_the_page_of_formats(write_file: WriteFile) -> None:
    own = {"question": "Hi", "better": "Hello.", "worse": "No."}
    path = write_file("mine.jsonl", lines({**PAIR, "rating": "bad"}, own, own))
    first, second, third = problems_of(path).splitlines()
    hint = ' docs/data-formats.md has every field and, under "Your own layout", how to convert other rows.'
    assert second == f'{path}:2: "prompt" is missing; the row has: better, question, worse.{hint}'
    assert "docs/" not in first + third


def test_the_command_that_is_told_for_a_parquet_file_makes_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list([PAIR, PAIR]).to_parquet(path)
    code = problems_of(path).partition("python -c '")[2].removesuffix("'")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "told", "exec"), {})
    assert len(load_pairs(["pairs.jsonl"]).rows) == 2


def test_an_empty_file_is_an_error(write_file: WriteFile) -> None:
    assert "has no rows" in problems_of(write_file("pairs.jsonl", "\n\n"))


def test_a_missing_file_names_the_nearest_one(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_DATA_DIR", raising=False)
    path = write_file("pairs.train.jsonl", lines(PAIR))
    with pytest.raises(
        DataError, match=r"no such file \(ALIGN_DATA_DIR is not set\)\. Did you mean pairs\.train\.jsonl"
    ):
        load_pairs([str(path).replace("train", "tran")])
    with pytest.raises(DataError, match="is a folder"):
        load_pairs([str(path.parent)])


def test_a_name_is_looked_up_in_the_data_directory(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file("mirror/pairs.train.jsonl", lines(PAIR))
    monkeypatch.setenv("ALIGN_DATA_DIR", str(path.parent))
    assert load_pairs(["pairs.train"]).rows[0].source == "pairs.train"
    with pytest.raises(DataError, match=r"Did you mean pairs\.train\.jsonl"):
        load_pairs(["pairs.trian.jsonl"])


def test_skipped_rows_are_counted_and_listed(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": ""}))
    loaded = load_pairs([str(path)], on_error="skip")
    report = loaded.sources[0].to_json()
    assert (report["rows"], report["kept"], report["dropped"]) == (3, 1, {"unreadable": 2})
    assert [error.split(":")[1] for error in report["errors"]] == ["2", "3"]
    assert len(report["sha256"]) == 64


def test_a_manifest_does_not_hold_the_messages_of_a_file_full_of_bad_rows(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines(PAIR, *[{**PAIR, "chosen": ""}] * 250))
    report = load_pairs([str(path)], on_error="skip").sources[0].to_json()
    assert report["dropped"] == {"unreadable": 250} and len(report["errors"]) == 201
    assert report["errors"][-1] == f"and 50 more: align data check {path} lists them all."


def test_skipping_every_row_is_an_error(write_file: WriteFile) -> None:
    path = write_file("pairs.jsonl", lines({"chosen": ""}, {}))
    with pytest.raises(DataError, match=r"none of its 2 rows can be used\. The first: .*pairs\.jsonl:1"):
        load_pairs([str(path)], on_error="skip")


def test_a_row_without_a_source_gets_the_name_of_its_file(write_file: WriteFile) -> None:
    path = write_file("mine.jsonl", lines({"messages": [USER, GOOD]}, {"messages": [USER, GOOD], "source": "lima"}))
    assert [row.source for row in load_dialogues([str(path)]).rows] == ["mine", "lima"]


def test_a_prompt_that_one_file_marks_is_a_safety_prompt_in_all(write_file: WriteFile) -> None:
    """Which reward model speaks depends on the prompt, not on the file that it is read from."""
    other = {"role": "user", "content": "Something else"}
    first = write_file("first.jsonl", lines({"prompt": [USER]}, {"prompt": [other]}))
    second = write_file("second.jsonl", lines({"prompt": [USER], "is_safety": True}, {"prompt": [USER]}))
    data = load_prompts([str(first), str(second)])
    assert [row.is_safety for row in data.rows] == [True, False, True, True]
    assert [source.num_kept for source in data.sources] == [2, 2]
    assert not load_prompts([str(first)]).rows[0].is_safety


def test_a_json_file_may_hold_one_list(write_file: WriteFile) -> None:
    assert len(load_prompts([str(write_file("a.json", json.dumps([{"prompt": [USER]}] * 2)))]).rows) == 2
    with pytest.raises(DataError, match=r"b\.json\[1\]: a int, not an object"):
        load_prompts([str(write_file("b.json", json.dumps([{"prompt": [USER]}, 5])))])
    with pytest.raises(DataError, match=r"not a JSON list: Extra data.*ends with \.jsonl"):
        load_prompts([str(write_file("c.json", '{"a": 1}\n{"a": 2}\n'))])


def test_candidates_load_with_empty_responses(write_file: WriteFile) -> None:
    path = write_file("candidates.jsonl", lines({"prompt": [USER], "response": "", "index": 1}))
    assert load_rows([str(path)], Candidate.from_json).rows[0].response == ""


def test_a_failed_write_leaves_neither_a_file_nor_a_temporary_one(tmp_path: Path) -> None:
    def rows() -> Any:
        yield PAIR
        raise DataError("stop")

    with pytest.raises(DataError):
        write_rows(tmp_path / "out.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


def test_split_by_prompt_keeps_a_conversation_on_one_side() -> None:
    def pair(index: int, turn: int) -> PreferencePair:
        opening = Message("user", f"question {index}")
        longer = (opening, Message("assistant", "a"), Message("user", f"follow-up {turn}"))
        return PreferencePair(prompt=longer if turn else (opening,), chosen="c", rejected="r")

    rows = [pair(index, turn) for index in range(300) for turn in range(3)]
    train, valid = split_by_prompt(rows, valid_fraction=0.2, seed=1)
    sides = [{row.prompt[0].content for row in side} for side in (train, valid)]
    assert not sides[0] & sides[1]
    assert len(train) + len(valid) == 900
    # 300 conversations at 0.2: mean 60, standard deviation sqrt(300 * 0.2 * 0.8) = 6.9; four of those on each side.
    assert 32 < len(sides[1]) < 88


def test_the_command_splits_a_file_and_writes_over_nothing(write_file: WriteFile, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{number // 2}"}],
            "chosen": [{"role": "assistant", "content": f"a{number}"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "rank_chosen": number,
        }
        for number in range(80)
    ]
    source = write_file("all.jsonl", lines(*rows))
    arguments = ["split", str(source), "--out", str(tmp_path / "mine"), "--valid-fraction", "0.3"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    parts = [load_pairs([str(tmp_path / f"mine.{name}.jsonl")]).rows for name in ("train", "valid")]
    opens = [{pair.prompt[0].content for pair in part} for part in parts]
    assert sum(map(len, parts)) == 80 and not opens[0] & opens[1] and min(map(len, opens)) > 4
    written = [json.loads(line) for name in ("train", "valid") for line in (tmp_path / f"mine.{name}.jsonl").open()]
    assert {row["chosen"][0]["content"]: row["rank_chosen"] for row in written} == {f"a{n}": n for n in range(80)}, (
        "columns that nothing here reads stay"
    )
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RunError) and "exists" in str(again.exception)
    nowhere = CliRunner().invoke(app, ["split", str(source), "--out", str(tmp_path / "nowhere" / "mine")])
    assert isinstance(nowhere.exception, RunError) and "there is no folder" in str(nowhere.exception)
    for folder in (".", ".."):
        wrong = CliRunner().invoke(app, ["split", str(source), "--out", folder])
        assert isinstance(wrong.exception, DataError)
        assert str(wrong.exception).startswith(f"{folder}: is a folder. Name the beginning of two files, e.g. --out ")


def asking(text: str) -> Row:
    return {"prompt": [{"role": "user", "content": text}]}


def test_columns_that_nothing_reads_are_kept_whatever_they_hold(write_file: WriteFile, tmp_path: Path) -> None:
    """JSON can spell half a character, UTF-8 cannot."""
    rows = [asking(f"q{number}") | {"raw": "cut \ud83d", "number": number} for number in range(20)]
    arguments = ["split", str(write_file("all.jsonl", lines(*rows))), "--out", str(tmp_path / "mine")]
    assert CliRunner().invoke(app, [*arguments, "--valid-fraction", "0.5"]).exit_code == 0
    written = [json.loads(line) for name in ("train", "valid") for line in (tmp_path / f"mine.{name}.jsonl").open()]
    assert sorted(row["number"] for row in written) == list(range(20))
    assert {row["raw"] for row in written} == {"cut \ud83d"}


def test_dates_in_a_data_set_of_the_hub_are_written_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [asking(f"q{number}") | {"day": datetime.date(2023, 7, 18)} for number in range(20)]
    monkeypatch.delenv("ALIGN_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    arguments = ["split", "owner/name", "--out", str(tmp_path / "mine"), "--valid-fraction", "0.5"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    written = [json.loads(line) for name in ("train", "valid") for line in (tmp_path / f"mine.{name}.jsonl").open()]
    assert len(written) == 20 and {row["day"] for row in written} == {"2023-07-18"}


@pytest.mark.parametrize(("fraction", "part"), [("0.001", "train"), ("0.999", "valid")])
def test_a_split_with_an_empty_part_is_refused_and_the_fraction_that_is_told_does(
    write_file: WriteFile, tmp_path: Path, fraction: str, part: str
) -> None:
    source = write_file("all.jsonl", lines(*(asking(f"q{number // 2}") for number in range(6))))
    arguments = ["split", str(source), "--out", str(tmp_path / "mine"), "--valid-fraction"]
    refused = CliRunner().invoke(app, [*arguments, fraction])
    assert isinstance(refused.exception, DataError)
    text = f"{source}: its 6 rows open with 3 user messages, all of which fall into {part}. Give --valid-fraction "
    assert str(refused.exception).startswith(text) and not list(tmp_path.glob("mine*"))
    [better] = re.findall(r"--valid-fraction ([\d.]+), or another --seed\.", str(refused.exception))
    assert CliRunner().invoke(app, [*arguments, better]).exit_code == 0
    sizes = {name: len(load_prompts([str(tmp_path / f"mine.{name}.jsonl")]).rows) for name in ("train", "valid")}
    assert sizes[part] == 4 and sum(sizes.values()) == 6


def test_rows_that_all_open_alike_cannot_be_split(write_file: WriteFile, tmp_path: Path) -> None:
    source = write_file("all.jsonl", lines(asking("q"), asking("q")))
    refused = CliRunner().invoke(app, ["split", str(source), "--out", str(tmp_path / "mine")])
    assert isinstance(refused.exception, DataError) and not list(tmp_path.glob("mine*"))
    assert str(refused.exception).startswith(f"{source}: its 2 rows open with the same user message, so they stay tog")


def test_split_by_prompt_depends_on_the_seed_but_not_on_the_order() -> None:
    rows = [Prompt(messages=(Message("user", str(index)),)) for index in range(100)]
    _, valid = split_by_prompt(rows, valid_fraction=0.3, seed=1)
    _, turned = split_by_prompt(rows[::-1], valid_fraction=0.3, seed=1)
    _, other = split_by_prompt(rows, valid_fraction=0.3, seed=2)
    assert valid == turned[::-1]
    assert valid != other


LOADERS = {"pref_": load_pairs, "sft_": load_dialogues, "prompts_": load_prompts}


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get("ALIGN_DATA_DIR"), reason="ALIGN_DATA_DIR is not set")
def test_every_file_of_the_data_directory_loads_without_a_bad_row() -> None:
    loaded = {}
    for path in sorted(Path(os.environ["ALIGN_DATA_DIR"]).glob("*.jsonl*")):
        loader = (
            load_pairs
            if "_pairs" in path.name
            else next((load for prefix, load in LOADERS.items() if path.name.startswith(prefix)), load_prompts)
        )
        loaded[path.name] = len(loader([path.name]).rows)
        assert loaded[path.name] == sum(1 for _ in read_lines(path))
    assert len(loaded) > 0
