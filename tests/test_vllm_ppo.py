"""PPO that samples with vLLM for real, on a random model: the engine follows the policy, adapters or not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence

import pytest
import torch
from accelerate import Accelerator
from merging import merged_copy
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignment.config import load_config
from alignment.data import load_prompts
from alignment.errors import SamplerError
from alignment.logprobs import response_logprobs
from alignment.models import load_chat_model, save_model
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling import Sample, SamplingParams
from alignment.sampling.prompts import Asked
from alignment.sampling.vllm_engine import VllmSampler
from rlhf import ppo_run
from rlhf.config import PPOConfig
from rlhf.policy_sampler import open_policy_vllm
from rlhf.ppo import PPOTrainer, iteration_seed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [5, 6]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, save_judges) -> list[str]:
    """Of a random Llama with heads of a size that vLLM's CPU kernels have, and reward models with its body."""
    toy = load_chat_model("toy")
    config = LlamaConfig(
        vocab_size=len(toy.tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(LlamaForCausalLM(config), toy, folder / "policy")
    judges = save_judges(folder, str(folder / "policy"))
    return [
        *judges, f"model.path={folder / 'policy'}", "prompts.prompts=toy:prompts.train", "prompts.max_prompts=8",
        "sampling.engine=vllm", "sampling.max_new_tokens=8", "train.batch_size=4", "train.minibatch_size=2",
        "train.max_steps=2", "optim.lr=1e-2", "run.device=cpu",
    ]  # fmt: skip


def gaps(model: nn.Module, found: Sequence[Sequence[Sample]], temperature: float) -> Tensor:
    """Distances of reported log-probabilities from those of a teacher-forced pass in float32."""
    trees = [
        [Tree(prompt, [Branch(sample.token_ids) for sample in of_prompt])]
        for prompt, of_prompt in zip(IDS, found, strict=True)
    ]
    with torch.no_grad():
        expected = response_logprobs(model, collate(trees), temperature=temperature)
    reported = torch.tensor([value for of_prompt in found for sample in of_prompt for value in sample.logprobs])
    return (reported - expected).abs()


@pytest.mark.parametrize("extra", [["lora.r=0"], ["lora.r=4", "sampling.temperature=0.7"]], ids=str)
def test_vllm_samples_from_the_policy_as_it_stands_after_every_update(settings, extra):
    config = load_config(PPOConfig, None, [*settings, *extra, "model.dtype=float32", "run.dir=unused"])
    temperature = config.sampling.temperature
    rows = load_prompts(["toy:prompts.train"]).rows
    prompts = [Asked(prompt=prompt, ids=ids) for prompt, ids in zip(rows, IDS, strict=False)]
    with open_policy_vllm(config, torch.float32) as vllm:
        assert isinstance(vllm, VllmSampler)
        trainer = PPOTrainer(config, Accelerator(cpu=True), torch.float32, vllm)
        past = [merged_copy(trainer.policy, torch.float32)]
        metrics = []
        for seed in range(2):
            metrics.append(trainer.iterate(prompts, seed=seed))
            past.append(merged_copy(trainer.policy, torch.float32))
        params = SamplingParams(num_candidates=4, max_new_tokens=8, temperature=temperature)
        found = trainer.sampler.sample(IDS, params)
    for figures in metrics:
        assert figures["first_ratio_error"] < 1e-5
        assert figures["sampler_gap"] < 1e-4
    assert metrics[0]["kl_k3"] < 1e-4 < metrics[1]["kl_k3"]
    *earlier, present = (gaps(model, found, temperature) for model in past)
    assert present.max() < 1e-3
    assert min(each.mean() for each in earlier) > 1e-2
    with pytest.raises(SamplerError, match="closed"):
        trainer.sampler.sample(IDS, params)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_resumed_run_samples_from_the_checkpoints_policy(settings, rank, tmp_path, monkeypatch):
    """The engine of the second start holds the model that the run began with until it is given the newest weights."""
    extra = [f"lora.r={rank}", "model.dtype=float32", "train.max_steps=3", "train.save_every=1"]

    def rows(name: str, *, resume: bool = False) -> list[dict[str, float]]:
        ppo_run.run(load_config(PPOConfig, None, [*settings, *extra, f"run.dir={tmp_path / name}"]), resume=resume)
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: row[key] for key in row if "second" not in key} for row in map(json.loads, lines)]

    whole = rows("whole")
    iterate = PPOTrainer.iterate

    def killed(trainer, prompts, *, seed, **options):
        if seed == iteration_seed(0, 2):
            raise InterruptedError
        return iterate(trainer, prompts, seed=seed, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "iterate", killed)
        with pytest.raises(InterruptedError):
            rows("killed")
    resumed = rows("killed", resume=True)
    assert len(resumed) == len(whole) == 3
    assert resumed[2]["ppo/sampler_gap"] < 1e-4 and resumed[2]["ppo/kl_k3"] > 1e-3
    for name, value in whole[2].items():
        if name.startswith("ppo/"):
            assert resumed[2][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_the_stage_trains_and_looks_at_held_out_prompts_in_bfloat16(settings, tmp_path):
    looks = ["evaluation.prompts=toy:prompts.heldout", "evaluation.max_prompts=4", "evaluation.every=1"]
    extra = [*looks, "model.dtype=bfloat16", f"run.dir={tmp_path / 'run'}"]
    result = ppo_run.run(load_config(PPOConfig, None, [*settings, *extra]))
    assert result["iterations"] == 2 and result["alarms"] == {}
    rows = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [row["step"] for row in rows if "ppo/held_out_reward" in row] == [0, 1, 2]
    # Eight bits of mantissa; the weights before the update would be further off.
    assert all(row["ppo/sampler_gap"] < 0.1 for row in rows[1:])
    before, after = ((tmp_path / "run" / f"answers-{step}.jsonl").read_text(encoding="utf-8") for step in (0, 2))
    assert before != after
