"""What fine-tuning changed: held-out loss and perplexity by source, and answers before and after."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

from alignment.chat import ChatFormat, decode_response, fit_prompt
from alignment.data import write_rows
from alignment.dialogue import Dialogue
from alignment.distributed import equal_passes, for_all, gather_objects
from alignment.hardware import autocast_to
from alignment.line_log import all_lines
from alignment.logprobs import response_logprobs, unwrap
from alignment.model_folders import context_length
from alignment.progress import ProgressBar
from alignment.runs import Run
from alignment.sampling import SamplingParams
from alignment.sampling.memory import CPU_MAX_ROWS
from alignment.sampling.torch_engine import TorchSampler
from alignment.training import MicroBatch
from sft.config import SFTEvaluation
from sft.examples import Examples, dialogue_batches


def response_loss(model: nn.Module, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood summed over the trained tokens, in nats (Llama 2 Sec. 3.1: prompts carry no loss)."""
    logprobs = response_logprobs(model, part.batch)
    return -logprobs.sum(), {}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    *,
    max_tokens: int,
    row_tokens: int | None = None,
    dtype: torch.dtype,
    title: str = "held-out loss",
) -> dict[str, Any]:
    """Mean loss per trained token (nats) and its exponential, overall and by source; empty without examples.

    Every process takes a share of them.
    """
    if not examples.encoded:
        return {}
    device = next(model.parameters()).device
    model.eval()
    state = PartialState()
    share = slice(state.process_index, None, state.num_processes)
    mine: dict[str, tuple[float, int]] = {}
    by_source = defaultdict(list)
    for index, dialogue in enumerate(examples.dialogues):
        by_source[dialogue.source].append(index)
    sizes = {"max_tokens": max_tokens, "row_tokens": row_tokens}
    with ProgressBar(title, len(examples.encoded), shown=state.is_main_process) as bar:
        advance = for_all(bar.advance)
        for source, indices in by_source.items():
            total, count = 0.0, 0
            parts = list(dialogue_batches(examples.encoded, indices[share], **sizes))
            [spare] = dialogue_batches(examples.encoded, indices[:1], **sizes)
            for part, counts in equal_passes(parts, spare, model):
                with autocast_to(dtype, device):
                    loss, _ = response_loss(model, part.to(device))
                if counts:
                    total, count = total + loss.item(), count + part.batch.num_targets
                    advance(part.batch.num_branches)
            mine[source] = (total, count)
    shares = gather_objects(mine)
    sums = {source: [sum(column) for column in zip(*(each[source] for each in shares), strict=True)] for source in mine}
    overall = [sum(column) for column in zip(*sums.values(), strict=True)]
    return {**_figures(*overall), "by_source": {source: _figures(*found) for source, found in sums.items()}}


def _figures(total: float, count: int) -> dict[str, float | int | None]:
    """Loss, perplexity (None where it is past every float), tokens."""
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None, "tokens": count}


def sample_answers(
    model: nn.Module,
    chat: ChatFormat,
    dialogues: Sequence[Dialogue],
    settings: SFTEvaluation,
    run_dir: Run,
    *,
    dtype: torch.dtype,
    part: Literal["before", "after"],
) -> None:
    """Greedy answers to the last turns of held-out dialogues, as `answers.jsonl`: prompt, reference, before, after.

    What a resumed run finds from before its training is kept. All processes sample, for a sharded model needs them
    all; the main one writes.
    """
    path = run_dir.path / "answers.jsonl"
    is_done = part == "before" and path.exists()
    PartialState().wait_for_everyone()
    if not dialogues or is_done:
        return
    room = context_length(unwrap(model).config) - settings.max_new_tokens
    prompts = [fit_prompt(chat, dialogue.messages[:-1], room)[0] for dialogue in dialogues]
    fitting = [index for index, ids in enumerate(prompts) if ids is not None]
    params = SamplingParams(temperature=0.0, max_new_tokens=settings.max_new_tokens)
    # The same number in all processes, which take every step of a sharded model together.
    sampler = TorchSampler(model, stop_ids=[chat.end_of_turn_id], max_rows=CPU_MAX_ROWS)
    device = next(model.parameters()).device
    with (
        ProgressBar(f"sft: answers {part}", len(fitting), shown=run_dir.writes) as bar,
        autocast_to(dtype, device),
    ):
        drawn = sampler.sample([prompts[index] for index in fitting], params, on_progress=bar.advance)
    texts = {index: decode_response(chat, sample.token_ids) for index, [sample] in zip(fitting, drawn, strict=True)}
    if path.exists():
        rows = all_lines(path, len(dialogues))
    else:
        rows = [
            {
                "prompt": [message.to_json() for message in dialogue.messages[:-1]],
                "reference": dialogue.messages[-1].content,
                "source": dialogue.source,
            }
            for dialogue in dialogues
        ]
    if run_dir.writes:
        write_rows(path, ({**row, part: texts.get(index)} for index, row in enumerate(rows)))
