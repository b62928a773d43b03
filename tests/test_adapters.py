"""Adapters beside merged weights, and models that share what they have in common."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from alignment.adapters import (
    Adapter,
    attach_frozen,
    decoder_prefix,
    fingerprint,
    keep_frozen_active,
    linear_layers,
    read_adapter,
    set_decoder,
    write_adapter,
)
from alignment.config import LoraSection
from alignment.errors import ModelError
from alignment.model_folders import model_folder
from alignment.model_workers import sharing_copy
from alignment.models import LoadedModel, add_lora, load_chat_model, load_reward_model, save_model, saved_adapter

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_tuned) -> dict[str, Path]:
    """SFT from the toy model, a reward model from that, and another chat model from the toy model."""
    folder, fine_tune = tmp_path_factory.mktemp("runs"), partial(save_tuned, std=0.2, alpha=3.0)
    sft = fine_tune(load_chat_model("toy"), folder / "sft", rank=2, seed=1)
    reward = fine_tune(load_reward_model(str(sft), new_head_seed=0), folder / "reward", rank=3, seed=2)
    policy = fine_tune(load_chat_model("toy"), folder / "policy", rank=4, seed=3)
    last = fine_tune(load_chat_model("toy"), folder / "last", rank=2, seed=4, last_layers=1)
    return {"sft": sft, "reward": reward, "policy": policy, "last": last}


def hidden(decoder: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return decoder(IDS).last_hidden_state


def on_policy(runs: dict[str, Path], target: str = "reward") -> tuple[LoadedModel, nn.Module, Adapter]:
    """The policy, and a decoder on its weights that is to be the target's."""
    policy = load_chat_model(str(runs["policy"]))
    change = saved_adapter(runs[target]) + -saved_adapter(runs["policy"])
    decoder = sharing_copy(policy.model.get_decoder())
    attach_frozen(decoder, change)
    return policy, decoder, change


def load_chat(runs: dict[str, Path], name: str) -> LoadedModel:
    return load_reward_model(str(runs[name])) if name == "reward" else load_chat_model(str(runs[name]))


@pytest.mark.parametrize("name", ["sft", "policy", "last"])
def test_peft_loads_the_adapter_on_the_model_that_it_belongs_on(runs, name):
    base = AutoModelForCausalLM.from_pretrained(model_folder("toy"))
    found = PeftModel.from_pretrained(base, runs[name] / "adapter")
    expected = load_chat_model(str(runs[name])).model
    torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, atol=2e-5, rtol=1e-4)
    assert (load_chat_model("toy").model(IDS).logits - expected(IDS).logits).abs().max() > 0.01


def test_peft_loads_a_reward_models_adapter_of_two_stages_with_its_head(runs):
    base = AutoModelForSequenceClassification.from_pretrained(model_folder("toy"), num_labels=1)
    found = PeftModel.from_pretrained(base, runs["reward"] / "adapter")
    found.config.pad_token_id = 0
    expected = load_reward_model(str(runs["reward"])).model
    torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_peft_loads_the_adapter_where_the_decoder_has_another_name(tmp_path):
    """GPT-NeoX calls it `gpt_neox`, most models `model`."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    base = GPTNeoXForCausalLM(config).eval()
    layer = "layers.1.attention.query_key_value"
    change = Adapter("b", {layer: (torch.randn(2, 16), torch.randn(48, 2))})
    assert decoder_prefix(base) == "gpt_neox."
    write_adapter(change, tmp_path / "adapter", base="base", decoder=decoder_prefix(base))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (2, 2, {})
    read = read_adapter(tmp_path / "adapter")
    assert read.backbone == "b" and list(read.layers) == [layer]
    expected = copy.deepcopy(base)
    first, second = change.layers[layer]
    expected.gpt_neox.get_submodule(layer).weight += second @ first
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-4)


def test_lora_is_refused_where_no_layer_can_take_it():
    """GPT-2 has a layer of its own for what others do with nn.Linear."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16))
    with pytest.raises(ModelError, match=r"gpt2: LoRA goes on linear layers .* lora\.r=0"):
        add_lora(model, LoraSection(r=2), is_reward_model=False, seed=0)


def test_a_model_trained_in_full_has_no_adapter(runs, tmp_path):
    loaded = load_chat_model(str(runs["sft"]))
    save_model(loaded.model, loaded, tmp_path / "full")
    assert saved_adapter(tmp_path / "full") is None
    assert saved_adapter(model_folder("toy")) is None


def test_one_adapter_minus_another_turns_one_model_into_the_other(runs):
    policy, decoder, change = on_policy(runs)
    assert {len(first) for first, _ in change.layers.values()} == {2 + 3 + 4}
    reward = load_reward_model(str(runs["reward"])).model.get_decoder()
    torch.testing.assert_close(hidden(decoder), hidden(reward), atol=1e-4, rtol=1e-4)
    assert (hidden(policy.model.get_decoder()) - hidden(reward)).abs().max() > 0.01
    assert not any(parameter.requires_grad for name, parameter in decoder.named_parameters() if "frozen" in name)


def test_layers_with_an_adapter_in_one_of_the_models_only(runs):
    _, decoder, _ = on_policy(runs, "last")
    expected = hidden(load_chat(runs, "last").model.get_decoder())
    torch.testing.assert_close(hidden(decoder), expected, atol=1e-4, rtol=1e-4)
    adapter = saved_adapter(runs["last"])
    last = load_chat_model("toy").model.config.num_hidden_layers - 1
    assert adapter.layers and all(name.startswith(f"layers.{last}.") for name in adapter.layers)


def test_the_copy_holds_no_weights_of_its_own_but_the_adapters(runs):
    policy, decoder, _ = on_policy(runs)
    held = {parameter.data_ptr() for parameter in policy.model.parameters()}
    own = {name for name, parameter in decoder.named_parameters() if parameter.data_ptr() not in held}
    assert own and all(".frozen." in name for name in own)
    assert not any(isinstance(module, LoraLayer) for module in policy.model.modules())


def test_weights_are_told_apart_in_either_type_and_below_adapters(runs):
    toy = load_chat_model("toy")
    own = fingerprint(toy.model.get_decoder().named_parameters())
    assert own == fingerprint(load_chat_model("toy", dtype=torch.bfloat16).model.get_decoder().named_parameters())
    assert own != fingerprint(load_chat_model(str(runs["sft"])).model.get_decoder().named_parameters())
    assert {saved_adapter(runs[name]).backbone for name in ("sft", "reward", "policy")} == {own}
    adapted = add_lora(toy.model, LoraSection(r=2), is_reward_model=False, seed=0)
    assert own == fingerprint(adapted.get_base_model().get_decoder().named_parameters())


def test_adapters_on_different_weights_do_not_add_up():
    with pytest.raises(ValueError, match="different weights"):
        Adapter("a", {}) + Adapter("b", {})


@pytest.mark.parametrize("last_layers", [None, 1])
def test_an_adapter_in_training_goes_on_top_of_the_frozen_one(runs, last_layers):
    policy, decoder, _ = on_policy(runs)
    reward = load_reward_model(str(runs["reward"]))
    expected = hidden(reward.model.get_decoder())
    set_decoder(reward.model, decoder)
    assert reward.model.get_decoder() is decoder
    head = reward.model.score.weight.clone()
    lora = LoraSection(r=2, last_layers=last_layers)
    critic = add_lora(sharing_copy(reward.model), lora, is_reward_model=True, seed=0)
    keep_frozen_active(critic)
    torch.testing.assert_close(hidden(critic.get_base_model().get_decoder()), expected, atol=1e-4, rtol=1e-4)

    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    layers = policy.model.config.num_hidden_layers if last_layers is None else last_layers
    assert len(trained) == 2 * layers * 7 + 1 and all(".default." in name for name in trained)
    critic.get_base_model().get_decoder()(IDS).last_hidden_state.square().sum().backward()
    grads = [parameter.grad for name, parameter in critic.named_parameters() if "lora_B.default" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    # The reward model that it was copied from is not trained along, its head neither.
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    torch.testing.assert_close(hidden(decoder), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(reward.model.score.weight, head)


def test_linear_layers_are_those_that_adapters_go_on_with_and_without_one(runs):
    _, decoder, _ = on_policy(runs)
    plain = list(linear_layers(load_chat_model("toy").model.get_decoder()))
    assert list(linear_layers(decoder)) == plain and len(plain) == 7 * decoder.config.num_hidden_layers
