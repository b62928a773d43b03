"""Models in and out: pad tokens, adapters, and what is saved."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from merging import merged_copy, share_kept, small_change
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen3NextConfig,
    xLSTMConfig,
)

from alignment import models
from alignment.chat_formats import CHATML
from alignment.config import LoraSection
from alignment.errors import ModelError
from alignment.logprobs import branch_scores, response_logprobs
from alignment.manifests import weights_sha256
from alignment.model_checks import reach_of
from alignment.model_folders import check_is_chat_model, load_chat, model_context
from alignment.models import add_lora, load_chat_model, load_reward_model, rounded_copy, save_model
from alignment.prefix_batch import Branch, Tree, collate
from alignment.sampling import SamplingParams, torch_engine
from alignment.sampling.torch_engine import TorchSampler
from reward_models.score import Scorer

BATCH = collate([[Tree([5, 6, 7], [Branch([8, 9, 10]), Branch([11])])]])
TINY = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DEEPSEEK = {
    "intermediate_size": 16, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2,
}  # fmt: skip
GEMMA = {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8}


def save_tokenizer(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_a_safe_pad_token_is_kept(make_tokenizer, tmp_path):
    folder = save_tokenizer(make_tokenizer(template=CHATML), tmp_path)
    assert load_chat(folder).tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|im_start|>", None])
def test_a_pad_token_that_stands_in_dialogues_is_replaced(pad, make_tokenizer, tmp_path):
    tokenizer = load_chat(save_tokenizer(make_tokenizer(template=CHATML, pad=pad), tmp_path)).tokenizer
    assert tokenizer.pad_token in ("<|endoftext|>", "<pad>")


def test_the_pad_token_is_chosen_for_the_template_that_is_used(make_tokenizer, tmp_path):
    """The tokenizer's own template would leave <|endoftext|> free; the one asked for ends turns with it."""
    tokenizer = make_tokenizer(template=CHATML, pad="<|endoftext|>")
    template = tmp_path / "own.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    chat = load_chat(save_tokenizer(tokenizer, tmp_path / "model"), str(template))
    assert chat.end_of_turn_id == 0
    assert chat.tokenizer.pad_token_id not in (0, chat.tokenizer.eos_token_id)


def test_a_tokenizer_with_no_token_to_spare_is_refused(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(("<|im_start|>", "<|im_end|>"), template=CHATML, pad="<|im_end|>")
    with pytest.raises(ModelError, match="no control token to pad with"):
        load_chat(save_tokenizer(tokenizer, tmp_path))


def test_a_template_that_is_missing_is_told_with_the_model(make_tokenizer, tmp_path):
    folder = save_tokenizer(make_tokenizer(), tmp_path / "base")
    with pytest.raises(ModelError, match=r"base: the tokenizer has no chat template\. Set model\.chat_template"):
        load_chat(folder)


def with_adapters(model, *, is_reward_model, **lora):
    adapted = add_lora(model, LoraSection(r=4, alpha=8, **lora), is_reward_model=is_reward_model, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts at zero: a merge that forgets them would not show
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted


def saved_reward_model(folder):
    loaded = load_reward_model("toy", new_head_seed=0)
    save_model(loaded.model, loaded, folder)
    return folder / "model.safetensors"


def saved_chat_model(folder):
    loaded = load_chat_model("toy")
    save_model(loaded.model, loaded, folder)
    return folder / "model.safetensors"


def saved_config(config, folder):
    """A folder without weights."""
    config.save_pretrained(folder)
    load_chat_model("toy").tokenizer.save_pretrained(folder)
    return str(folder)


def saved_random(config, folder):
    """A model of this kind with random weights."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_chat_model("toy").tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_new_reward_model_is_the_chat_model_with_a_drawn_head():
    """Stiennon et al. 2020: variance 1 / (hidden + 1). The deviation of 64 drawn numbers is within a third of it."""
    backbone = load_chat_model("toy").model.get_decoder().state_dict()
    reward = load_reward_model("toy", new_head_seed=0).model
    for name, weights in reward.get_decoder().state_dict().items():
        assert torch.equal(weights, backbone[name]), name
    head = reward.score.weight
    assert reward.score.bias is None and head.shape == (1, reward.config.hidden_size) and head.dtype == torch.float32
    assert head.std().item() == pytest.approx((reward.config.hidden_size + 1) ** -0.5, rel=1 / 3)
    assert not torch.equal(head, load_reward_model("toy", new_head_seed=1).model.score.weight)


def test_a_reward_model_without_its_head_is_refused(tmp_path):
    """transformers would draw a fresh one and only warn."""
    file = saved_reward_model(tmp_path / "rm")
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"rm: 1 of its weights are in none of its files \(score\.weight\)"):
        load_reward_model(str(tmp_path / "rm"))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_reward_model_is_no_policy(tmp_path, is_tied):
    """Where the output matrix is the embedding, transformers would take the backbone without a word."""
    config = saved_reward_model(tmp_path / "rm").with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": is_tied}))
    with pytest.raises(ModelError, match=r"rm: is a reward model\. Name a chat model\."):
        load_chat_model(str(tmp_path / "rm"))


@pytest.mark.parametrize("load", [load_chat_model, partial(load_reward_model, new_head_seed=0), load_reward_model])
def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(tmp_path, load):
    first = saved_reward_model if load is load_reward_model else saved_chat_model
    folder = first(tmp_path / "m").parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(1000)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"m: the tokenizer has \d+ tokens, the model's embedding only \d+\. Put"):
        load(str(folder))


@pytest.mark.parametrize(
    ("config", "has"),
    [
        (PhiConfig(**TINY, intermediate_size=16), "a bias in its output layer"),
        (GraniteConfig(**TINY, intermediate_size=16, logits_scaling=8.0), "logits_scaling"),
        (CohereConfig(**TINY, intermediate_size=16, bos_token_id=1, eos_token_id=2), "logit_scale"),
        (Gemma3TextConfig(**TINY, **GEMMA, final_logit_softcapping=30.0), "final_logit_softcapping"),
    ],
)
def test_a_model_whose_logits_are_more_than_a_product_is_refused(config, has, tmp_path):
    """`response_logprobs` computes nothing but that product: losses would be wrong without a word."""
    with pytest.raises(ModelError, match=f"m: a .* with {has}, which is not supported"):
        load_chat_model(saved_random(config, tmp_path / "m"))


def test_a_setting_that_leaves_logits_as_they_are_is_no_hindrance(tmp_path):
    load_chat_model(saved_random(GraniteConfig(**TINY, intermediate_size=16, logits_scaling=1.0), tmp_path / "m"))


@pytest.mark.parametrize(
    ("config", "load"),
    [
        (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), load_chat_model),
        (xLSTMConfig(), load_chat_model),
        (Qwen3NextConfig(), partial(load_reward_model, new_head_seed=0)),
    ],
)
def test_recurrent_and_convolutional_layers_are_refused(config, load, tmp_path):
    """They read the responses before theirs in a row. It is told before weights are read: there are none."""
    with pytest.raises(ModelError, match=r"m: a .* has layers other than full or sliding-window attention"):
        load(saved_config(config, tmp_path / "m"))


@pytest.mark.parametrize("config", [FalconConfig(), GPTJConfig(), GPTNeoConfig(), BloomConfig()])
@pytest.mark.parametrize("load", [load_chat_model, partial(load_reward_model, new_head_seed=0)])
def test_an_attention_that_cannot_be_exchanged_is_refused(config, load, tmp_path):
    with pytest.raises(ModelError, match=r"m: the attention of a .* cannot take our masks"):
        load(saved_config(config, tmp_path / "m"))


@pytest.fixture
def text_and_images(tmp_path):
    """A random Gemma 3 as its larger sizes are: the settings of the language model are one level down."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**TINY, **GEMMA, "sliding_window": 6, "max_position_embeddings": 99},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    return saved_random(config, tmp_path / "m")


def test_a_model_of_text_and_images_is_trained_as_its_language_model(text_and_images):
    assert model_context(text_and_images) == 99
    loaded = load_chat_model(text_and_images)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    expected = loaded.model(input_ids=ids).logits.log_softmax(-1)[0, [2, 3, 4], [8, 9, 10]]
    found = response_logprobs(loaded.model, collate([[Tree([5, 6, 7], [Branch([8, 9, 10])])]]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="sees 6 tokens back, and a row has 7"):
        response_logprobs(loaded.model, collate([[Tree([5, 6, 7], [Branch([8, 9, 10, 11])])]]))
    reward = load_reward_model(text_and_images, new_head_seed=0)
    assert reward.model.config.text_config.pad_token_id == reward.tokenizer.pad_token_id
    names = [name for name, _ in with_adapters(reward.model, is_reward_model=True, last_layers=1).named_parameters()]
    assert any("language_model.layers.1." in name for name in names if "lora_" in name)
    assert not any("language_model.layers.0." in name for name in names if "lora_" in name)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_sees_images_is_not_trained(text_and_images, rank):
    """No text reaches it, and several processes would wait for its gradients."""
    for loaded, head in (
        (load_chat_model(text_and_images), "lm_head"),
        (load_reward_model(text_and_images, new_head_seed=0), "score"),
    ):
        model = add_lora(loaded.model, LoraSection(r=rank), is_reward_model=head == "score", seed=0)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert trained and not any("vision" in name or "projector" in name for name in trained)
        batch = collate([[Tree([5, 6], [Branch([8])])]])
        values = branch_scores(model, batch) if head == "score" else response_logprobs(model, batch)
        values.sum().backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_a_model_of_text_and_images_with_adapters_is_loaded_again_in_bfloat16(text_and_images, tmp_path):
    """Its weights have other names in memory than in files."""
    loaded = load_chat_model(text_and_images, dtype=torch.bfloat16)
    save_model(with_adapters(loaded.model, is_reward_model=False), loaded, tmp_path / "tuned")
    batch = collate([[Tree([5, 6, 7], [Branch([8])])]])
    expected = response_logprobs(load_chat_model(str(tmp_path / "tuned")).model, batch)
    found = load_chat_model(str(tmp_path / "tuned"), dtype=torch.bfloat16, keep_adapter=True)
    assert any("lora_" in name for name, _ in found.model.named_parameters())
    torch.testing.assert_close(response_logprobs(found.model, batch), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize(
    ("config", "has"),
    [
        (DogeConfig(**TINY, intermediate_size=16, num_key_value_heads=1), "a mask of its own"),
        (DeepseekV3Config(**TINY, **DEEPSEEK), "values of another width than its keys"),
    ],
)
def test_an_attention_that_ours_does_not_compute_is_refused(config, has, tmp_path):
    model = load_chat_model(saved_random(config, tmp_path / "m")).model
    with pytest.raises(ModelError, match=f"its attention has {has}, which is not supported"):
        response_logprobs(model, BATCH)
    with pytest.raises(ModelError, match=f"its attention has {has}, which is not supported"):
        TorchSampler(model, stop_ids=[]).sample([[5, 6, 7]], SamplingParams(max_new_tokens=2))


def test_dialogues_beyond_the_length_that_changes_all_positions_are_refused(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 6,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
    extra = {"intermediate_size": 16, "max_position_embeddings": 99, "pad_token_id": 0, "bos_token_id": 1}
    config = Phi3Config(**TINY, **extra, eos_token_id=2, rope_parameters=rope, original_max_position_embeddings=6)
    for window, tokens in ((None, 6), (4, 4), (9, 6)):
        config.sliding_window = window
        assert reach_of(config).tokens == tokens, "the shorter of the two"
    config.sliding_window = None
    model = load_chat_model(saved_random(config, tmp_path / "m")).model
    assert len(response_logprobs(model, collate([[Tree([5, 6, 7], [Branch([8, 9, 10]), Branch([8, 9])])]]))) == 5
    with pytest.raises(ModelError, match="one of more than 6 tokens changes the positions of all beside it, and a row"):
        response_logprobs(model, collate([[Tree([5, 6, 7], [Branch([8, 9, 10, 11])])]]))
    with pytest.raises(ModelError, match=r"more than 6 tokens changes .*, and prompt and response may have 7"):
        TorchSampler(model, stop_ids=[]).sample([[5, 6, 7]], SamplingParams(max_new_tokens=4))


def test_a_mixture_of_experts_that_asks_for_its_own_loss_is_used_without(tmp_path):
    sizes = {"intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    folder = saved_random(MixtralConfig(**TINY, **sizes, output_router_logits=True), tmp_path / "m")
    model = load_chat_model(folder).model
    assert torch.isfinite(response_logprobs(model, BATCH)).all()
    assert TorchSampler(model, stop_ids=[]).sample([[5, 6, 7]], SamplingParams(max_new_tokens=2))


def test_sampling_flags_without_do_sample_do_not_keep_a_model_from_being_saved(tmp_path):
    file = saved_chat_model(tmp_path / "m").with_name("generation_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.9, "top_p": 0.6, "pad_token_id": 3}))
    loaded = load_chat_model(str(tmp_path / "m"))
    save_model(loaded.model, loaded, tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)


def test_what_is_invalid_otherwise_is_left_out_of_what_is_saved(tmp_path, caplog):
    file = saved_chat_model(tmp_path / "m").with_name("generation_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"length_penalty": 2.0}))
    loaded = load_chat_model(str(tmp_path / "m"))
    assert "m: its generation_config.json is left out, for it is invalid" in caplog.text
    save_model(loaded.model, loaded, tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert "length_penalty" not in saved and not saved.get("do_sample")
    assert saved["eos_token_id"] == loaded.chat.end_of_turn_id


def test_a_model_of_text_and_images_is_sampled_as_its_language_model(text_and_images, monkeypatch):
    model = load_chat_model(text_and_images).model
    monkeypatch.setattr(torch_engine, "free_memory", lambda _: 10**6)
    [[sample]] = TorchSampler(model, stop_ids=[]).sample([[5, 6, 7]], SamplingParams(temperature=0, max_new_tokens=3))
    expected = response_logprobs(model, collate([[Tree([5, 6, 7], [Branch(sample.token_ids)])]]))
    assert sample.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(ModelError, match="sees 6 tokens back, and prompt and response may have 7"):
        TorchSampler(model, stop_ids=[]).sample([[5, 6, 7]], SamplingParams(max_new_tokens=4))


@pytest.mark.parametrize("damage", ["cut off", "another size"])
def test_weights_that_cannot_be_read_are_named(damage, tmp_path):
    file = saved_reward_model(tmp_path / "rm")
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        weights = load_file(file)
        weights["score.weight"] = torch.zeros(1, 7)
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="rm: its weights cannot be read"):
        load_reward_model(str(tmp_path / "rm"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": "', b'{"a": "\xe9"}', b"[1]"])
def test_a_damaged_json_file_is_told_with_its_model(name, content, tmp_path):
    file = saved_chat_model(tmp_path / "m").with_name(name)
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"m: its tokenizer cannot be loaded \(.+\)\. If a file is damaged, copy the"):
        load_chat_model(str(file.parent))
    if name == "config.json":
        with pytest.raises(ModelError, match=r"m: its config\.json cannot be read \(.+\)\. If a file is damaged, copy"):
            check_is_chat_model(str(file.parent))


@pytest.mark.parametrize("content", [b"[1]", b"{}"])
def test_a_damaged_list_of_the_files_of_a_model_is_told(content, tmp_path):
    loaded = load_chat_model("toy")
    loaded.model.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    loaded.tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match="m: its weights cannot be read"):
        load_chat_model(str(tmp_path / "m"))


def test_a_damaged_adapter_is_named(save_tuned, tmp_path):
    folder = save_tuned(load_chat_model("toy"), tmp_path / "m", rank=2, seed=1)
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ModelError, match=r"adapter_model\.safetensors: cannot be read .+ Copy the model's folder again"
    ):
        load_chat_model(str(folder), dtype=torch.bfloat16, keep_adapter=True)


def test_a_copy_to_sample_from_rounds_weights_and_not_positions():
    model = load_chat_model("toy").model
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    copied = rounded_copy(model, torch.bfloat16)
    assert {weight.dtype for weight in copied.parameters()} == {torch.bfloat16} and not copied.training
    buffers = dict(copied.named_buffers())
    assert any(name.endswith("inv_freq") for name in buffers)
    expected = dict(load_chat_model("toy", dtype=torch.bfloat16).model.named_buffers())
    assert all(buffer.dtype == torch.float32 and buffer.equal(expected[name]) for name, buffer in buffers.items())
    for weight in copied.parameters():
        weight.data.zero_()
    assert all(weight.equal(weights[name]) for name, weight in model.named_parameters())  # a copy


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (GPTNeoXConfig(**TINY, hidden_dropout=0.5, attention_dropout=0.5), "hidden_dropout"),
        (OPTConfig(**TINY, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5), "dropout"),
        (OPTConfig(**TINY, ffn_dim=16, word_embed_proj_dim=16, dropout=0.0, layerdrop=0.5), "layerdrop"),
    ],
)
def test_a_models_own_dropout_is_off_and_in_its_file_as_it_was(config, rate, tmp_path):
    """GPT-NeoX has modules for it, and as OPT calls the function with a rate of its own."""
    loaded = load_chat_model(saved_random(config, tmp_path / "m"))
    loaded.model.train()
    first = response_logprobs(loaded.model, BATCH)
    assert all(response_logprobs(loaded.model, BATCH).equal(first) for _ in range(5))
    save_model(loaded.model, loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[rate] == 0.5


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_small_change_by_lora_is_still_there_in_bfloat16(tmp_path, is_sharded):
    loaded = load_chat_model("toy", dtype=torch.bfloat16)
    before = copy.deepcopy(loaded.model)
    adapted = with_adapters(loaded.model, is_reward_model=False)
    small_change(adapted, 2e-5)
    save_model(adapted, loaded, tmp_path / "one")
    if is_sharded:
        model, folder = load_chat_model(str(tmp_path / "one")).model, tmp_path / "one"
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="40KB")
        assert (folder / "model.safetensors.index.json").is_file()
    found = load_chat_model(str(tmp_path / "one"), dtype=torch.bfloat16, keep_adapter=True).model
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}
    assert share_kept(found, before, adapted.get_base_model()) == pytest.approx(1, abs=0.02)
    merged = load_chat_model(str(tmp_path / "one"), dtype=torch.bfloat16).model
    assert share_kept(merged, before, adapted.get_base_model()) < 0.6
    below = {name.replace(".base_layer", ""): weight for name, weight in found.named_parameters()}
    assert all(torch.equal(below[name], weight) for name, weight in before.named_parameters())
    whole = load_chat_model(str(tmp_path / "one"), keep_adapter=True).model  # float32 has room for it
    assert share_kept(whole, before, adapted.get_base_model()) == pytest.approx(1, abs=1e-3)
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in before.named_parameters()]


def test_a_small_change_on_top_of_an_earlier_one_is_still_there_in_bfloat16(tmp_path):
    first = load_chat_model("toy", dtype=torch.bfloat16)
    adapted = with_adapters(first.model, is_reward_model=False)
    small_change(adapted, 0.02)
    save_model(adapted, first, tmp_path / "first")
    second = load_chat_model(str(tmp_path / "first"), dtype=torch.bfloat16)
    again = add_lora(second.model, LoraSection(r=2, alpha=4), is_reward_model=False, seed=5)
    start = merged_copy(again)
    small_change(again, 2e-4)
    save_model(again, second, tmp_path / "second")
    found = load_chat_model(str(tmp_path / "second"), dtype=torch.bfloat16, keep_adapter=True).model
    assert share_kept(found, start, again.get_base_model()) == pytest.approx(1, abs=0.1)
    assert next(m for n, m in found.named_modules() if n.endswith("lora_A.frozen")).weight.shape[0] == 4 + 2


@torch.no_grad()
def test_a_scorer_in_bfloat16_keeps_what_lora_added(tmp_path):
    loaded = load_reward_model("toy", dtype=torch.bfloat16, new_head_seed=3)
    adapted = with_adapters(loaded.model, is_reward_model=True)
    small_change(adapted, 1e-3)
    expected = branch_scores(adapted, BATCH)
    save_model(adapted, loaded, tmp_path / "rm")
    apart = branch_scores(Scorer.load(str(tmp_path / "rm"), dtype="bfloat16").model, BATCH)
    torch.testing.assert_close(apart, expected, atol=1e-4, rtol=0)
    merged = branch_scores(load_reward_model(str(tmp_path / "rm"), dtype=torch.bfloat16).model, BATCH)
    assert (merged - expected).abs().max() > 10 * (apart - expected).abs().max()


@torch.no_grad()
def test_a_policy_with_adapters_is_saved_merged(tmp_path):
    loaded = load_chat_model("toy")
    plain = response_logprobs(loaded.model, BATCH)
    adapted = with_adapters(loaded.model, is_reward_model=False)
    expected = response_logprobs(adapted, BATCH)
    save_model(adapted, loaded, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(response_logprobs(found, BATCH), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.1
    assert found.config.pad_token_id == loaded.tokenizer.pad_token_id


@torch.no_grad()
def test_a_reward_model_with_adapters_is_saved_merged_with_its_head(tmp_path):
    loaded = load_reward_model("toy", new_head_seed=3)
    plain = branch_scores(loaded.model, BATCH)
    adapted = with_adapters(loaded.model, is_reward_model=True)
    expected = branch_scores(adapted, BATCH)
    save_model(adapted, loaded, tmp_path / "model")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    rows = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, *[loaded.tokenizer.pad_token_id] * 2]])
    torch.testing.assert_close(found(input_ids=rows).logits[:, 0], expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["lm", "lm in bfloat16", "tied", "score in bfloat16", "full"])
def test_what_is_saved_is_what_peft_merges_in_float32(kind, tmp_path):
    """Bit for bit; and the model that was saved trains on as it was."""
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    is_reward_model = kind.startswith("score")
    load = partial(load_reward_model, new_head_seed=3) if is_reward_model else load_chat_model
    loaded = load("toy", dtype=dtype)
    if kind == "tied":
        loaded.model.config.tie_word_embeddings = True
        loaded = replace(loaded, model=LlamaForCausalLM(loaded.model.config))
    lora = {} if kind == "full" else {"is_reward_model": is_reward_model}
    model = with_adapters(loaded.model, **lora) if lora else loaded.model
    expected = copy.deepcopy(model).float()
    expected = expected.merge_and_unload() if lora else expected
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_model(model, loaded, tmp_path / "model")

    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == {name for name, _ in expected.named_parameters()}
    assert all(weight.equal(expected.get_parameter(name)) for name, weight in found.items())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", [type(expected).__name__])
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert ("lm_head.weight" in found) == (kind in ("lm", "lm in bfloat16", "full"))


@pytest.mark.parametrize("load", [load_chat_model, partial(load_reward_model, new_head_seed=3)])
def test_a_process_that_gets_its_weights_from_the_main_one_reads_none(load, monkeypatch):
    full = load("toy", dtype=torch.bfloat16).model
    monkeypatch.setattr(models, "gets_weights_later", lambda: True)
    again = load("toy", dtype=torch.bfloat16).model  # to sample from, or to score with
    assert all(weight.equal(again.get_parameter(name)) for name, weight in full.named_parameters())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    empty = load("toy", dtype=torch.bfloat16, for_training=True).model
    for name, weight in full.named_parameters():
        twin = empty.get_parameter(name)
        assert (twin.shape, twin.dtype, twin.device.type) == (weight.shape, weight.dtype, "cpu")
    for name, buffer in full.named_buffers():
        assert buffer.equal(empty.get_buffer(name)), name


def test_adapters_on_the_last_layers_leave_the_first_alone():
    model = load_chat_model("toy").model
    count = model.config.num_hidden_layers
    names = [name for name, _ in with_adapters(model, is_reward_model=False, last_layers=1).named_parameters()]
    adapted = {int(name.split(".layers.")[1].split(".")[0]) for name in names if "lora_" in name}
    assert adapted == {count - 1} and count > 1


def test_rank_zero_trains_the_model_itself():
    model = load_chat_model("toy").model
    assert add_lora(model, LoraSection(r=0), is_reward_model=False, seed=0) is model


def test_the_digest_of_a_sharded_model_is_of_all_its_shards(tmp_path):
    model = load_chat_model("toy").model
    digests = set()
    for change in ("none", "first", "last"):
        folder = tmp_path / change
        model.save_pretrained(folder, max_shard_size="20KB")
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 1
        if change != "none":
            shards[0 if change == "first" else -1].write_bytes(b"other")
        digests.add(weights_sha256(folder))
    assert len(digests) == 3
