"""`align score`, `align rm compare` and the notebook's `score` on a tiny reward model: order, resume, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alignment.cli import scoring
from alignment.cli.main import app
from alignment.dialogue import Message, as_response
from alignment.errors import ConfigError, DataError, ModelError, RunError
from alignment.prefix_batch import Branch, Tree, collate
from reward_models.config import EvaluationSection
from reward_models.score import Scorer, score

Row = dict[str, Any]


def row(number: int, **fields: Any) -> Row:
    return {"prompt": [{"role": "user", "content": f"How are you, number {number}?"}], **fields}


def assistant(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


FINE, AWAY = "I am fine. ", assistant("Go away.")
PAIRS = [row(n, chosen=assistant(FINE * (n + 1)), rejected=AWAY, source="s") for n in range(5)]
RESPONSES = [row(n // 2, response=assistant(f"Answer {n}. " * (n % 3 + 1))) for n in range(10)]


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def align(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def two_prompts_a_write_in_float32(monkeypatch):
    monkeypatch.setattr(scoring, "PROMPTS_PER_WRITE", 2)
    monkeypatch.setattr("reward_models.score.compute_dtype", lambda *_: torch.float32)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def responses(tmp_path):
    return write(tmp_path / "responses.jsonl", RESPONSES)


def test_responses_keep_their_order_and_their_own_scores(reward_folder, responses, tmp_path):
    out = tmp_path / "scored.jsonl"
    assert align("score", reward_folder, responses, "--out", out).exit_code == 0
    found = read(out)
    assert [entry["response"] for entry in found] == [entry["response"] for entry in RESPONSES]
    scorer = Scorer.load(reward_folder)
    for entry in found:
        prompt = as_response(entry).prompt.messages
        [[alone]] = scorer.score([prompt], [[entry["response"][0]["content"]]])
        assert entry["score"] == pytest.approx(alone, abs=1e-5)
        assert 0 < entry["probability"] < 1
    assert sorted(path.name for path in tmp_path.glob("scored*")) == ["scored.jsonl"]
    assert [{**entry, "score": 0, "probability": 0} for entry in found] == [
        {**entry, "score": 0, "probability": 0} for entry in RESPONSES
    ], "rows stay whole and gain two fields"


def test_dialogues_are_scored_and_written_as_they_came(reward_folder, tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], "id": 7}
    data, out = write(tmp_path / "dialogues.jsonl", [row]), tmp_path / "scored.jsonl"
    assert align("score", reward_folder, data, "--out", out).exit_code == 0
    [found] = read(out)
    assert found == {**row, "score": found["score"], "probability": found["probability"]}
    assert "'Yo'" in align("score", reward_folder, data).stdout


def test_half_a_character_in_a_column_that_nothing_reads_stays(reward_folder, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{**entry, "raw": "cut \ud83d"} for entry in RESPONSES])
    assert align("score", reward_folder, data, "--out", tmp_path / "out.jsonl").exit_code == 0
    assert [entry["raw"] for entry in read(tmp_path / "out.jsonl")] == ["cut \ud83d"] * len(RESPONSES)


def test_pairs_are_reported_and_written(reward_folder, pairs, tmp_path):
    out = tmp_path / "scored.jsonl"
    done = align("score", reward_folder, pairs, "--out", out, "--json")
    report = json.loads(done.stdout)
    wins = [entry["score_chosen"] > entry["score_rejected"] for entry in read(out)]
    assert (report["pairs"], report["accuracy"]["value"]) == (5, sum(wins) / 5)
    assert report["max_length"] == Scorer.load(reward_folder).context_length


@pytest.mark.parametrize("kind", ["pairs", "responses"])
@pytest.mark.parametrize("half_written", [False, True])
def test_an_interrupted_call_goes_on_and_ends_with_the_same_file(
    kind, half_written, reward_folder, request, tmp_path, monkeypatch
):
    data, whole, cut = request.getfixturevalue(kind), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    align("score", reward_folder, data, "--out", whole)
    calls = []
    score_block = Scorer.score

    def stops_at_the_second_block(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_block(self, *arguments, **options)

    monkeypatch.setattr(Scorer, "score", stops_at_the_second_block)
    align("score", reward_folder, data, "--out", cut)
    assert not cut.exists()
    if half_written:
        with (tmp_path / "cut.jsonl.partial").open("a") as file:
            file.write('{"prompt": [], "score": 1.0}\n{"pro')
    refused = align("score", reward_folder, data, "--out", cut)
    assert isinstance(refused.exception, RunError) and "Add --resume" in str(refused.exception)
    assert align("score", reward_folder, data, "--out", cut, "--resume").exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()
    # Five prompts in blocks of two: the second block once cut off and once scored, then the third.
    assert len(calls) == 4
    assert not list(tmp_path.glob("cut.jsonl.partial*"))


def test_unfinished_rows_of_other_data_are_not_gone_on_with(reward_folder, responses, tmp_path):
    out = tmp_path / "scored.jsonl"
    scoring.PartialFile.open(out, {"model": "another", "data": []}, resume=False).begin("float32")
    result = align("score", reward_folder, responses, "--out", out, "--resume")
    assert isinstance(result.exception, RunError) and "another model, other data or settings" in str(result.exception)


def test_unfinished_rows_that_are_damaged_are_named_and_left_as_they_are(tmp_path):
    data, about = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"
    begun = scoring.PartialFile.open(tmp_path / "out.jsonl", {"model": "any"}, resume=False)
    begun.begin("float32")
    begun.append([{"score": 1.0}], 1)
    data.write_text(data.read_text() + '{"sco\n{"prompts_done": 2}\n')
    before = data.read_bytes()
    with pytest.raises(RunError) as caught:
        scoring.PartialFile.open(tmp_path / "out.jsonl", {"model": "any"}, resume=True)
    assert f"{data}:3: damaged" in str(caught.value) and f"With it {about}." in str(caught.value)
    assert data.read_bytes() == before


@pytest.mark.parametrize("content", [b'{"model": "a', b'{"model": "\xe9"}', b"[1]", b""])
def test_a_damaged_note_of_what_unfinished_rows_were_made_from_is_named(tmp_path, content):
    data, about = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"
    data.touch()
    about.write_bytes(content)
    with pytest.raises(RunError) as caught:
        scoring.PartialFile.open(tmp_path / "out.jsonl", {"model": "any"}, resume=True)
    assert str(caught.value) == f"{about}: no JSON object. The file is damaged: remove it and {data}."


def test_a_file_that_is_there_is_not_written_over(reward_folder, responses, tmp_path):
    out = tmp_path / "thesis.jsonl"
    out.write_text("years of work")
    result = align("score", reward_folder, responses, "--out", out)
    assert isinstance(result.exception, RunError)
    assert out.read_text() == "years of work"


def test_a_bad_row_is_named_before_anything_is_scored(reward_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    data = write(tmp_path / "bad.jsonl", [*RESPONSES, row(7, response=7)])
    for rows in (data, write(tmp_path / "bad-pairs.jsonl", [*PAIRS, row(7, chosen="", rejected="x")])):
        result = align("score", reward_folder, rows, "--out", tmp_path / "out.jsonl")
        assert isinstance(result.exception, DataError)
        assert f"{rows}:{6 if 'pairs' in rows else 11}: " in str(result.exception)
        assert not list(tmp_path.glob("out.jsonl*"))


def test_pairs_and_responses_are_not_mixed(reward_folder, pairs, responses):
    result = align("score", reward_folder, pairs, responses)
    assert "pairs and responses in one call" in str(result.exception)


def test_two_models_are_compared_on_the_same_pairs(reward_folder, pairs, tmp_path):
    same = json.loads(align("rm", "compare", reward_folder, reward_folder, pairs, "--json").stdout)
    assert same["difference"]["value"] == 0 and same["first"] == same["second"]
    # A file of scores stands for its model; with all pairs turned round, what one gets right the other gets wrong.
    scored = tmp_path / "scored.jsonl"
    align("score", reward_folder, pairs, "--out", scored)
    rows = read(scored)
    flipped = [{**r, "score_chosen": r["score_rejected"], "score_rejected": r["score_chosen"]} for r in rows]
    report = json.loads(align("rm", "compare", scored, write(tmp_path / "flipped.jsonl", flipped), "--json").stdout)
    assert report["first"] == same["first"]
    assert report["difference"]["value"] == pytest.approx(1 - 2 * same["first"]["value"])
    shown = align("rm", "compare", reward_folder, scored, pairs)
    assert shown.exit_code == 0 and "pair by pair" in shown.stdout


def test_scores_of_other_pairs_are_refused(reward_folder, pairs, tmp_path):
    others = [{**entry, "score_chosen": 1.0, "score_rejected": 0.0} for entry in PAIRS[:3]]
    result = align("rm", "compare", reward_folder, write(tmp_path / "other.jsonl", others), pairs)
    assert "holds other pairs" in str(result.exception)
    result = align("rm", "compare", reward_folder, pairs, pairs)
    assert 'pairs.jsonl:1: "score_chosen" is missing. Make the file with' in str(result.exception)
    result = align("rm", "compare", reward_folder, reward_folder)
    assert "Name the pairs to compare on" in str(result.exception)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_scores_of_a_pair_that_differs_anywhere_are_refused(field, reward_folder, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    rows = [{**entry, "score_chosen": 1.0, "score_rejected": 0.0} for entry in PAIRS]
    role = "user" if field == "prompt" else "assistant"
    rows[2][field] = [{"role": role, "content": "Something else."}]
    other = write(tmp_path / "other.jsonl", rows)
    result = align("rm", "compare", reward_folder, other, pairs)
    assert isinstance(result.exception, DataError)
    assert f'"{field}" of {other}:3 is not that of {pairs}:3' in str(result.exception)


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity", "true", '"1.0"', None])
def test_a_score_in_a_file_must_be_a_finite_number(value, tmp_path):
    rows = [{**entry, "score_chosen": 1.0, "score_rejected": 0.0} for entry in PAIRS]
    lines = [json.dumps(entry) for entry in rows]
    lines[3] = lines[3].replace(', "score_rejected": 0.0', "" if value is None else f', "score_rejected": {value}')
    file = tmp_path / "scored.jsonl"
    file.write_text("\n".join(lines))
    result = align("rm", "compare", file, file)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(f'{file}:4: "score_rejected" is ')
    assert "\n" not in str(result.exception)


def run_with_scores(path: Path, reward_folder: str, rows: list[Row], signs: list[int]) -> Path:
    """A finished run as `align rm` leaves it; +1 is a pair it got right."""
    shutil.copytree(reward_folder, path / "model")
    (path / "manifest.json").write_text('{"status": "finished"}')
    scored = [{**entry, "score_chosen": sign, "score_rejected": 0} for entry, sign in zip(rows, signs, strict=True)]
    write(path / "held_out_scores.jsonl", scored)
    return path


def test_without_data_the_held_out_scores_of_the_first_run_are_taken(reward_folder, pairs, tmp_path, monkeypatch):
    first = run_with_scores(tmp_path / "a", reward_folder, PAIRS[:4], [1, 1, 1, -1])
    second = run_with_scores(tmp_path / "b", reward_folder, PAIRS[:4], [1, -1, -1, -1])
    (first / "config.yaml").write_text(f"data: {{valid: [{pairs}]}}")  # all five, of which one was left out
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        report = json.loads(align("rm", "compare", first, second, "--json").stdout)
    assert (report["first"]["value"], report["second"]["value"], report["first"]["count"]) == (0.75, 0.25, 4)
    # A second run that was measured on other pairs is scored on the first one's; named pairs are scored by both.
    other = run_with_scores(tmp_path / "c", reward_folder, PAIRS, [1] * 5)
    alone = json.loads(align("score", reward_folder, write(tmp_path / "four.jsonl", PAIRS[:4]), "--json").stdout)
    report = json.loads(align("rm", "compare", first, other, "--json").stdout)
    assert (report["first"]["value"], {**report["second"], "prompts": 4}) == (0.75, alone["accuracy"])
    report = json.loads(align("rm", "compare", first, second, pairs, "--json").stdout)
    assert report["first"] == report["second"] and report["first"]["count"] == 5


# ------------------------------------------------------------------------------------------- rows that cannot be scored


@pytest.mark.parametrize("messages", [[], None, [{"role": "user", "content": "Hi"}], "Hi"])
def test_a_dialogue_without_a_response_is_named(messages, reward_folder, tmp_path):
    good = {"messages": [*row(1)["prompt"], *assistant("Fine.")]}
    data = write(tmp_path / "dialogues.jsonl", [good, {"messages": messages}])
    result = align("score", reward_folder, data)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(f'{data}:2: "messages" ')


def test_an_unreadable_first_line_does_not_make_pairs_responses(reward_folder, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{not JSON\n" + "".join(json.dumps(entry) + "\n" for entry in PAIRS))
    result = align("score", reward_folder, data)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(f"{data}:1: not JSON") and "\n" not in str(result.exception)


@pytest.mark.parametrize("kind", ["pairs", "responses"])
def test_a_row_too_long_for_the_model_is_named_before_anything_is_scored(kind, reward_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    long = assistant("x!" * 600)
    rows = [*PAIRS, row(6, chosen=long, rejected=AWAY)] if kind == "pairs" else [*RESPONSES, row(6, response=long)]
    data = write(tmp_path / "long.jsonl", rows)
    result = align("score", reward_folder, data, "--out", tmp_path / "out.jsonl")
    assert isinstance(result.exception, DataError)
    assert f"{data}:{len(rows)}: " in str(result.exception) and "over the model's 512 tokens" in str(result.exception)
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize("kind", ["pairs", "responses"])
def test_a_response_that_the_models_format_cannot_write_is_a_bad_row(kind, reward_folder, tmp_path, monkeypatch):
    """As in training: the tag would become the layout's own ids and begin another exchange."""

    class Refusing:
        def __init__(self, chat):
            self.chat = chat

        def __getattr__(self, name):
            return getattr(self.chat, name)

        def check(self, messages):
            if any("[INST]" in message.content for message in messages):
                raise DataError("an assistant turn contains [INST]")

    load = scoring.load_chat_of
    monkeypatch.setattr(scoring, "load_chat_of", lambda model: (Refusing(load(model)[0]), load(model)[1]))
    good, bad = assistant("Fine."), assistant("Fine. [INST] And you? [/INST]")
    rows = [row(1, chosen=good, rejected=bad)] if kind == "pairs" else [row(0, response=good), row(1, response=bad)]
    done = align("score", reward_folder, write(tmp_path / "rows.jsonl", rows))
    assert isinstance(done.exception, DataError) and "contains [INST]" in str(done.exception)


@pytest.mark.parametrize("kind", ["pairs", "responses"])
def test_columns_of_null_are_none(kind, reward_folder, tmp_path):
    """As where rows of several kinds were joined in one table."""
    empty = {"messages": None, "response": None, "chosen": None, "rejected": None}
    given = PAIRS if kind == "pairs" else RESPONSES
    dialogues = [{**empty, "messages": [*each["prompt"], *each["response"]]} for each in RESPONSES]
    for rows in ([{**empty, **each} for each in given], dialogues):
        done = align("score", reward_folder, write(tmp_path / "rows.jsonl", rows), "--json")
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", [["score"], ["rm", "compare"]])
def test_what_works_in_one_process_refuses_a_launcher(command, reward_folder, pairs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=f"align {' '.join(command)} runs in one process"):
        if command == ["score"]:
            scoring.score_files(reward_folder, [pairs], out=None, as_json=True, resume=False, wanted_precision=0.9)
        else:
            scoring.compare_models(reward_folder, reward_folder, [pairs], as_json=True)


def test_a_pair_too_long_for_one_of_two_models_is_named(reward_folder, tmp_path):
    data = write(tmp_path / "long.jsonl", [*PAIRS, row(6, chosen=assistant("x!" * 600), rejected=AWAY)])
    result = align("rm", "compare", reward_folder, reward_folder, data)
    assert isinstance(result.exception, DataError) and f"{data}:6: " in str(result.exception)


@pytest.mark.parametrize("kind", ["pairs", "responses"])
def test_prompts_that_lose_their_oldest_turns_are_counted(kind, reward_folder, tmp_path):
    """Two responses to one long prompt are one prompt; the other prompts are whole."""
    history = [{"role": "user", "content": "x!" * 600}, *assistant("Indeed."), {"role": "user", "content": "And?"}]
    long = {"prompt": history}
    answers = [{**long, "response": assistant(text)} for text in ("Yes.", "No.")]
    judged = [{**long, "chosen": assistant("Yes."), "rejected": assistant("No.")}]
    rows = [*PAIRS, *judged] if kind == "pairs" else [*RESPONSES, *answers]
    done = align("score", reward_folder, write(tmp_path / "rows.jsonl", rows), "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)
    assert "1 prompt lost the oldest turns" in done.stderr and "512 tokens" in done.stderr


def test_nothing_is_said_where_no_prompt_is_cut(reward_folder, pairs):
    assert "oldest turns" not in align("score", reward_folder, pairs).stderr


# --------------------------------------------------------------------------------------------- the unfinished file


def test_a_wrong_model_leaves_nothing_behind(responses, tmp_path, make_llama, make_tokenizer):
    from alignment.chat_formats import CHATML

    tokenizer = make_tokenizer(template=CHATML)
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    for model in (tmp_path / "nowhere", tmp_path / "chat"):
        result = align("score", model, responses, "--out", tmp_path / "out.jsonl")
        assert isinstance(result.exception, ModelError)
        assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_what_a_call_killed_before_its_first_row_leaves_is_nothing_done(options, reward_folder, responses, tmp_path):
    (tmp_path / "out.jsonl.partial.json").write_text('{"model": "any", "data": [], "dtype": "float32"}')
    assert align("score", reward_folder, responses, "--out", tmp_path / "out.jsonl", *options).exit_code == 0
    assert len(read(tmp_path / "out.jsonl")) == len(RESPONSES)
    assert not list(tmp_path.glob("out.jsonl.partial*"))


def test_rows_are_never_there_without_what_they_were_made_from(reward_folder, responses, tmp_path, monkeypatch):
    """Killed after any file operation of its beginning and end, a call leaves no rows that the next would discard."""
    data, about = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"

    def checks(method):
        def checked(self, *arguments, **options):
            result = method(self, *arguments, **options)
            assert about.exists() or not data.exists()
            return result

        return checked

    for name in ("touch", "unlink", "replace"):
        monkeypatch.setattr(Path, name, checks(getattr(Path, name)))
    assert align("score", reward_folder, responses, "--out", tmp_path / "out.jsonl").exit_code == 0
    # Rows whose other file somebody removed are not written over.
    (tmp_path / "out.jsonl").unlink()
    data.write_text("{}\n")
    result = align("score", reward_folder, responses, "--out", tmp_path / "out.jsonl", "--resume")
    assert isinstance(result.exception, RunError) and data.read_text() == "{}\n"


def test_a_resumed_call_computes_in_the_type_it_began_with(reward_folder, responses, tmp_path, monkeypatch):
    """Whatever `auto` says by then: on CPUs it is timed."""
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    monkeypatch.setattr("reward_models.score.compute_dtype", lambda _, name: known.get(name, torch.bfloat16))
    align("score", reward_folder, responses, "--out", whole)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_scored_responses", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        align("score", reward_folder, responses, "--out", cut)
    monkeypatch.setattr("reward_models.score.compute_dtype", lambda _, name: known.get(name, torch.float32))
    assert align("score", reward_folder, responses, "--out", cut, "--resume").exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()
    align("score", reward_folder, responses, "--out", tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() != whole.read_bytes()


# --------------------------------------------------------------------------------------------------------- reports


def test_the_report_is_json_however_long_its_names(reward_folder, tmp_path):
    name = "a source with a long name, " * 10 + "[/train] :train:"
    data = write(tmp_path / "pairs.jsonl", [{**entry, "source": name} for entry in PAIRS])
    assert list(json.loads(align("score", reward_folder, data, "--json").stdout)["by_source"]) == [name]


def test_the_wanted_precision_is_a_setting_with_the_stages_default(reward_folder, tmp_path):
    labels = {"chosen_safe": True, "rejected_safe": False}
    data = write(tmp_path / "pairs.jsonl", [{**entry, **labels} for entry in PAIRS])

    def wanted(*options: str) -> float:
        report = json.loads(align("score", reward_folder, data, "--json", *options).stdout)
        return report["unsafe_detection"]["wanted_precision"]

    assert wanted() == EvaluationSection().wanted_precision
    assert wanted("--wanted-precision", "0.6") == 0.6
    result = align("score", reward_folder, data, "--wanted-precision", "1.5")
    assert isinstance(result.exception, ConfigError) and "wanted_precision" in str(result.exception)


def test_a_model_whose_scores_are_no_numbers_is_refused(reward_folder, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "score_trees", lambda *_, **__: [[1.0, float("nan")], [float("inf"), 0.0]])
    result = align("score", reward_folder, pairs, "--out", tmp_path / "out.jsonl")
    assert isinstance(result.exception, ModelError)
    assert "2 scores that are no finite numbers" in str(result.exception)


# --------------------------------------------------------------------------------------------- scores in a notebook


def test_a_prompt_may_be_a_text_or_turns_in_either_form(reward_folder):
    text = "How are you?"
    forms = [text, [{"role": "user", "content": text}], (Message("user", text),)]
    found = score(reward_folder, forms, [["Fine.", "Go away."]] * 3)
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0] == pytest.approx(found[2], abs=1e-5)
    assert len(found[0]) == 2 and found[0][0] != pytest.approx(found[0][1], abs=1e-3)


@pytest.mark.parametrize(
    ("prompts", "responses", "problem"),
    [
        (["Hi"], ["Fine."], r"responses\[0\] is the text 'Fine.'. Put it into a list"),
        (["Hi"], "Fine.", "responses is the text 'Fine.' for 1 prompts"),
        ("Hi", ["Fine."], "prompts is the text 'Hi'. Give a list"),
        (["Hi", "Ho"], [["Fine."], []], r"responses\[1\] is empty"),
        (["Hi"], [[]], r"responses\[0\] is empty"),
        (["Hi"], [["Fine."], ["So so."]], "responses is 2 lists for 1 prompts"),
        (["Hi"], [["Fine.", None]], r"responses\[0\] holds None"),
        (["Hi", 7], [["Fine."], ["So so."]], r'"prompts\[1\]" is 7'),
        ([[{"role": "assistant", "content": "Hi"}]], [["Fine."]], r'"prompts\[0\]\[0\]" is a assistant turn'),
        ([[{"role": "user"}]], [["Fine."]], r'"prompts\[0\]\[0\]" has content None'),
    ],
)
def test_prompts_and_responses_of_the_wrong_form_are_refused(prompts, responses, problem, reward_folder):
    with pytest.raises(DataError, match=problem):
        score(reward_folder, prompts, responses)


def test_many_responses_to_one_prompt_stay_within_the_token_budget(reward_folder, monkeypatch):
    """Ten branches of 1 to 10 tokens on a trunk of 6 take 61 in one row; 20 are allowed."""
    sizes: list[int] = []

    def noted_collate(rows):
        sizes.append(collate(rows).num_tokens)
        return collate(rows)

    monkeypatch.setattr("reward_models.score.collate", noted_collate)
    trees = [Tree(range(10, 16), [Branch(range(20, 20 + n)) for n in order]) for order in ([*range(1, 11)], [3, 1])]
    loaded = Scorer.load(reward_folder)
    whole = loaded.score_trees(trees)
    loaded.max_tokens, heard = 20, []
    sizes.clear()
    found = loaded.score_trees(trees, on_progress=heard.append)
    assert max(sizes) <= 20 and len(sizes) > 3
    assert sum(heard) == 2
    for ours, expected in zip(found, whole, strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)
    assert len(set(whole[0])) == 10


def test_progress_counts_every_prompt(reward_folder):
    prompts = [as_response(entry).prompt.messages for entry in RESPONSES]
    heard: list[int] = []
    Scorer.load(reward_folder, max_tokens=100).score(prompts, [["ok"]] * len(prompts), on_progress=heard.append)
    assert sum(heard) == len(prompts) and 1 < len(heard) < len(prompts)


def test_the_stage_keeps_its_own_command():
    assert "mix_in" in align("rm", "--help").stdout
