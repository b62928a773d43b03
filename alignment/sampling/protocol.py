"""What every sampling engine takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How responses are drawn; `temperature=0` is greedy, `top_p=1` and `top_k=0` are off."""

    num_candidates: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One response.

    Attributes:
        token_ids: the sampled tokens; ends with the end-of-turn token where `finish_reason` is "stop".
        logprobs: their natural log-probabilities under the model at the sampling temperature (before top-p and
            top-k cut anything off), so that a teacher-forced pass at that temperature gives the same numbers. For
            greedy sampling, at temperature 1.
        finish_reason: "stop" at end of turn, "length" where `max_new_tokens` ran out.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Sampler(Protocol):
    """An engine. Results come in the order of the prompts, K samples each, whatever happens inside."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], None] | None = None,
        on_prompt: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """K samples for each prompt (token ids).

        Args:
            prompts: not empty, each of at least one token.
            params: how many samples, and how they are drawn.
            on_progress: hears of finished samples, a count each time.
            on_prompt: is handed each prompt's index and samples as soon as it has them all. These are not kept: the
                prompt's place in the result is an empty list, so that memory holds what is being sampled.
        """
        ...
