"""The toy model: a tiny random Llama with a byte-level tokenizer, written as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.distributed import save_alone

# One control token opens a turn and one ends it, so that a row of the toy task has some twenty tokens.
CONTROL_TOKENS = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
TOY_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_toy_model(folder: Path) -> None:
    """Writes model and tokenizer, the same bytes every time."""
    tokenizer = make_toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    save_alone(model, folder)
    tokenizer.save_pretrained(folder)


def make_toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, and the control tokens. A turn ends with `<|im_end|>`; `</s>` is end of sequence.

    `<|im_start|>` is there for `model.chat_template=chatml`.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TOY_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
