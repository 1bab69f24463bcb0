"""Span attention: probabilities at the key columns, pooled over pieces of rows and keys; and its gradient.

The derivation is in `mold_kernels.span_attention`, pieces and columns in `mold_kernels._triton.span_pieces`. A **unit**
is heads that share a key head and a gradient: those of a key head, or one head where the result keeps each apart.

Forward: a program takes one row piece and a block of key pieces. All its scores are k q^T tiles of [columns, rows], the
rows of a piece and the query heads of one key head side by side; they are added up over heads in registers and over
rows and columns at the end, so that one number a pair of pieces leaves the program. Backward: with the gradient spread
over pairs of pieces, g is one number a column and row piece. dq: a program takes one row piece and a key head and walks
the columns. dk: a program takes a tile of columns and a share of the row pieces; shares are added in a fixed order.

Maxima: a program takes one row piece and a block of key words, adds up the tiles over heads and over each word's
columns, and keeps the largest row (`span_maxima` does the rest); in the backward g is then one number a row and column.

Cost with P = B Hq T N / 2 pairs: forward 2 P D FLOPs, reading q once a tile of columns and the columns once a row
piece; backward 4 P D for dq and 4 P D for dk. Stored: G x E floats for the pairs of pieces.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mold_kernels._triton.scores import (
    capped_scores,
    first_position,
    load_padding,
    load_rows,
    padding_ends,
    product,
    score_slope,
    selected_sums,
    store_rows,
    tile_options,
    with_strides,
)
from mold_kernels._triton.span_maxima import maximum_gradient, spans_of_pieces, step_maxima
from mold_kernels._triton.span_pieces import load_span, pool_spans
from mold_kernels._triton.tiles import GATHERED_TOKENS, MAXIMA_WARPS
from mold_kernels.span_pieces import Pieces

_PROGRAMS = 512
"""Enough programs to fill a GPU of 132 to 148 multiprocessors: work is split until there are as many."""


@triton.jit
def _of_example(pieces, batch, TQ, TK, row_count, key_count):
    """The pieces of one example, in the order of `Pieces`."""
    return (
        pieces[0] + batch * (TQ + 1),
        pieces[1] + batch * (row_count + 1),
        pieces[2] + batch * (TK + 1),
        pieces[3] + batch * (key_count + 1),
        pieces[4] + batch * (TK + 1),
        pieces[5] + batch * TK,
        pieces[6] + batch * TK,
    )


@triton.jit
def _piece_rows(row_start_ptr, piece):
    """(first row, row after the last, whether a step holds the piece)"""
    start = tl.load(row_start_ptr + piece)
    return start // 2, tl.load(row_start_ptr + piece + 1) // 2, start % 2 == 1


@triton.jit
def _piece_and_columns(
    row_start_ptr,
    row_piece,
    low,
    high,
    before_ptr,
    padding_ptr,
    first_ptr,
    range_ptr,
    batch,
    T,
    CAUSAL: tl.constexpr,
):
    """(a piece's first row, row after its last, position of row 0, first, end of the columns that its rows may see)

    Of the columns [low, high); of none where no step holds the piece.
    """
    first_row, end_row, held = _piece_rows(row_start_ptr, row_piece)
    offset = first_position(first_ptr, batch)
    high = tl.where(held, high, low)
    if held:
        begin = offset + first_row
        end = offset + end_row
        if CAUSAL:
            high = tl.minimum(high, tl.load(before_ptr + end))
        if range_ptr is not None:
            low = tl.maximum(low, tl.load(before_ptr + tl.load(range_ptr + begin)))
            if not CAUSAL:
                high = tl.minimum(high, tl.load(before_ptr + tl.load(range_ptr + T + end - 1)))
        if padding_ptr is not None:
            first_real, end_real, _ = load_padding(padding_ptr, batch)
            low = tl.maximum(low, tl.load(before_ptr + first_real))
            high = tl.minimum(high, tl.load(before_ptr + end_real))
            if CAUSAL:
                high = tl.where(begin < end_real, high, low)
    return first_row, end_row, offset, low, high


@triton.jit
def _load_columns(columns_ptr, valid_ptr, place, end, T):
    """The keys of the columns at `place`; T, which no row sees and nobody reads, for padding and from `end` on."""
    column = tl.load(columns_ptr + place, mask=place < end, other=T)
    if valid_ptr is not None:
        column = tl.where(tl.load(valid_ptr + column, mask=column < T, other=0).to(tl.int1), column, T)
    return column


@triton.jit
def _load_queries(
    q,
    lse_ptr,
    valid_ptr,
    batch,
    head,
    row,
    position,
    inside,
    TQ,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(queries, lse) of the rows `inside`, which stand at `position`; (0, +inf) of others and of padding: P is 0."""
    if valid_ptr is not None and CAUSAL:
        inside = inside & tl.load(valid_ptr + position, mask=inside, other=0).to(tl.int1)
    lse_ptr += head * TQ + row
    return load_rows(q, batch, head, row, inside, D, BLOCK_D), tl.load(lse_ptr, mask=inside, other=float("inf"))


@triton.jit
def _probabilities(scores, lse, position, column, range_ptr, T, CAUSAL: tl.constexpr):
    """exp(score - lse) where the row at `position` sees the column; all broadcast.

    Not in base 2 as in the flash kernels: lse rounded in base 2 would shift whole rows.
    """
    visible = column <= position if CAUSAL else column < T
    if range_ptr is not None:
        visible = visible & (column >= tl.load(range_ptr + position, mask=position < T, other=0))
        if not CAUSAL:
            visible = visible & (column < tl.load(range_ptr + T + position, mask=position < T, other=0))
    return tl.where(visible, tl.exp(scores - lse), 0.0)


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
    pieces,
    valid_ptr,
    padding_ptr,
    first_ptr,
    range_ptr,
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
    _, row_start_ptr, _, key_first_ptr, before_ptr, columns_ptr, column_piece_ptr = _of_example(
        pieces, batch, TQ, TK, row_count, key_count
    )
    lse_ptr += batch * groups * units * members * TQ
    if valid_ptr is not None:
        valid_ptr += batch * TK

    low = tl.load(key_first_ptr + key_block)
    high = tl.load(key_first_ptr + tl.minimum(key_block + PIECES, key_count))
    first_row, end_row, offset, low, high = _piece_and_columns(
        row_start_ptr, row_piece, low, high, before_ptr, padding_ptr, first_ptr, range_ptr, batch, TK, CAUSAL
    )
    length = end_row - first_row
    tiles = tl.cdiv(length * members, BLOCK_M)
    key_piece = key_block + tl.arange(0, BLOCK_N)
    lower = tl.zeros([BLOCK_N], tl.float32)
    upper = tl.zeros([BLOCK_N], tl.float32)
    for start in range(low, high, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        column = _load_columns(columns_ptr, valid_ptr, place, high, TK)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for x in range(units * part // parts * tiles, units * (part + 1) // parts * tiles):
            first_head = ((first_unit + x // tiles) * members).to(tl.int64)
            pair = x % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = pair < length * members
            head = first_head + pair // length
            row = first_row + pair % length
            keys = load_rows(k, batch, first_head // group, column, column < TK, D, BLOCK_D)
            queries, lse = _load_queries(
                q, lse_ptr, valid_ptr, batch, head, row, offset + row, inside, TQ, CAUSAL, D, BLOCK_D
            )
            scores = capped_scores(product(keys, queries.T, None), scale, softcap, 1.0)
            acc += _probabilities(scores, lse[None, :], (offset + row)[None, :], column[:, None], range_ptr, TK, CAUSAL)
        column_piece = tl.load(column_piece_ptr + place, mask=place < high, other=-1)
        column_sums = tl.sum(acc, 1)
        lower += _sum_columns(column_sums, column_piece, key_piece)
        upper += _sum_columns(column_sums, column_piece, key_piece + BLOCK_N)
    line = ((part * tl.num_programs(1) // parts + result) * row_count + row_piece) * key_count
    tl.store(pairs_ptr + line + key_piece, lower, mask=key_piece < key_count)
    tl.store(pairs_ptr + line + key_piece + BLOCK_N, upper, mask=key_piece + BLOCK_N < key_count)


@triton.jit(do_not_specialize=["words", "row_count", "key_count", "TQ", "TK"])
def _span_attention_maxima_kernel(
    q,
    k,
    lse_ptr,
    largest_ptr,
    rows_ptr,
    key_spans_ptr,
    pieces,
    valid_ptr,
    padding_ptr,
    first_ptr,
    range_ptr,
    groups,
    heads,
    group,
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
    WORDS: tl.constexpr,
):
    blocks = tl.cdiv(words, WORDS)
    row_piece = tl.program_id(0) // blocks
    first_word = tl.program_id(0) % blocks * WORDS
    word = first_word + tl.arange(0, WORDS)
    result = tl.program_id(1).to(tl.int64)
    batch = result // groups
    first_head = tl.program_id(1) % groups * heads
    _, row_start_ptr, _, _, before_ptr, columns_ptr, _ = _of_example(pieces, batch, TQ, TK, row_count, key_count)
    lse_ptr += batch * groups * heads * TQ
    if valid_ptr is not None:
        valid_ptr += batch * TK

    if key_spans_ptr is None:
        start = tl.minimum(word, TK)
        end = tl.minimum(word + 1, TK)
    else:
        start, end = load_span(key_spans_ptr + batch * words * 2, word, words, TK)
    low = tl.min(tl.where(start < end, tl.load(before_ptr + start), TK), 0)
    high = tl.max(tl.where(start < end, tl.load(before_ptr + end), 0), 0)
    first_row, end_row, offset, low, high = _piece_and_columns(
        row_start_ptr, row_piece, low, high, before_ptr, padding_ptr, first_ptr, range_ptr, batch, TK, CAUSAL
    )
    if key_spans_ptr is None:  # a column is a word: one tile, wherever in it the seen ones begin
        low = tl.where(low < high, first_word, high)
    row = first_row + tl.arange(0, BLOCK_M)
    total = tl.zeros([WORDS, BLOCK_M], tl.float32)
    for first in range(low, high, BLOCK_N):
        column = _load_columns(columns_ptr, valid_ptr, first + tl.arange(0, BLOCK_N), high, TK)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for x in range(heads):
            head = (first_head + x).to(tl.int64)
            keys = load_rows(k, batch, head // group, column, column < TK, D, BLOCK_D)
            queries, lse = _load_queries(
                q, lse_ptr, valid_ptr, batch, head, row, offset + row, row < end_row, TQ, CAUSAL, D, BLOCK_D
            )
            scores = capped_scores(product(keys, queries.T, None), scale, softcap, 1.0)
            acc += _probabilities(scores, lse[None, :], (offset + row)[None, :], column[:, None], range_ptr, TK, CAUSAL)
        if key_spans_ptr is None:
            total += acc
        else:
            holds = (start[:, None] <= column[None, :]) & (column[None, :] < end[:, None])
            total = selected_sums(holds.to(tl.float32), acc, total)
    total = tl.where(total == total, total, float("inf"))  # NaN is more than any number
    largest = tl.max(total, 1)
    largest_row = tl.min(tl.where(total == largest[:, None], row[None, :], TQ), 1)
    at = (result * row_count + row_piece) * words + word
    tl.store(largest_ptr + at, largest, mask=word < words)
    tl.store(rows_ptr + at, largest_row, mask=word < words)


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
    pieces,
    valid_ptr,
    padding_ptr,
    first_ptr,
    range_ptr,
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
    _, row_start_ptr, _, _, before_ptr, columns_ptr, column_piece_ptr = _of_example(
        pieces, batch, TQ, TK, row_count, key_count
    )
    result = batch * groups + first_head * groups // heads
    lse_ptr += batch * heads * TQ
    if valid_ptr is not None:
        valid_ptr += batch * TK

    low = tl.load(before_ptr)
    high = tl.load(before_ptr + TK)
    first_row, end_row, offset, low, high = _piece_and_columns(
        row_start_ptr, row_piece, low, high, before_ptr, padding_ptr, first_ptr, range_ptr, batch, TK, CAUSAL
    )
    length = end_row - first_row
    unit = 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr)
    for first in range(0, length * members, BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        inside = pair < length * members
        head = first_head + pair // length
        row = first_row + pair % length
        queries, lse = _load_queries(
            q, lse_ptr, valid_ptr, batch, head, row, offset + row, inside, TQ, CAUSAL, D, BLOCK_D
        )
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dlse = tl.zeros([BLOCK_M], tl.float32)
        for start in range(low, high, BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            column = _load_columns(columns_ptr, valid_ptr, place, high, TK)
            column_piece = tl.load(column_piece_ptr + place, mask=place < high, other=0)
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
            weights = g * _probabilities(
                scores, lse[:, None], (offset + row)[:, None], column[None, :], range_ptr, TK, CAUSAL
            )
            dlse -= tl.sum(weights, 1)
            acc = product((weights * slope).to(keys.dtype), keys, acc)
        store_rows(dq, batch, head, row, inside, acc * (scale * unit), D, BLOCK_D)
        tl.store(dlse_ptr + (batch * heads + head) * TQ + row, dlse * unit, mask=inside)


@triton.jit
def _shares(columns, slots, BLOCK_N: tl.constexpr):
    """(tiles of columns, shares of the rows) that fill the slots; few enough shares that adding them is cheap."""
    tiles = tl.maximum(tl.cdiv(columns, BLOCK_N), 1)
    return tiles, tl.minimum(slots // tiles, 32)


@triton.jit(do_not_specialize=["steps", "words", "row_count", "key_count", "TQ", "TK"])
def _span_attention_backward_dk_kernel(
    q,
    k,
    lse_ptr,
    pairs_ptr,
    maxima,
    slots_ptr,
    pieces,
    valid_ptr,
    padding_ptr,
    first_ptr,
    range_ptr,
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
    row_piece_ptr, row_start_ptr, _, _, before_ptr, columns_ptr, column_piece_ptr = _of_example(
        pieces, batch, TQ, TK, row_count, key_count
    )
    lse_ptr += batch * kv_heads * group * TQ
    if valid_ptr is not None:
        valid_ptr += batch * TK
    offset = first_position(first_ptr, batch)
    count = tl.load(before_ptr + TK)
    tiles, shares = _shares(count, tl.num_programs(0), BLOCK_N)
    share = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * BLOCK_N
    if (start < count) & (share < shares):
        place = start + tl.arange(0, BLOCK_N)
        column = _load_columns(columns_ptr, valid_ptr, place, count, TK)
        column_piece = tl.load(column_piece_ptr + place, mask=place < count, other=0)
        keys = load_rows(k, batch, kv_head, column, column < TK, D, BLOCK_D)
        first_column = tl.load(columns_ptr + start)
        last_column = tl.load(columns_ptr + tl.minimum(start + BLOCK_N, count) - 1)
        begin = 0
        end = offset + TQ
        if CAUSAL:
            begin = first_column
        if range_ptr is not None:
            end = tl.load(range_ptr + TK + last_column)
            if not CAUSAL:
                begin = tl.load(range_ptr + first_column)
        if padding_ptr is not None:
            # Not `_`, which has another type above: Triton 3.6 takes that for a variable that the block changes.
            first_real, end_real, _broken = load_padding(padding_ptr, batch)
            if CAUSAL:
                begin = tl.maximum(begin, first_real)
                end = tl.minimum(end, end_real)
            end = tl.where((last_column < first_real) | (first_column >= end_real), begin, end)
        # Of the rows at [begin, end) the pieces; a column that no row may see has none or one.
        low = tl.load(row_piece_ptr + tl.minimum(tl.maximum(begin - offset, 0), TQ))
        last_row = tl.minimum(tl.maximum(end - offset, 1), TQ) - 1
        seeing = tl.maximum(tl.load(row_piece_ptr + last_row) + 1 - low, 0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for x in range((low + seeing * share // shares) * group, (low + seeing * (share + 1) // shares) * group):
            row_piece = (x // group).to(tl.int64)
            head = kv_head * group + x % group
            first_row, end_row, _held = _piece_rows(row_start_ptr, row_piece)
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
            queries, lse = _load_queries(
                q, lse_ptr, valid_ptr, batch, head, row, offset + row, inside, TQ, CAUSAL, D, BLOCK_D
            )
            scores = capped_scores(product(keys, queries.T, None), scale, softcap, 1.0)
            weights = g * score_slope(scores, softcap, 1.0)
            weights *= _probabilities(
                scores, lse[None, :], (offset + row)[None, :], column[:, None], range_ptr, TK, CAUSAL
            )
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
    seen = tuple(pieces), *padding_ends(mask), first, ranges
    if row_reduction == "max":
        pooled, _ = _maxima(q, k, lse, row_spans, key_spans, pieces, seen, scale, softcap, causal, groups)
        return _of_batch(pooled.view(batch, groups, steps, keys), sequences, every_key)
    pooled = lse.new_empty(batch * groups, steps, keys)
    tile, options = tile_options("span_attention_forward", q)
    programs = pieces.row_count * triton.cdiv(pieces.key_count, 2 * tile.n)
    members = min(heads // kv_heads, heads // groups)
    units = heads // groups // members
    parts = min(units, triton.cdiv(2 * _PROGRAMS, programs * batch * groups))
    pairs = lse.new_empty(parts, batch * groups, pieces.row_count, pieces.key_count)
    _span_attention_forward_kernel[programs, batch * groups * parts](
        *(with_strides(q), with_strides(k), lse, pairs, *seen),
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


def _maxima(q, k, lse, row_spans, key_spans, pieces, seen, scale, softcap, causal, groups):
    """(pooled [B H', S, M], the first row that has each maximum)"""
    batch, heads, length, _ = q.shape
    words = k.shape[2] if key_spans is None else key_spans.shape[1]
    largest = lse.new_empty(batch * groups, pieces.row_count, words)
    rows = torch.empty_like(largest, dtype=torch.int32)
    tile, options = tile_options("span_attention_backward_dk", q)  # whose rows those of a piece are
    block = tile.n if key_spans is None else max(16, tile.n // 2)
    _span_attention_maxima_kernel[pieces.row_count * triton.cdiv(words, block), batch * groups](
        *(with_strides(q), with_strides(k), lse, largest, rows, key_spans, *seen),
        *(groups, heads // groups, heads // k.shape[1], words, pieces.row_count, pieces.key_count),
        *(length, k.shape[2], scale, softcap),
        CAUSAL=causal,
        WORDS=block,
        **(options | {"num_warps": MAXIMA_WARPS}),
    )
    return step_maxima(largest, rows, row_spans, pieces.row_piece, groups / heads)


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
    batch, heads, length, head_dim = q.shape
    kv_heads, steps = k.shape[1], row_spans.shape[1]
    if sequences:
        words = k.shape[2] if every_key else key_spans.shape[1]
        of_sequences, grad = grad, grad.new_zeros(batch, groups, steps, words)
        _own_blocks(grad, sequences, every_key).copy_(of_sequences)
    grad = grad.flatten(0, 1)
    unit = None
    if q.dtype == torch.float16:  # gradients of A are small: keep the weights within float16
        unit = grad.abs().amax().clamp_min(1e-30)
        grad = grad / unit
    lse, pieces = lse.contiguous(), Pieces(*pieces)
    seen = tuple(pieces), *padding_ends(mask), first, ranges
    pairs = maxima = None
    if row_reduction == "max":
        _, largest_rows = _maxima(q, k, lse, row_spans, key_spans, pieces, seen, scale, softcap, causal, groups)
        of_rows = spans_of_pieces(row_spans, pieces.row_piece, pieces.row_count)
        of_keys = None if every_key else spans_of_pieces(key_spans, pieces.key_piece, pieces.key_count)
        maxima = largest_rows, (grad * (groups / heads)).contiguous(), of_rows, of_keys, key_spans
    else:
        pairs = _spread(grad, row_spans, key_spans, pieces, mean=row_reduction == "mean", factor=groups / heads)

    dq, dk, dlse = torch.empty_like(q), k.new_empty(k.shape), lse.new_empty(batch, heads, length)
    sizes = steps, grad.shape[2], pieces.row_count, pieces.key_count, length, k.shape[2], scale, softcap
    members = min(heads // kv_heads, heads // groups)
    warps = {} if maxima is None else {"num_warps": MAXIMA_WARPS}
    _, options = tile_options("span_attention_backward_dq", q)
    _span_attention_backward_dq_kernel[pieces.row_count, batch * heads // members](
        *(*map(with_strides, (q, k, dq)), lse, pairs, maxima, unit, dlse, *seen),
        *(groups, heads, members, heads // kv_heads, *sizes),
        CAUSAL=causal,
        **(options | warps),
    )
    tile, options = tile_options("span_attention_backward_dk", q)
    slots = max(triton.cdiv(k.shape[2], tile.n), triton.cdiv(_PROGRAMS, batch * kv_heads))
    partial = lse.new_empty(batch * kv_heads, slots, tile.n, head_dim)
    _span_attention_backward_dk_kernel[slots, batch * kv_heads](
        *(with_strides(q), with_strides(k), lse, pairs, maxima, partial, *seen),
        *(groups, kv_heads, heads // kv_heads, *sizes),
        CAUSAL=causal,
        **(options | warps),
    )
    _span_attention_gather_dk_kernel[triton.cdiv(k.shape[2], GATHERED_TOKENS), batch * kv_heads](
        *(partial, unit, with_strides(dk), pieces.before, kv_heads, slots, k.shape[2], scale),
        D=head_dim,
        BLOCK_D=options["BLOCK_D"],
        BLOCK_N=tile.n,
        BLOCK_T=GATHERED_TOKENS,
        enable_fp_fusion=True,
    )
    return dq, dk, dlse
