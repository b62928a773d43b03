"""Attention over prefix-shared trees on a CPU: all tokens side by side without padding, each block by matrix products.

The CPU kernels behind `scaled_dot_product_attention` compute what the mask throws away (padding, other branches) and,
in bfloat16, run at a fraction of the matrix throughput. Here a batch is one flat row; a block of queries (a piece of a
trunk or branch, or a whole small tree) meets only the keys it may see. The backward pass computes the probabilities
again, so that memory grows with tokens, not with their square.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignment.errors import ModelError
from alignment.prefix_batch import PrefixBatch

TREE_ATTENTION = "align_tree"
# A matrix product for a block costs about as much as this many scores: small trees are computed whole.
BLOCK_OVERHEAD = 8192
# Queries of a trunk or branch that share a block: fewer throw away less of the causal square, more make fewer products.
BLOCK_QUERIES = 128


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `start` to `stop` of the flat row, the ranges of keys they meet, and what is added to the scores.

    `tree` is where its tree begins and ends in the flat row.

    `bias` (stop - start, last keys) is 0 where a query sees a key and -inf elsewhere; it covers the last of the keys,
    those before them are seen by every query of the block.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    bias: Float[Tensor, "Q K"]
    tree: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Queries:
    """Some queries of a flat row: their places, ascending, and the blocks in which they alone meet their keys.

    A block's `start` and `stop` count these queries here, its keys are those of the whole row.
    """

    places: Int[Tensor, " S"]
    blocks: Sequence[Block]


class Attend(Protocol):
    """Attention of a whole flat row in a layer by somebody who keeps keys and values: the sampling engine."""

    def __call__(
        self, layer: int, queries: Float[Tensor, "H N D"], keys: Float[Tensor, "G N D"], values: Float[Tensor, "G N D"]
    ) -> Float[Tensor, "H N D"]:
        """The output for queries that are scaled already."""
        ...


def some_queries(blocks: Sequence[Block], places: Int[Tensor, " S"]) -> Queries:
    """The queries at `places` of the flat row, none named twice, in any order."""
    places = places.sort().values
    wanted = places.tolist()
    kept = []
    for block in blocks:
        start, stop = bisect_left(wanted, block.start), bisect_left(wanted, block.stop)
        if start < stop:
            kept.append(Block(start, stop, block.keys, block.bias[places[start:stop] - block.start], block.tree))
    return Queries(places, kept)


def tree_blocks(batch: PrefixBatch, dtype: torch.dtype) -> list[Block]:
    """The blocks of a batch whose real tokens stand side by side in the order of rows and columns."""
    blocks: list[Block] = []
    offset = 0
    for tree_ids, branch_ids in zip(batch.tree_ids, batch.branch_ids, strict=True):
        length = int((tree_ids >= 0).sum())
        # A new stretch begins where the tree or the branch changes: a trunk, its branches, the next trunk, ...
        stretches = torch.stack([tree_ids, branch_ids])[:, :length]
        values, counts = torch.unique_consecutive(stretches, dim=1, return_counts=True)
        start = offset
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for (tree, branch), count in zip(values.T.tolist(), counts.tolist(), strict=True):
            parts.setdefault(tree, []).append((branch, start, start + count))
            start += count
        for stretches_of_tree in parts.values():
            blocks += _blocks_of_tree(stretches_of_tree, dtype)
        offset += length
    return blocks


# What attention functions of some models are given besides, and what is more than softmax(q k^T) v.
_NOT_COMPUTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


def tree_attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G K D"],
    value: Float[Tensor, "B G K D"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    blocks: Sequence[Block] | None = None,
    last_queries: Queries | None = None,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B Q H D"], None]:
    """An attention function of transformers; without `blocks` and `attend` it is SDPA's.

    Grouped queries are supported: H heads share the keys and values of G. In the last layer, with `last_queries`, only
    these are computed and the output is 0 elsewhere. With `attend`, that alone computes the one row there is.

    Raises ModelError where the model's attention is of a kind that neither way computes, or its layers keep `blocks`
    and `attend` to themselves: all of a flat row would see each other.
    """
    unknown = [name for name in _NOT_COMPUTED if kwargs.get(name) is not None]
    if blocks is not None or attend is not None:
        if attention_mask is not None and attention_mask.numel() > 1:  # more than the mask that was given
            unknown.append("a mask of its own")
        if value.shape[-1] != query.shape[-1]:
            unknown.append("values of another width than its keys")
    if unknown:
        raise ModelError(f"{module.config.model_type}: its attention has {unknown[0]}, which is not supported.")
    if blocks is None and attend is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:  # that of a flat row
            raise ModelError(
                f"{module.config.model_type}: its layers do not hand on to their attention what ours needs. Take a "
                "model of another family."
            )
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if dropout:
        raise ModelError("attention dropout is not supported: set attention_dropout to 0 in the model's config.json.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    queries = query[0]
    if last_queries is not None and module.layer_idx == module.config.num_hidden_layers - 1:
        queries, blocks = queries[:, last_queries.places], last_queries.blocks
    dtype = value.dtype  # under autocast, rotary embeddings leave queries and keys in float32
    if attend is not None:
        output = attend(module.layer_idx, (queries * scale).to(dtype), key[0].to(dtype), value[0])
        return output.transpose(0, 1)[None], None
    output = block_attention((queries * scale).to(dtype), key[0], value[0], blocks)
    if output.shape[1] < query.shape[2]:
        output = output.new_zeros(query.shape[1:]).index_copy(1, last_queries.places, output)
    return output.transpose(0, 1)[None], None


def block_attention(
    queries: Float[Tensor, "H N D"],
    keys: Float[Tensor, "G N D"],
    values: Float[Tensor, "G N D"],
    blocks: Sequence[Block],
) -> Float[Tensor, "H N D"]:
    """Attention over the blocks of a flat row; queries are scaled already, H is a multiple of G."""
    return _BlockAttention.apply(queries, keys, values, blocks)


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)


class _BlockAttention(torch.autograd.Function):
    """softmax(q k^T + bias) v, block by block. q is (H, N, D); k and v are (G, N, D), H a multiple of G."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Tensor:
        """The output (H, N, D).

        Scores are rounded to the type of q and k, and keys have large parts in common, which take the bits. What all
        keys of a tree share adds the same to all scores of a query, so softmax does not see it: it is taken off (Zhang
        et al. 2024, arXiv:2410.02367, Sec. 4.2), tree by tree, so that none is rounded by what stands beside it. The
        gradients are the same, since a query's score gradients sum to zero.
        """
        ctx.key_dtype = k.dtype
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        k = torch.zeros_like(k, dtype=v.dtype)
        for start, stop in dict.fromkeys(block.tree for block in blocks):
            own = wide[:, start:stop]
            k[:, start:stop] = own - own.mean(1, keepdim=True)
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        grouped = q.unflatten(0, (len(k), -1))  # (G, H / G, N, D)
        output = torch.empty_like(grouped)
        for block in blocks:
            queries, keys, values = _operands(grouped, k, v, block)
            probabilities = _probabilities(queries, keys, block)
            output[:, :, block.start : block.stop] = (probabilities @ values).view(len(k), -1, *_shape(block, q))
        return output.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v = ctx.saved_tensors
        grouped, grad = (tensor.unflatten(0, (len(k), -1)) for tensor in (q, grad_output))
        grad_q, grad_k, grad_v = torch.empty_like(grouped), torch.zeros_like(k), torch.zeros_like(v)
        for block in ctx.blocks:
            queries, keys, values = _operands(grouped, k, v, block)
            upstream = grad[:, :, block.start : block.stop].reshape(len(k), -1, q.shape[-1])
            probabilities = _probabilities(queries, keys, block)
            grad_probabilities = upstream @ values.transpose(1, 2)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            grad_q[:, :, block.start : block.stop] = (grad_scores @ keys).view(len(k), -1, *_shape(block, q))
            _add_to_ranges(grad_k, grad_scores.transpose(1, 2) @ queries, block)
            _add_to_ranges(grad_v, probabilities.transpose(1, 2) @ upstream, block)
        return grad_q.flatten(0, 1), grad_k.to(ctx.key_dtype), grad_v, None


def _operands(grouped: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(G, H / G * Q, D) queries, (G, K, D) keys and values of a block."""
    queries = grouped[:, :, block.start : block.stop].reshape(len(k), -1, grouped.shape[-1])
    keys, values = (torch.cat([tensor[:, a:b] for a, b in block.keys], dim=1) for tensor in (k, v))
    return queries, keys, values


def _probabilities(queries: Tensor, keys: Tensor, block: Block) -> Tensor:
    scores = queries @ keys.transpose(1, 2)
    length, covered = block.bias.shape
    scores.view(len(keys), -1, length, keys.shape[1])[..., -covered:].add_(block.bias)
    return torch.softmax(scores, dim=-1)


def _shape(block: Block, q: Tensor) -> tuple[int, int]:
    return block.stop - block.start, q.shape[-1]


def _add_to_ranges(gradient: Tensor, addition: Tensor, block: Block) -> None:
    position = 0
    for start, stop in block.keys:
        gradient[:, start:stop] += addition[:, position : position + stop - start]
        position += stop - start


def _blocks_of_tree(stretches: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[Block]:
    """One block, or those of the trunk and of each branch, whichever computes less.

    Stretches are (branch, start, stop), branch 0 the trunk.
    """
    trunk = next(((start, stop) for branch, start, stop in stretches if branch == 0), None)
    pieces: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    for branch, start, stop in stretches:
        before = (trunk,) if branch and trunk else ()
        pieces += [(a, b, (*before, (start, b))) for a, b in _pieces(start, stop)]
    first, last = stretches[0][1], stretches[-1][2]
    apart = sum((b - a) * sum(high - low for low, high in keys) + BLOCK_OVERHEAD for a, b, keys in pieces)
    if (last - first) ** 2 + BLOCK_OVERHEAD <= apart:
        branches = torch.cat([torch.full((stop - start,), branch) for branch, start, stop in stretches])
        seen = (branches[None] == 0) | (branches[None] == branches[:, None])
        return [Block(first, last, ((first, last),), _bias(seen.tril(), dtype), (first, last))]
    return [Block(a, b, keys, _causal_bias(b - a, dtype), (first, last)) for a, b, keys in pieces]


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """A stretch cut into equal pieces of at most `BLOCK_QUERIES` tokens."""
    count = math.ceil((stop - start) / BLOCK_QUERIES)
    edges = [start + (stop - start) * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def _causal_bias(length: int, dtype: torch.dtype) -> Tensor:
    return _bias(torch.ones(length, length, dtype=torch.bool).tril(), dtype)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
