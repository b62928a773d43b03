"""The script of the ablations: which finished runs its tables may show."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.cli.stages import Stage
from alignment.config import StageConfig
from alignment.data import SourceReport
from alignment.files import file_sha256
from alignment.runs import open_run
from reward_models.trainer import HELD_OUT_SCORES

SCRIPT = Path(__file__).parents[1] / "recipes" / "smollm2" / "ablations.py"
ROW = {"prompt": [{"role": "user", "content": "q"}], "chosen": "yes", "rejected": "no"}


def train(config: StageConfig, *, resume: bool = False) -> dict[str, Any]:
    """What the stage leaves of which the script reads, without any work."""
    run = open_run(config, resume=resume)
    run.note_sources([SourceReport(name, file_sha256(Path(name)), 1, 1) for name in config.data.train])
    scores = [{"score_chosen": 1.0, "score_rejected": float(number)} for number in range(3)]
    (run.path / HELD_OUT_SCORES).write_text("".join(json.dumps({**ROW, **score}) + "\n" for score in scores))
    return run.finish({"stage": "rm", "valid": {}})


@pytest.fixture
def ablations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`ablations("key=value", ...)`: the script with one study of one variant, whose pairs are `pairs.jsonl`."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW) + "\n")
    script = runpy.run_path(str(SCRIPT))
    settings = ["model=toy", "kind=helpfulness", f"data.train={tmp_path}/pairs.jsonl"]
    study = script["Study"]("a study", settings, {"plain": []})
    own = script["main"].__globals__
    monkeypatch.setitem(own, "studies", lambda graded: {"one": study})
    monkeypatch.setitem(own, "_graded_pairs", lambda folder: {})
    monkeypatch.setitem(own, "prepare_libraries", lambda: None)
    monkeypatch.setattr(Stage, "run_function", lambda stage: train)

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--runs", str(tmp_path / "runs"), "--seeds", "0", "--", *words])
        script["main"]()

    return call


def test_finished_runs_of_other_settings_are_not_shown_as_those_asked_for(ablations, capsys):
    ablations("one", "data.max_rows=16")
    assert "a study, seeds [0]" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"one/plain-0: finished with other data\.max_rows\. Remove it, or"):
        ablations("one", "data.max_rows=8")
    ablations("one", "data.max_rows=16", "run.num_threads=1")
    assert "a study, seeds [0]" in capsys.readouterr().out


def test_finished_runs_of_other_data_are_not_shown_either(ablations, tmp_path):
    ablations("one")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**ROW, "chosen": "maybe"}) + "\n")
    with pytest.raises(SystemExit, match=r"one/plain-0: finished with other .*pairs\.jsonl"):
        ablations("one")
