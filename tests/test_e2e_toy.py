"""The toy pipeline from the command line: it learns by the computable truth, skips what is done, saves plain models."""

import json
from pathlib import Path

import pytest
import torch
from processes import ROOT, align
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignment.dialogue import Message
from alignment.logprobs import branch_scores, response_logprobs
from alignment.models import load_chat_model, load_reward_model
from alignment.prefix_batch import Branch, Tree, collate

pytestmark = pytest.mark.e2e


def result(path: Path) -> dict:
    return json.loads((path / "result.json").read_text())


def test_both_reward_models_agree_with_the_truth_on_held_out_pairs(pipeline):
    assert result(pipeline / "rm-helpfulness")["accuracy"] > 0.90
    assert result(pipeline / "rm-safety")["accuracy"] > 0.90


def test_sft_lowers_the_held_out_loss(pipeline):
    figures = result(pipeline / "sft")
    assert figures["valid_loss_after"] < 0.5 * figures["valid_loss_before"]


def test_true_reward_rises_from_sft_to_rejection_sampling_to_ppo(pipeline):
    policies = result(pipeline / "eval")["policies"]
    truth = {name: row["truth"]["reward"] for name, row in policies.items()}
    # Margins of 0.1 on a scale from 0 to 1, and outside the 95 % intervals.
    assert truth["rs"]["value"] > truth["sft"]["value"] + 0.1
    assert truth["ppo"]["value"] > truth["sft"]["value"] + 0.2
    assert truth["ppo"]["low"] > truth["sft"]["high"]


def test_the_safety_gate_lowers_the_true_violation_rate(pipeline):
    policies = result(pipeline / "eval")["policies"]
    assert policies["ppo"]["truth"]["violation_rate"]["high"] < policies["sft"]["truth"]["violation_rate"]["low"]


def test_ppo_starts_at_ratio_one_and_reports_its_kl(pipeline):
    rows = [json.loads(line) for line in (pipeline / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["ppo/first_ratio_error"] < 1e-5 for row in rows)
    assert abs(rows[0]["ppo/kl"]) < 1e-4 < rows[-1]["ppo/kl"]


def test_manifests_carry_hashes_counts_and_vetoed_pairs(pipeline):
    manifest = json.loads((pipeline / "rm-safety" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert all(len(source["sha256"]) == 64 for source in manifest["inputs"])
    assert manifest["train"]["veto"]["drop"] > 0
    assert manifest["train"]["rows"] + manifest["train"]["veto"]["drop"] == manifest["inputs"][0]["kept"]
    assert len(manifest["models"]["model"]) == 64


def test_a_second_run_skips_everything_and_a_changed_setting_is_refused(pipeline):
    again = align("run", "recipes/toy/pipeline.yaml", f"runs={pipeline}")
    assert again.returncode == 0 and again.stderr.count("finished before, skipped") == 8
    changed = align("run", "recipes/toy/pipeline.yaml", f"runs={pipeline}", "sft.optim.lr=1e-4")
    assert changed.returncode == 2 and "--from sft" in changed.stderr


def test_a_finished_run_is_not_overwritten(pipeline):
    done = align("sft", pipeline / "sft" / "config.yaml")
    assert done.returncode == 2
    assert "finished run" in done.stderr and "Traceback" not in done.stderr


def test_the_policy_loads_with_plain_transformers_with_the_same_outputs(pipeline):
    folder = pipeline / "ppo" / "model"
    plain, ours = AutoModelForCausalLM.from_pretrained(folder), load_chat_model(str(pipeline / "ppo"))
    ids = ours.chat.tokenizer.encode("give c")
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1].gather(-1, torch.tensor(ids[1:])[:, None])
        found = response_logprobs(ours.model, collate([[Tree(ids[:1], [Branch(ids[1:])])]]))
    torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("name", ["rm-helpfulness", "rm-safety"])
def test_the_reward_model_loads_with_plain_transformers_with_the_same_outputs(pipeline, name):
    folder = pipeline / name / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = load_reward_model(str(pipeline / name))
    prompt = [token for segment in ours.chat.segments([Message("user", "give c")]) for token in segment.ids]
    branches = [ours.chat.encode_response(text) for text in ("cccccc", "xx", "no")]
    rows = tokenizer.pad({"input_ids": [prompt + branch for branch in branches]}, return_tensors="pt")
    with torch.no_grad():
        expected = plain(**rows).logits[:, 0]
        found = branch_scores(ours.model, collate([[Tree(prompt, [Branch(branch) for branch in branches])]]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# Where the names that a stage writes are explained, besides docs/metrics.md.
PAGES = {"gatt": "ghost-attention.md", "ppo": "ppo.md", "eval": "evaluation.md", "rm": "reward-models.md"}


def test_every_metric_and_every_headline_figure_of_every_stage_is_explained(pipeline):
    metrics = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in ("sft", "gatt", "rm-helpfulness", "rm-safety", "reject", "ppo", "eval"):
        figures = result(pipeline / name)
        page = PAGES.get(figures["stage"])
        explained = metrics + ((ROOT / "docs" / page).read_text(encoding="utf-8") if page else "")
        for figure in figures.keys() - {"stage", "kind", "policies"}:
            assert f"`{figure}`" in explained, f"{name}: {figure}"
        for policy in figures.get("policies", {}).values():
            assert all(f"`{figure}`" in explained for figure in policy), name
        log = pipeline / name / "metrics.jsonl"
        rows = map(json.loads, log.read_text().splitlines()) if log.exists() else []
        for figure in {key for row in rows for key in row} - {"step", "stage"}:
            assert f"| `{figure}` |" in explained, f"{name}: {figure}"


def test_two_reward_models_are_compared_by_the_scores_they_left(pipeline):
    """Each was validated on its own pairs; as files of scores they can only be compared on the same ones."""
    scores = [pipeline / name / "held_out_scores.jsonl" for name in ("rm-helpfulness", "rm-safety")]
    for path, name in zip(scores, ("rm-helpfulness", "rm-safety"), strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        right = sum(row["score_chosen"] > row["score_rejected"] for row in rows)
        assert right / len(rows) == pytest.approx(result(pipeline / name)["accuracy"], abs=0.01)
    same = align("rm", "compare", scores[0], scores[0], "--json")
    assert same.returncode == 0 and json.loads(same.stdout)["difference"]["value"] == 0
    assert align("rm", "compare", *scores).returncode == 2


def test_score_sample_and_chat_work_on_the_results(pipeline, tmp_path):
    cache = {"ALIGN_CACHE_DIR": str(pipeline.parent / "cache")}
    report = align("score", pipeline / "rm-safety", "toy:safety.valid", "--json", env=cache)
    assert report.returncode == 0, report.stderr
    assert json.loads(report.stdout)["accuracy"]["value"] > 0.7  # vetoed pairs included, which it is right to miss

    out = tmp_path / "candidates.jsonl"
    options = ("--num-candidates", "3", "--max-new-tokens", "12", "--max-prompts", "5", "--out", out)
    sampled = align("sample", pipeline / "ppo", "toy:prompts.heldout", *options, env=cache)
    assert sampled.returncode == 0, sampled.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] * 5

    scored = tmp_path / "scored.jsonl"
    assert align("score", pipeline / "rm-helpfulness", out, "--out", scored, env=cache).returncode == 0
    assert all(0 < json.loads(line)["probability"] < 1 for line in scored.read_text().splitlines())

    talk = align("chat", pipeline / "ppo", "--safety", pipeline / "rm-safety", stdin="give c\nmore d\n", env=cache)
    assert talk.returncode == 0, talk.stderr
    assert talk.stderr.count("P(safe)") == 2 and "P(safe)" not in talk.stdout


def test_a_users_mistake_ends_with_exit_code_2_and_no_traceback(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n{"prompt": []}\n')
    done = align("rm", "kind=safety", "model=toy", f"data.train={bad}", f"run.dir={tmp_path}/run", "trian.epochs=2")
    assert done.returncode == 2 and 'Did you mean "train"?' in done.stderr
    done = align("rm", "kind=safety", "model=toy", f"data.train={bad}", f"run.dir={tmp_path}/run")
    assert done.returncode == 2 and "bad.jsonl:1" in done.stderr and "bad.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
