"""Linear layers with adapters: peft's own numbers, and under autocast as near to float32's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from alignment.config import LoraSection
from alignment.low_rank import LowRankLinear, held_factors, use_low_rank_linear
from alignment.models import add_lora, load_chat_model

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def layers(*, bias: bool = False, dropout: float = 0.0, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """A layer of ours and the same one of peft's, each with a frozen adapter and one in training."""
    made = []
    for use in (use_low_rank_linear, lambda config: config):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(6, 5, bias=bias)}).requires_grad_(False).to(dtype)
        for name, rank in (("frozen", 3), ("default", 2)):
            config = LoraConfig(r=rank, lora_alpha=4, lora_dropout=dropout, target_modules=["layer"])
            inject_adapter_in_model(use(config), model, adapter_name=name)
            nn.init.normal_(model["layer"].lora_B[name].weight)
        model["layer"].set_adapter(["frozen", "default"])
        for part in (model["layer"].lora_A, model["layer"].lora_B):
            part["frozen"].requires_grad_(False)
            part["default"].float()
        made.append(model["layer"])
    ours, theirs = made
    assert type(ours) is LowRankLinear and type(theirs) is Linear
    return ours, theirs


def output_and_gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    trained = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
    assert len(trained) == 2 and not any(grad is None for grad in trained)
    return [y.detach(), x.grad, *trained]


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 0, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_pefts(shape, bias):
    ours, theirs = layers(bias=bias)
    x = torch.randn(shape)
    for found, expected in zip(output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_adapter_of_two_or_none_is_used():
    ours, theirs = layers()
    x = torch.randn(4, 6)
    for layer in (ours, theirs):
        layer.set_adapter("frozen")
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), ours.base_layer(x))
    ours.enable_adapters(enabled=False)
    assert torch.equal(ours(x), ours.base_layer(x))


def test_a_merged_layer_and_dropout_are_left_to_peft():
    x = torch.randn(4, 6)
    ours, _ = layers()
    expected = ours(x)
    ours.merge()
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    found = []
    for layer in layers(dropout=0.5):
        layer.train()
        torch.manual_seed(3)
        found.append(layer(x))
    assert torch.equal(*found)


def test_under_autocast_it_is_as_near_to_float32_as_pefts_and_of_the_same_type():
    exact, _ = layers()
    ours, theirs = layers(dtype=torch.bfloat16)
    exact.load_state_dict(ours.state_dict())  # the same rounded weights, computed with in float32
    x = torch.randn(64, 6).bfloat16()
    expected = output_and_gradients(exact, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, of_peft = (output_and_gradients(layer, x) for layer in (ours, theirs))
    for mine, other, true in zip(found, of_peft, expected, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - true).abs().max() <= 1.5 * (other - true).abs().max() + 1e-6
        torch.testing.assert_close(mine.float(), true, atol=0.02 * true.abs().max(), rtol=0.05)


@torch.no_grad()
def test_held_factors_are_those_of_the_weights_in_the_type_of_the_call_until_the_end():
    ours, _ = layers()
    model, x = nn.Sequential(ours), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    plain = model(x)
    with held_factors(model):
        ours.lora_B["default"].weight.add_(1)
        assert torch.equal(model(x), plain)  # put together once
        ours.lora_B["default"].weight.sub_(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x), low, atol=0, rtol=0)
    ours.lora_B["default"].weight.add_(1)
    assert not torch.allclose(model(x), plain)
    rounded, _ = layers(dtype=torch.bfloat16)
    exact = rounded(x)
    with held_factors(rounded):
        assert torch.equal(rounded(x), exact)  # in float32, as the input is


def test_adapters_of_a_model_are_ours():
    model = add_lora(load_chat_model("toy").model, LoraSection(r=2), is_reward_model=False, seed=0)
    kinds = {type(module) for module in model.modules() if isinstance(module, Linear)}
    assert kinds == {LowRankLinear}


def test_nothing_is_made_on_another_device():
    ours, _ = layers()
    y = ours.to("meta")(torch.empty(4, 6, device="meta", requires_grad=True))
    assert y.device.type == "meta"
    y.sum().backward()
