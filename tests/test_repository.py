"""The repository as a whole: imports point down, recipes validate, help is quick and complete."""

import ast
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli.main import app, run_stage
from alignment.cli.pipeline import load_pipeline
from alignment.cli.stages import STAGES
from alignment.config import describe, load_config
from alignment.errors import ConfigError, DataError, ModelError, RunError
from alignment.models import load_reward_model, save_model

ROOT = Path(__file__).parents[1]
PACKAGES = ("alignment", "sft", "reward_models", "rlhf")
ALLOWED = {
    "alignment": {"alignment"},
    "sft": {"alignment", "sft"},
    "reward_models": {"alignment", "reward_models"},
    "rlhf": {"alignment", "reward_models", "rlhf"},
}
PURE = ("alignment/tensor_ops.py", "reward_models/losses.py", "rlhf/gating.py", "rlhf/rewards.py", "rlhf/advantages.py")
PIPELINES = sorted(ROOT.glob("recipes/*/*.yaml"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
    for path in (ROOT / package).rglob("*.py"):
        if path.is_relative_to(ROOT / "alignment" / "cli"):
            continue
        upward = imported(path) & set(PACKAGES) - ALLOWED[package]
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


@pytest.mark.parametrize("name", [*PURE, "rlhf/losses.py"])
def test_modules_of_pure_maths_import_torch_and_jaxtyping_only(name):
    assert imported(ROOT / name) <= {"__future__", "math", "typing", "torch", "jaxtyping"}


def test_nothing_imports_experimental_trl():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert "trl.experimental" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_validates(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    for made_first in re.findall(r"--out (\S+)", text):
        Path(made_first).touch()
    for earlier_run in re.findall(r"^ *(?:model|helpfulness|safety): (?:\{path: )?(runs/[\w/-]+)", text, re.M):
        (tmp_path / earlier_run / "model").mkdir(parents=True)
        (tmp_path / earlier_run / "model" / "config.json").touch()
    for earlier_rows in re.findall(r"(runs/[\w/-]+)/sft\.jsonl", text):
        (tmp_path / earlier_rows).mkdir(parents=True)
        (tmp_path / earlier_rows / "sft.jsonl").touch()
    if path.parent.name in ("smollm2", "llama2-7b", "llama2-70b"):
        # The data is not part of the repository: empty files of the same names stand for it.
        monkeypatch.setenv("ALIGN_DATA_DIR", str(tmp_path))
        for name in ("sft_general", "sft_safety", "sft_oasst_multiturn", "sft_roleplay", "prompts_helpful",
                     "prompts_safety", "pref_helpful_hh", "pref_helpful_graded", "pref_helpful_ai_scored",
                     "pref_safety_hh", "pref_safety_labelled"):  # fmt: skip
            for split in ("train", "valid", "test"):
                (tmp_path / f"{name}.{split}.jsonl.gz").touch()
        (tmp_path / "eval_safety_tuned_llamas.jsonl").touch()
    # The header says how it is run.
    [stage] = set(re.findall(rf"(?:align|alignment\.cli\.main) (\w+) {path.relative_to(ROOT)}", text))
    if stage != "run":
        assert load_config(STAGES[stage].config_class(), path).run.dir
        return
    plan = load_pipeline(path, [f"runs={tmp_path}/runs"])
    part_of_the_method = {
        "gatt.yaml": {"sft", "gatt", "eval"},
        "distil.yaml": {"sft", "rm", "distil", "eval"},
        "rounds.yaml": {"sft", "rm", "reject", "eval"},
    }
    whole = {"sft", "rm", "reject", "ppo", "eval"}
    assert {stage.config.stage for stage in plan.stages} >= part_of_the_method.get(path.name, whole)
    for stage in plan.stages:  # a draw from all rows together would leave out most of what earlier stages made
        if stage.config.stage == "sft" and any(name.startswith(f"{tmp_path}/runs") for name in stage.config.data.train):
            assert stage.config.data.max_rows is None, stage.name


def test_a_pipeline_reports_the_problems_of_all_stages_together(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(
        "stages:\n"
        "  a: {stage: sft, model: toy, data: {train: nowhere.jsonl}}\n"
        "  b: {stage: rm, model: '${c}', kind: helpful, data: {train: also-nowhere.jsonl}}\n"
        "  d: {stage: dance}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, ["e.train.epochs=1"])
    message = str(caught.value)
    for part in (
        "nowhere.jsonl: no such file",
        "${c} is no earlier stage",
        "stages.d.stage is 'dance'",
        "e: unknown key",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stages: [sft, rm]", "stages: a list. It must hold"),
        ("defaults: fast\nstages: {a: {stage: sft}}", "defaults: a str. It must hold"),
        ("stages: {a: {stage: sft, model: toy, data: {train: 'toy:sft.train'}, run: {dir: elsewhere}}}",
         "stages.a.run.dir: is runs/p/a in a pipeline. Set runs"),
        ("stages:\n  a: {stage: sft, model: toy, data: {train: 'toy:sft.train'}, run: {device: cpu}}\n"
         "  b: {stage: sft, model: toy, data: {train: 'toy:sft.train'}}",
         "run.device is auto, cpu in different stages"),
        ("stages: {e: {stage: eval, policies: {a/b: toy}, rewards: {helpfulness: toy, safety: toy}, prompts: {prompts: "
         "'toy:prompts.heldout'}}}", "policies: 'a/b' is no name for a file of answers"),
        ("stages: {3: {stage: sft}}", "p.yaml:1: the key 3 is read as int"),
        ("stages: {a: {stage: [sft]}}", "stages.a.stage is ['sft']. Use one of sft, "),
        ("runs: {a: 1}\nstages: {a: {stage: sft}}", "runs: {'a': 1} is no folder's name. Give text"),
        *((f"stages: {{'{name}': {{stage: sft}}}}", f"stages: '{name}' is no name for a folder")
          for name in ("", ".", "..", "a/b")),
        *((f"stages: {{{name}: {{stage: sft}}}}", f"stages: '{name}' means something else in a pipeline")
          for name in ("here", "round", "runs", "defaults", "stages")),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_run_as_written_says_so(tmp_path, text, problem):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(tmp_path / "p.yaml", ["a.run.seed=1"] if "elsewhere" in text else [])
    assert problem in str(caught.value)


def test_a_stage_whose_name_has_a_dot_cannot_be_set_on_the_command_line(tmp_path):
    (tmp_path / "p.yaml").write_text("stages: {v1.1: {stage: sft, model: toy, data: {train: 'toy:sft.train'}}}")
    with pytest.raises(ConfigError, match=r"v1: unknown key.* A name with a dot, as v1\.1, cannot be written there"):
        load_pipeline(tmp_path / "p.yaml", ["v1.1.run.seed=1"])


@pytest.mark.parametrize(("runs", "shown"), [("runs=[a]", "['a']"), ("runs.x=5", "{'x': 5}"), ("runs=", "''")])
def test_the_parent_of_the_runs_is_a_name(tmp_path, runs, shown):
    (tmp_path / "p.yaml").write_text("stages: {sft: {model: toy, data: {train: 'toy:sft.train'}}}")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(tmp_path / "p.yaml", [runs, "x=3"])
    first, second = str(caught.value).splitlines()
    assert first == f"{tmp_path}/p.yaml: runs: {shown} is no folder's name. Give text, e.g. runs/mine."
    assert "x: unknown key" in second


def test_help_is_quick_and_imports_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "alignment.cli.main", "--help"]
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)  # compiles what is not compiled yet
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    print(f"align --help took {time.monotonic() - start:.2f} s")  # shown with -s; timing decides nothing
    imported_modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported_modules & {"torch", "transformers", "trl", "datasets", "pandas", "numpy"}
    for name in (*STAGES, "run", "score", "sample", "chat", "data"):
        assert name in done.stdout


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_every_setting_is_explained(stage):
    for kind in (None, *stage.kinds):
        for key, _, _, meaning in describe(stage.of_kind(kind).config_class()):
            assert meaning, f"{stage.name} {kind}: {key} has no docstring"


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_has_a_recipe_script(name, monkeypatch, capsys):
    """The script shows the settings of its own stage."""
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert STAGES[name].summary in " ".join(shown.split())
    assert f"align {name}" in shown and "run.dir" in shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["sample", "toy", "toy:prompts.heldout", "--temperature", "-1"], "temperature"),
        (["sample", "toy", "toy:prompts.heldout", "--num-candidates", "0"], "num_candidates"),
        (["sample", "toy", "toy:prompts.heldout", "--top-k", "-2"], "top_k"),
        (["chat", "toy", "--temperature", "-1"], "temperature"),
    ],
)
def test_options_out_of_range_are_the_users_mistake(arguments, problem):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert problem in str(result.exception)


def test_sampling_does_not_write_over_a_file(tmp_path):
    out = tmp_path / "thesis.jsonl"
    out.write_text("years of work")
    result = CliRunner().invoke(app, ["sample", "toy", "toy:prompts.heldout", "--out", str(out)])
    assert isinstance(result.exception, RunError) and out.read_text() == "years of work"
    nowhere = str(tmp_path / "nowhere" / "out.jsonl")
    result = CliRunner().invoke(app, ["sample", "toy", "toy:prompts.heldout", "--out", nowhere])
    assert isinstance(result.exception, RunError) and "there is no folder" in str(result.exception)


def test_a_pipeline_names_sections_that_no_stage_has_and_settings_that_are_none(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(
        "defaults: {optimizer: {lr: 1}}\n"
        "stages:\n"
        "  sft: {stage: sft, model: '${no}', data: {train: '${nor}/x.jsonl', valid: nowhere.jsonl}, optim: {lt: 1}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, ["sft=3"])
    for part in (
        "defaults.optimizer: no stage has such a section",
        "sft=3: write sft.KEY=VALUE",
        "${no} is no earlier stage",
        "${nor} is no earlier stage",
        "nowhere.jsonl: no such file",
        'Did you mean "lr"?',
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"command line: defaults=fast: write defaults\.KEY=VALUE\."):
        load_pipeline(path, ["defaults=fast"])


@pytest.mark.parametrize(
    ("stage", "settings", "found"),
    [
        ("sft", ["model=toy", "data.train=toy:sft.train", "data.max_rows=8", "train.batch_size=3",
                 "data.valid=toy:sft.valid", "data.max_length=20"],
         "8 dialogues, 6 steps; 200 held-out dialogues."),
        ("gatt", ["model=toy", "prompts={prompts: 'toy:prompts.train', max_prompts: 5}"], "5 dialogues."),
        ("eval", ["kind=gatt", "policies.a=toy", "prompts={prompts: 'toy:prompts.heldout', max_prompts: 3, turns: 2}"],
         "3 dialogues, 1 policies."),
    ],
)  # fmt: skip
def test_a_dry_run_reads_the_rows_and_refuses_a_model_that_cannot_chat(tmp_path, capsys, stage, settings, found):
    run_stage(stage, [*settings, f"run.dir={tmp_path / 'run'}"], dry_run=True)
    assert f"{stage}: settings and rows are in order: {found}" in capsys.readouterr().err
    if stage != "sft":
        with pytest.raises(DataError, match=r"prompts: none fits into 5 tokens \(prompts\.max_prompt_length\)"):
            short = [*settings, "prompts.max_prompt_length=5", f"run.dir={tmp_path / 'run'}"]
            run_stage(stage, short, dry_run=True)
    judge = load_reward_model("toy", new_head_seed=0)
    save_model(judge.model, judge, tmp_path / "judge")
    key = "policies.a" if stage == "eval" else "model"
    with pytest.raises(ModelError, match="judge: is a reward model"):
        run_stage(stage, [*settings, f"{key}={tmp_path / 'judge'}", f"run.dir={tmp_path / 'run'}"], dry_run=True)
    assert not (tmp_path / "run").exists()
