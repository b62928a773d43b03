"""What a model's folder says without its weights: which kind of model, its context, tokenizer and chat format."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from alignment.chat import ChatFormat
from alignment.chat_formats import chat_format
from alignment.demo_model import DEMO_MODEL, make_demo_model
from alignment.errors import ModelError
from alignment.sources import cached_folder, find_model
from alignment.toy import TOY_VERSION
from alignment.toy_model import make_toy_model

COPY_AGAIN = "If a file is damaged, copy the folder again."


def model_folder(name: str) -> Path | str:
    """A folder (or Hub id) that `from_pretrained` takes; built-in models are put into the cache first."""
    found = find_model(name)
    if found == DEMO_MODEL:
        return cached_folder(DEMO_MODEL, make_demo_model)
    if found == "toy":
        return cached_folder(f"toy-model-{TOY_VERSION}", make_toy_model)
    return found


def load_chat_of(path: str, chat_template: str = "auto") -> tuple[ChatFormat, int]:
    """The chat format of a model by any of its names, and the tokens its context holds; no weights are loaded."""
    folder = model_folder(path)
    chat = load_chat(folder, chat_template)
    return chat, context_length(read_config(folder, path))


def load_chat(folder: Path | str, chat_template: str = "auto") -> ChatFormat:
    """The chat format of a model folder; its tokenizer has a pad token that neither a text nor a turn's end has."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # there is no telling what a damaged file has transformers and tokenizers raise
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({error}). {COPY_AGAIN}") from error
    tokenizer.padding_side = "right"
    try:
        chat = chat_format(tokenizer, chat_template)
        if not _pads_safely(chat):
            tokenizer.pad_token = _spare_token(chat)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    return chat


def context_length(config: PreTrainedConfig) -> int:
    """Tokens a model's context holds; beyond all data where its configuration names no end."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", sys.maxsize)


def model_context(path: str) -> int:
    """Tokens that a model's context holds; no weights are loaded."""
    return context_length(read_config(model_folder(path), path))


def reward_model_context(path: str) -> int:
    """Tokens that a reward model's context holds; no weights are loaded. Raises ModelError where it is none."""
    config = read_config(model_folder(path), path)
    check_one_score(config, path)
    return context_length(config)


def check_is_chat_model(path: str) -> None:
    """Raises ModelError for a reward model, whose backbone transformers would take and tie an output matrix to."""
    if is_classifier(read_config(model_folder(path), path)):
        raise ModelError(f"{path}: is a reward model. Name a chat model.")


def read_config(folder: Path | str, path: str) -> PreTrainedConfig:
    """The configuration in a folder of `model_folder`. Raises ModelError, with `path`, where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # as in load_chat
        raise ModelError(f"{path}: its config.json cannot be read ({error}). {COPY_AGAIN}") from error


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether it is that of a model with scores, not of one that chats."""
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def check_one_score(config: PreTrainedConfig, path: str) -> None:
    """Raises ModelError where it is not that of a reward model, which has one score."""
    if not is_classifier(config):
        kind = (config.architectures or [""])[0]
        raise ModelError(f'{path}: not a reward model ({kind}). Train one with "align rm", or name its run.')
    if config.num_labels != 1:
        raise ModelError(f"{path}: a classifier with {config.num_labels} outputs. A reward model has one.")


def _pads_safely(chat: ChatFormat) -> bool:
    """Whether the pad token can stand nowhere in a dialogue: a plain classifier reads the last token that is no pad."""
    tokenizer = chat.tokenizer
    ends = (tokenizer.eos_token_id, chat.end_of_turn_id)
    if tokenizer.pad_token is None or tokenizer.pad_token_id in ends:
        return False
    return tokenizer.pad_token not in (tokenizer.chat_template or "")


def _spare_token(chat: ChatFormat) -> str:
    """A control token that neither the template nor the end of a response uses."""
    tokenizer = chat.tokenizer
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)}
    names = [tokenizer.unk_token, *(str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()))]
    for name in names:
        if name and name not in used and name not in (tokenizer.chat_template or ""):
            return name
    raise ModelError(
        "the tokenizer has no control token to pad with. Add one, and a row to the model: docs/troubleshooting.md, "
        "Tokenizer and template."
    )
