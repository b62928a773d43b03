"""Rounds of a pipeline: what a `repeat` block stands for, and what is wrong with one."""

import json
from pathlib import Path

import pytest
import yaml

from alignment.cli.pipeline import load_pipeline
from alignment.cli.rounds import expand_rounds
from alignment.errors import ConfigError
from alignment.manifests import changed_settings, settings

BLOCK = yaml.safe_load(
    """
    repeat: 3
    first: {rs: "${sft}"}
    stages:
      reject:
        model: ${last.rs}
        round: ${round}
        earlier_rounds: ["${earlier.reject}/candidates.jsonl"]
      rs: {stage: sft, data: {train: ["${base}/d.jsonl", "${reject}/sft.jsonl"]}, note: "round ${round} of ${sft}"}
    """
)


def test_every_round_has_its_own_stages_and_sees_those_before():
    stages, outside, problems = expand_rounds({"sft": {"model": "toy"}, "rounds": BLOCK}, {}, "p.yaml")
    assert problems == [] and outside == {"reject-3": "reject", "rs-3": "rs"}
    assert list(stages) == ["sft", "reject-1", "rs-1", "reject-2", "rs-2", "reject-3", "rs-3"]
    assert stages["reject-1"] == {"stage": "reject", "model": "${sft}", "round": 1, "earlier_rounds": []}
    assert stages["reject-3"] == {
        "stage": "reject", "model": "${rs-2}", "round": 3,
        "earlier_rounds": ["${reject-1}/candidates.jsonl", "${reject-2}/candidates.jsonl"],
    }  # fmt: skip
    assert stages["rs-2"] == {
        "stage": "sft", "data": {"train": ["${base}/d.jsonl", "${reject-2}/sft.jsonl"]}, "note": "round 2 of ${sft}",
    }  # fmt: skip


def test_the_command_line_changes_a_block():
    over = {"rounds": {"repeat": 1, "stages": {"rs": {"note": "mine"}}}}
    stages, outside, _ = expand_rounds({"rounds": BLOCK}, over, "p.yaml")
    assert list(stages) == ["reject-1", "rs-1"] and stages["rs-1"]["note"] == "mine"
    assert outside == {"reject-1": "reject", "rs-1": "rs"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"repeat": 0}, "stages.rounds.repeat: 0. It must be a whole number above 0."),
        ({"repeat": True}, "stages.rounds.repeat: True."),
        ({"stages": {}}, "stages.rounds.stages: missing or empty."),
        ({"stages": {"a/b": {}}}, "stages.rounds.stages: 'a/b' is no name for a folder."),
        ({"stages": {"here": {}}}, "stages.rounds.stages: 'here' means something else in a pipeline."),
        ({"frist": {}}, "stages.rounds.frist: unknown key. Known in a repeat block: repeat, first, stages."),
        ({"first": {"sr": "x"}}, "stages.rounds.first: must name stages of the block"),
        ({"first": {"rs": {"path": "x"}}}, "stages.rounds.first.rs: must be text, what ${last.rs} stands for in"),
        ({"first": {}}, "stages.rounds.stages.reject.model: ${last.rs} is nothing in round 1. Say what in first.rs."),
        (
            {"stages": {"rs": {"model": "${last.sft}"}}, "first": {}},
            "stages.rounds.stages.rs.model: ${last.sft} is no stage of the block. Known: rs.",
        ),
        (
            {"stages": {"rs": {"models": [{"path": "${earlier.rs}"}]}}, "first": {}},
            "stages.rounds.stages.rs.models.path: ${earlier.rs} stands for many rounds. Write it as an item of a list.",
        ),
        (
            {"stages": {"rs": {"model": "${earlier.rs}"}}, "first": {}},
            "stages.rounds.stages.rs.model: ${earlier.rs} stands for many rounds. Write it as an item of a list.",
        ),
    ],
)
def test_what_is_wrong_with_a_block_is_said(change, problem):
    _, _, problems = expand_rounds({"rounds": {**BLOCK, **change}}, {}, "p.yaml")
    assert problems and problems[0].startswith(f"p.yaml: {problem}")


def test_a_later_stage_has_all_versions_however_many_there_are():
    named = {"policies": {"sft": "${sft}", "v${round}": {"path": "${each.rs}", "dtype": "float32"}, "ppo": "${ppo}"}}
    listed = {"data": {"train": ["mine.jsonl", "${each.reject}/sft.jsonl", "${reject}/candidates.jsonl"]}}
    for repeat in (1, 3):
        entries = {"rounds": {**BLOCK, "repeat": repeat}, "eval": named, "student": listed}
        stages, _, problems = expand_rounds(entries, {}, "p.yaml")
        assert problems == []
        versions = {f"v{n}": {"path": f"${{rs-{n}}}", "dtype": "float32"} for n in range(1, repeat + 1)}
        policies = stages["eval"]["policies"]
        assert policies == {"sft": "${sft}", **versions, "ppo": "${ppo}"}
        assert list(policies) == ["sft", *versions, "ppo"]
        files = [f"${{reject-{n}}}/sft.jsonl" for n in range(1, repeat + 1)]
        assert stages["student"]["data"]["train"] == ["mine.jsonl", *files, "${reject}/candidates.jsonl"]


def test_names_and_values_of_all_versions_have_their_numbers():
    weights = {"max_rows_of": {"${each.reject}/sft.jsonl": 5}, "t-${round}": {"path": "${each.rs}", "t": "${round}.j"}}
    stages, _, problems = expand_rounds({"rounds": {**BLOCK, "repeat": 2}, "student": weights}, {}, "p.yaml")
    assert problems == []
    assert stages["student"] == {
        "max_rows_of": {"${reject-1}/sft.jsonl": 5, "${reject-2}/sft.jsonl": 5},
        "t-1": {"path": "${rs-1}", "t": "1.j"},
        "t-2": {"path": "${rs-2}", "t": "2.j"},
    }


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (
            {"policies": {"rs": "${each.rs}"}},
            "policies.rs: ${each.rs} stands for many rounds. Write it as an item of a list, or with a name for each: "
            '"rs-${round}". The last one is ${rs}.',
        ),
        (
            {"policies": {"rs-${round}": "${rs}"}},
            "policies.rs-${round}: has a ${round} in its name and no ${each.STAGE}, whose rounds these are.",
        ),
        (
            {"policies": {"v3": "mine", "v${round}": "${each.rs}"}},
            "policies.v3: is there twice, under its name and with ${round}.",
        ),
        (
            {"policies": {"v${round}": "${each.rs}", "v3": "mine"}},
            "policies.v3: is there twice, under its name and with ${round}.",
        ),
        (
            {"data": ["${each.sr}/sft.jsonl"]},
            "data: ${each.sr} is no repeated stage before this one. Known: reject, rs, again.",
        ),
        ({"p-${round}": ["${each.rs}", "${each.again}"]}, "p-${round}: again, rs have different numbers of rounds."),
    ],
)
def test_what_is_wrong_with_all_versions_is_said(entry, problem):
    entries = {"rounds": BLOCK, "others": {"repeat": 2, "stages": {"again": {}}}, "eval": entry}
    _, _, problems = expand_rounds(entries, {}, "p.yaml")
    assert problems == [f"p.yaml: stages.eval.{problem}"]


def test_without_rounds_there_are_no_versions():
    _, _, problems = expand_rounds({"eval": {"data": ["${each.rs}"]}, "rounds": BLOCK}, {}, "p.yaml")
    expected = "${each.rs} is no repeated stage before this one. There is no repeat block before this stage."
    assert problems == [f"p.yaml: stages.eval.data: {expected}"]


@pytest.mark.parametrize("repeat", [1, 3])
def test_the_recipe_evaluates_every_version(repeat):
    path = Path(__file__).parents[1] / "recipes" / "toy" / "rounds.yaml"
    evaluation = load_pipeline(path, [f"rounds.repeat={repeat}"]).stages[-1].config
    assert list(evaluation.policies) == ["sft", *(f"rs-{number}" for number in range(1, repeat + 1))]


def test_names_may_not_clash():
    entries = {"rs-2": {}, "rounds": BLOCK, "rs": {}}
    _, _, problems = expand_rounds(entries, {}, "p.yaml")
    assert problems == [
        "p.yaml: stages.rs-2: there are two stages of this name.",
        "p.yaml: stages.rs: is also a name in a repeat block.",
    ]


PIPELINE = """
runs: {runs}
stages:
  sft: {{model: toy, data: {{train: "toy:sft.train"}}}}
  rounds:
    repeat: 2
    first: {{rs: "${{sft}}"}}
    stages:
      reject:
        model: ${{last.rs}}
        rewards: {{helpfulness: toy, safety: toy}}
        prompts: {{prompts: "toy:prompts.train"}}
        round: ${{round}}
        earlier_rounds: ["${{earlier.reject}}/candidates.jsonl"]
      rs: {{stage: sft, model: toy, data: {{train: ["${{reject}}/sft.jsonl"]}}}}
  more: {{stage: sft, model: "${{rs}}", data: {{train: ["toy:sft.train", "${{rs-1}}/answers.jsonl"]}}}}
"""


def test_a_pipeline_with_rounds_is_validated_as_a_whole(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.format(runs=tmp_path / "runs"))
    plan = load_pipeline(path, ["rs-2.train.epochs=5"], from_stage="reject-2")
    stages = {stage.name: stage for stage in plan.stages}
    assert list(stages) == ["sft", "reject-1", "rs-1", "reject-2", "rs-2", "more"]
    assert [stage.again for stage in plan.stages] == [False, False, False, True, True, True]
    assert stages["reject-2"].config.model.path == str(tmp_path / "runs" / "rs-1")
    assert stages["reject-2"].config.round == 2
    assert stages["rs-2"].config.train.epochs == 5 and stages["rs-1"].config.train.epochs == 2
    assert stages["more"].config.model.path == str(tmp_path / "runs" / "rs-2")
    assert load_pipeline(path, ["rounds.repeat=3"]).stages[-2].name == "rs-3"
    with pytest.raises(ConfigError, match=r"stages.rs-2: trian: unknown key. Did you mean \"train\""):
        load_pipeline(path, ["rounds.stages.rs.trian.epochs=1"])


def test_a_run_of_an_older_version_counts_as_having_the_defaults_of_new_settings(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.format(runs=tmp_path / "runs"))
    config = load_pipeline(path, []).stages[0].config
    before = json.loads(json.dumps(settings(config)))
    del before["data"]["max_rows_of"], before["evaluation"]
    assert changed_settings({"settings": before}, config) == []
    fewer = {**before, "data": {**before["data"], "max_rows": 3}}
    assert changed_settings({"settings": fewer}, config) == ["data.max_rows"]
    assert changed_settings({"settings": {**before, "gone": 1}}, config) == ["data.max_rows_of", "evaluation", "gone"]
