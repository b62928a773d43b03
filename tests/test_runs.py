"""Run directories: nothing half-written, nothing overwritten by accident, and resuming from what is complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from filelock import FileLock

from alignment import hardware, runs
from alignment.cli.stages import STAGES
from alignment.config import DataSection, ModelSection, PositiveInt, RunSection, StageConfig, describe, load_config
from alignment.data import load_prompts
from alignment.errors import RunError
from alignment.files import replacing, save_figure, write_folder, write_json, write_text
from alignment.hardware import process_state
from alignment.isolation import isolated
from alignment.locks import release_locks
from alignment.manifests import (
    changed_settings,
    is_finished,
    read_manifest,
    read_result,
    settings,
    tokenizer_sha256,
    upstream_runs,
    weights_sha256,
)
from alignment.runs import (
    Run,
    check_run_dir,
    mark_complete,
    newest_checkpoint,
    open_run,
)
from rlhf.config import RejectionSamplingConfig
from sft.config import SFTConfig


class SmallConfig(StageConfig):
    """A stage with one setting and one input of each kind."""

    stage: ClassVar[str] = "small"

    steps: PositiveInt = 3
    """How often."""
    model: ModelSection | None = None
    """A model."""
    data: DataSection | None = None
    """Rows."""


@pytest.fixture
def config(tmp_path: Path) -> SmallConfig:
    return SmallConfig(run=RunSection(dir=str(tmp_path / "run"), seed=4))


def with_run(config: SmallConfig, **changes: object) -> SmallConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


def begin(config: StageConfig, **options: object) -> Run:
    """A run that has something to lose."""
    run = open_run(config, **options)
    run.log(1, {"small/loss": 2.0})
    return run


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may run after it."""


def kill(*_: object, **__: object) -> None:
    raise Killed


# ------------------------------------------------------------------------------------------------ atomic writes


def test_a_killed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(Killed):
        write_text(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(temporary: Path, **_: object) -> None:
        temporary.write_text("ne")
        raise error

    with pytest.raises(error), replacing(path) as temporary:
        half(temporary)
    with pytest.raises(error):
        save_figure(SimpleNamespace(savefig=half), path)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_file_is_synced_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_ino, path.read_text())))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == [(path.stat().st_ino, "old")] and path.read_text() == "new"


def test_what_a_killed_write_left_is_written_over(tmp_path):
    (tmp_path / "a.txt.tmp").write_text("half of something longer")
    write_text(tmp_path / "a.txt", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "new")]


def test_json_is_written_readably_in_any_language(tmp_path):
    write_json(tmp_path / "a.json", {"a": "日本", "b": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": "日本",\n  "b": [\n    1\n  ]\n}\n'


def test_a_killed_folder_write_leaves_the_old_folder_and_the_next_one_starts_clean(tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, lambda place: (place / "a").write_text("old"))

    def half(place: Path) -> None:
        (place / "junk").write_text("half")
        raise Killed

    with pytest.raises(Killed):
        write_folder(folder, half)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a": "old"}
    write_folder(folder, lambda place: (place / "b").write_text("new"))
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"b": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_takes_its_place_once_all_of_its_files_are_on_disk(tmp_path, monkeypatch):
    """Right after a model's, the checkpoints that it was made from are removed."""
    folder, synced, fsync = tmp_path / "model", [], os.fsync

    def note(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, folder.exists()))
        fsync(handle)

    def fill(place: Path) -> None:
        (place / "deep").mkdir()
        for name in ("a", "deep/b"):
            (place / name).write_text(name)

    monkeypatch.setattr(os, "fsync", note)
    write_folder(folder, fill)
    assert sorted(synced) == sorted(((folder / name).stat().st_ino, False) for name in ("a", "deep/b"))


# ---------------------------------------------------------------------------------------- opening and finishing


def test_a_run_writes_its_configuration_and_manifest_at_once(config):
    run = open_run(config)
    assert run.writes
    assert load_config(SmallConfig, run.path / "config.yaml") == config
    manifest = read_manifest(run.path)
    assert (manifest["stage"], manifest["status"], manifest["seed"]) == ("small", "running", 4)
    assert {"python", "torch", "transformers", "trl", "peft"} <= manifest["versions"].keys()
    assert not is_finished(run.path)
    with pytest.raises(RunError, match=r"no result\.json\. The run is unfinished"):
        read_result(run.path)


def test_a_finished_run_has_its_result_with_time_and_memory(config):
    run = open_run(config)
    returned = run.finish({"accuracy": 0.75})
    result = read_result(run.path)
    assert result == returned
    assert result["accuracy"] == 0.75
    assert result["time_seconds"] >= 0
    assert 0.01 < result["peak_memory_gb"] < 100
    assert is_finished(run.path)


def test_the_manifest_has_hashes_and_counts_of_every_input(config, tmp_path):
    good = '{"prompt": [{"role": "user", "content": "hi"}]}\n'
    path = tmp_path / "prompts.jsonl"
    path.write_text(good + "not json\n" + good)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    data = DataSection(train=[str(path)])
    config = config.model_copy(update={"model": ModelSection(path=str(model)), "data": data})
    run = open_run(config)
    run.note_sources(load_prompts([str(path)], on_error="skip").sources)
    manifest = read_manifest(run.path)
    (entry,) = manifest["inputs"]
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (entry["name"], entry["rows"], entry["kept"]) == (str(path), 3, 2)
    assert sum(entry["dropped"].values()) == 1
    assert f"{path}:2" in entry["errors"][0]
    assert manifest["models"] == {"model": hashlib.sha256(b"weights").hexdigest()}


def test_notes_are_on_disk_at_once_and_are_found_on_resuming(config):
    run = begin(config)
    run.note(before={"loss": 2.5})
    assert json.loads((run.path / "manifest.json").read_text())["before"] == {"loss": 2.5}
    again = open_run(config, resume=True)
    assert again.noted("before") == {"loss": 2.5}
    assert again.noted("after") is None


def test_beginning_and_peak_memory_of_a_resumed_run_are_those_of_all_its_parts(config, monkeypatch):
    run = begin(config)
    run.note(started="2026-11-25T10:00:00+0000")
    monkeypatch.setattr(hardware, "peak_memory_gb", lambda: 5.0)
    run.note_elapsed()
    monkeypatch.setattr(hardware, "peak_memory_gb", lambda: 2.0)
    again = open_run(config, resume=True)
    assert again.noted("started") == "2026-11-25T10:00:00+0000"
    assert again.finish({})["peak_memory_gb"] == read_result(again.path)["peak_memory_gb"] == 5.0


def test_a_later_part_of_a_run_may_need_the_most_memory(config, monkeypatch):
    for peak in (2.0, 5.0):
        run = begin(config, resume=peak == 5.0)
        monkeypatch.setattr(hardware, "peak_memory_gb", lambda peak=peak: peak)
        run.note_elapsed()
    assert run.finish({})["peak_memory_gb"] == 5.0


def test_a_resumed_run_computes_in_the_type_it_began_with_and_a_named_type_stays(config, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(hardware, "_settled", {})
    for prefers_bf16, resume in ((True, False), (False, True)):
        hardware.unsettle_auto()
        monkeypatch.setattr(hardware, "_cpu_prefers_bf16", lambda: prefers_bf16)  # noqa: B023, used within the loop
        begin(config, resume=resume, state=process_state("cpu"))
        assert hardware.compute_dtype(cpu) == torch.bfloat16
        assert hardware.compute_dtype(cpu, "float32") == torch.float32
    hardware.unsettle_auto()
    assert hardware.compute_dtype(cpu) == torch.float32


def test_a_run_knows_which_runs_it_was_made_from(config, tmp_path):
    upstream = open_run(with_run(config, dir=str(tmp_path / "up")))
    (upstream.path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "q"}]}\n')
    reader = config.model_copy(update={"data": DataSection(train=[str(upstream.path / "rows.jsonl")])})
    before = read_manifest(open_run(reader).path)["made_from"]
    assert list(before.values()) == [read_manifest(upstream.path)["id"]]
    assert open_run(reader, resume=True) and upstream_runs(reader) == before
    open_run(with_run(config, dir=str(tmp_path / "up"), overwrite=True))
    assert upstream_runs(reader) != before


def test_a_run_is_not_overwritten_by_a_stage_that_reads_it(config):
    run = open_run(config)
    (run.path / "model").mkdir()
    (run.path / "model" / "config.json").write_text("{}")
    for model in (run.path, run.path / "model"):
        again = with_run(config, overwrite=True).model_copy(update={"model": ModelSection(path=str(model))})
        with pytest.raises(RunError, match=r"holds model.*which run.overwrite=true would remove"):
            open_run(again)
    assert (run.path / "model" / "config.json").exists()


def test_a_folder_with_another_run_in_it_is_not_emptied(config):
    run = open_run(config)
    inner = open_run(with_run(config, dir=str(run.path / "evaluations" / "eval")))
    with pytest.raises(RunError, match=rf"holds another run \({inner.path}\), which run\.overwrite=true, or --from"):
        check_run_dir(with_run(config, overwrite=True))
    assert inner.path.exists() and run.noted("status") == "running"


def test_the_saved_configuration_does_not_overwrite_the_run_it_belongs_to(config):
    run = open_run(with_run(config, overwrite=True))
    assert not load_config(SmallConfig, run.path / "config.yaml").run.overwrite


# ------------------------------------------------------------------------------------------------- protection


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_not_touched(config, resume):
    open_run(config).finish({"accuracy": 1.0})
    before = {file.name: file.read_bytes() for file in Path(config.run.dir).iterdir()}
    with pytest.raises(RunError, match=r"holds a finished run\. Give another run\.dir, or run\.overwrite=true"):
        open_run(config, resume=resume)
    assert {file.name: file.read_bytes() for file in Path(config.run.dir).iterdir()} == before


def test_an_unfinished_run_goes_on_only_when_asked_to(config):
    begin(config).note(before=1)
    with pytest.raises(RunError, match=r"holds an unfinished run\. Add --resume"):
        open_run(config)
    assert open_run(config, resume=True).noted("before") == 1


def test_a_run_does_not_go_on_with_other_settings(config):
    begin(config)
    for changed, key in ((config.model_copy(update={"steps": 5}), "steps"), (with_run(config, seed=5), "run.seed")):
        with pytest.raises(RunError, match=rf"other settings \({key}\)\. Resume with the same"):
            open_run(changed, resume=True)


def test_a_run_does_not_go_on_from_another_model(config, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(b"one")
    config = config.model_copy(update={"model": ModelSection(path=str(model))})
    begin(config)
    open_run(config, resume=True)
    weights.write_bytes(b"two")
    with pytest.raises(RunError, match="model changed since the unfinished run began"):
        open_run(config, resume=True)


def test_a_run_does_not_go_on_with_another_chat_template(config, tmp_path):
    """Its first rows had other ids. A run that an earlier version began, which noted no digests, goes on."""
    model, own = tmp_path / "model", tmp_path / "own.jinja"
    model.mkdir()
    (model / "config.json").write_text("{}")
    files = {"model.tokenizer": model / "chat_template.jinja", "model.chat_template": own}
    for file in files.values():
        file.write_text("one")
    config = config.model_copy(update={"model": ModelSection(path=str(model), chat_template=str(own))})
    path = begin(config).path
    for key, file in files.items():
        open_run(config, resume=True)
        file.write_text("two")
        with pytest.raises(RunError, match=rf": {key} changed since the unfinished run began"):
            open_run(config, resume=True)
        file.write_text("one")
    manifest = read_manifest(path)
    del manifest["templates"]
    write_json(path / "manifest.json", manifest)
    own.write_text("two")
    open_run(config, resume=True)


def test_weights_of_the_older_format_have_a_digest_too(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    before = weights_sha256(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert weights_sha256(tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    before = weights_sha256(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"three")
    assert weights_sha256(tmp_path) == before, "transformers reads the others"


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_another_vocabulary_is_another_tokenizer_where_it_is_made_from_that(tmp_path, name):
    (tmp_path / name).write_text("one")
    before = tokenizer_sha256(tmp_path)
    (tmp_path / name).write_text("two")
    assert tokenizer_sha256(tmp_path) != before
    (tmp_path / "tokenizer.json").write_text("{}")
    before = tokenizer_sha256(tmp_path)
    (tmp_path / name).write_text("three")
    assert tokenizer_sha256(tmp_path) == before


@pytest.mark.parametrize("leaves_a_folder", [False, True])
def test_a_run_stopped_before_it_had_made_anything_begins_anew_with_what_was_corrected(
    config, tmp_path, leaves_a_folder
):
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = config.model_copy(update={"model": ModelSection(path=str(model)), "data": DataSection(train=[str(rows)])})

    def opened(steps: int, **options: bool) -> Run:
        (model / "model.safetensors").write_text(f"weights {steps}")
        rows.write_text(f'{{"prompt": [{{"role": "user", "content": "{steps}"}}]}}\n')
        run = open_run(config.model_copy(update={"steps": steps}), **options)
        run.note_sources(load_prompts([str(rows)]).sources)
        return run

    first = opened(3)
    first.note(before=1)
    if leaves_a_folder:
        (first.path / "checkpoints").mkdir()
    again = opened(5, resume=True)
    assert again.noted("before") is None and again.noted("settings")["steps"] == 5
    with pytest.raises(RunError, match="holds an unfinished run"):
        opened(7)


@pytest.mark.parametrize("left", ["metrics.jsonl", "answers.jsonl", "sampled.0.jsonl", "checkpoints/checkpoint-3/x"])
def test_whatever_a_run_has_made_is_not_gone_on_with_by_other_settings(config, left):
    file = open_run(config).path / left
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    for ask in (check_run_dir, open_run):
        with pytest.raises(RunError, match=r"other settings \(steps\)"):
            ask(config.model_copy(update={"steps": 5}), resume=True)


def test_a_run_goes_on_with_another_tracker_or_from_another_place(config, tmp_path):
    """The folder and what is reported decide nothing about the outcome."""
    begin(config).note(before=1)
    release_locks()
    Path(config.run.dir).rename(tmp_path / "moved")
    moved = with_run(config, dir=str(tmp_path / "moved"), report_to=["tensorboard"])
    assert open_run(moved, resume=True).noted("before") == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_no_run_made_is_never_touched(config, overwrite, resume):
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty and not a run directory"):
        open_run(with_run(config, overwrite=overwrite), resume=resume)
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]


NO_OBJECT = "manifest.json: no JSON object. The file is damaged: remove the folder and run its stage again, or, if it"
OTHER_MANIFESTS = {
    b'{"name": "app", "version": 3}': "not empty and not a run directory",
    **dict.fromkeys((b"[1]", b"not json", b'{"stage": "\xe9"}', b""), NO_OBJECT),
}


@pytest.mark.parametrize("manifest", OTHER_MANIFESTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_of_something_else_makes_no_run_directory(config, manifest, overwrite):
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "manifest.json").write_bytes(manifest)
    with pytest.raises(RunError, match=OTHER_MANIFESTS[manifest]):
        open_run(with_run(config, overwrite=overwrite))
    assert (folder / "manifest.json").read_bytes() == manifest


def test_data_may_lie_below_a_manifest_of_another_program(config, tmp_path):
    (tmp_path / "manifest.json").write_text('{"audio": 1}\n{"audio": 2}\n')
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "q"}]}\n')
    reader = config.model_copy(update={"data": DataSection(train=[str(tmp_path / "rows.jsonl")])})
    assert open_run(reader).writes


@pytest.mark.parametrize("content", [b'{"accuracy": ', b'{"accuracy": "\xe9"}', b"[1]"])
def test_a_damaged_result_is_named(config, content):
    run = open_run(config)
    run.finish({})
    (run.path / "result.json").write_bytes(content)
    with pytest.raises(RunError, match=r"result\.json: no JSON object\. The file is damaged: run the stage again\."):
        read_result(run.path)


def test_a_file_is_no_run_directory(config):
    Path(config.run.dir).write_text("years of work")
    with pytest.raises(RunError, match=r"run: is a file\. Give another run\.dir"):
        open_run(config)


def test_an_empty_folder_may_be_used(config):
    Path(config.run.dir).mkdir()
    assert read_manifest(open_run(config).path)["status"] == "running"


@pytest.mark.parametrize("finished", [False, True])
def test_overwrite_starts_anew(config, finished):
    run = open_run(config)
    run.note(before=1)
    (run.path / "model").mkdir()
    if finished:
        run.finish({})
    again = open_run(with_run(config, overwrite=True))
    assert again.noted("before") is None
    assert sorted(file.name for file in again.path.iterdir()) == ["config.yaml", "lock", "manifest.json"]
    assert not is_finished(again.path)


def test_overwrite_empties_the_folder_that_a_link_leads_to(config, tmp_path):
    outside, linked = tmp_path / "outside", tmp_path / "elsewhere" / "run"
    outside.mkdir()
    (outside / "kept").write_text("")
    linked.mkdir(parents=True)
    Path(config.run.dir).symlink_to(linked)
    run = open_run(config)
    (run.path / "sampled.jsonl").write_text("old")
    (run.path / "link").symlink_to(outside)
    open_run(with_run(config, overwrite=True))
    assert sorted(file.name for file in linked.iterdir()) == ["config.yaml", "lock", "manifest.json"]
    assert (outside / "kept").exists() and Path(config.run.dir).is_symlink()


@pytest.mark.parametrize("count", range(4))
def test_an_overwriting_that_was_interrupted_leaves_a_run_that_is_not_taken_for_finished(config, monkeypatch, count):
    run = open_run(config)
    (run.path / "rows.jsonl").write_text("old")
    run.finish({"accuracy": 1.0})
    remove, removed = runs._remove, []

    def interrupted(entry: Path) -> None:
        if len(removed) == count:
            raise KeyboardInterrupt
        removed.append(entry.name)
        remove(entry)

    monkeypatch.setattr(runs, "_remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_run(with_run(config, overwrite=True))
    monkeypatch.undo()
    assert len(removed) == count and not is_finished(run.path)
    for resume in (False, True):
        with pytest.raises(RunError, match=r"holds an outdated run.*run\.overwrite=true"):
            open_run(config, resume=resume)
    again = open_run(with_run(config, overwrite=True))
    assert sorted(file.name for file in again.path.iterdir()) == ["config.yaml", "lock", "manifest.json"]


def test_overwrite_with_resume_keeps_what_there_is(config):
    """So that the command that started a run with run.overwrite=true can be given again with --resume."""
    overwriting = with_run(config, overwrite=True)
    begin(overwriting).note(before=1)
    assert open_run(overwriting, resume=True).noted("before") == 1


def test_resume_of_a_run_that_has_not_begun_begins_it(config, caplog):
    """A job that is put back into a queue resumes always; who mistypes run.dir is told."""
    assert open_run(config, resume=True).noted("status") == "running"
    assert [record.getMessage() for record in caplog.records] == [
        f"{config.run.dir}: there is no run to resume, so one begins."
    ]


@pytest.mark.parametrize("victim", ["model_hashes", "to_yaml", "git_commit"])
def test_a_run_killed_while_it_opens_can_be_resumed(config, monkeypatch, victim):
    monkeypatch.setattr(runs, victim, kill)
    with pytest.raises(Killed):
        open_run(config)
    monkeypatch.undo()
    assert open_run(config, resume=True).noted("seed") == 4


def test_leftovers_of_a_killed_write_are_removed(config):
    run = open_run(config)
    (run.path / "model.tmp").mkdir()
    (run.path / "model.tmp" / "half").write_text("")
    (run.path / "result.json.tmp").write_text("{")
    open_run(config, resume=True)
    assert not list(run.path.glob("*.tmp"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_directory_is_checked_without_touching_it(config, resume):
    check_run_dir(config, resume=resume)
    assert not Path(config.run.dir).exists()
    run = begin(config)
    before = {file.name: file.stat().st_mtime_ns for file in run.path.iterdir()}
    other = config.model_copy(update={"steps": 5})
    with pytest.raises(RunError, match=r"other settings \(steps\)" if resume else "holds an unfinished run"):
        check_run_dir(other, resume=resume)
    check_run_dir(with_run(config, overwrite=True), resume=resume)
    run.finish({})
    with pytest.raises(RunError, match="holds a finished run"):
        check_run_dir(config, resume=resume)
    assert {name: before[name] for name in ("config.yaml", "lock")} == {
        name: (run.path / name).stat().st_mtime_ns for name in ("config.yaml", "lock")
    }


# ------------------------------------------------------------------------- what may change until a run is resumed

WANTED = {
    "model": "toy",
    "rewards": {"helpfulness": "toy", "safety": "toy"},
    "prompts": {"prompts": "toy:prompts.train"},
    "min_gain": 2.0,
}


def reject_config(tmp_path: Path, **changes: object) -> RejectionSamplingConfig:
    rewards = {**WANTED["rewards"], **changes.pop("rewards", {})}
    run = {"dir": str(tmp_path / "reject")}
    return RejectionSamplingConfig.model_validate({**WANTED, "run": run, **changes, "rewards": rewards})


@pytest.mark.parametrize(
    "change",
    [
        {"min_gain": 0.0},
        {"accumulate": "last"},
        {"baseline": ["mine.jsonl"]},
        {"rewards": {"threshold": 0.3}},
        {"rewards": {"max_tokens_per_batch": 64}},
    ],
    ids=str,
)
def test_a_round_goes_on_with_other_settings_of_what_comes_after_sampling(tmp_path, change):
    begin(reject_config(tmp_path))
    changed = reject_config(tmp_path, **change)
    [key] = changed_settings(read_manifest(tmp_path / "reject"), changed)
    assert key in RejectionSamplingConfig.resume_may_change
    run = open_run(changed, resume=True)
    assert changed_settings(read_manifest(run.path), changed) == []
    with pytest.raises(RunError, match=r"other settings \(round\)\. Resume with the same"):
        open_run(reject_config(tmp_path, **change, round=2), resume=True)


def test_other_contents_are_noticed_under_another_spelling_of_the_files_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": [{"role": "user", "content": "one"}]}\n')
    begin(config).note_sources(load_prompts(["rows.jsonl"]).sources)
    open_run(config, resume=True).note_sources(load_prompts([str(rows)]).sources)
    rows.write_text('{"prompt": [{"role": "user", "content": "two"}]}\n')
    with pytest.raises(RunError, match=r"rows\.jsonl changed since the unfinished run began"):
        open_run(config, resume=True).note_sources(load_prompts(["./rows.jsonl"]).sources)


def test_a_built_in_model_is_no_folder_of_its_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = config.model_copy(update={"model": ModelSection(path="toy")})
    folder = config.model_copy(update={"model": ModelSection(path="./toy")})
    assert changed_settings({"settings": settings(named)}, folder) == ["model.path"]


def test_another_spelling_of_a_file_is_no_change_of_what_is_said_of_it(write_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_file("a.jsonl", "x")

    def config(name: str, count: int = 3) -> SFTConfig:
        own = [f"data.train={name}", f"data.max_rows_of={{{name}: {count}}}"]
        return load_config(SFTConfig, None, ["model=toy", "run.dir=r", *own], check_inputs=False)

    before = {"settings": settings(config("a.jsonl"))}
    assert changed_settings(before, config(str(tmp_path / "a.jsonl"))) == []
    assert changed_settings(before, config("a.jsonl", 4)) == ["data.max_rows_of.a.jsonl"]


def test_a_resumed_run_may_read_one_more_file_but_not_other_contents_of_those_it_knows(config, tmp_path):
    row = '{"prompt": [{"role": "user", "content": "%s"}]}\n'
    (tmp_path / "one.jsonl").write_text(row % "one")
    (tmp_path / "two.jsonl").write_text(row % "two")
    one, two = (str(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    begin(config).note_sources(load_prompts([one]).sources)
    open_run(config, resume=True).note_sources(load_prompts([one, two]).sources)
    (tmp_path / "two.jsonl").write_text(row % "three")
    with pytest.raises(RunError, match=r"two\.jsonl changed since the unfinished run began"):
        open_run(config, resume=True).note_sources(load_prompts([one, two]).sources)


def test_checkpoints_may_come_more_often_after_a_resume_but_batches_stay(tmp_path):
    values = {"model": "toy", "data": {"train": "toy:sft.train"}, "run": {"dir": str(tmp_path / "sft")}}
    begin(SFTConfig.model_validate(values))
    open_run(SFTConfig.model_validate({**values, "train": {"save_every": 7}}), resume=True)
    for key in ("batch_size", "max_tokens_per_batch"):
        with pytest.raises(RunError, match=rf"other settings \(train\.{key}\)"):
            open_run(SFTConfig.model_validate({**values, "train": {key: 7}}), resume=True)


@pytest.mark.parametrize("stage", STAGES)
def test_what_may_change_are_settings(stage):
    cls = STAGES[stage].config_class()
    assert cls.resume_may_change <= {key for key, *_ in describe(cls)}


# ------------------------------------------------------------------------------------------- several processes


@contextmanager
def another_process_at(folder: Path) -> Iterator[None]:
    """The lock that another process holds: of another opening of the file, as flock counts them."""
    with (folder / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_locked(folder: Path) -> bool:
    try:
        with another_process_at(folder):
            return False
    except BlockingIOError:
        return True


@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite": True}, {}])
def test_a_run_that_another_process_works_on_is_left_alone(config, changes):
    run = open_run(config)
    release_locks()
    (run.path / "model.tmp").mkdir()
    before = {file.name: file.stat().st_mtime_ns for file in run.path.iterdir()}
    resume, changed = changes.get("resume", False), with_run(config, overwrite=changes.get("overwrite", False))
    with another_process_at(run.path):
        for ask in (open_run, check_run_dir):
            with pytest.raises(RunError, match=r"run: another process .* is working here\. Wait for it, or stop it\."):
                ask(changed, resume=resume)
    assert {file.name: file.stat().st_mtime_ns for file in run.path.iterdir()} == before


def test_a_run_is_free_again_when_its_process_was_killed(config):
    open_run(config)
    release_locks()
    text = (
        "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); "
        "time.sleep(600)"
    )
    arguments = [sys.executable, "-c", text, str(Path(config.run.dir) / "lock")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RunError, match=rf"another process \({os.getpid()} on"):  # who wrote the manifest
            open_run(config, resume=True)
        other.kill()
    assert open_run(config, resume=True)


def test_a_run_is_locked_until_it_is_finished_and_may_be_opened_again_meanwhile(config):
    run = open_run(config)
    assert is_locked(run.path)
    assert open_run(config, resume=True)
    assert open_run(with_run(config, overwrite=True)) and is_locked(run.path)
    run.finish({})
    assert not is_locked(run.path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError, None])
def test_a_stage_that_ends_leaves_its_run_to_others(config, error):
    @isolated()
    def stage() -> None:
        assert is_locked(open_run(config).path)
        if error:
            raise error

    if error:
        with pytest.raises(error):
            stage()
    else:
        stage()
    assert not is_locked(Path(config.run.dir))


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError()])
def test_where_the_file_system_has_no_locks_runs_are_made_without(config, monkeypatch, error):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert open_run(config).writes and open_run(config, resume=True)


def process(index: int) -> SimpleNamespace:
    """The part of accelerate's PartialState that a run looks at."""
    device = torch.device("cpu")
    return SimpleNamespace(is_main_process=index == 0, wait_for_everyone=lambda: None, num_processes=2, device=device)


def test_only_the_main_process_writes(config):
    main = open_run(config, state=process(0))
    before = {file.name: file.read_bytes() for file in main.path.iterdir()}
    other = open_run(config, state=process(1))  # finds the run that the main process has just made
    assert main.writes and not other.writes
    other.note(junk=1)
    other.log(1, {"a": 1.0})
    other.finish({"a": 1})
    other.clear_checkpoints()
    assert {file.name: file.read_bytes() for file in main.path.iterdir()} == before


def test_every_process_finds_the_notes_of_the_run_it_resumes(config):
    begin(config).note(before=1)
    assert [open_run(config, resume=True, state=process(index)).noted("before") for index in (0, 1)] == [1, 1]


# ------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(run: Run, step: int, *, complete: bool) -> Path:
    folder = run.path / "checkpoints" / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_text("weights")
    if complete:
        mark_complete(folder)
    return folder


def test_the_newest_complete_checkpoint_is_taken_by_number(config):
    run = open_run(config)
    assert newest_checkpoint(run) is None
    checkpoint(run, 5, complete=True)
    ten = checkpoint(run, 10, complete=True)
    checkpoint(run, 15, complete=False)
    assert newest_checkpoint(run) == ten


def test_a_checkpoint_killed_before_its_mark_is_not_used(config, monkeypatch):
    run = open_run(config)
    five = checkpoint(run, 5, complete=True)
    ten = checkpoint(run, 10, complete=False)
    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(Killed):
        mark_complete(ten)
    assert newest_checkpoint(run) == five


def cut_off(file: Path) -> None:
    os.truncate(file, 3)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [cut_off, emptied, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(config, damage, caplog):
    run = open_run(config)
    five, ten = (checkpoint(run, step, complete=True) for step in (5, 10))
    damage(ten / "deep" / "weights")
    assert newest_checkpoint(run) == five
    assert f"{ten}: the checkpoint is damaged (deep/weights). The run goes on from the one before it" in caplog.text
    (ten / "deep" / "weights").write_text("again")
    mark_complete(ten)
    assert newest_checkpoint(run) == ten


def test_a_checkpoint_with_a_damaged_mark_is_not_used_but_one_of_an_earlier_version_is(config, caplog):
    run = open_run(config)
    five, ten = (checkpoint(run, step, complete=True) for step in (5, 10))
    os.truncate(ten / "complete", 4)
    assert newest_checkpoint(run) == five and "damaged (complete)" in caplog.text
    os.truncate(ten / "complete", 0)
    assert newest_checkpoint(run) == ten


def test_half_written_checkpoints_are_removed_before_the_run_goes_on(config):
    """Trainer keeps the newest two, marked or not, and its steps may now be others."""
    run = begin(config)
    checkpoint(run, 50, complete=True)
    half = checkpoint(run, 100, complete=False)
    (half.parent / "checkpoint-60.tmp").mkdir()
    again = open_run(config, resume=True)
    assert [folder.name for folder in half.parent.iterdir()] == ["checkpoint-50"]
    assert newest_checkpoint(again).name == "checkpoint-50"


def test_checkpoints_of_a_finished_run_are_cleared(config):
    run = open_run(config)
    checkpoint(run, 5, complete=True)
    run.clear_checkpoints()
    assert not (run.path / "checkpoints").exists()


def test_metrics_of_a_run_carry_its_stage(config):
    run = open_run(config)
    run.log(3, {"small/loss": 0.5})
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"step": 3, "stage": "small", "small/loss": 0.5}
