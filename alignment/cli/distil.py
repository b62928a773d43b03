"""`align distil` with a reward model of this project as its filter: `sft` knows none."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState

from alignment.distributed import for_all, map_over_processes
from alignment.isolation import isolated
from alignment.progress import ProgressBar
from reward_models.score import Scorer
from rlhf.judges import judges_context
from sft import context_distillation
from sft.config import DistilConfig


@isolated()
def run(config: DistilConfig, *, resume: bool = False) -> dict[str, Any]:
    """See `sft.context_distillation.run`. Raises ModelError where `safety` is no reward model, before any sampling."""
    context = judges_context({"safety": config.safety})
    return context_distillation.run(config, _load_score, judge_context=context, resume=resume)


def _load_score(config: DistilConfig, device: torch.device) -> context_distillation.Score:
    scorer = Scorer.load(
        config.safety.path,
        device=device,
        dtype=config.safety.dtype,
        chat_template=config.safety.chat_template,
        max_tokens=config.max_tokens_per_batch,
    )

    def score(prompts: Any, responses: Any) -> list[list[float]]:
        def work(mine: Any) -> list[list[float]]:
            asked, given = [prompt for prompt, _ in mine], [texts for _, texts in mine]
            return scorer.score(asked, given, on_progress=for_all(bar.advance))

        with ProgressBar("distil: scores", len(prompts), shown=PartialState().is_main_process) as bar:
            return map_over_processes(work, list(zip(prompts, responses, strict=True)))

    return score
