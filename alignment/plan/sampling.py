"""What the built-in sampling engine holds: tables of keys and values, a prompt's once for all its responses."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.plan.passes import Rows, run_pass
from alignment.plan.phases import Work
from alignment.plan.shapes import DeviceKind, ModelSpec, weights
from alignment.sampling.draw import CPU_ROWS
from alignment.sampling.memory import kv_bytes, kv_width
from alignment.sampling.own_tokens import whole_columns
from alignment.sampling.torch_engine import PREFILL_TOKENS


@dataclass(frozen=True)
class Draws:
    """Responses that are decoded side by side.

    Attributes:
        prompts: prompts that have responses in the tables at one time.
        candidates: responses of each.
        prompt_tokens: of each prompt.
        new_tokens: of each response at most.
    """

    prompts: int
    candidates: int
    prompt_tokens: int
    new_tokens: int

    @property
    def rows(self) -> int:
        """Responses side by side."""
        return self.prompts * self.candidates


@dataclass(frozen=True)
class Sampling:
    """Bytes of keys and values, bytes at most beside them, and the work: prompts are run first, then tokens decoded.

    What the decoding steps read is the weights once a step, and keys and values once a token.
    """

    kv_cache: int
    working: int
    prefill: Work
    decode: Work

    def work(self, times: float) -> list[Work]:
        """Drawing so many such sets of responses one after the other."""
        return [self.prefill.times(times), self.decode.times(times)]


def draws_of(*, total_prompts: int, candidates: int, max_rows: int, prompt_tokens: int, new_tokens: int) -> Draws:
    """As many responses side by side as `max_rows` lets in, where there are so many to draw.

    The engine takes whole prompts; one with more candidates than `max_rows` comes in lots.
    """
    together = min(candidates, max_rows)
    prompts = max(1, min(total_prompts, max_rows // together))
    return Draws(prompts, together, prompt_tokens, new_tokens)


def sampling(spec: ModelSpec, draws: Draws, *, device: DeviceKind) -> Sampling:
    """Drawing one set of responses side by side."""
    config, dtype = spec.shape, spec.arithmetic
    lengths = {"prompt_tokens": draws.prompt_tokens, "new_tokens": draws.new_tokens}
    kv_cache = kv_bytes(config, dtype, prompts=draws.prompts, rows=draws.rows, **lengths)
    columns = whole_columns(draws.new_tokens)
    # Prompts run as flat rows with the attention of a CPU, on every device.
    at_a_time = max(1, min(draws.prompts, PREFILL_TOKENS // draws.prompt_tokens))
    rows = Rows(at_a_time, draws.prompt_tokens - 1, (1,))
    prefill = run_pass(spec, rows, "logprobs", device="cpu")
    # One layer's tables are copied when prompts come and go.
    copies = 2 * (draws.prompts * draws.prompt_tokens + draws.rows * columns) * kv_width(config) * dtype.itemsize
    length = draws.prompt_tokens + columns
    # Scores, in float32 with their weights, and the weights in the model's type; a CPU never has those of the prompts.
    scored = columns if device == "cpu" else length
    scores = draws.rows * config.num_attention_heads * scored * 2 * (4 + dtype.itemsize)
    at_once = min(draws.rows, CPU_ROWS) if device == "cpu" else draws.rows
    logits = draws.rows * config.vocab_size * dtype.itemsize + 3 * 4 * at_once * config.vocab_size
    attention = 4 * config.num_hidden_layers * config.hidden_size * length
    decode = draws.rows * draws.new_tokens * (2 * weights(spec).parameters + attention)
    total_prefill = prefill.flops * draws.prompts // at_a_time
    steps = draws.new_tokens * (weights(spec).parameters * dtype.itemsize + kv_cache)
    working = max(prefill.peak, copies + scores + logits)
    return Sampling(kv_cache, working, Work(total_prefill), Work(decode, steps))
