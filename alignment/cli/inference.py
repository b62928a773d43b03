"""`align sample` and `align chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from alignment.config import ModelSection, PromptSection, SamplingSection, build_section
from alignment.data import load_prompts, write_rows
from alignment.dialogue import Message, Messages
from alignment.errors import ConfigError
from alignment.hardware import compute_dtype
from alignment.models import LoadedModel, context_length, load_chat_model, load_chat_of
from alignment.progress import ProgressBar
from alignment.runs import check_new_file
from alignment.sampling.engines import open_sampler
from alignment.sampling.prompts import as_candidate, choose_prompts, fit_prompts, sample_ids, sample_prompts
from alignment.sampling.torch_engine import TorchSampler
from reward_models.calibration import sigmoid
from reward_models.score import Scorer


def sample_file(
    model: str, source: str, settings: Mapping[str, Any], *, max_prompts: int | None, seed: int, out: Path | None
) -> None:
    """Candidates of a file's prompts, to a file or the terminal."""
    if out is not None:
        check_new_file(out)
    prompts = build_section(PromptSection, {"prompts": [source], "max_prompts": max_prompts})
    sampling = build_section(SamplingSection, settings)
    data = load_prompts([source])
    chat, context = load_chat_of(model)
    chosen = choose_prompts(data, prompts, seed)
    fitting = fit_prompts(chat, chosen, prompts, room=context - sampling.max_new_tokens)
    longest = max(len(ids) for _, ids in fitting)
    with open_sampler(ModelSection(path=model), sampling, PartialState().device, max_prompt_length=longest) as sampler:
        samples = sample_prompts(sampler, fitting, sampling, seed=seed, title="sample")
    rows = [
        as_candidate(chat, prompt, sample, index).to_json()
        for (prompt, _), drawn in zip(fitting, samples, strict=True)
        for index, sample in enumerate(drawn)
    ]
    if out is not None:
        write_rows(out, rows)
        return
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


def chat_loop(
    model: str,
    *,
    helpfulness: str | None,
    safety: str | None,
    system: str | None,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Reads user turns, prints answers; the history is kept."""
    sampling = build_section(SamplingSection, {"temperature": temperature, "max_new_tokens": max_new_tokens})
    loaded = _load(model)
    device = PartialState().device
    scorers = {name: Scorer.load(path, device=device) for name, path in _named(helpfulness, safety)}
    sampler = TorchSampler(loaded.model, stop_ids=[loaded.chat.end_of_turn_id], max_rows=1)
    console = Console(highlight=False)
    history: Messages = (Message("system", system),) if system else ()
    from alignment.chat import decode_response, fit_prompt

    limit = context_length(loaded.model.config) - max_new_tokens
    if limit <= 0:
        raise ConfigError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's context.")
    for number, turn in enumerate(iter(_read_turn, "")):
        history = (*history, Message("user", turn))
        ids, _ = fit_prompt(loaded.chat, history, limit)
        if ids is None:
            console.print(f"[red]That is over {limit} tokens. Shorten it.[/red]")
            history = history[:-1]
            continue
        silent = ProgressBar("", 0, shown=False)
        [[sample]] = sample_ids(sampler, [ids], sampling, seed=seed + number, bar=silent)
        answer = decode_response(loaded.chat, sample.token_ids)
        console.print(answer, markup=False)
        for name, scorer in scorers.items():
            [[value]] = scorer.score([history], [[answer]])
            shown = f"P(safe) {sigmoid(value):.3f}" if name == "safety" else f"{value:+.2f}"
            console.print(f"[dim]{name}: {shown}[/dim]")
        history = (*history, Message("assistant", answer or "..."))


def _load(model: str) -> LoadedModel:
    device = PartialState().device
    loaded = load_chat_model(model, dtype=compute_dtype(device))
    loaded.model.to(device)
    return loaded


def _named(helpfulness: str | None, safety: str | None) -> list[tuple[str, str]]:
    return [(name, path) for name, path in (("helpfulness", helpfulness), ("safety", safety)) if path]


def _read_turn() -> str:
    """The next user turn; empty at the end of input."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return ""
    return sys.stdin.readline().strip()
