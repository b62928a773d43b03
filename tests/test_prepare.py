"""From files to encoded pairs: what is left out is counted, and what is wrong shows before a run is touched."""

from __future__ import annotations

import pytest
from pairs import configured, pair, prepared, write
from typer.testing import CliRunner

from alignment.chat_formats import CHATML
from alignment.cli.main import app
from alignment.errors import DataError, RunError
from alignment.training import FEW_STEPS, warn_of_few_steps
from reward_models import trainer
from reward_models.prepare import warn_of_short_mix

SAFE, VETO = {"chosen_safe": True, "rejected_safe": False}, {"chosen_safe": False, "rejected_safe": True}


def test_rows_are_counted_by_source_and_bin_and_by_why_they_were_left_out(tmp_path):
    """Of 6 safety pairs 2 are vetoed, so a tenth of helpfulness rows is (4 / 9 =) 0; equal parts make it 4 of 5."""
    long = pair(9, chosen=[{"role": "assistant", "content": "x" * 400}])
    train = write(tmp_path / "safe.jsonl", [pair(i, **(VETO if i < 2 else SAFE)) for i in range(6)])
    mixed = write(tmp_path / "helpful.jsonl", [pair(10 + i) for i in range(5)])
    valid = write(tmp_path / "valid.jsonl", [pair(20, **SAFE), pair(21, **VETO), {"prompt": 1}, long])
    found = prepared(
        tmp_path, "kind=safety", f"data.train={train}", f"data.mix_in={mixed}", "data.mix=equal_parts",
        f"data.valid={valid}", "data.max_length=200", "data.on_error=skip",
    )  # fmt: skip
    assert found.notes["train"]["mix"] == {str(train): 4, str(mixed): 4}
    assert found.notes["train"]["safety_bins"] == {"chosen_safe_other_unsafe": 4, "unlabelled": 4}
    assert found.notes["train"]["veto"] == {"drop": 2}
    assert found.vetoed == 2
    assert found.left_out == {"train": {"vetoed": 2}, "valid": {"unreadable": 1, "vetoed": 1, "too_long": 1}}
    assert (len(found.train), len(found.valid)) == (8, 1)


def test_the_mix_in_the_manifest_is_what_is_trained_on(tmp_path):
    first, second = (write(tmp_path / f"{n}.jsonl", [pair(i) for i in range(10)]) for n in ("a", "b"))
    found = prepared(tmp_path, "kind=helpfulness", f"data.train=[{first}, {second}]", "data.max_rows=7")
    assert sum(found.notes["train"]["mix"].values()) == len(found.train) == 7


def test_vetoed_pairs_of_a_source_that_is_drawn_from_are_told_by_source_alone(tmp_path):
    """Most of these rows were not to be trained on in any case."""
    train = write(tmp_path / "a.jsonl", [pair(index) for index in range(9)])
    other = write(tmp_path / "b.jsonl", [pair(20 + index, **(VETO if index < 4 else SAFE)) for index in range(6)])
    settings = ["kind=helpfulness", f"data.train={train}", f"data.mix_in={other}"]
    drawn, whole = prepared(tmp_path, *settings, "data.mix=90/10"), prepared(tmp_path, *settings)
    assert (drawn.vetoed, drawn.left_out["train"]) == (0, {}) and len(drawn.train) == 10
    assert (whole.vetoed, whole.left_out["train"]) == (4, {"vetoed": 4})
    for found in (drawn, whole):
        assert found.notes["train"]["veto_by_source"] == {
            str(train): {"rows": 9, "vetoed": 0},
            str(other): {"rows": 6, "vetoed": 4},
        }


def test_vetoed_pairs_that_are_kept_are_not_left_out(tmp_path):
    train = write(tmp_path / "a.jsonl", [pair(0, **VETO)])
    found = prepared(tmp_path, "kind=safety", f"data.train={train}", "veto=keep")
    assert found.left_out["train"] == {} and found.notes["train"]["veto"] == {"keep": 1}


def test_rows_are_kept_to_the_context_of_the_model(tmp_path):
    """The toy model holds 512 tokens; the default length is the paper's 4096."""
    long = pair(0, chosen=[{"role": "assistant", "content": "x" * 600}])
    train = write(tmp_path / "a.jsonl", [pair(1), long])
    found = prepared(tmp_path, "kind=helpfulness", f"data.train={train}")
    assert found.max_length == found.notes["max_length"] == 512
    assert found.left_out["train"] == {"too_long": 1}
    only = write(tmp_path / "b.jsonl", [long])
    with pytest.raises(DataError, match="over the model's context, 512 tokens"):
        prepared(tmp_path, "kind=helpfulness", f"data.train={only}")


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([pair(0, **VETO)], ["kind=safety"], "no pair is left to train on: 1 vetoed"),
        ([pair(0)], ["kind=helpfulness", "data.max_length=5"], "1 too_long .*over data.max_length, 5 tokens"),
        ([pair(0)], ["kind=safety"], "no response carries a safety label"),
        ([pair(0)], ["kind=safety", "safety_loss_weight=2"], "no response carries a safety label"),
    ],
)
def test_a_training_set_that_cannot_be_used_says_why(tmp_path, rows, settings, reason):
    train = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=reason):
        prepared(tmp_path, f"data.train={train}", *settings)


@pytest.mark.parametrize(("label", "kind"), [(True, "safe"), (False, "unsafe")])
def test_labels_of_one_kind_alone_are_warned_of(tmp_path, caplog, label, kind):
    """A lower loss is to be had by scores that are all high, or all low."""
    rows = [pair(0, chosen_safe=label), pair(1, rejected_safe=label)]
    train = write(tmp_path / "a.jsonl", rows)
    prepared(tmp_path, "kind=safety", f"data.train={train}")
    assert f"all labelled responses are {kind}," in caplog.text
    caplog.clear()
    prepared(tmp_path, "kind=helpfulness", f"data.train={train}")
    write(train, [*rows, pair(2, **SAFE)])
    prepared(tmp_path, "kind=safety", f"data.train={train}")
    assert not caplog.text


def test_a_weight_for_labels_that_are_not_there_is_warned_of(tmp_path, caplog):
    train = write(tmp_path / "a.jsonl", [pair(0)])
    prepared(tmp_path, "kind=helpfulness", f"data.train={train}", "safety_loss_weight=1")
    assert "safety_loss_weight=1: no response of data.train carries a safety label" in caplog.text


def test_a_safety_model_without_labels_is_trained_where_that_is_asked_for(tmp_path):
    train = write(tmp_path / "a.jsonl", [pair(0)])
    assert len(prepared(tmp_path, "kind=safety", f"data.train={train}", "safety_loss_weight=0").train) == 1


def test_bad_data_leaves_a_finished_run_alone_even_where_it_was_to_be_overwritten(tmp_path):
    train = write(tmp_path / "a.jsonl", [pair(0)])
    old = tmp_path / "run"
    old.mkdir()
    (old / "manifest.json").write_text('{"status": "finished"}')
    (old / "result.json").write_text("{}")
    settings = ["kind=helpfulness", f"data.train={train}", "data.max_length=5", "run.overwrite=true"]
    with pytest.raises(DataError):
        trainer.run(configured(tmp_path, *settings))
    assert (old / "result.json").exists()
    (old / "result.json").unlink()
    (old / "manifest.json").unlink()
    old.rmdir()
    with pytest.raises(DataError):
        trainer.run(configured(tmp_path, *settings))
    assert not old.exists()  # nothing to resume or to overwrite


def test_a_run_does_not_go_on_with_changed_data(tmp_path, monkeypatch):
    train = write(tmp_path / "a.jsonl", [pair(index) for index in range(4)])
    config = configured(tmp_path, "kind=helpfulness", f"data.train={train}", "train.batch_size=2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_model", _interrupt)
        trainer.run(config)
    write(train, [pair(index) for index in range(3)])
    with pytest.raises(RunError, match=r"a\.jsonl changed since the unfinished run began"):
        trainer.run(config, resume=True)


def test_a_run_does_not_go_on_with_another_chat_template(tmp_path, monkeypatch):
    train, template = write(tmp_path / "a.jsonl", [pair(index) for index in range(4)]), tmp_path / "own.jinja"
    template.write_text(CHATML)
    settings = ["kind=helpfulness", f"data.train={train}", "train.batch_size=2", f"model.chat_template={template}"]
    config = configured(tmp_path, *settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_model", _interrupt)
        trainer.run(config)
    template.write_text(CHATML.replace("<|im_start|>", "<|im_start|>the "))
    with pytest.raises(RunError, match=r"model\.chat_template changed since the unfinished run began"):
        trainer.run(config, resume=True)


def test_rows_are_drawn_by_the_seed(tmp_path):
    train, valid = (write(tmp_path / f"{name}.jsonl", [pair(index) for index in range(40)]) for name in "av")

    def drawn(*extra: str) -> tuple[list[str], list[str]]:
        found = prepared(
            tmp_path, "kind=helpfulness", f"data.train={train}", f"data.valid={valid}", "data.max_rows=6",
            "data.max_valid_rows=5", *extra,
        )  # fmt: skip
        parts = ([each.pair.prompt[0].content for each in part] for part in (found.train, found.valid))
        return tuple(parts)

    first, other = drawn(), drawn("run.seed=1")
    assert first == drawn() and list(map(len, first)) == list(map(len, other)) == [6, 5]
    assert first[0] != other[0] and first[1] != other[1]


def test_a_dry_run_reads_every_row(tmp_path):
    train = write(tmp_path / "a.jsonl", [pair(0, **VETO), *(pair(index, **SAFE) for index in range(1, 6))])
    settings = ["rm", "model=toy", "kind=safety", f"data.train={train}", "train.batch_size=2", "--dry-run"]
    settings.append(f"run.dir={tmp_path / 'run'}")
    done = CliRunner().invoke(app, settings)
    assert "5 pairs, 3 steps; 0 held-out pairs. train: 1 vetoed." in done.output
    write(train, [pair(0, chosen_safe="yes")])
    done = CliRunner().invoke(app, settings)
    assert isinstance(done.exception, DataError) and 'a.jsonl:1: "chosen_safe"' in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_a_handful_of_steps_is_warned_of(caplog):
    warn_of_few_steps(16, "pairs", 1, 512)
    assert "16 pairs in batches of 512 make 1 optimizer step." in caplog.text
    caplog.clear()
    warn_of_few_steps(10_240, "pairs", FEW_STEPS, 512)
    assert not caplog.text


def test_a_mix_for_which_rows_are_too_few_is_warned_of(tmp_path, caplog):
    """Of 10 pairs and 4 of the other aim equal parts are 6 short; ninety to ten wants one of them."""
    train = write(tmp_path / "a.jsonl", [pair(index) for index in range(10)])
    other = write(tmp_path / "b.jsonl", [pair(20 + index) for index in range(4)])
    settings = ["kind=helpfulness", f"data.train={train}", f"data.mix_in={other}"]
    assert prepared(tmp_path, *settings).notes["mix_shortfall"] == 0
    assert prepared(tmp_path, *settings, "data.mix=90/10").notes["mix_shortfall"] == 0
    short = prepared(tmp_path, *settings, "data.mix=equal_parts").notes["mix_shortfall"]
    assert short == 6
    warn_of_short_mix(0, "equal_parts")
    assert not caplog.text
    warn_of_short_mix(short, "equal_parts")
    assert "data.mix=equal_parts: data.mix_in has 6 rows too few" in caplog.text
    command = ["rm", "model=toy", *settings, "data.mix=equal_parts", f"run.dir={tmp_path / 'run'}", "--dry-run"]
    assert "data.mix_in has 6 rows too few for equal_parts." in CliRunner().invoke(app, command).output


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
