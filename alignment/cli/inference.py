"""`align score`, `align sample` and `align chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from alignment.config import PromptSection, SamplingSection
from alignment.data import load_pairs, load_prompts, load_rows, read_lines, write_rows
from alignment.dialogue import Candidate, Message, Messages, PreferencePair
from alignment.errors import ConfigError, DataError
from alignment.hardware import compute_dtype
from alignment.models import LoadedModel, load_chat_model
from alignment.progress import ProgressBar
from alignment.sampling.prompts import as_candidate, choose_prompts, sample_ids, sample_prompts
from alignment.sampling.torch_engine import TorchSampler
from alignment.sources import find_data
from reward_models.evaluate import evaluate_pairs, report_table
from reward_models.score import Scorer


def score_files(model: str, files: list[str], *, out: Path | None, as_json: bool) -> None:
    """Pairs: agreement with people. Responses: score and sigmoid(score), which is P(safe) for a safety model."""
    kinds = {name: _has_pairs(name) for name in files}
    if len(set(kinds.values())) > 1:
        mixed = ", ".join(f"{name} ({'pairs' if pairs else 'responses'})" for name, pairs in kinds.items())
        raise DataError(f"pairs and responses in one call: {mixed}. Score them in two.")
    console = Console(highlight=False)
    device = PartialState().device
    if all(kinds.values()):
        pairs = load_pairs(files).rows
        scorer = Scorer.load(model, device=device)
        with ProgressBar("score", len(pairs)) as bar:
            scores = scorer.score(
                [p.prompt for p in pairs], [[p.chosen, p.rejected] for p in pairs], on_progress=bar.advance
            )
        report = evaluate_pairs(pairs, [s[0] for s in scores], [s[1] for s in scores])
        rows = [_scored_pair(pair, *both) for pair, both in zip(pairs, scores, strict=True)]
        shown: Any = json.dumps(report, indent=2) if as_json else report_table(report, f"{model} on {len(pairs)} pairs")
    else:
        candidates = load_rows(files, _as_response).rows
        scorer = Scorer.load(model, device=device)
        with ProgressBar("score", len(candidates)) as bar:
            prompts, texts = [c.prompt.messages for c in candidates], [[c.response] for c in candidates]
            values = [value for [value] in scorer.score(prompts, texts, on_progress=bar.advance)]
        rows = [
            {**candidate.to_json(), "score": value, "probability": _sigmoid(value)}
            for candidate, value in zip(candidates, values, strict=True)
        ]
        report = {"responses": len(values), "mean_score": sum(values) / len(values)}
        shown = (
            json.dumps(report, indent=2)
            if as_json or out
            else "\n".join(
                f"{row['score']:+.3f}  {row['probability']:.3f}  {row['response'][0]['content'][:90]!r}" for row in rows
            )
        )
    if out is not None:
        write_rows(out, rows)
    console.print(shown, markup=False) if isinstance(shown, str) else console.print(shown)


def sample_file(
    model: str, source: str, settings: Mapping[str, Any], *, max_prompts: int | None, seed: int, out: Path | None
) -> None:
    """Candidates of a file's prompts, to a file or the terminal."""
    data = load_prompts([source])
    prompts = PromptSection(prompts=[source], max_prompts=max_prompts)
    sampling = SamplingSection(**settings)
    loaded = _load(model)
    samples, fitting = sample_prompts(
        loaded, choose_prompts(data, prompts, seed), prompts, sampling, seed=seed, title="sample"
    )
    rows = [
        as_candidate(loaded.chat, prompt, sample, index).to_json()
        for prompt, drawn in zip(fitting, samples, strict=True)
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
    loaded = _load(model)
    device = PartialState().device
    scorers = {name: Scorer.load(path, device=device) for name, path in _named(helpfulness, safety)}
    sampler = TorchSampler(loaded.model, stop_ids=[loaded.chat.end_of_turn_id], max_rows=1)
    sampling = SamplingSection(temperature=temperature, max_new_tokens=max_new_tokens)
    console = Console(highlight=False)
    history: Messages = (Message("system", system),) if system else ()
    from alignment.chat import decode_response, fit_prompt

    limit = loaded.model.config.max_position_embeddings - max_new_tokens
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
            shown = f"P(safe) {_sigmoid(value):.3f}" if name == "safety" else f"{value:+.2f}"
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


def _has_pairs(name: str) -> bool:
    first = next(iter(read_lines(find_data(name))), None)
    return first is not None and first.row is not None and "chosen" in first.row


def _as_response(row: Mapping[str, Any]) -> Candidate:
    """A row with `prompt` and `response`, or a dialogue whose last turn is the response."""
    if "messages" in row and "response" not in row:
        *prompt, last = row["messages"]
        row = {**row, "prompt": prompt, "response": [last]}
    return Candidate.from_json({"index": 0, **row})


def _scored_pair(pair: PreferencePair, chosen: float, rejected: float) -> dict[str, Any]:
    return {**pair.to_json(), "score_chosen": chosen, "score_rejected": rejected}


def _sigmoid(value: float) -> float:
    import torch

    return float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))
