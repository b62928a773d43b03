"""`align distil` with a reward model of this project as its filter: `sft` knows none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate import PartialState

from alignment.decontamination import load_prompts_of
from alignment.dialogue import Messages, RowError
from alignment.distributed import for_all, map_over_processes
from alignment.isolation import isolated
from alignment.model_folders import check_is_chat_model, load_chat_of
from alignment.progress import ProgressBar
from reward_models.score import check_fits
from rlhf.judges import judges_context, load_scorer
from sft import context_distillation
from sft.config import DistilConfig
from sft.conversation import describe_asked, format_and_limit


@isolated()
def run(config: DistilConfig, *, resume: bool = False) -> dict[str, Any]:
    """See `sft.context_distillation.run`. Raises ModelError where `safety` is no reward model, before any sampling."""
    context = judges_context({"safety": config.safety})
    return context_distillation.run(
        config, _load_score, judge_context=context, is_readable=_reader(config), resume=resume
    )


def check(config: DistilConfig, *, untrained: Collection[str] = ()) -> str:
    """What `align distil --dry-run` says: reads rows and the chat format, loads no weights, writes nothing.

    `untrained` as in `judges_context`.
    """
    judges = judges_context({"safety": config.safety}, untrained=untrained)
    check_is_chat_model(config.model.path)
    model, prompts, sampling = config.model, config.prompts, config.sampling
    chat, limit = format_and_limit(model, prompts.max_prompt_length, sampling, judges)
    data = load_prompts_of(prompts)
    found = context_distillation.why_not_asked(config, data, chat, limit=limit)
    count, others = describe_asked(found, "prompts", model, prompts, sampling, judges)
    return f"{count} prompts.{others}"


def _reader(config: DistilConfig) -> context_distillation.IsReadable:
    chat, context = load_chat_of(config.safety.path, config.safety.chat_template)

    def is_readable(prompt: Messages, responses: Sequence[str]) -> bool:
        try:
            return not check_fits(chat, context, prompt, responses)
        except RowError:
            return False

    return is_readable


def _load_score(config: DistilConfig, device: torch.device) -> context_distillation.Score:
    scorer = load_scorer(config.safety, device, max_tokens=config.max_tokens_per_batch)

    def score(prompts: Any, responses: Any) -> list[list[float]]:
        def work(mine: Any) -> list[list[float]]:
            asked, given = [prompt for prompt, _ in mine], [texts for _, texts in mine]
            return scorer.score(asked, given, on_progress=for_all(bar.advance))

        with ProgressBar("distil: scores", len(prompts), shown=PartialState().is_main_process) as bar:
            return map_over_processes(work, list(zip(prompts, responses, strict=True)))

    return score
