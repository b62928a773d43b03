"""The run directories of a pipeline: what is skipped, gone on with, made again or refused, and what may refer to what.

Stages write what real ones do, without any work.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from alignment import hardware, manifests
from alignment.chat_formats import CHATML
from alignment.cli import pipeline as pipelines
from alignment.cli import pipeline_stages
from alignment.cli.main import run_pipeline, run_stage
from alignment.cli.pipeline import check_pipeline, check_runs, load_pipeline, run_stages
from alignment.cli.pipeline_inputs import JUDGES, check_stages
from alignment.cli.stages import STAGES, Stage
from alignment.config import StageConfig, describe, load_config
from alignment.config.sections import named_inputs
from alignment.data import SourceReport
from alignment.errors import ConfigError, DataError, RunError
from alignment.files import file_sha256, write_json
from alignment.locks import release_locks
from alignment.manifests import mark_outdated, read_manifest, read_result, upstream_runs
from alignment.model_folders import model_folder
from alignment.runs import open_run
from alignment.sources import find_data
from rlhf.config import RejectionSamplingConfig

ROOT = Path(__file__).parents[1]
ROW = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "a"}]}\n'

TEXT = """
defaults: {run: {device: cpu}}
stages:
  sft: {model: BASE, data: {train: "${here}/rows.jsonl"}}
  rm: {kind: safety, model: "${sft}", data: {train: "toy:safety.train"}}
  reject:
    model: ${sft}
    rewards: {helpfulness: "${rm}", safety: "${rm}"}
    prompts: {prompts: "toy:prompts.train"}
  rs: {stage: sft, model: BASE, data: {train: ["${reject}/sft.jsonl"]}}
"""


def write_model(folder: Path, kind: str, *, weights: str) -> None:
    """The toy model's tokenizer and configuration with anything for weights."""
    shutil.copytree(model_folder("toy"), folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if kind == "reward model":
        config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_text(weights)


class Trial:
    """A pipeline's file with its data and base model, and how its stages went: `log` has a line for each that ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.log: list[str] = []
        self.fails_in = ""
        base = folder / "base"
        write_model(base, "chat model", weights="base")
        (folder / "rows.jsonl").write_text(ROW % "q")
        (folder / "p.yaml").write_text(TEXT.replace("BASE", str(base)))

    def load(self, *overrides: str, from_stage: str | None = None) -> pipelines.Pipeline:
        return load_pipeline(self.folder / "p.yaml", [f"runs={self.runs}", *overrides], from_stage=from_stage)

    def run(self, *overrides: str, from_stage: str | None = None) -> list[str]:
        """What was done in this call."""
        self.log.clear()
        run_stages(self.load(*overrides, from_stage=from_stage))
        return list(self.log)

    def work(self, stage: Stage) -> Callable[..., dict[str, Any]]:
        """A stage's `run`: the files that others read, and a manifest and result as the real one's."""

        def run(config: StageConfig, *, resume: bool = False) -> dict[str, Any]:
            run_dir = open_run(config, resume=resume)
            name = run_dir.path.name
            self.log.append(f"{name} goes on" if resume else name)
            found = [(key, find_data(key)) for _, key, kind in config.input_names() if kind == "data"]
            run_dir.note_sources([SourceReport(key, file_sha256(path), 1, 1) for key, path in found])
            (run_dir.path / "half").write_text("done")
            if name == self.fails_in:
                release_locks()  # as `isolated` does
                raise KeyboardInterrupt
            if stage.makes:
                write_model(run_dir.model_dir, stage.makes, weights=name)
            if stage.name == "reject":
                (run_dir.path / "sft.jsonl").write_text(ROW % "new")
            return run_dir.finish({"stage": stage.name})

        return run


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    found = Trial(tmp_path)
    monkeypatch.setattr(Stage, "run_function", lambda stage: found.work(stage))
    for name in ("one_line", "print_summary", "write_report"):
        monkeypatch.setattr(pipelines, name, lambda *_, **__: "")
    return found


ALL = ["sft", "rm", "reject", "rs"]


def statuses(trial: Trial) -> dict[str, str]:
    return {name: (read_manifest(trial.runs / name) or {}).get("status") for name in ALL}


# -------------------------------------------------------------------------------------------- made again from a stage


def test_finished_stages_are_skipped_and_an_interrupted_one_goes_on(trial):
    trial.fails_in = "reject"
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    trial.fails_in = ""
    assert trial.run() == ["reject goes on", "rs"]
    assert trial.run() == []


@pytest.mark.parametrize("fails_in", ["rm", "reject", "rs"])
def test_a_series_begun_with_from_is_gone_on_with_where_it_was_interrupted(trial, capsys, fails_in):
    trial.run()
    before = {name: read_manifest(trial.runs / name)["id"] for name in ALL}
    trial.fails_in = fails_in
    with pytest.raises(KeyboardInterrupt):
        trial.run(from_stage="rm")
    assert f"{fails_in}: not finished. The same command without --from goes on here." in capsys.readouterr().err
    place = ALL.index(fails_in)
    assert statuses(trial) == {
        name: "finished" if name == "sft" or ALL.index(name) < place else "running" if name == fails_in else "outdated"
        for name in ALL
    }
    trial.fails_in = ""
    assert trial.run() == [f"{fails_in} goes on", *ALL[place + 1 :]]
    after = {name: read_manifest(trial.runs / name)["id"] for name in ALL}
    assert [name for name in ALL if after[name] == before[name]] == ["sft"]
    assert trial.run() == []


def test_a_stage_that_is_to_be_made_again_starts_without_its_old_files(trial):
    trial.run()
    trial.fails_in = "rm"
    with pytest.raises(KeyboardInterrupt):
        trial.run(from_stage="rm")
    (trial.runs / "rs" / "old").write_text("")
    trial.fails_in = ""
    trial.run()
    assert not (trial.runs / "rs" / "old").exists()


def test_an_interrupted_run_that_is_to_be_made_again_is_not_gone_on_with(trial):
    trial.fails_in = "rm"
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    trial.fails_in = ""
    assert trial.run(from_stage="rm") == ["rm", "reject", "rs"]


# -------------------------------------------------------------------------------- refused before the first stage runs


def test_a_stage_made_from_an_older_run_is_refused_before_any_stage_runs(trial):
    trial.run()
    config = trial.load("sft.run.overwrite=true").stages[0].config
    trial.work(STAGES["sft"])(config)
    shutil.rmtree(trial.runs / "rm")
    with pytest.raises(RunError, match=r"reject: was made from an earlier version of model: .*sft, .* --from reject"):
        trial.run()
    assert trial.log == []


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_finished_stage_whose_source_is_going_to_be_made_again_is_refused(trial, is_gone):
    trial.run()
    if is_gone:
        (trial.runs / "sft").rename(trial.folder / "elsewhere")
    else:
        mark_outdated(trial.runs / "sft")
    with pytest.raises(RunError, match=r"rm: was made from an earlier version of model: .*sft\. Add --from rm"):
        trial.run()
    assert trial.log == []
    assert trial.run(from_stage="rm") == ALL


def other_rows(trial: Trial) -> str:
    (trial.folder / "rows.jsonl").write_text(ROW % "another")
    return f"sft: finished with other contents of {trial.folder}/rows.jsonl. Put the old ones back, add --from sft to"


def other_base_model(trial: Trial) -> str:
    (trial.folder / "base" / "model.safetensors").write_bytes(b"another")
    return f"sft: finished with other contents of {trial.folder}/base. Put the old ones back, add --from sft to"


def other_rows_in_an_earlier_run(trial: Trial) -> str:
    (trial.runs / "reject" / "sft.jsonl").write_text(ROW % "mine")
    return f"rs: finished with other contents of {trial.runs}/reject/sft.jsonl. Put the old ones back, add --from rs to"


def other_tokenizer(trial: Trial) -> str:
    with (trial.folder / "base" / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    base = f"{trial.folder}/base"
    return f"sft: finished with other contents of the tokenizer or chat template of {base}. Put the old ones back, add"


@pytest.mark.parametrize("change", [other_rows, other_base_model, other_rows_in_an_earlier_run, other_tokenizer])
def test_other_contents_behind_a_finished_stage_are_refused(trial, change):
    trial.run()
    message = change(trial)
    with pytest.raises(RunError) as caught:
        trial.run()
    assert message in str(caught.value) and trial.log == []
    stage = message.split(":")[0]
    assert trial.run(from_stage=stage) == ALL[ALL.index(stage) :]


def test_another_chat_template_behind_a_finished_stage_is_refused(trial):
    template = trial.folder / "own.jinja"
    template.write_text(CHATML)
    own = f"defaults.model.chat_template={template}"
    assert trial.run(own) == ALL
    template.write_text(CHATML + "{# another #}")
    with pytest.raises(RunError, match=r"sft: finished with other contents of .*/own\.jinja\. Put the old ones back"):
        trial.run(own)
    assert trial.log == []
    for name in ALL:  # as an earlier version noted them
        manifest = read_manifest(trial.runs / name)
        del manifest["templates"]
        write_json(trial.runs / name / "manifest.json", manifest)
    assert trial.run(own) == []


def test_a_manifest_of_another_program_above_a_base_model_vouches_for_nothing(trial):
    (trial.folder / "manifest.json").write_text('{"name": "my extension"}')
    trial.run()
    manifest = read_manifest(trial.runs / "sft")
    assert manifest["made_from"] == {}
    noted = {f"model: {trial.folder}/base": ""}  # by an earlier version
    write_json(trial.runs / "sft" / "manifest.json", {**manifest, "made_from": noted})
    assert trial.run() == []
    message = other_base_model(trial)
    with pytest.raises(RunError) as caught:
        trial.run()
    assert message in str(caught.value)


def run_by_name(trial: Trial, *, is_absolute: bool) -> list[str]:
    """What was done where the working directory is the pipeline's, and names of file and runs are relative or not."""
    folder = trial.folder if is_absolute else Path()
    trial.log.clear()
    run_stages(load_pipeline(folder / "p.yaml", [f"runs={folder / 'runs'}"]))
    return list(trial.log)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_another_spelling_of_a_pipelines_path_is_no_change(trial, monkeypatch, is_absolute):
    monkeypatch.chdir(trial.folder)
    trial.fails_in = "rs"
    with pytest.raises(KeyboardInterrupt):
        run_by_name(trial, is_absolute=is_absolute)
    trial.fails_in = ""
    assert run_by_name(trial, is_absolute=not is_absolute) == ["rs goes on"]
    assert run_by_name(trial, is_absolute=is_absolute) == []
    assert run_by_name(trial, is_absolute=not is_absolute) == []
    other_rows_in_an_earlier_run(trial)
    with pytest.raises(RunError, match=r"rs: finished with other contents of .*reject/sft\.jsonl"):
        run_by_name(trial, is_absolute=is_absolute)
    assert trial.log == []


def test_another_file_is_a_change_and_both_names_are_said(trial):
    trial.run()
    other = trial.folder / "other.jsonl"
    other.write_text(ROW % "q")
    with pytest.raises(RunError, match=r"sft: finished with other settings \(data\.train\)\. ") as caught:
        trial.run(f"sft.data.train={other}")
    assert f"data.train was ['{trial.folder}/rows.jsonl'], and is ['{other}']. Add --from sft" in str(caught.value)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("override", "names", "first"),
    [("rm.run.overwrite=true", "rm", "rm"), ("defaults.run.overwrite=yes", "sft, rm, reject, rs", "sft")],
)
def test_overwriting_which_a_pipeline_does_not_do_is_refused(trial, override, names, first, dry_run):
    trial.run()
    trial.log.clear()
    with pytest.raises(ConfigError) as caught:
        run_pipeline(trial.folder / "p.yaml", [f"runs={trial.runs}", override], dry_run=dry_run)
    assert str(caught.value).startswith(f"stages.{names}: run.overwrite: a pipeline keeps what is finished")
    assert f"Add --from {first} instead" in str(caught.value) and trial.log == []
    assert trial.run("rm.run.overwrite=false") == []


def test_the_report_of_a_pipeline_shows_its_own_stages(trial, monkeypatch):
    asked: list[tuple[list[Path], list[str]]] = []
    monkeypatch.setattr(pipelines, "write_report", lambda paths, *, stages: asked.append((paths, stages)))
    trial.run()
    assert asked == [([trial.runs], ALL)]


def test_each_file_is_read_once_and_models_of_known_runs_never(trial, monkeypatch):
    trial.run()
    read: list[str] = []

    def digest(path: Path) -> str:
        read.append(path.relative_to(trial.folder).as_posix())
        return file_sha256(path)

    monkeypatch.setattr(manifests, "file_sha256", digest)
    monkeypatch.setattr(pipeline_stages, "file_sha256", digest)
    check_runs(trial.load())
    tokenizer = [f"base/{name}" for name in manifests.TOKENIZER_FILES if (trial.folder / "base" / name).is_file()]
    assert sorted(read) == sorted(["base/model.safetensors", *tokenizer, "rows.jsonl", "runs/reject/sft.jsonl"])


def test_what_an_earlier_stage_made_may_be_removed_once_it_was_read(trial):
    trial.run()
    (trial.runs / "reject" / "sft.jsonl").unlink()
    (trial.runs / "sft" / "model" / "model.safetensors").unlink()
    assert trial.run() == []


@pytest.mark.parametrize(
    ("gone", "reader", "key"),
    [
        ("sft/model", "reject", "model"),
        ("rm/model/model.safetensors", "reject", "rewards.helpfulness"),
        ("reject/sft.jsonl", "rs", "data.train"),
    ],
)
def test_what_a_stage_to_come_reads_and_was_removed_is_found_before_any_stage_runs(trial, gone, reader, key):
    trial.fails_in = reader
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    trial.fails_in, maker = "", gone.partition("/")[0]
    (trial.runs / gone).rename(trial.folder / "elsewhere")
    with pytest.raises(RunError, match=rf"{maker}: finished, but what {reader} reads of it \({key}: .+--from {maker} "):
        trial.run()
    assert trial.log == []
    assert trial.run(from_stage=maker) == ALL[ALL.index(maker) :]


@pytest.mark.parametrize("from_stage", [None, "rs"])
def test_a_folder_that_no_run_made_is_found_before_the_first_stage(trial, from_stage):
    (trial.runs / "rs").mkdir(parents=True)
    (trial.runs / "rs" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="rs: not empty and not a run directory"):
        trial.run(from_stage=from_stage)
    assert trial.log == [] and not (trial.runs / "sft").exists()


def test_other_settings_of_an_unfinished_stage_are_found_before_the_first_stage_goes_on(trial):
    trial.fails_in = "rs"
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    trial.fails_in = ""
    shutil.rmtree(trial.runs / "reject")
    with pytest.raises(RunError, match=r"rs: the unfinished run has other settings \(train\.epochs\)"):
        trial.run("rs.train.epochs=7")
    assert trial.log == []
    assert trial.run("rs.train.save_every=7") == ["reject", "rs goes on"]


def test_changed_settings_are_named_with_their_keys(trial):
    trial.run()
    with pytest.raises(RunError, match=r"sft: finished with other settings \(data\.max_length, optim\.lr\)\."):
        trial.run("sft.optim.lr=1", "sft.data.max_length=9")


@pytest.mark.parametrize("from_stage", [None, "rm", "sft"])
def test_a_second_align_run_beside_the_first_is_refused_and_changes_nothing(trial, from_stage):
    """The first one, whose lock is another's than those of this process's runs, is in its second stage."""
    trial.run()
    held = FileLock(trial.runs / "rm" / "lock")
    mark_outdated(trial.runs / "rm")
    before = statuses(trial)
    with held, pytest.raises(RunError, match=r"rm: another process .* is working here"):
        trial.run(from_stage=from_stage)
    assert statuses(trial) == before and trial.log == []


@pytest.mark.parametrize(("stage", "error"), [("sft", DataError), ("rm", RunError)])
def test_a_refused_from_changes_nothing(trial, stage, error):
    trial.run()
    (trial.folder / "rows.jsonl").write_text("no row\n")  # which sft reads again, or which it did not read
    before = {path: path.read_bytes() for path in trial.runs.rglob("*") if path.is_file()}
    with pytest.raises(error):
        trial.run(from_stage=stage)
    assert {path: path.read_bytes() for path in trial.runs.rglob("*") if path.is_file()} == before
    assert trial.log == []


def test_a_home_folder_is_found(trial, monkeypatch):
    monkeypatch.setenv("HOME", str(trial.folder))
    trial.runs = Path("~/mine")
    assert trial.run() == ALL
    assert read_result(trial.folder / "mine" / "rs")["stage"] == "sft"
    assert trial.run() == []


def test_a_run_is_known_by_its_name_in_the_home_folder(trial, monkeypatch):
    trial.run()
    monkeypatch.setenv("HOME", str(trial.folder))
    config = trial.load().stages[1].config
    there = config.model_copy(update={"model": config.model.model_copy(update={"path": "~/runs/sft"})})
    assert list(upstream_runs(there).values()) == [read_manifest(trial.runs / "sft")["id"]]


@pytest.mark.e2e
def test_a_round_resumed_with_other_settings_ends_as_one_begun_with_them(tmp_path, save_judges):
    """Also where the threshold has a say in the temperature that is chosen."""
    settings = [
        *("model.path=toy", "model.dtype=float32", "run.device=cpu", *save_judges(tmp_path)),
        *("prompts.prompts=toy:prompts.train", "prompts.max_prompts=12", "sampling.num_candidates=3"),
        *("sampling.max_new_tokens=8", "sampling.temperature_grid=[0.7, 1.3]", "sampling.temperature_prompts=4"),
    ]
    changed = ["rewards.threshold=0.6", "rewards.max_tokens_per_batch=64", "accumulate=all"]

    def run(name: str, *more: str, resume: bool = False) -> None:
        config = load_config(RejectionSamplingConfig, None, [*settings, *more, f"run.dir={tmp_path / name}"])
        STAGES["reject"].run_function()(config, resume=resume)

    with pytest.raises(DataError, match="Lower min_gain"):
        run("resumed", "min_gain=1e9")
    run("resumed", *changed, resume=True)
    run("whole", *changed)
    for name in ("candidates.jsonl", "sft.jsonl", "potential.json"):
        assert (tmp_path / "resumed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_dry_run_says_what_is_wrong_with_the_runs(trial):
    trial.run()
    other_rows(trial)
    with pytest.raises(RunError, match="sft: finished with other contents of"):
        run_pipeline(trial.folder / "p.yaml", [f"runs={trial.runs}"], dry_run=True)
    run_pipeline(trial.folder / "p.yaml", [f"runs={trial.runs}"], from_stage="sft", dry_run=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_directory_that_is_taken_is_found_before_data_is_read(tmp_path, dry_run, monkeypatch):
    settings = ["model=toy", "kind=safety", "data.train=toy:safety.train", f"run.dir={tmp_path}"]
    (tmp_path / "thesis.txt").write_text("years of work")
    for name in ("run_function", "check_function"):
        monkeypatch.setattr(Stage, name, lambda _: pytest.fail("the work has begun"))
    with pytest.raises(RunError, match="not empty and not a run directory"):
        run_stage("rm", settings, dry_run=dry_run)
    run_stage("rm", settings, show_config=True)


# --------------------------------------------------------------------------------------- references to earlier stages

FIRST = """
stages:
  sft: {model: toy, data: {train: "toy:sft.train"}}
  rm-safety: {stage: rm, kind: safety, model: "${sft}", data: {train: "toy:safety.train"}}
  reject:
    model: ${sft}
    rewards: {helpfulness: "${rm-safety}", safety: "${rm-safety}/model"}
    prompts: {prompts: "toy:prompts.train"}
  measured:
    stage: eval
    policies: {safety: "${sft}"}
    rewards: {helpfulness: "${rm-safety}", safety: "${rm-safety}"}
    prompts: {prompts: "toy:prompts.heldout"}
  more: {stage: rm, kind: safety, model: "${rm-safety}", data: {train: "toy:safety.train"}}
"""


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (
            '{stage: sft, model: "${reject}", data: {train: "toy:sft.train"}}',
            "model: ${reject}: must be a chat model; reject makes no model, but candidates.jsonl, sft.jsonl. Earlier "
            "stages that make one: sft.",
        ),
        (
            '{stage: sft, model: "${rm-safety}/model", data: {train: "toy:sft.train"}}',
            "model: ${rm-safety}/model: must be a chat model; rm makes a reward model. Earlier stages that make one: "
            "sft.",
        ),
        (
            '{stage: eval, policies: {safety: "${rm-safety}"}, rewards: {helpfulness: "${rm-safety}", safety: '
            '"${rm-safety}"}, prompts: {prompts: "toy:prompts.heldout"}}',
            "policies.safety: ${rm-safety}: must be a chat model; rm makes a reward model.",
        ),
        (
            '{stage: reject, model: "${sft}", rewards: {helpfulness: "${rm-safety}", safety: "${sft}"}, prompts: '
            '{prompts: "toy:prompts.train"}}',
            "rewards.safety: ${sft}: must be a reward model; sft makes a chat model. Earlier stages that make one: "
            "rm-safety, more.",
        ),
        (
            '{stage: distil, model: "${sft}", safety: "${sft}", prompts: {prompts: "toy:prompts.train"}}',
            "safety: ${sft}: must be a reward model; sft makes a chat model.",
        ),
        (
            '{stage: rm, kind: safety, model: "${reject}", data: {train: "toy:safety.train"}}',
            "model: ${reject}: must be a chat model or a reward model; reject makes no model",
        ),
        (
            '{stage: sft, model: "${sft}", data: {train: ["${reject}/stf.jsonl"]}}',
            "data.train: ${reject}/stf.jsonl: reject writes no such file, but candidates.jsonl, sft.jsonl. Did you "
            "mean sft.jsonl?",
        ),
        (
            '{stage: sft, model: "${sft}", data: {train: ["${reject}"]}}',
            "data.train: ${reject}: reject writes no such file, but candidates.jsonl, sft.jsonl.",
        ),
    ],
)  # fmt: skip
def test_a_reference_to_what_a_stage_never_makes_is_found_before_any_stage_runs(tmp_path, stage, problem):
    (tmp_path / "p.yaml").write_text(f"{FIRST}  wrong: {stage}\n")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(tmp_path / "p.yaml", [])
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/p.yaml: stages.wrong: {problem}")


def test_references_to_what_stages_make_are_in_order(tmp_path):
    last = 'data: {train: ["${measured}/answers-safety.jsonl", "${reject}/candidates.jsonl", "${sft}/answers.jsonl"]}'
    (tmp_path / "p.yaml").write_text(f'{FIRST}  last: {{stage: sft, model: "${{sft}}/model", {last}}}\n')
    assert [stage.name for stage in load_pipeline(tmp_path / "p.yaml", []).stages][-1] == "last"


def test_every_setting_for_a_model_is_known_to_be_for_a_reward_model_or_for_a_chat_model():
    found = set()
    for stage in STAGES.values():
        for kind in (None, *stage.kinds):
            keys = [key for key, *_ in describe(stage.of_kind(kind).config_class())]
            found |= {key.removesuffix(".path") for key in keys if key.endswith(".path") or key == "policies"}
    assert found == {*JUDGES, "model", "policies"}


def test_the_files_of_a_stage_are_those_of_the_documentation():
    page = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    for stage in STAGES.values():
        [(makes, files)] = re.findall(rf"^\| `{stage.name}` \|(?: (\w+ model))? \| (.*) \|$", page, re.M)
        names = re.findall(r"`([\w.-]+\.jsonl)`", files)
        assert [re.sub("NAME|ITERATION", "*", name) for name in names] == list(stage.files)
        assert makes == (stage.makes or "")


# ---------------------------------------------------------------------------------------------- rows and chat formats


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_bad_row_of_the_last_stage_is_found_before_the_first_one_runs(trial, dry_run):
    (trial.folder / "last.jsonl").write_text(ROW % "good" + '{"messages": []}\n' + "no row\n")
    last = [f"runs={trial.runs}", f"rs.data.valid={trial.folder}/last.jsonl"]
    with pytest.raises(DataError) as caught:
        run_pipeline(trial.folder / "p.yaml", last, dry_run=dry_run)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"stages.rs: data.valid: {trial.folder}/last.jsonl:2: ")
    assert second.startswith(f"stages.rs: data.valid: {trial.folder}/last.jsonl:3: ")
    assert trial.log == [] and not trial.runs.exists()
    run_pipeline(trial.folder / "p.yaml", [*last, "rs.data.on_error=skip"], dry_run=True)


def test_rows_of_another_kind_than_the_stage_reads_are_found_before_the_first_one_runs(trial):
    with pytest.raises(DataError, match=r"stages\.rm: data\.mix_in: .*rows\.jsonl:1: "):
        trial.run(f"rm.data.mix_in={trial.folder}/rows.jsonl")
    assert trial.log == []


def test_rows_of_finished_stages_and_of_earlier_ones_are_not_read_beforehand(trial, monkeypatch):
    trial.run()
    trial.fails_in = "rs"
    with pytest.raises(KeyboardInterrupt):
        trial.run(from_stage="rs")
    read = []
    monkeypatch.setattr("alignment.cli.pipeline_inputs.load_rows", lambda names, *_, **__: read.extend(names))
    check_pipeline(trial.load())
    assert read == []
    check_pipeline(trial.load(from_stage="reject"))
    assert read == ["toy:prompts.train"]


def test_every_setting_for_rows_has_a_parser():
    for stage in STAGES.values():
        for kind in (None, *stage.kinds):
            chosen = stage.of_kind(kind)
            keys = _data_settings(chosen.config_class())
            assert keys == set(chosen.rows)
            assert all(callable(chosen.row_parser(key)) for key in keys)


def _data_settings(cls: type[StageConfig]) -> set[str]:
    """The settings that name files of rows."""
    values: dict[str, Any] = {}
    for key, *_ in describe(cls):
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = ["rows"]
    return {key for key, _, kind in named_inputs(cls, values) if kind == "data"}


CHATS = """
stages:
  sft: {model: {path: toy%s}, data: {train: "toy:sft.train"}}
  rm: {kind: safety, model: {path: toy%s}, data: {train: "toy:safety.train"}}
  rs: {stage: sft, model: "${sft}", data: {train: "toy:sft.train"}}
  ppo:
    model: {path: "${rs}"%s}
    rewards: {helpfulness: "${rm}", safety: "${rm}/model"}
    prompts: {prompts: "toy:prompts.train"}
"""


@pytest.mark.parametrize(
    ("sft", "rm", "ppo", "agrees"),
    [
        ("", "", "", True),
        (", chat_template: TEMPLATE", "", "", False),
        ("", ", chat_template: TEMPLATE", "", False),
        (", chat_template: TEMPLATE", ", chat_template: TEMPLATE", "", True),
        ("", ", chat_template: TEMPLATE", ", chat_template: TEMPLATE", True),
    ],
)
def test_judges_of_another_chat_format_are_found_before_they_are_trained(tmp_path, sft, rm, ppo, agrees):
    (tmp_path / "t.jinja").write_text(CHATML)
    (tmp_path / "p.yaml").write_text((CHATS % (sft, rm, ppo)).replace("TEMPLATE", f"{tmp_path}/t.jinja"))
    plan = load_pipeline(tmp_path / "p.yaml", [f"runs={tmp_path / 'runs'}"])
    if agrees:
        check_stages(plan)
    else:
        with pytest.raises(ConfigError, match=r"^stages\.ppo: rewards\.helpfulness: writes dialogues in another"):
            check_stages(plan)


WHOLE = """
stages:
  sft: {model: toy, data: {train: "toy:sft.train"}}
  rm: {kind: safety, model: "${sft}", data: {train: ROWS}}
  reject:
    model: ${sft}
    rewards: {helpfulness: "${rm}", safety: "${rm}"}
    prompts: {prompts: "toy:prompts.train"}
    sampling: {max_new_tokens: 32}
  rs: {stage: sft, model: toy, data: {train: ["${reject}/sft.jsonl"]}}
  gatt: {model: "${rs}", prompts: {prompts: "toy:prompts.train"}, sampling: {max_new_tokens: 32}}
  ppo:
    model: ${rs}
    rewards: {helpfulness: "${rm}", safety: "${rm}"}
    prompts: {prompts: "toy:prompts.train"}
    sampling: {max_new_tokens: 32}
  eval:
    policies: {rs: "${rs}", ppo: "${ppo}"}
    rewards: {helpfulness: "${rm}", safety: "${rm}"}
    prompts: {prompts: "toy:prompts.heldout"}
    sampling: {max_new_tokens: 32}
"""
UNLABELLED = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}


def whole_pipeline(folder: Path, *overrides: str, labels: bool = True) -> pipelines.Pipeline:
    rows = folder / "pairs.jsonl"
    rows.write_text(json.dumps(UNLABELLED | ({"chosen_safe": True, "rejected_safe": False} if labels else {})))
    (folder / "p.yaml").write_text(WHOLE.replace("ROWS", str(rows)))
    return load_pipeline(folder / "p.yaml", [f"runs={folder / 'runs'}", *overrides])


def test_every_stage_is_checked_before_the_first_one_runs(tmp_path):
    check_pipeline(whole_pipeline(tmp_path))
    with pytest.raises(ConfigError, match=r"^stages\.rm: data\.train: kind=safety, but no response carries"):
        check_pipeline(whole_pipeline(tmp_path, labels=False))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rm.data.max_length=2", r"rm: data\.train: no pair is left to train on: 1 too_long"),
        ("reject.sampling.max_new_tokens=511", r"reject: sampling\.max_new_tokens=511 leaves no room .* 51. tokens"),
        ("gatt.sampling.max_new_tokens=512", r"gatt: sampling\.max_new_tokens=512 leaves no room .* hold 512 tokens"),
        ("ppo.sampling.max_new_tokens=511", r"ppo: sampling\.max_new_tokens=511 leaves no room"),
        ("eval.sampling.max_new_tokens=512", r"eval: sampling\.max_new_tokens=512 leaves no room"),
        ("ppo.prompts.max_prompt_length=2", r"ppo: prompts: none fits into 2 tokens"),
        ("rs.model=BARE", r"rs: model: .*bare: its tokenizer cannot be loaded"),
        ("eval.policies.base=BARE", r"eval: .*bare: its tokenizer cannot be loaded"),
        ("eval.policies.base=JUDGE", r"eval: .*judge: is a reward model"),
        ("ppo.rewards.safety=toy", r"ppo: rewards\.safety: toy: not a reward model"),
        ("ppo.evaluation={guard: toy, prompts: 'toy:prompts.heldout'}", r"ppo: evaluation\.guard: toy: not a reward"),
    ],
)  # fmt: skip
def test_what_a_later_stage_would_refuse_is_found_before_the_first_one_runs(tmp_path, override, problem):
    write_model(tmp_path / "judge", "reward model", weights="any")
    write_model(tmp_path / "bare", "chat model", weights="any")
    for file in tmp_path.glob("bare/tokenizer*"):
        file.unlink()
    given = override.replace("BARE", f"{tmp_path / 'bare'}").replace("JUDGE", f"{tmp_path / 'judge'}")
    with pytest.raises(ConfigError, match=rf"^stages\.{problem}"):
        check_pipeline(whole_pipeline(tmp_path, given))


def test_settings_without_effect_are_found_where_a_stage_is_to_be_made_again(tmp_path):
    """PPO refuses them where it begins; an unfinished run that goes on may have begun with an earlier version."""
    plan = whole_pipeline(tmp_path, "ppo.evaluation.patience=3", labels=True)
    ppo = plan.stages[-2]
    ppo.path.mkdir(parents=True)
    write_json(ppo.path / "manifest.json", {"stage": "ppo", "status": "finished", "settings": {}})
    again = pipelines.Pipeline(plan.runs, [replace(stage, again=True) for stage in plan.stages])
    with pytest.raises(ConfigError, match=r"^stages\.ppo: evaluation\.patience"):
        check_stages(again)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("ppo.train.minibatch_size=64", r"ppo: train\.minibatch_size = 64 cannot be shared by 3 processes"),
        ("reject.sampling.engine=vllm", r"reject: sampling\.engine=vllm runs in one process"),
    ],
)
def test_what_so_many_processes_cannot_do_is_found_before_the_first_stage(tmp_path, monkeypatch, override, problem):
    monkeypatch.setattr(hardware, "num_processes", lambda: 3)
    even = ["ppo.train={batch_size: 96, minibatch_size: 48}"]
    check_stages(whole_pipeline(tmp_path, *even))
    with pytest.raises(ConfigError, match=rf"^stages\.{problem}"):
        check_stages(whole_pipeline(tmp_path, *even, "ppo.train.batch_size=192", override))


def test_a_model_that_several_stages_cannot_read_is_reported_once(tmp_path):
    write_model(tmp_path / "base", "reward model", weights="any")
    with pytest.raises(ConfigError) as found:
        check_pipeline(whole_pipeline(tmp_path, f"sft.model={tmp_path / 'base'}"))
    assert str(found.value) == f"stages.sft, reject: {tmp_path}/base: is a reward model. Name a chat model."
