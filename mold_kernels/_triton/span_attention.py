"""Span attention: probabilities at the key columns, pooled over pieces of rows and keys; and its gradient.

The derivation is in `mold_kernels.span_attention`, pieces and columns in `mold_kernels._triton.span_pieces`. A **unit**
is heads that share a key head and a gradient: those of a key head, or one head where the result keeps each apart.

Forward: a program takes one row piece and a block of key pieces. All its scores are k q^T tiles of [columns, rows], the
rows of a piece and the query heads of one key head side by side; they are added up over heads in registers and over
rows and columns at the end, so that one number a pair of pieces leaves the program. The backward spreads the gradient
over pairs of pieces for `span_gradient`. The largest rows are `span_maxima`'s, in either direction.

Cost with P = B Hq T N / 2 pairs: forward 2 P D FLOPs, reading q once a tile of columns and the columns once a row
piece. Stored: G x E floats for the pairs of pieces.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mold_kernels._triton import tiles
from mold_kernels._triton.scores import load_rows, padding_ends, tile_options, with_strides
from mold_kernels._triton.span_gradient import span_gradient
from mold_kernels._triton.span_maxima import span_attention_maxima, spans_of_pieces
from mold_kernels._triton.span_pieces import pool_spans
from mold_kernels._triton.span_probabilities import (
    Seen,
    column_probabilities,
    load_columns,
    of_example,
    piece_and_columns,
)
from mold_kernels.span_pieces import Pieces


@triton.jit
def _sum_columns(column_sums, column_piece, key_piece):
    """The columns' sums added up into the key pieces they are in."""
    return tl.sum(tl.where(column_piece[None, :] == key_piece[:, None], column_sums[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["parts", "row_count", "key_count", "TQ", "TK"])
def _span_attention_forward_kernel(
    q,
    k,
    lse_ptr,
    pairs_ptr,
    seen,
    groups,
    units,
    members,
    group,
    parts,
    row_count,
    key_count,
    TQ,
    TK,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PIECES: tl.constexpr = 2 * BLOCK_N  # enough that their columns fill tiles
    blocks = tl.cdiv(key_count, PIECES)
    row_piece = tl.program_id(0) // blocks
    key_block = tl.program_id(0) % blocks * PIECES
    result = (tl.program_id(1) // parts).to(tl.int64)
    batch = result // groups
    part = tl.program_id(1) % parts
    first_unit = (result % groups).to(tl.int32) * units
    seen = of_example(seen, batch, TQ, TK, row_count, key_count)
    lse_ptr += batch * groups * units * members * TQ

    low = tl.load(seen.pieces.key_first + key_block)
    high = tl.load(seen.pieces.key_first + tl.minimum(key_block + PIECES, key_count))
    first_row, end_row, offset, low, high = piece_and_columns(seen, row_piece, low, high, batch, TK, CAUSAL)
    length = end_row - first_row
    row_tiles = tl.cdiv(length * members, BLOCK_M)
    key_piece = key_block + tl.arange(0, BLOCK_N)
    lower = tl.zeros([BLOCK_N], tl.float32)
    upper = tl.zeros([BLOCK_N], tl.float32)
    for start in range(low, high, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        column = load_columns(seen, place, high, TK)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for x in range(units * part // parts * row_tiles, units * (part + 1) // parts * row_tiles):
            first_head = ((first_unit + x // row_tiles) * members).to(tl.int64)
            pair = x % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = pair < length * members
            head = first_head + pair // length
            row = first_row + pair % length
            keys = load_rows(k, batch, first_head // group, column, column < TK, D, BLOCK_D)
            p, _scores, _queries = column_probabilities(
                keys, column, q, lse_ptr, seen, batch, head, row, offset + row, inside, TQ, TK, scale, softcap, CAUSAL,
                D, BLOCK_D,
            )  # fmt: skip
            acc += p
        column_piece = tl.load(seen.pieces.column_piece + place, mask=place < high, other=-1)
        column_sums = tl.sum(acc, 1)
        lower += _sum_columns(column_sums, column_piece, key_piece)
        upper += _sum_columns(column_sums, column_piece, key_piece + BLOCK_N)
    line = ((part * tl.num_programs(1) // parts + result) * row_count + row_piece) * key_count
    tl.store(pairs_ptr + line + key_piece, lower, mask=key_piece < key_count)
    tl.store(pairs_ptr + line + key_piece + BLOCK_N, upper, mask=key_piece + BLOCK_N < key_count)


def span_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor | None,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    ranges: torch.Tensor | None,
    pieces: Sequence[torch.Tensor],
    scale: float,
    softcap: float | None,
    causal: bool,
    groups: int,
    row_reduction: str,
) -> torch.Tensor:
    """[B, H', S, M] float32."""
    sequences, (row_spans, key_spans) = len(row_spans) > len(q) and len(row_spans), _joined(q, row_spans, key_spans)
    every_key = key_spans is None
    batch, heads, length, _ = q.shape
    kv_heads, steps, keys = k.shape[1], row_spans.shape[1], k.shape[2] if every_key else key_spans.shape[1]
    lse, pieces = lse.contiguous(), Pieces(*pieces)
    seen = Seen(pieces, *padding_ends(mask), first, ranges)
    if row_reduction == "max":
        pooled, _ = span_attention_maxima(q, k, lse, row_spans, key_spans, seen, scale, softcap, causal, groups)
        return _of_batch(pooled.view(batch, groups, steps, keys), sequences, every_key)
    pooled = lse.new_empty(batch * groups, steps, keys)
    tile, options = tile_options("span_attention_forward", q)
    programs = pieces.row_count * triton.cdiv(pieces.key_count, 2 * tile.n)
    members = min(heads // kv_heads, heads // groups)
    units = heads // groups // members
    parts = min(units, triton.cdiv(2 * tiles.SPAN_PROGRAMS, programs * batch * groups))
    pairs = lse.new_empty(parts, batch * groups, pieces.row_count, pieces.key_count)
    _span_attention_forward_kernel[programs, batch * groups * parts](
        *(with_strides(q), with_strides(k), lse, pairs, seen),
        *(groups, units, members, heads // kv_heads, parts),
        *(pieces.row_count, pieces.key_count, length, k.shape[2], scale, softcap),
        CAUSAL=causal,
        **options,
    )
    rows: dict[str, Any] = {"spread": False, "mean": row_reduction == "mean", "factor": groups / heads}
    if every_key:  # a key is a piece and a key word
        pool_spans(pooled, pairs[..., :keys], row_spans, pieces.row_piece, **rows)
    else:
        by_step = lse.new_empty(batch * groups, steps, pieces.key_count)
        pool_spans(by_step, pairs, row_spans, pieces.row_piece, **rows)
        pool_spans(pooled.mT, by_step.mT[None], key_spans, pieces.key_piece, spread=False)
    return _of_batch(pooled.view(batch, groups, steps, keys), sequences, every_key)


def _of_batch(pooled, sequences, every_key):
    return _own_blocks(pooled, sequences, every_key).contiguous() if sequences else pooled


def _joined(q, row_spans, key_spans):
    """The spans of sequences as one example's: a row of one sees no key of another."""
    return [None if spans is None else spans.reshape(len(q), -1, 2) for spans in (row_spans, key_spans)]


def _own_blocks(pooled, sequences, every_key):
    """[sequences, H', S, M] of [1, H', sequences S, sequences M]: a sequence's steps over its own key words.

    Where every key is one all sequences have them all, [1, H', sequences S, Tk].
    """
    if every_key:
        return pooled[0].unflatten(-2, (sequences, -1)).movedim(1, 0)
    blocks = pooled[0].unflatten(-1, (sequences, -1)).unflatten(-3, (sequences, -1))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, 0)


def _spread(grad, row_spans, key_spans, pieces, **rows):
    """The gradient [B H', S, M] of spans as that of pairs of pieces, [B H', G, E]."""
    pairs = grad.new_empty(len(grad), pieces.row_count, pieces.key_count)
    if key_spans is None:  # a key is a piece and a key word
        pool_spans(pairs[..., : grad.shape[2]], grad[None], row_spans, pieces.row_piece, spread=True, **rows)
    else:
        by_step = grad.new_empty(len(grad), grad.shape[1], pieces.key_count)
        pool_spans(by_step.mT, grad.mT[None], key_spans, pieces.key_piece, spread=True)
        pool_spans(pairs, by_step[None], row_spans, pieces.row_piece, spread=True, **rows)
    return pairs


def span_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor | None,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    ranges: torch.Tensor | None,
    pieces: Sequence[torch.Tensor],
    scale: float,
    softcap: float | None,
    causal: bool,
    groups: int,
    row_reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dlse) from grad [B, H', S, M]."""
    sequences, (row_spans, key_spans) = len(row_spans) > len(q) and len(row_spans), _joined(q, row_spans, key_spans)
    every_key = key_spans is None
    if sequences:
        words = k.shape[2] if every_key else key_spans.shape[1]
        of_sequences, grad = grad, grad.new_zeros(len(q), groups, row_spans.shape[1], words)
        _own_blocks(grad, sequences, every_key).copy_(of_sequences)
    grad = grad.flatten(0, 1)
    unit = None
    if q.dtype == torch.float16:  # gradients of A are small: keep the weights within float16
        unit = grad.abs().amax().clamp_min(1e-30)
        grad = grad / unit
    lse, pieces = lse.contiguous(), Pieces(*pieces)
    seen = Seen(pieces, *padding_ends(mask), first, ranges)
    pairs, maxima, factor = None, None, groups / q.shape[1]
    if row_reduction == "max":
        _, largest_rows = span_attention_maxima(q, k, lse, row_spans, key_spans, seen, scale, softcap, causal, groups)
        of_rows = spans_of_pieces(row_spans, pieces.row_piece, pieces.row_count)
        of_keys = None if every_key else spans_of_pieces(key_spans, pieces.key_piece, pieces.key_count)
        maxima = largest_rows, (grad * factor).contiguous(), of_rows, of_keys, key_spans
    else:
        pairs = _spread(grad, row_spans, key_spans, pieces, mean=row_reduction == "mean", factor=factor)
    return span_gradient(q, k, lse, pairs, maxima, unit, seen, grad.shape[1:], scale, softcap, causal, groups)
