"""From the files of a configuration to encoded pairs, with a count of everything that was left out.

Nothing here writes: whatever is wrong with the data shows before a run directory is touched.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.chat import ChatFormat
from alignment.data import Loaded, SourceReport, load_pairs, pick
from alignment.dialogue import PreferencePair, safety_bin
from alignment.errors import DataError
from alignment.headlines import by_part
from alignment.model_folders import load_chat_of
from alignment.training import num_steps
from reward_models.config import MARGIN_TABLES, RewardModelConfig
from reward_models.mixing import mix_rows, rows_to_mix_in
from reward_models.preferences import EncodedPair, apply_veto, encode_pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedPairs:
    """Pairs to train on and to measure with, and what the manifest says of them.

    Attributes:
        train: encoded pairs in the order of sources and rows.
        valid: the same, held out.
        max_length: tokens of prompt and response to which rows were kept.
        sources: a report for each file read.
        notes: for the manifest: for either part rows kept by source and safety bin, and rows left out by reason; for
            each source read to train on, its rows and the `vetoed` among them; how many rows `data.mix` asks of
            `data.mix_in` that are not there.
        left_out: rows left out (or cut) by part and reason, without zeros, for whoever reads the result.
        vetoed: of all pairs read, those whose chosen response alone is labelled unsafe, whatever was done with them;
            of `data.mix_in` where all of it is trained on.
    """

    train: list[EncodedPair]
    valid: list[EncodedPair]
    max_length: int
    sources: list[SourceReport]
    notes: dict[str, Any]
    left_out: dict[str, dict[str, int]]
    vetoed: int


def prepare_pairs(config: RewardModelConfig, chat: ChatFormat, *, context_length: int) -> PreparedPairs:
    """Loads, vetoes, mixes, limits and encodes the pairs that a configuration names.

    Args:
        config: of the stage.
        chat: of the model to train.
        context_length: tokens the model can take; rows are kept to it where `data.max_length` is longer.

    Raises:
        DataError: bad rows, no pair left to train on, or a safety model without a safety label.
    """
    data = config.data
    train_data = load_pairs([*data.train, *data.mix_in], on_error=data.on_error)
    valid_data = load_pairs(data.valid, on_error=data.on_error)
    allowed: dict[str, list[PreferencePair]] = {}
    veto_by_source: dict[str, dict[str, int]] = {}
    for name, rows in train_data.by_source().items():
        allowed[name], count = apply_veto(rows, config.veto)
        veto_by_source[name] = {"rows": len(rows), "vetoed": count}
    read_whole = {*data.train, *(data.mix_in if data.mix == "all" else [])}
    vetoed = sum(veto_by_source[name]["vetoed"] for name in read_whole)
    mixed = mix_rows(
        {name: allowed[name] for name in data.train},
        {name: allowed[name] for name in data.mix_in},
        data.mix,
        seed=config.run.seed,
    )
    mix_shortfall = 0
    if data.mix in ("equal_parts", "90/10"):
        main, other = (sum(len(allowed[name]) for name in names) for names in (data.train, data.mix_in))
        mix_shortfall = max(0, rows_to_mix_in(main, data.mix) - other)
    named = [(name, row) for name, rows in mixed.items() for row in rows]
    named = pick(named, data.max_rows, config.run.seed)
    held_out, held_out_vetoed = apply_veto(valid_data.rows, config.veto)
    held_out = pick(held_out, data.max_valid_rows, config.run.seed)
    max_length = min(data.max_length, context_length)
    train_pairs = [row for _, row in named]
    train, train_left_out = _encode(config, chat, train_pairs, train_data, vetoed, max_length)
    valid, valid_left_out = _encode(config, chat, held_out, valid_data, held_out_vetoed, max_length)
    left_out = {"train": train_left_out, "valid": valid_left_out}
    if not train:
        limit = "data.max_length" if data.max_length <= context_length else "the model's context"
        raise DataError(_nothing_left(train_left_out, f"{limit}, {max_length} tokens"))
    _check_labels(config, train)
    source_of = {id(row): name for name, row in named}
    notes = {
        "max_length": max_length,
        "train": {**_counts(train, config, vetoed), "mix": Counter(source_of[id(pair.pair)] for pair in train)},
        "valid": _counts(valid, config, held_out_vetoed),
        "mix_shortfall": mix_shortfall,
    }
    notes["train"]["veto_by_source"] = veto_by_source
    for part, reasons in left_out.items():
        notes[part]["left_out"] = reasons
    sources = [*train_data.sources, *valid_data.sources]
    return PreparedPairs(train, valid, max_length, sources, notes, left_out, vetoed)


def check(config: RewardModelConfig) -> str:
    """What `align rm --dry-run` says: reads and encodes every row, loads no weights, writes nothing."""
    chat, context_length = load_chat_of(config.model.path, config.model.chat_template)
    pairs = prepare_pairs(config, chat, context_length=context_length)
    steps = num_steps(len(pairs.train), config.train)
    found = f"{len(pairs.train)} pairs, {steps} steps; {len(pairs.valid)} held-out pairs.{by_part(pairs.left_out)}"
    if shortfall := pairs.notes["mix_shortfall"]:
        found += f" data.mix_in has {shortfall} rows too few for {config.data.mix}."
    return found


def warn_of_short_mix(shortfall: int, mix: str) -> None:
    """Equal parts that are not equal."""
    if shortfall:
        logger.warning(
            "data.mix=%s: data.mix_in has %d rows too few for it, and all are taken. Add files of the other aim, or "
            "give weights by source.",
            mix, shortfall,
        )  # fmt: skip


def _encode(
    config: RewardModelConfig,
    chat: ChatFormat,
    pairs: Sequence[PreferencePair],
    data: Loaded[PreferencePair],
    vetoed: int,
    max_length: int,
) -> tuple[list[EncodedPair], dict[str, int]]:
    """The encoded pairs, and counts of those left out or cut by reason."""
    found = encode_pairs(
        chat,
        pairs,
        margins=MARGIN_TABLES[config.margin] if isinstance(config.margin, str) else config.margin,
        unrated_margin=config.unrated_margin,
        max_length=max_length,
        overlong=config.data.overlong,
        on_error=config.data.on_error,
    )
    reasons = {
        "unreadable": sum(sum(source.dropped.values()) for source in data.sources),
        "vetoed": vetoed if config.veto == "drop" else 0,
        **found.dropped,
        "history_cut": found.cut,
    }
    return found.encoded, {name: count for name, count in reasons.items() if count}


def _counts(pairs: Sequence[EncodedPair], config: RewardModelConfig, vetoed: int) -> dict[str, Any]:
    return {
        "rows": len(pairs),
        "safety_bins": dict(Counter(safety_bin(encoded.pair) for encoded in pairs)),
        "veto": {config.veto: vetoed},
    }


def _nothing_left(left_out: Mapping[str, int], limit: str) -> str:
    """Why no pair can be trained on."""
    remedies = {
        "vetoed": 'the safety label has the veto where the chosen response alone is unsafe: see "veto"',
        "too_long": f"one response alone is over {limit}",
        "refused_by_chat_format": 'the chat format refuses their text: see "align data preview"',
        "unreadable": 'bad rows were skipped: see "align data check"',
    }
    reasons = [f"{left_out[name]} {name} ({why})" for name, why in remedies.items() if left_out.get(name)]
    return f"data.train: no pair is left to train on: {'; '.join(reasons) or 'the mix takes none'}."


def _check_labels(config: RewardModelConfig, train: Sequence[EncodedPair]) -> None:
    """The gate reads sigmoid(score) as P(safe), which a safety model learns from labels alone, of both kinds."""
    labels = {label for pair in train for label in (pair.chosen_safe, pair.rejected_safe)} - {None}
    weight = (config.kind == "safety") if config.safety_loss_weight is None else config.safety_loss_weight
    if not weight or len(labels) == 2:
        return
    if labels:
        logger.warning(
            "data.train: all labelled responses are %s, so that every score is pushed to one side: P(safe) tells "
            "nothing apart, and neither does the gate of reject and ppo. Label responses of the other kind, too.",
            "safe" if True in labels else "unsafe",
        )
    elif config.kind == "helpfulness":
        logger.warning("safety_loss_weight=%g: no response of data.train carries a safety label.", weight)
    else:
        raise DataError(
            "data.train: kind=safety, but no response carries a safety label, so sigmoid(score) could not be read as "
            "P(safe). Add chosen_safe and rejected_safe (true or false) to rows that were judged, or set "
            "safety_loss_weight=0 to train on preferences alone."
        )
