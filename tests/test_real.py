"""SmolLM2-135M-Instruct and, where ALIGN_DATA_DIR is set, real human data."""

import functools
import gzip
import json
import os
import re
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import processes
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignment.chat import encode_dialogue, encode_prompt
from alignment.data import load_dialogues, load_prompts
from alignment.dialogue import Message
from alignment.logprobs import response_logprobs
from alignment.models import LoadedModel, load_chat_model, load_reward_model, save_model
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling import SamplingParams
from alignment.sampling.torch_engine import TorchSampler
from reward_models.score import Scorer

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
needs_data = pytest.mark.skipif("ALIGN_DATA_DIR" not in os.environ, reason="ALIGN_DATA_DIR is not set")


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_chat_model("smollm2-135m-instruct")


def data_dir() -> Path:
    """ALIGN_DATA_DIR, from whatever folder a command runs in."""
    return Path(os.environ["ALIGN_DATA_DIR"]).resolve()


def align(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {"ALIGN_DATA_DIR": str(data_dir())} if "ALIGN_DATA_DIR" in os.environ else {}
    return processes.align(*arguments, cwd=cwd, env=env)


def test_prompt_ids_equal_the_models_own_template(smollm2):
    for prompt in load_prompts([str(QUICKSTART / "data" / "prompts.train.jsonl")]).rows:
        messages = [message.to_json() for message in prompt.messages]
        expected = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(smollm2.chat, prompt.messages) == expected


def test_trained_tokens_of_every_demonstration_are_its_answers_and_their_end(smollm2):
    for dialogue in load_dialogues([str(QUICKSTART / "data" / "sft.train.jsonl")]).rows:
        encoded = encode_dialogue(smollm2.chat, dialogue)
        trained = [token for token, counts in zip(encoded.input_ids, encoded.loss_mask, strict=True) if counts]
        answers = [message.content for message in dialogue.messages if message.role == "assistant"]
        assert smollm2.tokenizer.decode(trained) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_plain_transformers_reads_the_score_where_we_do(tmp_path):
    """As docs/reward-models.md has it: the template's line break behind the response is taken off."""
    loaded = load_reward_model("smollm2-135m-instruct", chat_template="chatml", new_head_seed=0)
    save_model(loaded.model, loaded, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    prompt, response = "Why is the sky blue?", "It reflects the sea."
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    with torch.no_grad():
        expected = plain(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
    [[found]] = Scorer.load(str(tmp_path / "model"), dtype="float32").score([prompt], [[response]])
    assert found == pytest.approx(expected, abs=1e-4)


def test_pad_token_is_not_the_end_of_turn(smollm2):
    assert smollm2.tokenizer.pad_token_id != smollm2.chat.end_of_turn_id == smollm2.tokenizer.eos_token_id


def test_greedy_sampling_equals_generate(smollm2):
    questions = ("What is the capital of France?", "Write one sentence about rain.", "2 + 2 =", "Name three primes.")
    prompts = [encode_prompt(smollm2.chat, (Message("user", text),)) for text in questions]
    sampler = TorchSampler(smollm2.model, stop_ids=[smollm2.chat.end_of_turn_id])
    samples = sampler.sample(prompts, SamplingParams(temperature=0, max_new_tokens=24))
    for prompt, [sample] in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
        expected = smollm2.model.generate(ids, **settings)[0, len(prompt) :].tolist()
        assert sample.token_ids == expected


@needs_data
def test_greedy_sampling_of_fifty_real_prompts_equals_generate(smollm2):
    """Prompts of several turns, many side by side, in float32; `generate` gets one at a time."""
    rows = load_prompts(["prompts_helpful.test"]).rows
    encoded = [ids for row in rows if 50 <= len(ids := encode_prompt(smollm2.chat, row.messages)) <= 350][:50]
    assert len(encoded) == 50
    sampler = TorchSampler(smollm2.model, stop_ids=[smollm2.chat.end_of_turn_id], max_rows=32)
    samples = sampler.sample(encoded, SamplingParams(temperature=0, max_new_tokens=12))
    for prompt, [sample] in zip(encoded, samples, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids)}
        assert sample.token_ids == smollm2.model.generate(ids, **settings)[0, len(prompt) :].tolist()


def test_sampled_logprobs_equal_teacher_forcing(smollm2):
    prompt = encode_prompt(smollm2.chat, (Message("user", "Tell me about the sea."),))
    sampler = TorchSampler(smollm2.model, stop_ids=[smollm2.chat.end_of_turn_id])
    [samples] = sampler.sample([prompt], SamplingParams(num_candidates=4, max_new_tokens=24, temperature=0.8))
    batch = collate([[Tree(prompt, [Branch(sample.token_ids) for sample in samples])]])
    with torch.no_grad():
        found = response_logprobs(smollm2.model, batch, temperature=0.8)
    expected = torch.tensor([logprob for sample in samples for logprob in sample.logprobs])
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)


def test_the_quickstart_pipeline_runs_in_miniature(tmp_path):
    small = [f"{name}.data.max_rows=16" for name in ("sft", "rm-helpfulness", "rm-safety", "rs")]
    small += [f"{name}.data.max_valid_rows=8" for name in ("sft", "rm-helpfulness", "rm-safety", "rs")]
    small += ["gatt.prompts.max_prompts=10", "gatt.prompts.turns=2", "gatt.sampling.max_new_tokens=64"]
    small += ["gatt.sampling.num_candidates=4"]  # of ten dialogues one at least shall be finished, on any machine
    small += ["reject.prompts.max_prompts=2", "reject.sampling.num_candidates=2", "eval.prompts.max_prompts=2"]
    small += ["ppo.train.max_steps=1", "ppo.train.batch_size=4", "ppo.train.minibatch_size=4"]
    short = ("sft.evaluation", "rs.evaluation", "ppo.sampling", "eval.sampling")
    small += [f"{section}.max_new_tokens=16" for section in short]
    done = align("run", QUICKSTART / "pipeline.yaml", f"runs={tmp_path}/runs", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert summary["sft"]["valid_loss_after"] < summary["sft"]["valid_loss_before"]
    assert set(summary["eval"]["policies"]) == {"base", "sft", "rs", "ppo"}
    assert "gated reward" in done.stdout and "peak memory" in done.stdout


@needs_data
@pytest.mark.parametrize("kind", ["helpfulness", "safety"])
def test_every_row_of_the_reward_model_recipes_can_be_trained_on(kind):
    done = align("rm", f"recipes/smollm2/rm-{kind}.yaml", "--dry-run", "run.dir=runs/never")
    assert done.returncode == 0, done.stderr
    assert "settings and rows are in order" in done.stderr


@needs_data
def test_the_ablations_run_in_miniature(tmp_path):
    """On some of the safety pairs, and 60 of the graded ones that are held out; all graded ones are converted."""
    (tmp_path / "data").mkdir()
    for path in data_dir().glob("pref_safety_*"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            (tmp_path / "data" / path.name.removesuffix(".gz")).write_text("".join(islice(file, 100)), "utf-8")
    for path in data_dir().glob("pref_helpful_graded.*"):
        (tmp_path / "data" / path.name).symlink_to(path)
    runs, env = tmp_path / "runs", {"ALIGN_DATA_DIR": str(tmp_path / "data"), "COLUMNS": "160"}
    script = ROOT / "recipes" / "smollm2" / "ablations.py"

    def call(*words: str) -> subprocess.CompletedProcess:
        given = ("--runs", runs, "--seeds", "0", "1", *words)
        return processes.align(script, *given, env=env, work=processes.run_script)

    wrong = call("--", "margins")
    assert wrong.returncode and "no study margins" in wrong.stderr
    wrong = call("--variants", "huge", "--", "margin")
    assert wrong.returncode and "no variant huge" in wrong.stderr
    held_out = runs / "graded.valid.jsonl"
    pairs = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(pairs) > 600
    held_out.write_text("".join(pairs[:60]), encoding="utf-8")
    done = call("--", "margin", "auxiliary", "model.path=toy", "model.chat_template=auto", "data.max_rows=16")
    assert done.returncode == 0, done.stderr
    assert all(title in done.stdout for title in ("margin (Table 28)", "large", "auxiliary safety loss (Table 29)"))
    assert len(list(runs.glob("*/*/result.json"))) == 2 * (3 + 2)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """`written("data instruct ... --out FILE")`: the file that the command writes, once for all that name it."""

    @functools.cache
    def write(command: str) -> Path:
        folder = tmp_path_factory.mktemp("written")
        made = align(*command.split(), cwd=folder)
        assert made.returncode == 0, made.stderr
        [file] = folder.iterdir()
        return file

    return write


@needs_data
@pytest.mark.parametrize("name", ["small", "full", "gatt", "distil"])
def test_the_real_data_recipes_are_in_order(name, tmp_path, written):
    recipe = ROOT / "recipes" / "smollm2" / f"{name}.yaml"
    header = recipe.read_text(encoding="utf-8").replace("\\\n#", "")
    for command in re.findall(r"^# +align (data instruct .*)$", header, re.M):
        file = written(command)
        (tmp_path / file.name).symlink_to(file)
    done = align("run", recipe, "--dry-run", "runs=runs/never", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@needs_data
def test_data_check_finds_the_real_preference_files_in_order():
    done = align("data", "check", "pref_safety_labelled.train", "pref_safety_labelled.valid")
    assert done.returncode == 0, done.stderr
    assert "2417" in done.stdout.replace(",", "")
