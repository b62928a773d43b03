"""Log-probabilities of response tokens without the full [batch, length, vocabulary] tensor.

Only the hidden states that predict a counted token meet the output matrix, a few hundred at a time; the backward pass
computes each chunk's logits again instead of keeping them, and turns them into their gradient in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from alignment.errors import ModelError
from alignment.model_checks import reach_of
from alignment.prefix_batch import PrefixBatch
from alignment.tree_attention import TREE_ATTENTION, some_queries, tree_blocks

CHUNK_TOKENS = 512
# Rows of logits that a CPU turns into probabilities at once: a few megabytes in float32 stay in its cache.
CPU_ROWS = 32


class TokenStats(NamedTuple):
    """Of each counted token, in float32: `logprobs` (M,) natural log; `entropy` (M,) of its distribution, in nats."""

    logprobs: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]


def response_logprobs(model: nn.Module, batch: PrefixBatch, *, temperature: float = 1.0) -> Float[Tensor, " M"]:
    """Log-probabilities of the batch's counted tokens at the given sampling temperature, in float32."""
    hidden, weight = _predictors(model, batch)
    return token_logprobs(hidden, weight, batch.target_ids, temperature=temperature)


@torch.no_grad()
def response_stats(model: nn.Module, batch: PrefixBatch, *, temperature: float = 1.0) -> TokenStats:
    """Log-probabilities and entropies of the batch's counted tokens, without gradients."""
    hidden, weight = _predictors(model, batch)
    return token_stats(hidden, weight, batch.target_ids, temperature=temperature)


def token_logprobs(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    target_ids: Int[Tensor, " M"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, " M"]:
    """Log-softmax of `hidden @ weight.T / temperature` at the targets, `chunk_tokens` rows at a time.

    The product is of autocast's type where that is on, the softmax float32. Peak memory is a few (chunk_tokens, V)
    float32 tensors, in the backward pass too.
    """
    return _TokenLogprobs.apply(hidden, weight, target_ids, temperature, chunk_tokens)


@torch.no_grad()
def token_stats(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    target_ids: Int[Tensor, " M"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenStats:
    """`token_logprobs` with the entropy of each token's distribution, both without gradients."""
    hidden, weight = _as_computed(hidden, weight)
    logprobs, entropy = (torch.empty(len(target_ids), device=hidden.device) for _ in range(2))
    for among, table in _log_softmax(hidden, weight, temperature, chunk_tokens):
        logprobs[among] = table.gather(-1, target_ids[among, None])[:, 0]
        # -sum p log p. A token at -inf has probability 0 and adds nothing; 0 * -inf would be NaN.
        entropy[among] = -(table.exp() * table.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
    return TokenStats(logprobs, entropy)


def branch_scores(model: nn.Module, batch: PrefixBatch) -> Float[Tensor, " N"]:
    """A sequence classifier's scalar at the last token of every branch: score, or value, in float32."""
    return apply_score_head(model, hidden_states_at(model, batch, batch.last_rows, batch.last_columns))


def token_values(model: nn.Module, batch: PrefixBatch) -> Float[Tensor, " M"]:
    """A critic's value before each counted token, in float32: read where the token is predicted."""
    values = apply_score_head(model, hidden_states_at(model, batch, batch.source_rows, batch.source_columns))
    return values[batch.target_sources]


def apply_score_head(model: nn.Module, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
    """The scalar head in float32, whatever the backbone's type; FSDP gathers its weights in that one."""
    device, head = hidden.device.type, unwrap(model).score
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        weights = {name: weight.float() for name, weight in head.named_parameters()}
        return torch.func.functional_call(head, weights, (hidden.float(),))[:, 0]


def hidden_states_at(
    model: nn.Module, batch: PrefixBatch, rows: Int[Tensor, " S"], columns: Int[Tensor, " S"]
) -> Float[Tensor, "S H"]:
    """The decoder's output for the tokens at (row, column), none named twice.

    The last layer computes queries, output projection and MLP for these tokens alone, keys and values for all.
    The call goes through the outermost module, so that DDP and FSDP see it, and a hook takes the hidden states; the
    head then runs on one position (`logits_to_keep`), or is a scalar head, and costs nothing.
    """
    inner = unwrap(model)
    _check_window(inner, batch)
    flat = batch.input_ids.device.type == "cpu" and inner.config._attn_implementation == TREE_ATTENTION
    if flat:  # real tokens of all rows side by side
        lengths = (batch.tree_ids >= 0).sum(1)
        places = (lengths.cumsum(0) - lengths)[rows] + columns
    else:
        places = rows * batch.input_ids.shape[1] + columns
    taken: list[Tensor] = []
    handles = [inner.get_decoder().register_forward_hook(lambda _m, _a, out: taken.append(out.last_hidden_state))]
    handles += _last_layer_only_for(inner, places)
    extra = {"logits_to_keep": 1} if inner.get_output_embeddings() is not None else {}
    try:
        model(
            **(_flat_inputs(inner, batch, places) if flat else _padded_inputs(inner, batch)), use_cache=False, **extra
        )
    finally:
        for handle in handles:
            handle.remove()
    [hidden] = taken
    return hidden.flatten(0, 1)[places]


def _last_layer_only_for(inner: nn.Module, needed: Int[Tensor, " S"]) -> list[RemovableHandle]:
    """Hooks that give the last layer's queries, output projection and MLP the tokens at `needed` and no others.

    `needed` counts tokens of the flattened batch. What these would give the others is zero then; nothing reads them, as
    no layer follows. Keys and values are computed for all. Gradient checkpointing computes layers again when the hooks
    are gone, so there all tokens go in.
    """
    layers = getattr(inner.get_decoder(), "layers", None)  # other names, e.g. GPT-2's, compute all tokens
    if not layers or any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        return []
    shapes: list[torch.Size] = []

    def select(_module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        shapes.append(arguments[0].shape[:2])
        return (arguments[0].flatten(0, 1)[needed][None],)

    def put_back(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        everywhere = output.new_zeros(shapes[-1].numel(), output.shape[-1])
        return everywhere.index_copy(0, needed, output[0]).unflatten(0, shapes[-1])

    attention = getattr(layers[-1], "self_attn", None)
    parts = (getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), getattr(layers[-1], "mlp", None))
    hooks = (part.register_forward_pre_hook(select) for part in parts if part is not None)
    return [*hooks, *(part.register_forward_hook(put_back) for part in parts if part is not None)]


def _check_window(inner: nn.Module, batch: PrefixBatch) -> None:
    """Our masks let every token see its whole path. Raises ModelError where that is longer than a model's reach."""
    reach = reach_of(inner.config)
    if reach and batch.input_ids.shape[1] > reach.tokens < (longest := int(batch.position_ids.max()) + 1):
        raise ModelError(
            f"{inner.config.model_type}: {reach.why}, and a row has {longest}. That is not "
            f"supported: keep prompt and response within {reach.tokens} tokens (data.max_length)."
        )


def _padded_inputs(inner: nn.Module, batch: PrefixBatch) -> dict[str, Tensor]:
    """Rows with their mask, in the form that the model's attention takes.

    Raises ModelError for kernels that take no mask of their user's (flash and flex attention).
    """
    attention, mask = inner.config._attn_implementation, batch.attention_mask
    if attention == "eager":  # adds the mask to the scores
        mask = torch.zeros(mask.shape, dtype=inner.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(inner.dtype).min
        )
    elif attention not in ("sdpa", TREE_ATTENTION):
        raise ModelError(f"attention {attention} cannot keep responses in a row apart. Use sdpa or eager.")
    return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}


def _flat_inputs(inner: nn.Module, batch: PrefixBatch, needed: Int[Tensor, " S"]) -> dict[str, Any]:
    """The real tokens in one row, and the blocks of their attention. A mask of four axes stops transformers' own."""
    real = batch.tree_ids >= 0
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inner.dtype
    blocks = tree_blocks(batch, dtype)
    return {
        "input_ids": batch.input_ids[real][None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "position_ids": batch.position_ids[real][None],
        "blocks": blocks,
        "last_queries": some_queries(blocks, needed),
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DDP, FSDP and peft wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _predictors(model: nn.Module, batch: PrefixBatch) -> tuple[Tensor, Tensor]:
    """The (M, H) hidden states that predict the counted tokens, and the (V, H) output matrix."""
    hidden = hidden_states_at(model, batch, batch.source_rows, batch.source_columns)[batch.target_sources]
    return hidden, unwrap(model).get_output_embeddings().weight


class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at the targets; keeps hidden states and weights, but no logits, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, chunk_tokens: int
    ) -> Tensor:
        """(M,) log-probabilities in float32."""
        ctx.hidden_type, ctx.temperature, ctx.chunk_tokens = hidden.dtype, temperature, chunk_tokens
        hidden, computed = _as_computed(hidden, weight)
        ctx.save_for_backward(hidden, weight, target_ids)
        logprobs = torch.empty(len(target_ids), device=hidden.device)
        for among, table in _log_softmax(hidden, computed, temperature, chunk_tokens):
            logprobs[among] = table.gather(-1, target_ids[among, None])[:, 0]
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and, where it is trained, of the weight.

        A logit's gradient is (1 at the target, else 0, less its probability) * grad / temperature.
        """
        hidden, weight, target_ids = ctx.saved_tensors
        computed = weight.to(hidden.dtype)
        grad_output = grad_output.float() / ctx.temperature
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Sums of many chunks lose their last bits in bfloat16, as FSDP gathers weights.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in _slices(len(hidden), ctx.chunk_tokens):
            logits = hidden[chunk] @ computed.T
            for rows, among in _rows_at_once(chunk, logits):
                grad = grad_output[among, None]
                grad_logits = torch.softmax(_as_float32(logits[rows], ctx.temperature), dim=-1).mul_(-grad)
                logits[rows] = grad_logits.scatter_add_(-1, target_ids[among, None], grad)
            if grad_hidden is not None:
                grad_hidden[chunk] = logits @ computed
            if grad_weight is not None:
                grad_weight += logits.T @ hidden[chunk]
        grad_hidden = grad_hidden if grad_hidden is None else grad_hidden.to(ctx.hidden_type)
        grad_weight = grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _as_computed(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that a linear layer would compute in, here: autocast's where that is on."""
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _log_softmax(
    hidden: Tensor, weight: Tensor, temperature: float, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens after the others, with their (tokens, V) log-probabilities in float32."""
    for chunk in _slices(len(hidden), chunk_tokens):
        logits = hidden[chunk] @ weight.T
        for rows, among in _rows_at_once(chunk, logits):
            yield among, torch.log_softmax(_as_float32(logits[rows], temperature), dim=-1)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _rows_at_once(chunk: slice, logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of a chunk's logits to normalise together, each slice with its place among all tokens."""
    size = CPU_ROWS if logits.device.type == "cpu" else len(logits)
    for rows in _slices(len(logits), size):
        yield rows, slice(chunk.start + rows.start, chunk.start + rows.stop)


def _as_float32(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature
