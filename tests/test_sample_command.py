"""`align sample`: an interrupted call loses no prompt that has its samples, and ends with the same file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from alignment.cli.main import app
from alignment.data import write_rows
from alignment.errors import RunError
from alignment.locks import release_locks
from alignment.models import load_chat_model, save_model
from alignment.sampling.torch_engine import TorchSampler

LETTERS = "abcabda"  # three equal prompts, and two


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"give {letter}"}]} for letter in LETTERS]
    write_rows(path, [row | {"source": str(number)} for number, row in enumerate(rows)])
    return path


def sample(prompts: Path, out: Path, *extra: str) -> None:
    settings = ["--num-candidates", "2", "--max-new-tokens", "6", "--seed", "3", "--out", str(out)]
    done = CliRunner().invoke(app, ["sample", "toy", str(prompts), *settings, *extra])
    if done.exit_code == 130:
        raise KeyboardInterrupt
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """How many prompts each call of the sampler had; the first call is interrupted when three are done."""
    calls: list[int] = []
    original = TorchSampler.sample

    def interrupted(self, prompts, params, *, on_prompt: Callable, **options):
        calls.append(len(prompts))
        done = []

        def keep(index: int, samples: list) -> None:
            on_prompt(index, samples)
            done.append(index)
            if len(calls) == 1 and len(done) == 3:
                raise KeyboardInterrupt

        return original(self, prompts, params, on_prompt=keep, **options)

    monkeypatch.setattr(TorchSampler, "sample", interrupted)
    return calls


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_second_call_beside_the_first_is_refused_and_takes_nothing(prompts, sampled, tmp_path, is_begun):
    out, resume = tmp_path / "out.jsonl", ["--resume"] if is_begun else []
    if is_begun:
        with pytest.raises(KeyboardInterrupt):
            sample(prompts, out)
        release_locks()  # as the end of its process does
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*partial")}
    with FileLock(tmp_path / "out.jsonl.partial.lock"), pytest.raises(RunError, match="another process is writing it"):
        sample(prompts, out, *resume)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*partial")} == before and not out.exists()


def test_it_says_which_prompts_have_no_answers(prompts, tmp_path):
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    turns = [{"role": "user", "content": "give a " * 20}, {"role": "assistant", "content": "a"}]
    long = {"prompt": [{"role": "user", "content": "give a " * 200}], "source": "long"}
    cut = {"prompt": [*turns * 4, {"role": "user", "content": "give b"}], "source": "cut"}
    write_rows(prompts, [*rows, long, cut])
    done = CliRunner().invoke(
        app, ["sample", "toy", str(prompts), "--max-new-tokens", "6", "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.output
    assert "sample: left out 1 too long, cut the history of 1" in " ".join(done.stderr.split())
    assert len((tmp_path / "o").read_text().splitlines()) == len(rows) + 1


def test_a_prompt_may_be_as_long_as_the_models_context_allows(tmp_path):
    loaded, folder, out = load_chat_model("toy"), tmp_path / "long", tmp_path / "out.jsonl"
    save_model(loaded.model, loaded, folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 4096}))
    texts = (("user", "x" * 2100), ("assistant", "y"), ("user", "give b"))
    turns = [{"role": role, "content": text} for role, text in texts]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": turns}])
    arguments = ["sample", folder, tmp_path / "prompts.jsonl", "--max-new-tokens", 2, "--out", out]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    [row] = map(json.loads, out.read_text().splitlines())
    assert row["prompt"] == turns


def test_it_goes_on_after_an_interruption_and_ends_with_the_same_file(prompts, sampled, tmp_path, monkeypatch):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample(prompts, out)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()]
    num_kept = sum(row.get("index") == 0 for row in kept)
    assert num_kept > 0
    with pytest.raises(RunError, match=r"unfinished call's rows.*--resume"):
        sample(prompts, out)
    with pytest.raises(RunError, match="other data or settings"):
        sample(prompts, out, "--resume", "--temperature", "0.5")
    sample(prompts, out, "--resume")
    assert sampled == [len(LETTERS), len(LETTERS) - num_kept]
    sample(prompts, whole)
    assert out.read_text() == whole.read_text() and not list(tmp_path.glob("*.partial*"))
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(row["source"], row["index"]) for row in rows] == [(str(n), k) for n in range(len(LETTERS)) for k in (0, 1)]
    # Equal prompts have streams of their own.
    answers = [json.dumps([row["response"] for row in rows if row["source"] == n]) for n in "036"]
    assert len({*answers}) == 3


def test_all_of_it_may_be_there_when_it_goes_on(prompts, tmp_path, monkeypatch):
    """Interrupted between the last prompt and the file's last name."""
    from alignment.cli.partial_file import PartialFile

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartialFile, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        sample(prompts, out)
    monkeypatch.setattr(TorchSampler, "sample", None)
    sample(prompts, out, "--resume")
    assert len(out.read_text().splitlines()) == 2 * len(LETTERS)
