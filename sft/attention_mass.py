"""How much of a model's attention goes to an instruction given turns ago (Llama 2 Fig. 10, as a number)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alignment.chat import ChatFormat, encode_prompt
from alignment.dialogue import Message
from alignment.errors import DataError
from alignment.logprobs import unwrap
from alignment.models import LoadedModel
from sft.ghost_attention import context


@torch.no_grad()
def attention_picture(loaded: LoadedModel, dialogues: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The mean over dialogues of `attention_mass`, a list of turns for each layer.

    Turn n is averaged over the dialogues that have it. A dialogue has `instruction`, `user_turns` and `answers`.
    """
    tables = [attention_mass(loaded.model, *spans(loaded.chat, **_texts(row))) for row in dialogues if row["answers"]]
    num_turns = max((table.shape[1] for table in tables), default=0)
    columns = [
        torch.stack([table[:, turn] for table in tables if table.shape[1] > turn]).mean(0) for turn in range(num_turns)
    ]
    return torch.stack(columns, dim=1).tolist() if columns else []


def is_readable(chat: ChatFormat, context_length: int, dialogue: Mapping[str, Any]) -> bool:
    """Whether a format can write a dialogue of `attention_picture` and a context holds it."""
    try:
        ids, *_ = spans(chat, **_texts(dialogue))
    except DataError:
        return False
    return len(ids) <= context_length


def spans(
    chat: ChatFormat, instruction: str, user_turns: Sequence[str], answers: Sequence[str]
) -> tuple[list[int], tuple[int, int], list[tuple[int, int]]]:
    """The ids of a dialogue up to its last answer, and where the instruction and every answer stand in them.

    The instruction opens the first user turn.
    """
    places, ids = [], []
    for turn, answer in enumerate(answers):
        start = len(encode_prompt(chat, context(user_turns, answers[:turn])))
        response = chat.encode_response(answer)
        places.append((start, start + len(response)))
        ids = [*encode_prompt(chat, context(user_turns, answers[:turn])), *response]
    alone, other = (encode_prompt(chat, (Message("user", text),)) for text in (instruction, "\u2603"))
    return ids, (_num_shared(alone, other), _num_shared(alone, ids)), places


def attention_mass(
    model: nn.Module, ids: Sequence[int], instruction: tuple[int, int], answers: Sequence[tuple[int, int]]
) -> Float[Tensor, "layers answers"]:
    """The share of attention that the tokens of each answer give to the instruction's tokens.

    A token's attention sums to 1; the share is averaged over heads and over the answer's tokens. One layer's
    probabilities are held at a time.
    """
    inner = unwrap(model)
    rows: list[Float[Tensor, " answers"]] = []

    def measure(_module: nn.Module, _arguments: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        mass = output[1][0, :, :, slice(*instruction)].float().sum(-1).mean(0)  # (tokens,)
        rows.append(torch.stack([mass[start:stop].mean() for start, stop in answers]))
        return output[0], None

    # By class: GPT-2 and GPT-NeoX have other attributes than most for layers and their attention.
    parts = inner.get_decoder().modules()
    attentions = [part for part in parts if "Attention" in type(part).__name__ and hasattr(part, "layer_idx")]
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    handles = [attention.register_forward_hook(measure) for attention in attentions]
    try:
        inner.get_decoder()(input_ids=torch.tensor([list(ids)], device=inner.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        inner.set_attn_implementation(before)
    return torch.stack(rows).cpu()


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("instruction", "user_turns", "answers")}


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Leading tokens in common."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
