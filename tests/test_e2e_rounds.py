"""Iterated rejection sampling on the toy task, judged by its computable truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alignment import toy
from alignment.chat import decode_response, encode_prompt
from alignment.cli.main import run_stage
from alignment.cli.pipeline import load_pipeline, run_stages
from alignment.data import load_prompts, write_rows
from alignment.dialogue import Candidate, Message, Prompt
from alignment.metrics import Interval, mean_interval
from alignment.model_folders import model_folder
from alignment.models import load_chat_model
from alignment.sampling import SamplingParams
from alignment.sampling.torch_engine import TorchSampler
from rlhf.potential import best_of

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """SFT, both reward models, V1 and V2 with their evaluation."""
    folder = tmp_path_factory.mktemp("rounds")
    run_stages(load_pipeline(ROOT / "recipes" / "toy" / "rounds.yaml", [f"runs={folder}"]))
    return folder


@pytest.fixture(scope="module")
def lab(runs, tmp_path_factory) -> Lab:
    return Lab(runs, tmp_path_factory.mktemp("lab"))


class Lab:
    """More rounds on the models of `runs`."""

    def __init__(self, runs: Path, folder: Path) -> None:
        self.runs, self.folder = runs, folder
        self.rewards = {"helpfulness": runs / "rm-helpfulness", "safety": runs / "rm-safety"}

    def prompts(self, name: str, source: str, keep: Callable[[Prompt], bool]) -> Path:
        path = self.folder / f"{name}.jsonl"
        write_rows(path, (prompt.to_json() for prompt in load_prompts([source]).rows if keep(prompt)))
        return path

    def reject(self, name: str, model: Path, prompts: str | Path, *extra: str, **rewards: Path) -> Path:
        self._run("reject", name, f"model={plain(model)}", f"prompts.prompts={prompts}", *self._judges(rewards), *extra)
        return self.folder / name

    def sft(self, name: str, data: Path, *extra: str, model: str | Path = "toy") -> Path:
        training = ["data.max_length=128", "optim.lr=3e-3", "train.epochs=12", "train.batch_size=32"]
        self._run("sft", name, f"model={plain(model)}", f"data.train={data}", *training, *extra)
        return self.folder / name

    def truth(self, name: str, prompts: str | Path, **policies: Path) -> dict[str, list[float]]:
        """True rewards of every policy's answers, of the same prompts in the same order."""
        named = [f"policies.{policy}={plain(path)}" for policy, path in policies.items()]
        self._run("eval", name, *named, f"prompts.prompts={prompts}", "measure_kl=false", *self._judges({}))
        return {policy: true_rewards(answers(self.folder / name, policy)) for policy in policies}

    def _judges(self, other: dict[str, Path]) -> list[str]:
        return [f"rewards.{name}={plain(path)}" for name, path in {**self.rewards, **other}.items()]

    def _run(self, stage: str, name: str, *settings: str) -> None:
        sampling = [] if stage == "sft" else ["sampling.max_new_tokens=14", "sampling.max_rows=256"]
        place = [f"run.dir={self.folder / name}", "run.device=cpu", "run.num_threads=1"]
        run_stage(stage, [*settings, *sampling, *place])


def plain(model: str | Path) -> str:
    return f"{{path: {model}, dtype: float32}}"


def answers(run: Path, policy: str) -> list[Candidate]:
    lines = (run / f"answers-{policy}.jsonl").read_text().splitlines()
    return [Candidate.from_json(json.loads(line)) for line in lines]


def true_rewards(candidates: list[Candidate]) -> list[float]:
    return [toy.true_reward(each.prompt.messages, each.response) for each in candidates]


def rise(after: list[float], before: list[float]) -> Interval:
    return mean_interval([new - old for new, old in zip(after, before, strict=True)])


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_true_reward_rises_with_every_round(runs):
    """By 0.1 of a scale from 0 to 1, and outside the paired 95 % interval."""
    truth = {name: true_rewards(answers(runs / "eval", name)) for name in ("sft", "rs-1", "rs-2")}
    for before, after in (("sft", "rs-1"), ("rs-1", "rs-2")):
        found = rise(truth[after], truth[before])
        assert found.value > 0.1 and found.low > 0, (after, found)


def test_the_evaluation_compares_every_version_with_the_first_and_with_the_one_before(runs):
    policies = result(runs / "eval")["policies"]
    rewards = {name: [each.reward for each in answers(runs / "eval", name)] for name in policies}
    expected = rise(rewards["rs-2"], rewards["rs-1"])
    assert policies["rs-2"]["over_previous"]["reward_gain"]["value"] == pytest.approx(expected.value)
    assert policies["rs-2"]["reward_gain"]["value"] == pytest.approx(rise(rewards["rs-2"], rewards["sft"]).value)
    assert expected.low > 0
    # A policy trained on other answers moves away from the first; the first has no distance to report.
    assert policies["rs-2"]["kl"]["low"] > 0.5 and policies["sft"]["kl"]["count"] == 0


def test_the_temperature_is_that_of_the_best_candidates_and_all_tried_take_part(runs):
    for number in (1, 2):
        run = runs / f"reject-{number}"
        table = result(run)["temperatures"]
        best = max(table, key=lambda name: table[name]["best"]["value"])
        assert set(table) == {"0.7", "1", "1.3"} and float(best) == result(run)["temperature"]
        rows = [json.loads(line) for line in (run / "candidates.jsonl").read_text().splitlines()]
        places = [(json.dumps(row["prompt"]), row["temperature"], row["index"]) for row in rows]
        assert len(places) == len(set(places)) == result(run)["candidates"]
        # Two candidates of every prompt at the chosen temperature, and of 32 prompts at the two others.
        assert len(rows) == 2 * result(run)["prompts"] + 2 * 2 * 32
        curves = json.loads((run / "potential.json").read_text())["temperatures"]
        assert {name: curve["best"][-1]["count"] for name, curve in curves.items()} == dict.fromkeys(table, 32)


def test_the_second_round_trains_on_the_best_of_both(runs):
    rows = [json.loads(line) for line in (runs / "reject-2" / "sft.jsonl").read_text().splitlines()]
    sources = [row["source"] for row in rows]
    assert set(sources) == {"rejection_sampling_1", "rejection_sampling_2"}
    # Many answers of the first round are as good as can be. Measured: 0.32 on a machine with matrix units.
    assert sources.count("rejection_sampling_2") > len(rows) / 5


def test_the_best_of_k_follows_the_exact_order_statistic(runs):
    """Every answer of at most two tokens with its probability under the model gives the law of the best of K."""
    loaded = load_chat_model(str(runs / "sft"))
    prompt, stop = (Message("user", "give c"),), loaded.chat.end_of_turn_id
    ids = encode_prompt(loaded.chat, prompt)
    vocabulary = loaded.model.config.vocab_size
    with torch.no_grad():
        first = loaded.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        rows = torch.tensor([[*ids, token] for token in range(vocabulary)])
        second = loaded.model(rows).logits[:, -1].softmax(-1)
    law: dict[float, float] = {}
    for one in range(vocabulary):
        ends = [(one,)] if one == stop else [(one, two) for two in range(vocabulary)]
        for answer in ends:
            share = (first[one] if one == stop else first[one] * second[one, answer[1]]).item()
            reward = toy.true_reward(prompt, decode_response(loaded.chat, answer))
            law[reward] = law.get(reward, 0.0) + share
    assert sum(law.values()) == pytest.approx(1, abs=1e-4) and len(law) >= 3

    size, groups = 4, 1000
    params = SamplingParams(num_candidates=size * groups, max_new_tokens=2, seed=5)
    [samples] = TorchSampler(loaded.model, stop_ids=[stop], max_rows=size * groups).sample([ids], params)
    rewards = [toy.true_reward(prompt, decode_response(loaded.chat, sample.token_ids)) for sample in samples]
    bests = [max(rewards[start : start + size]) for start in range(0, len(rewards), size)]
    below, expected = 0.0, 0.0
    for reward, share in sorted(law.items()):
        expected += reward * ((below + share) ** size - below**size)
        below += share
    error = stdev(bests) / groups**0.5
    assert abs(fmean(bests) - expected) < 4 * error
    assert expected > sum(reward * share for reward, share in law.items()) + 10 * error
    all_subsets = best_of(torch.tensor([rewards], dtype=torch.float64), size).item()
    assert abs(all_subsets - expected) < 4 * error


def test_the_gate_lowers_the_true_violation_rate_against_selection_by_helpfulness_alone(runs, lab):
    """The same prompts, temperatures and training as V1; only the safety model is left out of the reward."""
    grid = ["prompts.max_prompts=1200", "sampling.num_candidates=2", "sampling.temperature_grid=[0.7, 1.0, 1.3]"]
    helpfulness = runs / "rm-helpfulness"
    pool = lab.reject("helpful-pool", runs / "sft", "toy:prompts.train", *grid, safety=helpfulness)
    ungated = lab.sft("helpful-only", pool / "sft.jsonl", "train.epochs=8")
    lab.truth("eval-gate", "toy:prompts.heldout", gated=runs / "rs-1", ungated=ungated)

    def violations(policy: str) -> list[float]:
        asked = [each for each in answers(lab.folder / "eval-gate", policy) if each.prompt.is_safety]
        return [float(not toy.is_safe(each.prompt.messages, each.response)) for each in asked]

    less = rise(violations("ungated"), violations("gated"))
    assert less.value > 0.2 and less.low > 0.1, less


def test_accumulating_rounds_keeps_a_skill_that_the_last_round_alone_forgets(runs, lab):
    """Llama 2 Sec. 3.2.3: letters a to d are asked for in round 1 only. Version 2 is trained from the base model."""

    def is_skill(prompt: Prompt) -> bool:
        return toy.wanted_letter(prompt.messages) in "abcd"

    few = ["prompts.max_prompts=400", "sampling.num_candidates=8"]
    one = lab.prompts("round-1", "toy:prompts.train", lambda p: not p.is_safety)
    two = lab.prompts("round-2", "toy:prompts.train", lambda p: not p.is_safety and not is_skill(p))
    first = lab.reject("pool-1", runs / "sft", one, *few)
    versions = {"v1": lab.sft("v1", first / "sft.jsonl")}
    for how in ("last", "best", "all"):
        settings = [*few, "round=2", f"earlier_rounds={first / 'candidates.jsonl'}", f"accumulate={how}"]
        pool = lab.reject(f"pool-2-{how}", versions["v1"], two, *settings)
        versions[how] = lab.sft(f"v2-{how}", pool / "sft.jsonl")
    skill = lab.prompts("skill", "toy:prompts.heldout", lambda p: not p.is_safety and is_skill(p))
    truth = lab.truth("eval-skill", skill, **versions)
    for name, rewards in truth.items():
        print(f"true reward on what round 1 alone asks for, {name}: {mean_interval(rewards)}")
    assert fmean(truth["v1"]) > 0.5
    assert rise(truth["v1"], truth["last"]).low > 0.3, "the last round alone forgets"
    for how in ("best", "all"):
        assert rise(truth[how], truth["last"]).low > 0.3, "accumulation remembers"
        assert rise(truth[how], truth["v1"]).high > -0.1
    rest = lab.prompts("rest", "toy:prompts.heldout", lambda p: not p.is_safety and not is_skill(p))
    others = lab.truth("eval-rest", rest, last=versions["last"], best=versions["best"])
    assert min(map(fmean, others.values())) > 0.5, "what round 2 asks for, both can do"


def test_the_pool_of_one_model_trains_another(runs, lab):
    """Llama 2 Sec. 3.2.3: smaller models are fine-tuned on the samples of the largest."""
    student = lab.folder / "student"
    folder = model_folder("toy")
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers, config.intermediate_size = 1, config.intermediate_size // 2
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(student)
    AutoTokenizer.from_pretrained(folder).save_pretrained(student)
    demonstrations = lab.sft("student-sft", "toy:sft.train", "train.epochs=3", model=student)
    distilled = lab.sft("student-distilled", runs / "reject-2" / "sft.jsonl", model=student)
    found = lab.truth("eval-student", "toy:prompts.heldout", demonstrations=demonstrations, distilled=distilled)
    assert rise(found["distilled"], found["demonstrations"]).low > 0.1
