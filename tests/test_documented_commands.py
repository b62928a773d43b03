"""Every command of README and docs: run with small stand-ins, or checked word by word where it trains for long."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from documented_commands import PAGES, ROOT, Command, block_lines, documented_commands, parse_as_script
from processes import align
from typer.testing import CliRunner

from alignment.cli.main import app
from alignment.cli.pipeline import load_pipeline
from alignment.cli.plan import load_stages
from alignment.cli.stages import STAGES
from alignment.config import build_config, merge, parse_overrides, read_yaml

COMMANDS = documented_commands()
ALIGN = [command.words[1:] for command in COMMANDS if command.program == "align"]
GROUPS = {("data", "check"), ("data", "preview"), ("data", "convert"), ("data", "split"), ("data", "instruct"),
          ("rm", "compare")}  # fmt: skip
RUN_WITH_TOYS = ("chat", "score", "sample", "report", "rm compare")


NAME_OF_DATA = r"\w+\.(train|valid|test)"  # in ALIGN_DATA_DIR


def of(program: str) -> list[Command]:
    return [command for command in COMMANDS if command.program == program]


def name_of(words: tuple[str, ...]) -> str:
    """The command, of one word or two."""
    return " ".join(words[:2]) if words[:2] in GROUPS else words[0]


def is_whole(words: tuple[str, ...]) -> bool:
    """Whether it can be run as it stands: not only a name in a sentence, no capitals that stand for something."""
    rest = words[len(name_of(words).split()) :]
    return bool(rest) and not any(re.fullmatch(r"[A-Z]{3,}(\.\w+)?", word) for word in words)


def those(*names: str) -> list[tuple[str, ...]]:
    """Whole `align` commands of these names."""
    return [words for words in ALIGN if name_of(words) in names and is_whole(words)]


def settings_of(words: tuple[str, ...]) -> list[str]:
    return [word for word in words if "=" in word and not word.startswith("-")]


@functools.cache
def help_of(*words: str) -> str:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--help"])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def check_stage(words: tuple[str, ...]) -> None:
    """Settings, and those of the file, make a configuration; its inputs need not be there."""
    name, rest = words[0], words[1:]
    files = [word for word in rest if word.endswith(".yaml") and "=" not in word]
    values = merge(read_yaml(ROOT / files[0]) if files else {}, parse_overrides(settings_of(rest)))
    cls = STAGES[name].of_kind(values.get("kind")).config_class()
    build_config(cls, values, " ".join(words), check_inputs=False)


def check_pipeline(words: tuple[str, ...]) -> None:
    path, from_stage = ROOT / words[1], words[words.index("--from") + 1] if "--from" in words else None
    assert load_pipeline(path, settings_of(words[1:]), from_stage=from_stage, check_inputs=False).stages


def test_commands_are_found_in_blocks_in_sentences_and_in_tables():
    assert len(ALIGN) > 80
    assert ("plan", "sft", "model=llama-2-7b", "--gpus", "8", "--fsdp") in ALIGN  # a table of scaling.md
    assert ("sample", "runs/sft", "prompts.jsonl", "--temperature", "0", "--out", "sft-answers.jsonl") in ALIGN
    assert {command.program for command in COMMANDS} >= {"accelerate", "torchrun", "python", "pip", "make", "git"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_are_shell(page):
    lines = [re.sub(r"<[^<>]*>", "PLACEHOLDER", line) for line in block_lines(page.read_text(encoding="utf-8"))]
    done = subprocess.run(["bash", "-n"], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ALIGN, ids=" ".join)
def test_commands_and_their_options_exist(words):
    if words[0] == "STAGE" or words[0].startswith("-"):
        return
    shown = help_of(*name_of(words).split())
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{option}(?![\w-])", shown), option


@pytest.mark.parametrize("words", [w for w in those(*STAGES) if "--help" not in w], ids=" ".join)
def test_stages_are_given_settings_that_exist(words):
    check_stage(words)


@pytest.mark.parametrize("words", [w for w in those("run") if w[1].startswith("recipes/")], ids=" ".join)
def test_pipelines_are_in_order(words):
    check_pipeline(words)


def without_options(words: tuple[str, ...]) -> list[str]:
    """A plan's stage, file and settings."""
    with_value = {"--gpu", "--gpus", "--utilisation"}
    return [word for before, word in pairwise(words) if word[0] != "-" and before not in with_value]


@pytest.mark.parametrize("words", those("plan"), ids=" ".join)
def test_what_is_planned_can_be_read(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    rest = without_options(words)
    stage = rest.pop(0) if rest[0] in STAGES else None
    path = next((Path(word) for word in rest if "=" not in word), None)
    assert load_stages(path, stage, settings_of(tuple(rest)))


@pytest.mark.e2e
@pytest.mark.parametrize("words", those("plan"), ids=" ".join)
def test_plans_are_made_and_come_to_the_peaks_that_are_written_beside_them(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words not in PEAKS:
        run(list(words))
        return
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert max(plan["peak_gb"] for plan in found) == pytest.approx(PEAKS[words], abs=0.06)


def written_peaks() -> dict[tuple[str, ...], float]:
    """GB by the command that is the last cell of their row, or the block behind their paragraph."""
    rows = re.findall(r"^\|.*?\| ([\d.]+) GB.*`align (plan [^`]+)` \|$", SCALING, flags=re.MULTILINE)
    paragraphs = re.findall(r"([\d.]+) GB at most(?:.|\n(?!\n))*\n\n    align (plan .+)$", SCALING, flags=re.MULTILINE)
    return {tuple(shlex.split(command)): float(peak) for peak, command in [*rows, *paragraphs]}


SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
PEAKS = written_peaks()
ON_24_GB = (
    "plan",
    "recipes/llama2-7b/lora.yaml",
    "defaults.model.gradient_checkpointing=true",
    "--gpu",
    "rtx4090-24gb",
)


def test_the_peaks_that_are_written_are_found():
    assert len(PEAKS) > 10 and PEAKS.keys() <= set(those("plan"))
    assert ON_24_GB in PEAKS


@pytest.mark.e2e
@pytest.mark.parametrize(("column", "gpus"), [(0, "1"), (1, "8")])
def test_the_recipe_for_one_gpu_comes_to_the_peaks_of_its_table(column, gpus, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = "recipes/llama2-7b/lora.yaml"
    table = SCALING.partition(f"| stage of `{path}`")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\w.*?) \(.*?\| ([\d.]+) GB[^|]*\| ([\d.]+) GB", table, flags=re.MULTILINE)
    found = json.loads(CliRunner().invoke(app, ["plan", path, "--gpus", gpus, "--json"]).stdout)
    peaks = {plan["name"]: plan["peak_gb"] for plan in found}
    named = {name: float(row[column]) for names, *row in rows for name in names.split(", ")}
    assert named.keys() == peaks.keys()
    assert named == pytest.approx(peaks, abs=0.06)


LAUNCHED = [command for command in COMMANDS if command.program in ("accelerate", "torchrun") and "-m" in command.words]


@pytest.mark.parametrize("command", LAUNCHED, ids=str)
def test_launchers_take_their_options_and_start_a_stage_with_its_settings(command):
    if command.program == "accelerate":
        found = launch_command_parser().parse_args(command.words[2:])
        assert found.module
    else:
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(command.words[1:])
    assert found.training_script == "alignment.cli.main"
    words = tuple(found.training_script_args)
    if words[0] == "run":
        check_pipeline(words)
    elif "CONFIG.yaml" in words:
        assert words[0] in STAGES
    else:
        check_stage(words)


def test_launchers_in_sentences_name_options_that_exist():
    for command in of("accelerate"):
        assert command.words[1] == "launch"
        _, unknown = launch_command_parser().parse_known_args([*command.words[2:], "script.py"])
        assert not unknown, command


@pytest.mark.parametrize("command", of("python"), ids=str)
def test_scripts_are_there(command):
    script = command.words[1]
    assert script in ("-c", "-m") or (ROOT / script).is_file()


SCRIPTS = {  # with the arguments of each command
    script: [command.words[2:] for command in of("python") if command.words[1] == script]
    for script in dict.fromkeys(command.words[1] for command in of("python"))
}
PARSING = [name for name in SCRIPTS if name.endswith(".py") and "def _arguments(" in (ROOT / name).read_text("utf-8")]


def parse_all(script: str, commands: list[tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
    """What a script's own parser makes of the arguments of several commands; nothing else in it is run."""
    return align(script, json.dumps(commands), work=parse_as_script)


def test_scripts_without_options_are_given_none():
    for script in SCRIPTS.keys() - set(PARSING) - {"-c", "-m"}:
        assert not any(word.startswith("-") for words in SCRIPTS[script] for word in words), script


@pytest.mark.e2e
@pytest.mark.parametrize("script", PARSING)
def test_scripts_know_their_options_and_values(script):
    done = parse_all(script, SCRIPTS[script])
    assert done.returncode == 0, done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("script", ["benchmarks/sft.py", "benchmarks/reward_model.py", "benchmarks/ppo.py"])
def test_a_misspelt_way_of_running_trl_is_found(script):
    done = parse_all(script, [("--trl", "trl-flatt")])
    assert done.returncode == 2 and "trl-flatt" in done.stderr


def test_make_pip_and_pytest_are_given_what_there_is():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for command in of("make"):
        assert command.words[1] in targets, command
    for command in of("pip"):
        for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(command.words)):
            assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"]), command
    marks = {mark.split(":")[0] for mark in project["tool"]["pytest"]["ini_options"]["markers"]}
    for command in of("pytest"):
        expression = command.words[command.words.index("-m") + 1] if "-m" in command.words else ""
        assert set(re.findall(r"\w+", expression)) - {"not", "and", "or"} <= marks, command
        assert all((ROOT / word).exists() for word in command.words if word.startswith("tests/")), command


def examples() -> dict[str, dict]:
    """A row of every public layout, from the table of data-formats.md."""
    text = (ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8")
    return {name: json.loads(row) for name, row in re.findall(r"^\| `([\w-]+)` \| `(\{.*\})`", text, re.M)}


def write_stand_in(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = json.dumps(rows) if path.suffix == ".json" else lines
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(content)


def stand_in_rows(name: str) -> list[dict]:
    """Small rows of the kind that a file's name says; enough for twenty turns of other prompts, and for a split."""

    def messages(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = []
    for number in range(40):
        prompt = messages("user", f"Say {number}.")
        long, short = messages("assistant", f"{number} it is."), messages("assistant", "No.")
        if "pair" in name or "pref" in name:
            labels = {"chosen_safe": number % 2 == 0, "rejected_safe": number % 3 == 0}
            rows.append({"prompt": prompt, "chosen": long, "rejected": short, **labels})
        elif "responses" in name:
            rows.append({"prompt": prompt, "response": long})
        elif "prompts" in name:
            rows.append({"prompt": prompt, "is_safety": number % 2 == 0})
        else:
            rows.append({"messages": prompt + long})
    return rows


def run(words: list[str], **options) -> str:
    done = CliRunner().invoke(app, words, **options)
    assert done.exit_code == 0, done.output or done.exception
    return done.output


@pytest.mark.parametrize("words", [w for w in ALIGN if w[0] == "data" and is_whole(w)], ids=" ".join)
def test_data_commands_run(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGN_DATA_DIR", raising=False)
    words = [word.replace("$ALIGN_DATA_DIR", ".").replace("smollm2-135m-instruct", "toy") for word in words]
    layout = words[words.index("--from") + 1] if "--from" in words else None
    out = words.index("--out") + 1 if "--out" in words else None
    for place, word in enumerate(words):
        if re.search(r"\.jsonl?(\.gz)?$", word) and place != out:
            write_stand_in(tmp_path / word, [examples()[layout]] if layout else stand_in_rows(word))
        elif re.fullmatch(NAME_OF_DATA, word):
            monkeypatch.setenv("ALIGN_DATA_DIR", str(tmp_path))
            write_stand_in(tmp_path / f"{word}.jsonl", stand_in_rows(word))
    run(words)
    if out:
        made = [path for path in tmp_path.glob(f"{words[out]}*") if path.stat().st_size]
        assert made


@pytest.mark.parametrize(
    "words",
    [w for w in ALIGN if {"--dry-run", "--help"} & {*w} and "STAGE" not in w and "smollm2/" not in w[1]],
    ids=" ".join,
)
def test_help_and_dry_runs_end_well(words, tmp_path, monkeypatch):
    for word in re.findall(r"[\w.-]+\.jsonl", " ".join(words)):
        write_stand_in(tmp_path / word, stand_in_rows(word))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    copied = (ROOT / "recipes" / "quickstart" / "pipeline.yaml").read_text(encoding="utf-8")  # and changed as told
    changed = copied.replace("runs/quickstart", "runs/mine").replace("${here}", "recipes/quickstart")
    (tmp_path / "mine.yaml").write_text(changed, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run([word.replace("smollm2-135m-instruct", "toy") for word in words])


@pytest.fixture
def toy_runs(pipeline, tmp_path, monkeypatch) -> Path:
    """A folder in which each run that the pages name is one of the toy pipeline's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_DATA_DIR", str(tmp_path))
    stand_for = {"rm-h": "rm-helpfulness", "rm-h-full": "rm-helpfulness", "rm-s": "rm-safety", "ppo-beta-1": "ppo",
                 "ppo-beta-2": "ppo", "v1": "rs", "v2": "rs", "guard": "rm-helpfulness"}  # fmt: skip
    (tmp_path / "runs").mkdir()
    for stage in pipeline.iterdir():
        if stage.is_dir():
            (tmp_path / "runs" / stage.name).symlink_to(stage)
    for name, stage in stand_for.items():
        (tmp_path / "runs" / name).symlink_to(pipeline / stage)
    for name in ("quickstart", "smollm2"):
        (tmp_path / "runs" / name).symlink_to(pipeline)
    return tmp_path


@pytest.mark.e2e
@pytest.mark.parametrize(
    "words", [w for w in those(*RUN_WITH_TOYS) if "vllm" not in w], ids=lambda words: shlex.join(words)
)
def test_models_are_scored_sampled_talked_to_and_reported(words, toy_runs):
    words = list(words)
    out = words.index("--out") + 1 if "--out" in words else None
    for place, word in enumerate(words):
        if re.fullmatch(NAME_OF_DATA, word):
            write_stand_in(toy_runs / f"{word}.jsonl", stand_in_rows(word))
        if not re.fullmatch(r"[\w-]+\.jsonl", word) or place == out:
            continue
        write_stand_in(toy_runs / word, stand_in_rows("pairs" if word.startswith("scored") else word))
        if word.startswith("scored"):
            pairs = (toy_runs / word).rename(toy_runs / f"pairs-of-{word}")
            run(["score", "runs/rm-h", pairs.name, "--out", word])
    short = ["--max-new-tokens", "4"] if words[0] in ("chat", "sample") and "--max-new-tokens" not in words else []
    report = ["--out", "report.html"] if words[0] == "report" and not out else []  # not into the shared runs
    run([*words, *short, *report], input="Hello.\n" if words[0] == "chat" else None)
    assert out is None or (toy_runs / words[out]).stat().st_size


# Settings that make a documented run a matter of a second.
SMALL = {
    "sft": ["train.max_steps=1", "train.batch_size=4"],
    "rm": ["train.max_steps=1", "train.batch_size=4"],
    "gatt": ["prompts.turns=2", "sampling.max_new_tokens=4", "instructions.kinds=[hobby]"],
    "distil": ["sampling.max_new_tokens=14", "prompts.max_prompts=40"],
    "reject": ["sampling.num_candidates=2", "sampling.max_new_tokens=4"],
    "ppo": [
        "train.max_steps=1",
        "ppo.critic_warmup=0",
        "train.batch_size=16",
        "train.minibatch_size=16",
        "sampling.max_new_tokens=4",
    ],
    "eval": ["sampling.max_new_tokens=4"],
}
HUB_MODELS = r"(?<==)(smollm2-135m-instruct|smaller-base|[\w-]+/[\w.-]*(?:Instruct|-hf))$"


def stand_in_inputs(folder: Path, words: list[str]) -> None:
    """Files and runs that a stage's settings name and that are not there: rows of the kind that it reads there."""
    for setting in settings_of(tuple(words)):
        key, _, value = setting.partition("=")
        for name in re.findall(r"[\w./-]+", value):
            path = folder / name
            if name.endswith(".jsonl") and not path.exists():
                rows = "pairs" if words[0] == "rm" else "prompts" if "prompts" in key else "demonstrations"
                write_stand_in(path, stand_in_rows(rows))
            elif name.startswith("runs/") and key != "run.dir" and not path.exists():
                is_judge = key.startswith(("rewards", "guard", "evaluation", "safety"))
                path.symlink_to(folder / "runs" / ("rm-helpfulness" if is_judge else "sft"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "words",
    [w for w in those(*STAGES) if not {"--help", "--dry-run", "sampling.engine=vllm"} & {*w} and ".yaml" not in w[1]],
    ids=" ".join,
)
def test_documented_stages_run(words, toy_runs):
    words = [re.sub(HUB_MODELS, "toy", word) for word in words]
    stand_in_inputs(toy_runs, words)
    given = next((word for word in words if word.startswith("prompts.prompts=")), None)
    if words[0] == "distil":  # answers that the toy's safety model can tell apart
        words.remove(given)
        words.append("prompts.prompts=toy:prompts.train")
    if any(word.startswith("prompts.not_in=") for word in words):  # the toy task has few prompts, all trained on
        (toy_runs / "unrelated.jsonl").write_text('{"prompt": [{"role": "user", "content": "unrelated"}]}\n')
        words.append("prompts.not_in=unrelated.jsonl")
    place = ["run.dir=made", "run.device=cpu", "run.num_threads=1"]
    template = ["model.chat_template=auto"] if "model.chat_template=llama2" in words else []
    run([*words, *SMALL[words[0]], *template, *place])
    assert json.loads((toy_runs / "made" / "result.json").read_text())["stage"] == words[0]


PYTHON = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    if "trl" not in code and "vllm" not in code
]


@pytest.mark.e2e
@pytest.mark.parametrize("code", PYTHON)
def test_python_of_the_pages_runs(code, toy_runs):
    for name in ("pairs", "demonstrations"):
        write_stand_in(toy_runs / f"{name}.jsonl", stand_in_rows(name))
    (toy_runs / "mine.csv").write_text("question,better,worse,rating\nHi?,Hello.,No.,better\n")
    settings = {"kind": "helpfulness", "model": "toy", "data": {"train": "pairs.jsonl"}, "run": {"dir": "runs/made"}}
    settings["train"] = {"max_steps": 1, "batch_size": 4}
    (toy_runs / "rm.yaml").write_text(json.dumps(settings))
    shutil.copytree(toy_runs / "runs" / "sft" / "model", toy_runs / "my-base")
    exec(compile(code, "page", "exec"), {})
