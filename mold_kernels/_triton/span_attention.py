"""Span attention: probabilities at the key columns, pooled over pieces of rows and keys; and its gradient.

The derivation is in `mold_kernels.span_attention`, pieces and columns in `mold_kernels._triton.span_pieces`.

Forward: a program takes one row piece and a block of key pieces. All its scores are k q^T tiles of [columns, rows], the
rows of a piece and the query heads of one key head side by side; they are added up over heads in registers and over
rows and columns at the end, so that one number a pair of pieces leaves the program. Backward: with the gradient spread
over pairs of pieces, g is one number a column and row piece. dq: a program takes one row piece and a key head and walks
the columns. dk: a program takes a tile of columns and a share of the row pieces; shares are added in a fixed order.

Cost with P = B Hq T N / 2 pairs: forward 2 P D FLOPs, reading q once a tile of columns and the columns once a row
piece; backward 4 P D for dq and 4 P D for dk. Stored: G x E floats for the pairs of pieces.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mold_kernels._triton.scores import (
    capped_scores,
    load_rows,
    product,
    score_slope,
    store_rows,
    tile_options,
    with_strides,
)
from mold_kernels._triton.span_pieces import pool_spans
from mold_kernels._triton.tiles import GATHERED_TOKENS
from mold_kernels.span_pieces import Pieces

_PROGRAMS = 512
"""Enough programs to fill a GPU of 132 to 148 multiprocessors: work is split until there are as many."""


@triton.jit
def _of_example(pieces, batch, T, row_count, key_count):
    """The pieces of one example, in the order of `Pieces`."""
    return (
        pieces[0] + batch * (T + 1),
        pieces[1] + batch * (row_count + 1),
        pieces[2] + batch * (T + 1),
        pieces[3] + batch * (key_count + 1),
        pieces[4] + batch * (T + 1),
        pieces[5] + batch * T,
        pieces[6] + batch * T,
    )


@triton.jit
def _piece_rows(row_start_ptr, piece):
    """(first row, row after the last, whether a step holds the piece)"""
    start = tl.load(row_start_ptr + piece)
    return start // 2, tl.load(row_start_ptr + piece + 1) // 2, start % 2 == 1


@triton.jit
def _seen_columns(before_ptr, range_ptr, low, high, first_row, end_row):
    """Of the columns [low, high) those that some row of a piece may see."""
    high = tl.minimum(high, tl.load(before_ptr + end_row))
    if range_ptr is not None:
        low = tl.maximum(low, tl.load(before_ptr + tl.load(range_ptr + first_row)))
    return low, high


@triton.jit
def _probabilities(scores, lse, row, column, range_ptr, T):
    """exp(score - lse) where the row sees the column; all broadcast.

    Not in base 2 as in the flash kernels: lse rounded in base 2 would shift whole rows.
    """
    visible = column <= row
    if range_ptr is not None:
        visible = visible & (column >= tl.load(range_ptr + row, mask=row < T, other=0))
    return tl.where(visible, tl.exp(scores - lse), 0.0)


@triton.jit
def _sum_columns(column_sums, column_piece, key_piece):
    """The columns' sums added up into the key pieces they are in."""
    return tl.sum(tl.where(column_piece[None, :] == key_piece[:, None], column_sums[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["parts", "row_count", "key_count", "T"])
def _span_attention_forward_kernel(
    q,
    k,
    lse_ptr,
    pairs_ptr,
    pieces,
    range_ptr,
    kv_heads,
    group,
    parts,
    row_count,
    key_count,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PIECES: tl.constexpr = 2 * BLOCK_N  # enough that their columns fill tiles
    blocks = tl.cdiv(key_count, PIECES)
    row_piece = tl.program_id(0) // blocks
    key_block = tl.program_id(0) % blocks * PIECES
    batch = (tl.program_id(1) // parts).to(tl.int64)
    part = tl.program_id(1) % parts
    _, row_start_ptr, _, key_first_ptr, before_ptr, columns_ptr, column_piece_ptr = _of_example(
        pieces, batch, T, row_count, key_count
    )

    first_row, end_row, held = _piece_rows(row_start_ptr, row_piece)
    low = tl.load(key_first_ptr + key_block)
    high = tl.load(key_first_ptr + tl.minimum(key_block + PIECES, key_count))
    low, high = _seen_columns(before_ptr, range_ptr, low, high, first_row, end_row)
    high = tl.where(held, high, 0)
    length = end_row - first_row
    tiles = tl.cdiv(length * group, BLOCK_M)
    key_piece = key_block + tl.arange(0, BLOCK_N)
    lower = tl.zeros([BLOCK_N], tl.float32)
    upper = tl.zeros([BLOCK_N], tl.float32)
    for start in range(low, high, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        column = tl.load(columns_ptr + place, mask=place < high, other=T)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for x in range(kv_heads * part // parts * tiles, kv_heads * (part + 1) // parts * tiles):
            kv_head = (x // tiles).to(tl.int64)
            pair = x % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = pair < length * group
            head = kv_head * group + pair // length
            row = first_row + pair % length
            lse = tl.load(
                lse_ptr + (batch * kv_heads * group + head) * T + row,
                mask=inside,
                other=float("inf"),
            )
            keys = load_rows(k, batch, kv_head, column, column < T, D, BLOCK_D)
            queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
            scores = capped_scores(product(keys, queries.T, None), scale, softcap, 1.0)
            acc += _probabilities(scores, lse[None, :], row[None, :], column[:, None], range_ptr, T)
        column_piece = tl.load(column_piece_ptr + place, mask=place < high, other=-1)
        column_sums = tl.sum(acc, 1)
        lower += _sum_columns(column_sums, column_piece, key_piece)
        upper += _sum_columns(column_sums, column_piece, key_piece + BLOCK_N)
    line = ((part * tl.num_programs(1) // parts + batch) * row_count + row_piece) * key_count
    tl.store(pairs_ptr + line + key_piece, lower, mask=key_piece < key_count)
    tl.store(pairs_ptr + line + key_piece + BLOCK_N, upper, mask=key_piece + BLOCK_N < key_count)


@triton.jit(do_not_specialize=["row_count", "key_count", "T"])
def _span_attention_backward_dq_kernel(
    q,
    k,
    dq,
    lse_ptr,
    pairs_ptr,
    unit_ptr,
    dlse_ptr,
    pieces,
    range_ptr,
    kv_heads,
    group,
    row_count,
    key_count,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_piece = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    _, row_start_ptr, _, _, before_ptr, columns_ptr, column_piece_ptr = _of_example(
        pieces, batch, T, row_count, key_count
    )
    pairs_ptr += (batch * row_count + row_piece) * key_count

    first_row, end_row, held = _piece_rows(row_start_ptr, row_piece)
    low, high = _seen_columns(before_ptr, range_ptr, 0, T, first_row, end_row)
    high = tl.where(held, high, 0)
    length = end_row - first_row
    unit = 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr)
    for first in range(0, length * group, BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        inside = pair < length * group
        head = kv_head * group + pair // length
        row = first_row + pair % length
        queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
        lse = tl.load(
            lse_ptr + (batch * kv_heads * group + head) * T + row,
            mask=inside,
            other=float("inf"),
        )
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dlse = tl.zeros([BLOCK_M], tl.float32)
        for start in range(low, high, BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            column = tl.load(columns_ptr + place, mask=place < high, other=T)
            column_piece = tl.load(column_piece_ptr + place, mask=place < high, other=0)
            g = tl.load(pairs_ptr + column_piece)
            keys = load_rows(k, batch, kv_head, column, column < T, D, BLOCK_D)
            scores = capped_scores(product(queries, keys.T, None), scale, softcap, 1.0)
            slope = score_slope(scores, softcap, 1.0)
            weights = g[None, :] * _probabilities(scores, lse[:, None], row[:, None], column[None, :], range_ptr, T)
            dlse -= tl.sum(weights, 1)
            acc = product((weights * slope).to(keys.dtype), keys, acc)
        store_rows(dq, batch, head, row, inside, acc * (scale * unit), D, BLOCK_D)
        tl.store(dlse_ptr + (batch * kv_heads * group + head) * T + row, dlse * unit, mask=inside)


@triton.jit
def _shares(columns, slots, BLOCK_N: tl.constexpr):
    """(tiles of columns, shares of the rows) that fill the slots; few enough shares that adding them is cheap."""
    tiles = tl.maximum(tl.cdiv(columns, BLOCK_N), 1)
    return tiles, tl.minimum(slots // tiles, 32)


@triton.jit(do_not_specialize=["row_count", "key_count", "T"])
def _span_attention_backward_dk_kernel(
    q,
    k,
    lse_ptr,
    pairs_ptr,
    slots_ptr,
    pieces,
    range_ptr,
    kv_heads,
    group,
    row_count,
    key_count,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    row_piece_ptr, row_start_ptr, _, _, before_ptr, columns_ptr, column_piece_ptr = _of_example(
        pieces, batch, T, row_count, key_count
    )
    pairs_ptr += batch * row_count * key_count

    count = tl.load(before_ptr + T)
    tiles, shares = _shares(count, tl.num_programs(0), BLOCK_N)
    share = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * BLOCK_N
    if (start < count) & (share < shares):
        place = start + tl.arange(0, BLOCK_N)
        column = tl.load(columns_ptr + place, mask=place < count, other=T)
        column_piece = tl.load(column_piece_ptr + place, mask=place < count, other=0)
        keys = load_rows(k, batch, kv_head, column, column < T, D, BLOCK_D)
        low = tl.load(row_piece_ptr + tl.load(columns_ptr + start))
        last_row = T - 1
        if range_ptr is not None:
            last_column = tl.load(columns_ptr + tl.minimum(start + BLOCK_N, count) - 1)
            last_row = tl.load(range_ptr + T + last_column) - 1
        seeing = tl.load(row_piece_ptr + last_row) + 1 - low
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for x in range((low + seeing * share // shares) * group, (low + seeing * (share + 1) // shares) * group):
            row_piece = (x // group).to(tl.int64)
            head = kv_head * group + x % group
            # Not `_`, which has another type above: Triton 3.6 takes that for a variable that the loop changes.
            first_row, end_row, _held = _piece_rows(row_start_ptr, row_piece)
            row = first_row + tl.arange(0, BLOCK_M)
            inside = row < end_row
            g = tl.load(pairs_ptr + row_piece * key_count + column_piece)
            queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
            lse = tl.load(
                lse_ptr + (batch * kv_heads * group + head) * T + row,
                mask=inside,
                other=float("inf"),
            )
            scores = capped_scores(product(keys, queries.T, None), scale, softcap, 1.0)
            weights = g[:, None] * score_slope(scores, softcap, 1.0)
            weights *= _probabilities(scores, lse[None, :], row[None, :], column[:, None], range_ptr, T)
            dk = product(weights.to(queries.dtype), queries, dk)
        slot = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N
        lane = tl.arange(0, BLOCK_N)
        store_rows((slots_ptr, D, 0, D, 1), slot, 0, lane, lane < BLOCK_N, dk, D, BLOCK_D)


@triton.jit(do_not_specialize=["slots", "T"])
def _span_attention_gather_dk_kernel(
    slots_ptr,
    unit_ptr,
    dk,
    before_ptr,
    kv_heads,
    slots,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    before_ptr += batch * (T + 1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(before_ptr + token, mask=token < T, other=0)
    held = (token < T) & (tl.load(before_ptr + token + 1, mask=token < T, other=0) > place)
    tiles, shares = _shares(tl.load(before_ptr + T), slots, BLOCK_N)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    slot = tl.program_id(1).to(tl.int64) * slots * BLOCK_N
    for share in range(shares):
        place_of_share = share * tiles * BLOCK_N + place
        acc += load_rows((slots_ptr, D, 0, D, 1), slot, 0, place_of_share, held, D, BLOCK_D)
    if unit_ptr is not None:
        scale *= tl.load(unit_ptr)
    store_rows(dk, batch, kv_head, token, token < T, acc * scale, D, BLOCK_D)


def span_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor,
    first: torch.Tensor | None,
    ranges: torch.Tensor | None,
    pieces: Sequence[torch.Tensor],
    scale: float,
    softcap: float | None,
    causal: bool,
    groups: int,
    row_reduction: str,
) -> torch.Tensor:
    """[B, 1, S, M] float32."""
    batch, heads, length, _ = q.shape
    kv_heads, steps, keys = k.shape[1], row_spans.shape[1], key_spans.shape[1]
    pooled = lse.new_empty(batch, steps, keys)
    lse, pieces = lse.contiguous(), Pieces(*pieces)
    tile, options = tile_options("span_attention_forward", q)
    programs = pieces.row_count * triton.cdiv(pieces.key_count, 2 * tile.n)
    parts = min(kv_heads, triton.cdiv(2 * _PROGRAMS, programs * batch))
    pairs = lse.new_empty(parts, batch, pieces.row_count, pieces.key_count)
    _span_attention_forward_kernel[programs, batch * parts](
        *(with_strides(q), with_strides(k), lse, pairs, tuple(pieces), ranges, kv_heads, heads // kv_heads, parts),
        *(pieces.row_count, pieces.key_count, length, scale, softcap),
        **options,
    )
    by_step = lse.new_empty(batch, steps, pieces.key_count)
    pool_spans(
        by_step, pairs, row_spans, pieces.row_piece, spread=False, mean=row_reduction == "mean", factor=1 / heads
    )
    pool_spans(pooled.mT, by_step.mT[None], key_spans, pieces.key_piece, spread=False)
    return pooled[:, None]


def span_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor,
    first: torch.Tensor | None,
    ranges: torch.Tensor | None,
    pieces: Sequence[torch.Tensor],
    scale: float,
    softcap: float | None,
    causal: bool,
    groups: int,
    row_reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dlse) from grad [B, 1, S, M]."""
    grad = grad[:, 0]
    batch, heads, length, head_dim = q.shape
    kv_heads, steps = k.shape[1], row_spans.shape[1]
    unit = None
    if q.dtype == torch.float16:  # gradients of A are small: keep the weights within float16
        unit = grad.abs().amax().clamp_min(1e-30)
        grad = grad / unit
    lse, pieces = lse.contiguous(), Pieces(*pieces)
    by_step = lse.new_empty(batch, steps, pieces.key_count)
    pairs = lse.new_empty(batch, pieces.row_count, pieces.key_count)
    pool_spans(by_step.mT, grad.mT[None], key_spans, pieces.key_piece, spread=True, factor=1 / heads)
    pool_spans(pairs, by_step[None], row_spans, pieces.row_piece, spread=True, mean=row_reduction == "mean")

    dq, dk, dlse = torch.empty_like(q), k.new_empty(k.shape), lse.new_empty(batch, heads, length)
    scalars = kv_heads, heads // kv_heads, pieces.row_count, pieces.key_count, length, scale, softcap
    _, options = tile_options("span_attention_backward_dq", q)
    _span_attention_backward_dq_kernel[pieces.row_count, batch * kv_heads](
        *(*map(with_strides, (q, k, dq)), lse, pairs, unit, dlse, tuple(pieces), ranges, *scalars), **options
    )
    tile, options = tile_options("span_attention_backward_dk", q)
    slots = max(triton.cdiv(length, tile.n), triton.cdiv(_PROGRAMS, batch * kv_heads))
    partial = lse.new_empty(batch * kv_heads, slots, tile.n, head_dim)
    _span_attention_backward_dk_kernel[slots, batch * kv_heads](
        *(with_strides(q), with_strides(k), lse, pairs, partial, tuple(pieces), ranges, *scalars), **options
    )
    _span_attention_gather_dk_kernel[triton.cdiv(length, GATHERED_TOKENS), batch * kv_heads](
        *(partial, unit, with_strides(dk), pieces.before, kv_heads, slots, length, scale),
        D=head_dim,
        BLOCK_D=options["BLOCK_D"],
        BLOCK_N=tile.n,
        BLOCK_T=GATHERED_TOKENS,
        enable_fp_fusion=True,
    )
    return dq, dk, dlse
