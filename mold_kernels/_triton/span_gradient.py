"""The gradient of span attention: of queries, keys and log-sum-exp, from the gradient of the probabilities.

That is g: one number a pair of pieces, which is all that a column and a row piece have, or with maxima one a row and
column, which `span_maxima` makes. dq and dlse: a program takes one row piece and a unit (`span_attention` says of what)
and walks the columns. dk: a program takes a tile of columns and a share of the row pieces; shares are added in a fixed
order.

Cost with P = B Hq T N / 2 pairs: 4 P D FLOPs for dq and 4 P D for dk.
"""

import torch
import triton
import triton.language as tl

from mold_kernels._triton import tiles
from mold_kernels._triton.scores import (
    capped_scores,
    first_position,
    load_padding,
    load_rows,
    product,
    score_slope,
    store_rows,
    tile_options,
    with_strides,
)
from mold_kernels._triton.span_maxima import maximum_gradient
from mold_kernels._triton.span_probabilities import (
    Seen,
    column_probabilities,
    load_columns,
    load_queries,
    of_example,
    piece_and_columns,
    piece_rows,
    probabilities,
)


@triton.jit(do_not_specialize=["steps", "words", "row_count", "key_count", "TQ", "TK"])
def _span_attention_backward_dq_kernel(
    q,
    k,
    dq,
    lse_ptr,
    pairs_ptr,
    maxima,
    unit_ptr,
    dlse_ptr,
    seen,
    groups,
    heads,
    members,
    group,
    steps,
    words,
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
    row_piece = tl.num_programs(0) - 1 - tl.program_id(0)
    units = heads // members
    batch = (tl.program_id(1) // units).to(tl.int64)
    first_head = (tl.program_id(1) % units * members).to(tl.int64)
    kv_head = first_head // group
    seen = of_example(seen, batch, TQ, TK, row_count, key_count)
    result = batch * groups + first_head * groups // heads
    lse_ptr += batch * heads * TQ

    low = tl.load(seen.pieces.before)
    high = tl.load(seen.pieces.before + TK)
    first_row, end_row, offset, low, high = piece_and_columns(seen, row_piece, low, high, batch, TK, CAUSAL)
    length = end_row - first_row
    unit = 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr)
    for first in range(0, length * members, BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        inside = pair < length * members
        head = first_head + pair // length
        row = first_row + pair % length
        queries, lse = load_queries(q, lse_ptr, seen, batch, head, row, offset + row, inside, TQ, CAUSAL, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dlse = tl.zeros([BLOCK_M], tl.float32)
        for start in range(low, high, BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            column = load_columns(seen, place, high, TK)
            column_piece = tl.load(seen.pieces.column_piece + place, mask=place < high, other=0)
            if maxima is None:
                g = tl.load(pairs_ptr + (result * row_count + row_piece) * key_count + column_piece)[None, :]
            else:
                g = maximum_gradient(
                    maxima, batch, result, row_piece, row_count, key_count, steps, words, row, column, column_piece, TK,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
            keys = load_rows(k, batch, kv_head, column, column < TK, D, BLOCK_D)
            scores = capped_scores(product(queries, keys.T, None), scale, softcap, 1.0)
            slope = score_slope(scores, softcap, 1.0)
            weights = g * probabilities(
                scores, lse[:, None], (offset + row)[:, None], column[None, :], seen, TK, CAUSAL
            )
            dlse -= tl.sum(weights, 1)
            acc = product((weights * slope).to(keys.dtype), keys, acc)
        store_rows(dq, batch, head, row, inside, acc * (scale * unit), D, BLOCK_D)
        tl.store(dlse_ptr + (batch * heads + head) * TQ + row, dlse * unit, mask=inside)


@triton.jit
def _shares(columns, slots, BLOCK_N: tl.constexpr):
    """(tiles of columns, shares of the rows) that fill the slots; few enough shares that adding them is cheap."""
    column_tiles = tl.maximum(tl.cdiv(columns, BLOCK_N), 1)
    return column_tiles, tl.minimum(slots // column_tiles, 32)


@triton.jit(do_not_specialize=["steps", "words", "row_count", "key_count", "TQ", "TK"])
def _span_attention_backward_dk_kernel(
    q,
    k,
    lse_ptr,
    pairs_ptr,
    maxima,
    slots_ptr,
    seen,
    groups,
    kv_heads,
    group,
    steps,
    words,
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
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    seen = of_example(seen, batch, TQ, TK, row_count, key_count)
    lse_ptr += batch * kv_heads * group * TQ
    offset = first_position(seen.first, batch)
    count = tl.load(seen.pieces.before + TK)
    column_tiles, shares = _shares(count, tl.num_programs(0), BLOCK_N)
    share = tl.program_id(0) // column_tiles
    start = tl.program_id(0) % column_tiles * BLOCK_N
    if (start < count) & (share < shares):
        place = start + tl.arange(0, BLOCK_N)
        column = load_columns(seen, place, count, TK)
        column_piece = tl.load(seen.pieces.column_piece + place, mask=place < count, other=0)
        keys = load_rows(k, batch, kv_head, column, column < TK, D, BLOCK_D)
        first_column = tl.load(seen.pieces.columns + start)
        last_column = tl.load(seen.pieces.columns + tl.minimum(start + BLOCK_N, count) - 1)
        begin = 0
        end = offset + TQ
        if CAUSAL:
            begin = first_column
        if seen.ranges is not None:
            end = tl.load(seen.ranges + TK + last_column)
            if not CAUSAL:
                begin = tl.load(seen.ranges + first_column)
        if seen.padding is not None:
            first_real, end_real, _ = load_padding(seen.padding, batch)
            if CAUSAL:
                begin = tl.maximum(begin, first_real)
                end = tl.minimum(end, end_real)
            end = tl.where((last_column < first_real) | (first_column >= end_real), begin, end)
        # Of the rows at [begin, end) the pieces; a column that no row may see has none or one.
        low = tl.load(seen.pieces.row_piece + tl.minimum(tl.maximum(begin - offset, 0), TQ))
        last_row = tl.minimum(tl.maximum(end - offset, 1), TQ) - 1
        seeing = tl.maximum(tl.load(seen.pieces.row_piece + last_row) + 1 - low, 0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for x in range((low + seeing * share // shares) * group, (low + seeing * (share + 1) // shares) * group):
            row_piece = (x // group).to(tl.int64)
            head = kv_head * group + x % group
            first_row, end_row, _held = piece_rows(seen.pieces, row_piece)
            row = first_row + tl.arange(0, BLOCK_M)
            inside = row < end_row
            result = batch * groups + head * groups // (kv_heads * group)
            if maxima is None:
                g = tl.load(pairs_ptr + (result * row_count + row_piece) * key_count + column_piece)[:, None]
            else:
                g = maximum_gradient(
                    maxima, batch, result, row_piece, row_count, key_count, steps, words, row, column, column_piece, TK,
                    BLOCK_M, BLOCK_N,
                ).T  # fmt: skip
            p, scores, queries = column_probabilities(
                keys, column, q, lse_ptr, seen, batch, head, row, offset + row, inside, TQ, TK, scale, softcap, CAUSAL,
                D, BLOCK_D,
            )  # fmt: skip
            weights = g * score_slope(scores, softcap, 1.0) * p
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
    column_tiles, shares = _shares(tl.load(before_ptr + T), slots, BLOCK_N)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    slot = tl.program_id(1).to(tl.int64) * slots * BLOCK_N
    for share in range(shares):
        place_of_share = share * column_tiles * BLOCK_N + place
        acc += load_rows((slots_ptr, D, 0, D, 1), slot, 0, place_of_share, held, D, BLOCK_D)
    if unit_ptr is not None:
        scale *= tl.load(unit_ptr)
    store_rows(dk, batch, kv_head, token, token < T, acc * scale, D, BLOCK_D)


def span_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    pairs: torch.Tensor | None,
    maxima: tuple | None,
    unit: torch.Tensor | None,
    seen: Seen,
    shape: tuple[int, int],
    scale: float,
    softcap: float | None,
    causal: bool,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dlse), dq and dk in q's dtype, dlse float32.

    Args:
        pairs: float32 [B H', G, E], the gradient of the probabilities of each pair of pieces; None where there are
            `maxima`.
        maxima: as `maximum_gradient` has them.
        unit: float32 [], by which the gradients were divided; None: by nothing.
        shape: how many steps and key words there are.
    """
    batch, heads, length, head_dim = q.shape
    kv_heads, pieces = k.shape[1], seen.pieces
    dq, dk, dlse = torch.empty_like(q), k.new_empty(k.shape), lse.new_empty(batch, heads, length)
    sizes = *shape, pieces.row_count, pieces.key_count, length, k.shape[2], scale, softcap
    members = min(heads // kv_heads, heads // groups)
    warps = {} if maxima is None else {"num_warps": tiles.MAXIMA_WARPS}
    _, options = tile_options("span_attention_backward_dq", q)
    _span_attention_backward_dq_kernel[pieces.row_count, batch * heads // members](
        *(*map(with_strides, (q, k, dq)), lse, pairs, maxima, unit, dlse, seen),
        *(groups, heads, members, heads // kv_heads, *sizes),
        CAUSAL=causal,
        **(options | warps),
    )
    tile, options = tile_options("span_attention_backward_dk", q)
    slots = max(triton.cdiv(k.shape[2], tile.n), triton.cdiv(tiles.SPAN_PROGRAMS, batch * kv_heads))
    partial = lse.new_empty(batch * kv_heads, slots, tile.n, head_dim)
    _span_attention_backward_dk_kernel[slots, batch * kv_heads](
        *(with_strides(q), with_strides(k), lse, pairs, maxima, partial, seen),
        *(groups, kv_heads, heads // kv_heads, *sizes),
        CAUSAL=causal,
        **(options | warps),
    )
    _span_attention_gather_dk_kernel[triton.cdiv(k.shape[2], tiles.GATHERED_TOKENS), batch * kv_heads](
        *(partial, unit, with_strides(dk), pieces.before, kv_heads, slots, k.shape[2], scale),
        D=head_dim,
        BLOCK_D=options["BLOCK_D"],
        BLOCK_N=tile.n,
        BLOCK_T=tiles.GATHERED_TOKENS,
        enable_fp_fusion=True,
    )
    return dq, dk, dlse
