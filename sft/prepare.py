"""From the files of a configuration to encoded dialogues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment.chat import ChatFormat
from alignment.data import SourceReport, load_dialogues, pick
from alignment.errors import DataError
from alignment.headlines import by_part
from alignment.model_folders import check_is_chat_model, load_chat_of
from alignment.training import num_steps
from sft.config import SFTConfig, SFTData
from sft.examples import Examples, make_examples


@dataclass(frozen=True)
class PreparedDialogues:
    """Dialogues to train on and to measure with.

    Attributes:
        chat: the format that they are encoded in.
        train: encoded dialogues in the order of sources and rows.
        valid: the same, held out.
        max_length: tokens to which rows were kept.
        sources: a report for each file read.
        left_out: rows left out (or cut) by part and reason, without zeros, for whoever reads the result.
    """

    chat: ChatFormat
    train: Examples
    valid: Examples
    max_length: int
    sources: list[SourceReport]
    left_out: dict[str, dict[str, int]]


def prepare_dialogues(config: SFTConfig) -> PreparedDialogues:
    """Loads, draws, limits and encodes the dialogues that a configuration names; no weights are loaded.

    Raises:
        DataError: bad rows, or no dialogue left to train on.
        ModelError: the model is none that chats.
    """
    data, seed = config.data, config.run.seed
    train_data = load_dialogues(data.train, on_error=data.on_error)
    valid_data = load_dialogues(data.valid, on_error=data.on_error)
    check_is_chat_model(config.model.path)
    chat, context_length = load_chat_of(config.model.path, config.model.chat_template)
    max_length = min(data.max_length, context_length)
    limits = {"max_length": max_length, "overlong": data.overlong, "on_error": data.on_error}
    by_source, at_most = train_data.by_source().items(), data.max_rows_of
    rows = [row for name, found in by_source for row in pick(found, at_most.get(name), seed)]
    train = make_examples(chat, pick(rows, data.max_rows, seed), **limits)
    valid = make_examples(chat, pick(valid_data.rows, data.max_valid_rows, seed), **limits)
    left_out = {"train": train.left_out(train_data.sources), "valid": valid.left_out(valid_data.sources)}
    if not train.encoded:
        raise DataError(_nothing_left(left_out["train"], data, context_length))
    return PreparedDialogues(chat, train, valid, max_length, [*train_data.sources, *valid_data.sources], left_out)


def check(config: SFTConfig) -> str:
    """What `align sft --dry-run` says: reads and encodes every row, loads no weights, writes nothing."""
    prepared = prepare_dialogues(config)
    count = len(prepared.train.encoded)
    steps, num_valid = num_steps(count, config.train), len(prepared.valid.encoded)
    return f"{count} dialogues, {steps} steps; {num_valid} held-out dialogues.{by_part(prepared.left_out)}"


def counts(examples: Examples) -> dict[str, Any]:
    """For the manifest: dialogues kept, cut and left out."""
    return {
        "rows": len(examples.encoded),
        "history_cut": examples.cut,
        "answers_cut": examples.answers_cut,
        "dropped": examples.dropped,
    }


def _nothing_left(left_out: Mapping[str, int], data: SFTData, context_length: int) -> str:
    """Why no dialogue can be trained on."""
    limit = f"{data.max_length} tokens, data.max_length"
    if context_length < data.max_length:
        limit = f"{context_length} tokens, the model's context"
    remedies = {
        "too_long": f"{'' if data.overlong == 'drop' else 'even without their older turns '}over {limit}",
        "refused_by_chat_format": 'the chat format refuses their text: see "align data preview"',
        "unreadable": 'bad rows were skipped: see "align data check"',
    }
    reasons = [f"{left_out[name]} {name} ({why})" for name, why in remedies.items() if left_out.get(name)]
    return f"data.train: no dialogue is left to train on: {'; '.join(reasons)}."
