"""Configuration: every problem of a file in one message, and key=value forms that mean what they say."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import model_validator
from typer.testing import CliRunner

from alignment.cli import main as command_line
from alignment.cli.stages import STAGES
from alignment.config import (
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    PositiveInt,
    SamplingSection,
    StageConfig,
    TrainSection,
    build_config,
    describe,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
    to_yaml,
)
from alignment.errors import ConfigError, DataError, ModelError, RunError
from alignment.hardware import check_launch, process_state
from alignment.sources import cache_dir, find_data, find_model
from reward_models.config import RewardModelConfig
from rlhf.config import EvalConfig, PPOConfig
from sft.config import GattConfig, SFTConfig


class SmallConfig(StageConfig):
    """A stage of its own, with one rule over two keys."""

    stage: ClassVar[str] = "small"

    model: ModelSection
    """A model."""
    data: DataSection
    optim: OptimSection = OptimSection()
    sampling: SamplingSection = SamplingSection()
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    steps: PositiveInt = 6
    """How often."""
    group: PositiveInt = 3
    """How many at once."""

    @model_validator(mode="after")
    def _check_group(self) -> SmallConfig:
        if self.steps % self.group:
            raise ValueError(f"group = {self.group} does not divide steps = {self.steps}. Choose a divisor.")
        return self


NEEDED = {"model": "toy", "data": {"train": "org/rows"}, "run": {"dir": "runs/x"}}


def build(values: dict[str, Any] | None = None, *overrides: str) -> SmallConfig:
    return build_config(SmallConfig, merge({**NEEDED, **(values or {})}, parse_overrides(overrides)), "test")


def problems(*overrides: str, cls: type[StageConfig] = SmallConfig, path: Path | None = None) -> list[str]:
    """The lines of the message."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    return str(caught.value).splitlines()


GOOD = ("model=toy", "data.train=org/rows", "run.dir=runs/x")


def test_a_good_configuration_has_the_papers_defaults():
    config = build()
    assert config.model.path == "toy"
    assert config.data.train == ["org/rows"]
    optim = config.optim
    # Llama 2 Sec. 3.2.2 and 3.2.3.
    assert (optim.betas, optim.eps, optim.weight_decay, optim.max_grad_norm) == ((0.9, 0.95), 1e-5, 0.1, 1.0)
    assert (optim.schedule, optim.final_lr_fraction, optim.warmup_fraction) == ("cosine", 0.1, 0.03)


def test_the_stages_have_the_papers_numbers():
    data = {"model": "toy", "data": {"train": "org/rows"}, "run": {"dir": "runs/x"}}
    sft = build_config(SFTConfig, data, "test")
    assert (sft.optim.lr, sft.train.epochs, sft.train.batch_size, sft.data.max_length) == (2e-5, 2.0, 64, 4096)
    assert sft.train.packing
    rm = build_config(RewardModelConfig, {**data, "kind": "safety"}, "test")
    assert (rm.optim.lr, rm.train.epochs, rm.train.batch_size, rm.optim.min_warmup_steps) == (1e-5, 1.0, 512, 5)
    assert (rm.margin, rm.veto) == ("small", "drop")
    assert (rm.optim.warmup_fraction, rm.optim.schedule, rm.optim.final_lr_fraction) == (0.03, "cosine", 0.1)
    for optim in (sft.optim, rm.optim):
        assert (optim.schedule, optim.final_lr_fraction, optim.weight_decay) == ("cosine", 0.1, 0.1)
    judges = {"rewards": {"helpfulness": "toy", "safety": "toy"}, "prompts": {"prompts": "org/rows"}}
    ppo = build_config(PPOConfig, {"model": "toy", "run": data["run"], **judges}, "test")
    assert (ppo.optim.lr, ppo.optim.schedule, ppo.optim.weight_decay) == (1e-6, "constant", 0.1)
    for optim in (rm.optim, ppo.optim):
        assert (optim.betas, optim.eps, optim.max_grad_norm) == ((0.9, 0.95), 1e-5, 1.0)
    assert (ppo.train.batch_size, ppo.train.minibatch_size) == (512, 64)
    assert ppo.ppo.beta == 0.01 and ppo.ppo.clip_range == 0.2 and ppo.rewards.threshold == 0.15


def test_an_unknown_key_is_refused_with_the_nearest_name():
    assert problems(*GOOD, "optim.leraning_rate=1", "optim.weight_decy=0.1") == [
        "command line: optim.leraning_rate: unknown key. Known here: lr, betas, eps, weight_decay, max_grad_norm, "
        "schedule, final_lr_fraction, warmup_fraction, min_warmup_steps.",
        'command line: optim.weight_decy: unknown key. Did you mean "weight_decay"?',
    ]
    assert problems(*GOOD, "grup=3") == ['command line: grup: unknown key. Did you mean "group"?']


def test_a_wrong_type_names_key_and_what_was_found():
    (line,) = problems(*GOOD, "steps=many")
    assert line.startswith("command line: steps: input should be a valid integer")
    assert line.endswith("found 'many'.")
    (line,) = problems(*GOOD, "mode=quick")
    assert "'fast' or 'slow'" in line and "found 'quick'" in line
    (line,) = problems(*GOOD, "sampling.top_p=1.5")
    assert line == "command line: sampling.top_p: input should be less than or equal to 1, found 1.5."


@pytest.mark.parametrize("value", ["5", "true"])
def test_what_names_no_file_is_one_problem(value):
    with pytest.raises(ConfigError) as caught:
        load_config(SFTConfig, None, ["model=toy", f"data.train={value}", "run.dir=r"])
    [line] = str(caught.value).splitlines()
    assert line.startswith("command line: data.train: ")


def test_a_wrong_item_of_a_list_is_one_problem():
    (line,) = problems(*GOOD, "optim.betas=[2, 0.9]")
    assert line == "command line: optim.betas.0: input should be less than 1, found 2."


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_nan_and_infinity_are_no_numbers(value):
    (line,) = problems(*GOOD, f"optim.lr={value}")
    assert "optim.lr" in line and "finite" in line


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.max_steps=yes", "train.max_steps"), ("train.epochs=on", "train.epochs"),
        ("optim.betas=[true, 0.9]", "optim.betas.0"), ("lora.last_layers=false", "lora.last_layers"),
        ("data.max_rows_of={org/rows: true}", "data.max_rows_of.org/rows"), ("run.seed=no", "run.seed"),
    ],
)  # fmt: skip
def test_true_and_false_are_no_numbers(override, key):
    (line,) = problems(*GOOD, override, cls=SFTConfig)
    assert line.startswith(f"command line: {key}: input should be a number, not true or false (YAML's yes, no), found ")


@pytest.mark.parametrize(
    ("cls", "override", "advice"),
    [
        (SFTConfig, "data.max_rows_of.mine.train=5", "'data.max_rows_of={mine.train: 5}'"),
        (SFTConfig, "data.max_rows_of.my.own.rows=5", "'data.max_rows_of={my.own.rows: 5}'"),
        (RewardModelConfig, "data.mix.mine.train=2", "'data.mix={mine.train: 2}'"),
    ],
)
def test_a_name_with_a_dot_is_told_to_go_into_braces(cls, override, advice):
    kind = ["kind=helpfulness"] if cls is RewardModelConfig else []
    (line,) = problems(*GOOD, *kind, override, cls=cls)
    assert line.endswith(f" A name with a dot goes into braces: {advice}.")
    (line,) = problems(*GOOD, *kind, "data.max_rows.x=5", cls=cls)
    assert "braces" not in line


def test_braces_change_one_entry_and_keep_the_others():
    written = {"data": {"max_rows_of": {"my.train": 1, "your.train": 2}}}
    changed = merge(written, parse_overrides(["data.max_rows_of={my.train: 5}"]))
    assert changed == {"data": {"max_rows_of": {"my.train": 5, "your.train": 2}}}


def test_true_and_false_are_right_where_they_are_meant():
    config = load_config(SFTConfig, None, [*GOOD, "train.packing=no", "run.overwrite=yes"])
    assert (config.train.packing, config.run.overwrite) == (False, True)
    assert build(None, "sampling.vllm={enforce_eager: true}").sampling.vllm == {"enforce_eager": True}


@pytest.mark.parametrize(
    ("cls", "override"),
    [(SFTConfig, "data.train=[]"), (RewardModelConfig, "data.train=[]"), (GattConfig, "prompts.prompts=[]")],
)
def test_a_stage_needs_data(cls, override):
    needed = ["model=toy", "run.dir=runs/x"] if cls is GattConfig else list(GOOD)
    lines = problems(*needed, *(["kind=safety"] if cls is RewardModelConfig else []), override, cls=cls)
    key = override.split("=")[0]
    assert lines == [f"command line: {key}: value should have at least 1 item after validation, not 0, found []."]


@pytest.mark.parametrize("override", ["optim.betas=[0.9, 1.0]", "optim.betas=[1, 0.95]", "lora={r: 4, dropout: 1}"])
def test_what_must_be_below_one_is(override):
    assert any("less than 1" in problem for problem in problems(*GOOD, override, cls=SFTConfig))


def test_a_seed_is_one_that_all_random_generators_take():
    assert build(None, f"run.seed={2**32 - 1}").run.seed == 2**32 - 1
    (line,) = problems(*GOOD, f"run.seed={2**32}")
    assert line.startswith("command line: run.seed: input should be less than or equal to 4294967295")


def test_a_run_directory_may_be_below_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert build(None, "run.dir=~/runs/x").run.dir == "/home/someone/runs/x"
    assert build(None, "run.dir=runs/~x").run.dir == "runs/~x"


@pytest.mark.parametrize("cls", [SFTConfig, RewardModelConfig])
@pytest.mark.parametrize("override", ["optim.lr=0", "optim.lr=-1e-5", "train.epochs=0", "train.epochs=-1"])
def test_a_stage_that_changes_a_default_keeps_its_limits(cls, override):
    kind = ["kind=safety"] if cls is RewardModelConfig else []
    (line,) = problems(*GOOD, *kind, override, cls=cls)
    assert override.split("=")[0] in line and "greater than 0" in line


@pytest.mark.parametrize("override", ["sampling.temperature=-1", "instructions.combine_rate=2"])
def test_ghost_attention_keeps_the_limits_of_rates_and_temperature(override):
    (line,) = problems("model=toy", "prompts.prompts=org/rows", "run.dir=runs/x", override, cls=GattConfig)
    assert override.split("=")[0] in line


def test_a_missing_required_key_is_named():
    assert problems("model=toy") == [
        "command line: run.dir: missing. Add it: it has no default.",
        "command line: data.train: missing. Add it: it has no default.",
    ]
    assert problems("model=toy", "run.dir=runs/x", "data.valid=org/rows") == [
        "command line: data.train: missing. Add it: it has no default."
    ]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ((), ["run.dir", "policies", "rewards.helpfulness", "rewards.safety", "prompts.prompts"]),
        (("run.seed=1", "policies.a={dtype: auto}", "rewards.safety=toy", "prompts.max_prompts=3"),
         ["run.dir", "policies.a.path", "rewards.helpfulness", "prompts.prompts"]),
    ],
)  # fmt: skip
def test_of_a_forgotten_section_the_keys_that_it_needs_are_named(given, missing):
    lines = problems(*given, cls=EvalConfig)
    assert lines == [f"command line: {key}: missing. Add it: it has no default." for key in missing]


def test_a_rule_over_two_keys_says_both():
    assert problems(*GOOD, "steps=7") == ["command line: group = 3 does not divide steps = 7. Choose a divisor."]


def test_all_problems_are_reported_in_one_message(tmp_path):
    """Unknown keys, wrong values, missing keys and files, and a rule that only valid keys bring to light."""
    path = tmp_path / "bad.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}/none}}\ndata: {{train: {tmp_path}/gone.jsonl, max_length: 0}}\n"
        "mode: quick\nsteps: 7\nextra: 1\nrun: {dir: runs/x}\n"
    )
    lines = problems("optim.lr=fast", path=path)
    assert all(line.startswith(f"{path}: ") for line in lines)
    keys = {line.removeprefix(f"{path}: ").split(":")[0] for line in lines}
    assert keys == {
        "data.max_length",
        "mode",
        "extra",
        "optim.lr",
        "group = 3 does not divide steps = 7. Choose a divisor.",
        "model",
        "data.train",
    }
    assert len(lines) == 7
    path.write_text("mode: quick\nextra: 1\n")
    assert len(problems(path=path)) == 5  # the two, and model, data and run missing


def test_a_missing_data_file_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    lines = problems("model=toy", "run.dir=runs/x", f"data.train=[{tmp_path}/pairz.jsonl, {tmp_path}/pairs.jsonl]")
    assert len(lines) == 1
    assert f"data.train: {tmp_path}/pairz.jsonl: no such file" in lines[0]
    assert lines[0].endswith("Did you mean pairs.jsonl?")


def test_inputs_that_an_earlier_stage_makes_need_not_exist(tmp_path):
    values = {**NEEDED, "model": f"{tmp_path}/runs/sft", "data": {"train": f"{tmp_path}/runs/reject/best.jsonl"}}
    made = [f"{tmp_path}/runs/sft", f"{tmp_path}/runs/reject"]
    config = build_config(SmallConfig, values, "test", made_earlier=made)
    assert config.model.path == made[0]
    with pytest.raises(ConfigError, match=r"model: .*no such model"):
        build_config(SmallConfig, values, "test", made_earlier=made[1:])


def test_rows_that_are_trained_on_are_not_held_out(tmp_path, monkeypatch):
    """By name, by another name of the same file, and where an earlier stage is still to make it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    monkeypatch.setenv("ALIGN_DATA_DIR", str(tmp_path))
    words = "is in data.train too. Hold other rows out: align data split."
    for valid in ("a.jsonl", "./a.jsonl", f"{tmp_path}/a.jsonl", "a", "link.jsonl"):
        lines = problems("model=toy", "data.train=[org/rows, a.jsonl]", f"data.valid=[org/more, {valid}]", "run.dir=r")
        assert lines == [f"command line: data.valid: {valid} {words}"]
    with pytest.raises(ConfigError, match=f"data.valid: runs/x/d.jsonl {words}"):
        made = {"data": {"train": "runs/x/d.jsonl", "valid": "runs/x/d.jsonl"}}
        build_config(SmallConfig, {**NEEDED, **made}, "test", made_earlier=["runs/x"])
    pairs = ["kind=safety", "data.train=org/rows", "data.mix_in=org/more", "data.valid=org/more"]
    [line] = problems("model=toy", "run.dir=r", *pairs, cls=RewardModelConfig)
    assert line.startswith("command line: data.valid: org/more is in data.mix_in too.")
    judges = ["rewards={helpfulness: toy, safety: toy}", "model=toy", "run.dir=r"]
    prompts = [f"{key}=toy:prompts.train" for key in ("prompts.prompts", "evaluation.prompts")]
    [line] = problems(*judges, *prompts, cls=PPOConfig)
    assert line.startswith("command line: evaluation.prompts: toy:prompts.train is in prompts.prompts too.")


def test_a_path_with_one_slash_is_no_hub_id_where_its_folder_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGN_DATA_DIR", raising=False)
    for folder in ("data", "models/llama"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    model, data = problems("model=models/lama", "data.train=[data/pairs, org/rows]", "run.dir=runs/x")
    assert model.startswith(
        "command line: model: models/lama: no such model. It is taken for no Hub id, since there is a folder models "
        'here. Did you mean "models/llama"? Give a folder'
    )
    assert data == (
        "command line: data.train: data/pairs: no such file (ALIGN_DATA_DIR is not set). It is taken for no Hub id, "
        "since there is a folder data here. Did you mean pairs.jsonl?"
    )
    assert load_config(SmallConfig, None, ["model=models/llama", "data.train=data/pairs.jsonl", "run.dir=runs/x"])
    assert find_model("org/model") == "org/model"


@pytest.mark.parametrize("name", ["org/rows", "org/rows:train", "org/rows:train[:10%]", "org/rows:train[10:20]+test"])
def test_a_part_of_a_data_set_of_the_hub_is_named_as_its_library_does(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_data(name) == name


def test_a_tilde_is_a_home_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    monkeypatch.setenv("ALIGN_DATA_DIR", "~/data")
    monkeypatch.setenv("ALIGN_CACHE_DIR", "~/cache")
    assert find_data("rows") == find_data("~/data/rows.jsonl") == tmp_path / "data" / "rows.jsonl"
    assert cache_dir() == tmp_path / "cache"
    for name, find in (("~nobody-of-that-name/rows.jsonl", find_data), ("~runs/sft", find_model)):
        with pytest.raises((DataError, ModelError), match=f"{name}: no such"):
            find(name)


@pytest.mark.parametrize("inside", [".", "model"])
def test_an_adapter_without_its_model_is_no_model(tmp_path, inside):
    folder = tmp_path / "adapter" / inside
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter: an adapter alone, without its model\. Name the run directory"):
        find_model(str(tmp_path / "adapter"))
    (folder / "config.json").write_text("{}")
    assert find_model(str(tmp_path / "adapter")) == folder


def test_a_chat_template_that_is_no_file_is_named_before_anything_loads(tmp_path):
    template = tmp_path / "own.jinja"
    lines = problems(*GOOD, f"model.chat_template={template}")
    assert lines == [
        f"command line: model.chat_template: {template} is no file. Use auto, llama2, chatml or the path of a Jinja "
        "template."
    ]
    policies = [f"policies.{name}={{path: toy, chat_template: {value}}}" for name, value in
                (("a", "chatml"), ("b", "chatlm"))]  # fmt: skip
    rest = ["rewards.helpfulness=toy", "rewards.safety=toy", "prompts.prompts=org/rows", "run.dir=runs/x"]
    (line,) = problems(*policies, *rest, cls=EvalConfig)
    assert line.startswith("command line: policies.b.chat_template: chatlm is no file.")
    template.write_text("{{ messages }}")
    config = load_config(SmallConfig, None, [*GOOD, f"model.chat_template={template}"])
    assert ("model.chat_template", str(template), "template") in config.input_names()
    made_later = {**NEEDED, "model": {"path": "toy", "chat_template": str(tmp_path / "runs" / "sft" / "made.jinja")}}
    assert build_config(SmallConfig, made_later, "test", made_earlier=[str(tmp_path / "runs" / "sft")])


def test_trackers_are_those_that_both_libraries_know():
    (line,) = problems(*GOOD, "run.report_to=[tensorboard, wanb]")
    assert line.startswith("command line: run.report_to.1: input should be 'tensorboard', 'wandb'")
    assert line.endswith("found 'wanb'.")


def test_the_inputs_of_a_configuration_are_listed():
    config = build({"data": {"train": ["a/b", "c/d"], "valid": "e/f"}})
    assert list(config.input_names()) == [
        ("model", "toy", "model"),
        ("data.train", "a/b", "data"),
        ("data.train", "c/d", "data"),
        ("data.valid", "e/f", "data"),
    ]


# ------------------------------------------------------------------------------------------------ what is installed

ASKS = ["model=toy", "prompts.prompts=toy:prompts.train", "run.dir=unused"]


@pytest.mark.parametrize(
    ("override", "package", "problem"),
    [
        ("sampling.engine=vllm", "vllm", "sampling.engine: vllm is not installed here. Run pip install -e"),
        ("run.report_to=[wandb]", "wandb", "run.report_to: wandb is not installed here. Run pip install wandb"),
    ],
)
def test_what_is_not_installed_is_told_before_the_stage_begins(monkeypatch, capsys, override, package, problem):
    """But not to a plan, which may be for another machine."""
    monkeypatch.setitem(sys.modules, package, None)
    load_config(GattConfig, None, [*ASKS, override])
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=re.escape(f"command line: {problem}")):
            command_line.run_stage("gatt", [*ASKS, override], dry_run=dry_run)
    if package == "vllm":
        command_line.run_stage("gatt", [*ASKS, override, "sampling.fall_back=true"], dry_run=True)
        assert "settings and rows are in order" in capsys.readouterr().err


def test_what_is_not_installed_is_told_before_a_pipeline_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    path = tmp_path / "p.yaml"
    path.write_text(
        f"runs: {tmp_path}/runs\n"
        "stages:\n"
        "  sft: {stage: sft, model: toy, data: {train: 'toy:sft.train'}}\n"
        "  late: {stage: gatt, model: '${sft}', prompts: {prompts: 'toy:prompts.train'}, sampling: {engine: vllm}}\n"
    )
    with pytest.raises(ConfigError, match=re.escape(f"{path}: stages.late: sampling.engine: vllm is not installed")):
        command_line.run_pipeline(path)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------- what files can refuse


@pytest.mark.parametrize(
    ("number", "what_to_do"),
    [
        (errno.EACCES, "Ask for the right to read or write it"),
        (errno.EROFS, "Ask for the right to read or write it"),
        (errno.ENOSPC, "Free space or name another place. Where a run was going, --resume goes on."),
        (errno.EEXIST, "A file is where a folder is needed"),
        (errno.ENOTDIR, "A file is where a folder is needed"),
    ],
)
def test_what_a_file_system_refuses_is_told_without_a_traceback(monkeypatch, capsys, number, what_to_do):
    def refuse(**_: Any) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr(command_line, "app", refuse)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: runs/x: {os.strerror(number)}. {what_to_do}")


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",  # torch.save
    ],
)
def test_a_full_disk_is_told_whoever_meets_it(monkeypatch, capsys, message):
    def fail(**_: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit):
        command_line.main()
    assert capsys.readouterr().err.startswith("error: No space left on device. Free space or name another place.")


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for encoding in ("ascii", "cp1252")]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)

    def show(**_: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            print("né → 日本 😀", file=stream)
        raise RunError("日本: is a file.")

    monkeypatch.setattr(command_line, "app", show)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    out, err = (stream.buffer.getvalue() for stream in streams if not stream.flush())
    assert out == rb"n\u00e9 \u2192 \u65e5\u672c \ud83d\ude00" + b"\n"
    assert json.loads(b'"%s"' % out.strip()) == "né → 日本 😀"
    assert err.decode("cp1252") == "né \\u2192 \\u65e5\\u672c \\ud83d\\ude00\nerror: \\u65e5\\u672c: is a file.\n"


def test_too_little_memory_of_a_device_is_no_bug(monkeypatch, capsys):
    def fail(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the device is out of memory. CUDA out of memory. Tried to allocate 2 GiB. Halve")


def test_other_errors_of_the_system_are_bugs(monkeypatch):
    def fail(**_: Any) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(ConnectionResetError):
        command_line.main()


def test_a_name_that_is_too_long_is_told(monkeypatch, capsys, tmp_path, write_file):
    rows = write_file(
        "sft.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    out = str(tmp_path / ("x" * 300))
    monkeypatch.setattr(sys, "argv", ["align", "data", "split", str(rows), "--out", out])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {out}.train.jsonl: File name too long. Give a shorter name.\n"


@pytest.mark.parametrize("words", [["sample", "toy", "toy:prompts.heldout"], ["chat", "toy", "-m", "Hi"]])
def test_a_negative_seed_is_refused(words):
    done = CliRunner().invoke(command_line.app, [*words, "--seed", "-1"])
    assert done.exit_code == 2 and "or equal to 0" in done.output


# ---------------------------------------------------------------------------------------------------- key=value


def test_values_of_arguments_are_read_as_yaml():
    assert parse_overrides(["a.b=1", "a.c=[x, y]", "d=true", "e=null", "f=", "g=1.5", "h=a=b", "i={j: 2}"]) == {
        "a": {"b": 1, "c": ["x", "y"]},
        "d": True,
        "e": None,
        "f": "",
        "g": 1.5,
        "h": "a=b",
        "i": {"j": 2},
    }


@pytest.mark.parametrize("text", ["runs/try #2", "#2", "[a, b #c\n]", "{a: 1} # one"])
def test_a_comment_in_an_argument_is_not_lost_without_a_word(text):
    with pytest.raises(ConfigError, match=r"command line: run\.dir: # begins a comment in YAML, so that '#.*' may be"):
        parse_overrides([f"run.dir={text}"])


def test_a_key_twice_behind_a_comment_is_one_problem():
    with pytest.raises(ConfigError, match=r'command line: a: "a" is there twice'):
        parse_overrides(["a={a: 1 # , a: 2}"])


def test_what_is_no_comment_stays():
    given = ["a='runs/try #2'", 'b=["x #1", y]', "c=runs/C#", "d=[a #", "e='#2'"]
    assert parse_overrides(given) == {"a": "runs/try #2", "b": ["x #1", "y"], "c": "runs/C#", "d": "[a #", "e": "#2"}


def test_a_file_of_settings_may_have_an_equals_sign_in_its_path(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lr=1e-4" / "config.yaml"
    path.parent.mkdir()
    path.write_text("model: toy\ndata: {train: 'toy:sft.train'}\nrun: {dir: runs/x}\n")
    monkeypatch.chdir(tmp_path)
    command_line.run_stage("sft", [str(path), "optim.lr=3e-4"], show_config=True)
    assert "lr: 0.0003" in capsys.readouterr().out
    assert command_line._split(["gone=1.yaml", "a=b"]) == (None, ["gone=1.yaml", "a=b"])


def test_a_later_argument_wins():
    assert parse_overrides(["a.b=1", "a.b=2", "a.c=3"]) == {"a": {"b": 2, "c": 3}}


@pytest.mark.parametrize("argument", ["steps", "=3", "--steps 3"])
def test_an_argument_without_key_or_value_is_refused(argument):
    with pytest.raises(ConfigError, match=r"is not key=value\. Write for example train\.epochs=2"):
        parse_overrides([argument])


def test_arguments_win_over_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: toy\ndata: {train: org/rows, max_length: 10}\nrun: {dir: runs/x}\nsteps: 9\n")
    config = load_config(SmallConfig, path, ["data.max_length=20", "run.seed=5"])
    assert (config.data.max_length, config.data.train, config.steps) == (20, ["org/rows"], 9)
    assert (config.run.dir, config.run.seed) == ("runs/x", 5)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_a_learning_rate_may_be_written_with_an_exponent(text):
    """YAML 1.1 reads 1e-5 as text."""
    assert build(None, f"optim.lr={text}").optim.lr == 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=toy", "model.dtype=bfloat16"],
        ["model.dtype=bfloat16", "model=toy"],
        ["model.path=toy", "model.dtype=bfloat16"],
        ["model={path: toy, dtype: bfloat16}"],
    ],
)
def test_the_short_form_of_a_model_merges_with_its_other_keys(overrides):
    values = {key: value for key, value in NEEDED.items() if key != "model"}
    config = build_config(SmallConfig, merge(values, parse_overrides(overrides)), "test")
    assert (config.model.path, config.model.dtype) == ("toy", "bfloat16")


@pytest.mark.parametrize("model", [{"path": "a/b", "dtype": "float32"}, {"dtype": "float32"}])
def test_the_short_form_of_a_model_keeps_the_files_other_keys(model):
    """A recipe may leave the model to the command line; its chat template or type must not get lost."""
    config = build_config(SmallConfig, merge({**NEEDED, "model": model}, parse_overrides(["model=c/d"])), "test")
    assert (config.model.path, config.model.dtype) == ("c/d", "float32")


def test_the_name_of_a_margin_table_replaces_margins_by_rating():
    values = {**NEEDED, "kind": "safety", "margin": {"better": 0.5}}
    config = build_config(RewardModelConfig, merge(values, parse_overrides(["margin=large"])), "test")
    assert config.margin == "large"


def test_margins_by_rating_replace_the_name_of_a_table():
    values = {**NEEDED, "kind": "safety", "margin": "small"}
    config = build_config(RewardModelConfig, merge(values, parse_overrides([f"margin={OWN_TABLE}"])), "test")
    assert config.margin["better"] == 2


def test_weights_by_source_replace_the_name_of_a_mix(tmp_path):
    path = tmp_path / "rm.yaml"
    path.write_text(
        "kind: safety\nmodel: toy\nrun: {dir: r}\ndata: {train: [toy:pairs.train, toy:safety.train], mix: all}\n"
    )
    weights = "data.mix={toy:pairs.train: 1, toy:safety.train: 3}"
    config = load_config(RewardModelConfig, path, [weights], check_inputs=False)
    assert config.data.mix == {"toy:pairs.train": 1, "toy:safety.train": 3}


def test_an_empty_mapping_replaces_what_stood_there():
    """The one way to take entries away: weights of other sources, templates that a file names."""
    base = {"templates": {"violence": "T"}, "data": {"max_rows_of": {"a": 1}, "max_rows": 2}}
    found = merge(base, parse_overrides(["templates={}", "data.max_rows_of={}"]))
    assert found == {"templates": {}, "data": {"max_rows_of": {}, "max_rows": 2}}


def test_a_source_with_a_name_like_a_models_key_may_have_a_weight():
    weights = merge({"mix": "equal_parts"}, parse_overrides(["mix={math: 1, code: 2}"]))
    assert weights == {"mix": {"math": 1, "code": 2}}
    assert merge(weights, parse_overrides(["mix=all"])) == {"mix": "all"}


def test_an_unset_variable_is_no_run_directory():
    with pytest.raises(ConfigError, match=r"run\.dir: empty, which would be the working directory"):
        load_config(SFTConfig, None, ["model=toy", "data.train=toy:sft.train", "run.dir="])


@pytest.mark.parametrize("values", [{"model": "toy"}, {"model": {"path": "toy", "dtpye": "float32"}}, {}])
def test_a_misspelt_key_beside_the_short_form_of_a_model_is_one_problem(values):
    overrides = ["model.dtpye=float32"] if values.get("model") == "toy" else ["model=toy", "model.dtpye=float32"]
    with pytest.raises(ConfigError) as caught:
        build_config(SmallConfig, merge({**NEEDED, **values}, parse_overrides(overrides)), "test")
    assert str(caught.value) == 'test: model.dtpye: unknown key. Did you mean "dtype"?'


# -------------------------------------------------------------------------------------- settings of several types

RM = (*GOOD, "kind=safety")
OWN_TABLE = "{significantly_better: 3, better: 2, slightly_better: 1, negligibly_better: 0}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("margin=huge", "margin: input should be 'none', 'small' or 'large', found 'huge'."),
        ("margin=3", "margin: input should be 'none', 'small' or 'large', found 3."),
        ("margin.better=-1", "margin.better: input should be greater than or equal to 0, found -1."),
        ("margin.better=much", "margin.better: input should be a valid number, unable to parse string as a number, "
         "found 'much'."),
        ("margin.better=.nan", "margin.better: input should be a finite number, found nan."),
        ("margin.better=.inf", "margin.better: input should be a finite number, found inf."),
        ("margin.betterr=1", "margin.betterr: input should be 'significantly_better', 'better', 'slightly_better' or "
         "'negligibly_better', found 'betterr'."),
        ("margin.better=1", "margin: no number for significantly_better, slightly_better, negligibly_better. "
         "Give all four ratings, 0 for no margin."),
        ("margin={}", "margin: no number for significantly_better, better, slightly_better, negligibly_better. "
         "Give all four ratings, 0 for no margin."),
        ("data.mix=80/20", "data.mix: input should be 'all', 'equal_parts' or '90/10', found '80/20'."),
        ("data.mix={org/rows: 0}", "data.mix.org/rows: input should be greater than 0, found 0."),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_name_or_a_mapping_is_one_line_about_what_was_meant(override, expected):
    assert problems(*RM, override, cls=RewardModelConfig) == [f"command line: {expected}"]


def test_every_wrong_number_of_a_mapping_has_its_line_and_other_rules_still_run():
    lines = problems(*RM, "margin={better: -1, slightly_better: x}", "data.mix=equal_parts", cls=RewardModelConfig)
    rule = "data.mix = equal_parts mixes in nothing. Name the other aim's pairs in data.mix_in."
    keys = ["margin.better", "margin.slightly_better"]
    assert len(lines) == 3 and f"command line: {rule}" in lines
    assert [line.split(": ")[1] for line in lines if "margin" in line] == keys


def test_a_margin_table_of_ones_own_names_all_four_ratings():
    config = load_config(RewardModelConfig, None, [*RM, f"margin={OWN_TABLE}"])
    assert config.margin == {"significantly_better": 3, "better": 2, "slightly_better": 1, "negligibly_better": 0}


def test_one_source_may_stand_without_brackets():
    assert build(None, "data.train=a/b").data.train == ["a/b"]
    assert build(None, "data.train=[a/b, c/d]").data.train == ["a/b", "c/d"]


# --------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("cls", "overrides"),
    [
        (SmallConfig, ["steps=9", "optim.lr=1e-7", "optim.betas=[0.8, 0.99]", "run.report_to=[tensorboard]"]),
        (SFTConfig, ["model.dtype=bfloat16", "lora.r=8", "train.max_steps=3", "data.valid=[a/b]"]),
        (RewardModelConfig, ["kind=helpfulness", f"margin={OWN_TABLE}", "safety_loss_weight=0.25"]),
    ],
)
def test_to_yaml_is_read_back_to_an_equal_configuration(tmp_path, cls, overrides):
    config = load_config(cls, None, [*GOOD, *overrides])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(cls, path) == config


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        build().steps = 12


def test_a_file_that_is_missing_or_no_mapping_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read \(No such file or directory\)"):
        read_yaml(tmp_path / "gone.yaml")
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: holds a list"):
        read_yaml(path)
    path.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: not YAML: while parsing a flow node, expected the node content"):
        read_yaml(path)
    path.write_text("a: !!int x\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not YAML: invalid literal"):
        read_yaml(path)
    path.write_bytes("# für\na: 1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml: not UTF-8 at byte 3 \(0xfc\)\. Save it as UTF-8\."):
        read_yaml(path)
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  epochs: 1\n  batch_size: 2\n  epochs: 3\n")
    with pytest.raises(ConfigError, match=r'a\.yaml:4: "epochs" is there twice in one mapping: keep one\.'):
        read_yaml(path)
    path.write_text("base: &base {lr: 1, eps: 2}\nfirst: {<<: *base, lr: 3}\nsecond: {lr: 4}\n")
    assert read_yaml(path)["first"] == {"lr": 3, "eps": 2}  # a merged mapping's key may be replaced
    (line,) = problems(*GOOD, "sampling.vllm={seed: 1, seed: 2}")
    assert line == 'command line: sampling.vllm: "seed" is there twice in one mapping: keep one.'


@pytest.mark.parametrize(("key", "kind"), [("3", "int"), ("yes", "bool"), ("", "null"), ("1.5", "float")])
def test_a_key_that_is_no_text_is_refused_with_its_line(tmp_path, key, kind):
    path = tmp_path / "a.yaml"
    path.write_text(f"train:\n  epochs: 1\n  ? {key}\n  : 2\n")
    problem = f"the key {key or 'null'} is read as {kind}, and keys are text: put it in quotes."
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}:3: {problem}"
    assert problems(*GOOD, f"optim={{? {key} : 2}}") == [f"command line: optim: {problem}"]
    assert problems(*GOOD, "3=x")[0].startswith("command line: 3: unknown key.")


@pytest.mark.parametrize("setting", ["run.dir", "data.train", "model.path"])
def test_a_name_that_is_not_utf8_is_refused(tmp_path, monkeypatch, setting):
    """Bytes in Latin-1 come as halves of characters, which the saved settings could not hold."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode("für".encode("latin-1"))
    Path(name).write_text("{}\n")
    assert f"command line: {setting}: 'f\\udcfcr' is not UTF-8. Rename the file or folder, or correct the text." in (
        problems(*GOOD, f"{setting}={name}")
    )


@pytest.mark.parametrize("text", ["2024-10-01", "2024-02-30"])
def test_what_looks_like_a_date_is_text(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"run: {{dir: {text}}}\n")
    assert read_yaml(path) == {"run": {"dir": text}}
    assert build(None, f"run.dir={text}").run.dir == text
    (line,) = problems(*GOOD, f"steps={text}")
    assert line.startswith("command line: steps: input should be a valid integer")


def test_every_setting_is_described():
    rows = {key: (kind, default, meaning) for key, kind, default, meaning in describe(SmallConfig)}
    assert rows["mode"] == ("fast|slow", "fast", "How.")
    assert rows["run.dir"][1] == "required"
    assert rows["model.dtype"][:2] == ("auto|float32|bfloat16", "auto")
    assert all(meaning for _, _, meaning in rows.values())


@pytest.mark.parametrize("section", [LoraSection, TrainSection])
def test_a_section_refuses_keys_it_does_not_know(section):
    with pytest.raises(ValueError, match="Extra inputs"):
        section.model_validate({"rank": 3})


@pytest.mark.parametrize(
    ("stage", "override", "problem"),
    [
        ("ppo", "sampling.num_candidates=3", "num_candidates = 3 does not divide train.minibatch_size = 64"),
        ("ppo", "train.minibatch_size=48", "minibatch_size = 48 does not divide train.batch_size = 512"),
        ("ppo", "train.epochs=1.5", "train.epochs"),
        ("gatt", "instructions.kinds=[]", "instructions.kinds"),
        ("gatt", "sampling.num_candidates=0", "sampling.num_candidates"),
        ("eval", "policies={}", "policies"),
        ("eval", "sampling.num_candidates=2", "sampling.num_candidates"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_loads(stage, override, problem):
    needed = {
        "ppo": ["model=toy", "prompts.prompts=toy:prompts.train"],
        "gatt": ["model=toy", "prompts.prompts=toy:prompts.train"],
        "eval": ["policies.a=toy", "prompts.prompts=toy:prompts.heldout"],
    }[stage]
    rewards = [] if stage == "gatt" else ["rewards.helpfulness=toy", "rewards.safety=toy"]
    load_config(STAGES[stage].config_class(), None, [*needed, *rewards, "run.dir=r"])
    needed = [setting for setting in needed if not setting.startswith(override.split("=")[0])]
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load_config(STAGES[stage].config_class(), None, [*needed, *rewards, "run.dir=r", override])


def test_few_layers_are_adapted_by_a_rank(tmp_path):
    settings = ["model=toy", "data.train=toy:sft.train", "run.dir=r", "lora.last_layers=3"]
    with pytest.raises(ConfigError, match=r"lora\.last_layers = 3 has no effect without adapters\. Set lora\.r, or"):
        load_config(SFTConfig, None, settings)
    assert load_config(SFTConfig, None, [*settings, "lora.r=4"]).lora.last_layers == 3
    in_full = load_config(SFTConfig, None, [*settings, "lora.r=0"])
    (tmp_path / "config.yaml").write_text(to_yaml(in_full))
    assert load_config(SFTConfig, tmp_path / "config.yaml") == in_full


def test_a_launchers_processes_that_know_nothing_of_one_another_are_refused(monkeypatch):
    """accelerate makes each the only one where torch finds no device: they would all work in one run directory."""
    alone, many = SimpleNamespace(num_processes=1), SimpleNamespace(num_processes=8)
    check_launch(alone)
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_launch(alone)  # without a launcher
    monkeypatch.setenv("LOCAL_RANK", "3")
    check_launch(many)
    with pytest.raises(ConfigError, match=r"started in 8 processes, but torch finds no CUDA device here"):
        check_launch(alone)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.device: cuda, but torch finds no CUDA device"):
        process_state("cuda")
    assert process_state("cpu").device.type == "cpu"
