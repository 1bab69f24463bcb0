"""The largest row of a step: found from those of its pieces, and its gradient spread to the row again.

Forward: a program takes one row piece and a block of key words, adds up the tiles of probabilities over heads and over
each word's columns, and leaves of each word the largest entry and the first row that has it; a second launch takes the
first piece of each step that has the most. Backward: `maximum_gradient` makes the gradient by a tile of rows and
columns where the kernels of `span_gradient` need it, out of one row and one number a step and key word;
`spans_of_pieces` says which steps and key words those can be. Stored: two numbers a row piece and key word.
"""

import torch
import triton
import triton.language as tl

from mold_kernels._triton.scores import load_rows, selected_sums, tile_options, with_strides
from mold_kernels._triton.span_pieces import load_span
from mold_kernels._triton.span_probabilities import (
    Seen,
    column_probabilities,
    load_columns,
    of_example,
    piece_and_columns,
)
from mold_kernels._triton.tiles import MARK_BLOCK, MAXIMA_WARPS, MAXIMA_WORDS, POOL_BLOCK

_WORDS = tl.constexpr(MAXIMA_WORDS)


@triton.jit(do_not_specialize=["words", "row_count", "key_count", "TQ", "TK"])
def _span_attention_maxima_kernel(
    q,
    k,
    lse_ptr,
    largest_ptr,
    rows_ptr,
    key_spans_ptr,
    seen,
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
    seen = of_example(seen, batch, TQ, TK, row_count, key_count)
    lse_ptr += batch * groups * heads * TQ

    if key_spans_ptr is None:
        start = tl.minimum(word, TK)
        end = tl.minimum(word + 1, TK)
    else:
        start, end = load_span(key_spans_ptr + batch * words * 2, word, words, TK)
    low = tl.min(tl.where(start < end, tl.load(seen.pieces.before + start), TK), 0)
    high = tl.max(tl.where(start < end, tl.load(seen.pieces.before + end), 0), 0)
    first_row, end_row, offset, low, high = piece_and_columns(seen, row_piece, low, high, batch, TK, CAUSAL)
    if key_spans_ptr is None:  # a column is a word: one tile, wherever in it the seen ones begin
        low = tl.where(low < high, first_word, high)
    row = first_row + tl.arange(0, BLOCK_M)
    total = tl.zeros([WORDS, BLOCK_M], tl.float32)
    for first in range(low, high, BLOCK_N):
        column = load_columns(seen, first + tl.arange(0, BLOCK_N), high, TK)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for x in range(heads):
            head = (first_head + x).to(tl.int64)
            keys = load_rows(k, batch, head // group, column, column < TK, D, BLOCK_D)
            p, _scores, _queries = column_probabilities(
                keys, column, q, lse_ptr, seen, batch, head, row, offset + row, row < end_row, TQ, TK, scale, softcap,
                CAUSAL, D, BLOCK_D,
            )  # fmt: skip
            acc += p
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


@triton.jit(do_not_specialize=["row_count", "steps", "words", "T"])
def _step_maxima_kernel(
    pooled_ptr,
    rows_ptr,
    largest_ptr,
    first_ptr,
    spans_ptr,
    piece_ptr,
    groups,
    row_count,
    steps,
    words,
    T,
    factor,
    BLOCK: tl.constexpr,
):
    result = tl.program_id(2).to(tl.int64)
    step = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start, end = load_span(spans_ptr + result // groups * steps * 2, step, steps, T)
    piece_ptr += result // groups * (T + 1)
    low = tl.load(piece_ptr + start)
    high = tl.where(start < end, tl.load(piece_ptr + end), low)
    best = tl.zeros([BLOCK], tl.float32)
    row = tl.full([BLOCK], -1, tl.int32)
    for piece in range(low, high):
        at = (result * row_count + piece) * words + word
        largest = tl.load(largest_ptr + at, mask=word < words, other=0.0)
        more = largest > best
        best = tl.where(more, largest, best)
        row = tl.where(more, tl.load(first_ptr + at, mask=word < words, other=-1), row)
    at = (result * steps + step) * words + word
    best = tl.where(best == float("inf"), float("nan"), best * factor)
    tl.store(pooled_ptr + at, best, mask=word < words)
    tl.store(rows_ptr + at, row, mask=word < words)


def _step_maxima(
    largest: torch.Tensor, first: torch.Tensor, row_spans: torch.Tensor, row_piece: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the largest entries of each step [B H', S, M], times `factor`; int32, the first row that has each, -1: it is 0)

    Of the largest of each row piece [B H', G, M], +inf for NaN, and their first rows.
    """
    (results, row_count, words), steps = largest.shape, row_spans.shape[1]
    pooled = largest.new_empty(results, steps, words)
    rows = first.new_empty(results, steps, words)
    _step_maxima_kernel[triton.cdiv(words, MARK_BLOCK), steps, results](
        *(pooled, rows, largest, first, row_spans, row_piece),
        *(results // len(row_spans), row_count, steps, words, row_piece.shape[1] - 1, factor),
        BLOCK=MARK_BLOCK,
        enable_fp_fusion=True,
    )
    return pooled, rows


def span_attention_maxima(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor | None,
    seen: Seen,
    scale: float,
    softcap: float | None,
    causal: bool,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the largest entries of each step [B H', S, M]; int32, the first row that has each, -1: it is 0)"""
    batch, heads, length, _ = q.shape
    pieces, words = seen.pieces, k.shape[2] if key_spans is None else key_spans.shape[1]
    largest = lse.new_empty(batch * groups, pieces.row_count, words)
    rows = torch.empty_like(largest, dtype=torch.int32)
    tile, options = tile_options("span_attention_backward_dk", q)  # whose rows those of a piece are
    block = tile.n if key_spans is None else max(16, tile.n // 2)
    _span_attention_maxima_kernel[pieces.row_count * triton.cdiv(words, block), batch * groups](
        *(with_strides(q), with_strides(k), lse, largest, rows, key_spans, seen),
        *(groups, heads // groups, heads // k.shape[1], words, pieces.row_count, pieces.key_count),
        *(length, k.shape[2], scale, softcap),
        CAUSAL=causal,
        WORDS=block,
        **(options | {"num_warps": MAXIMA_WARPS}),
    )
    return _step_maxima(largest, rows, row_spans, pieces.row_piece, groups / heads)


@triton.jit(do_not_specialize=["spans", "pieces", "T"])
def _spans_of_pieces_kernel(ranges_ptr, spans_ptr, piece_ptr, spans, pieces, T, BLOCK: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.full([BLOCK], spans, tl.int32)
    high = tl.zeros([BLOCK], tl.int32)
    for first in range(0, spans, BLOCK):
        index = first + tl.arange(0, BLOCK)
        start, end = load_span(spans_ptr + batch * spans * 2, index, spans, T)
        from_piece = tl.load(piece_ptr + batch * (T + 1) + start)[None, :]
        to_piece = tl.load(piece_ptr + batch * (T + 1) + end)[None, :]
        holds = (start < end)[None, :] & (from_piece <= piece[:, None]) & (piece[:, None] < to_piece)
        low = tl.minimum(low, tl.min(tl.where(holds, index[None, :], spans), 1))
        high = tl.maximum(high, tl.max(tl.where(holds, index[None, :] + 1, 0), 1))
    ranges_ptr += (batch * pieces + piece) * 2
    tl.store(ranges_ptr, low, mask=piece < pieces)
    tl.store(ranges_ptr + 1, high, mask=piece < pieces)


def spans_of_pieces(spans: torch.Tensor, piece: torch.Tensor, pieces: int) -> torch.Tensor:
    """int32 [B, pieces, 2]: [first, end) of the spans among which are all that hold each piece; empty where none does.

    `piece` is `row_piece` or `key_piece`.
    """
    (batch, count, _), length = spans.shape, piece.shape[1] - 1
    ranges = spans.new_empty(batch, pieces, 2)
    _spans_of_pieces_kernel[triton.cdiv(pieces, POOL_BLOCK), batch](
        ranges, spans, piece, count, pieces, length, BLOCK=POOL_BLOCK, enable_fp_fusion=True
    )
    return ranges


@triton.jit
def _gradient_of_words(
    rows_ptr, grad_ptr, first_step, end_step, words, row, word, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """[rows, words]: the gradients of the steps [first_step, end_step) where a row is the one that has the most."""
    g = tl.zeros([ROWS, WORDS], tl.float32)
    for step in range(first_step, end_step):
        at = step * words + word
        first = tl.load(rows_ptr + at, mask=word < words, other=-1)
        grad = tl.load(grad_ptr + at, mask=word < words, other=0.0)
        g += tl.where(first[None, :] == row[:, None], grad[None, :], 0.0)
    return g


@triton.jit
def maximum_gradient(
    maxima,
    batch,
    result,
    row_piece,
    row_count,
    key_count,
    steps,
    words,
    row,
    column,
    column_piece,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient [rows, columns] of the probabilities of a row piece; `column` is T at padding.

    `maxima`: (rows and gradients [B H', S, M], the steps of each row piece, the key words of each key piece, the key
    spans); the last two None where every key is a key word.
    """
    rows_ptr, grad_ptr, steps_ptr, words_ptr, key_spans_ptr = maxima
    rows_ptr += result * steps * words
    grad_ptr += result * steps * words
    steps_ptr += (batch * row_count + row_piece) * 2
    first_step = tl.load(steps_ptr)
    end_step = tl.load(steps_ptr + 1)
    if key_spans_ptr is None:
        return _gradient_of_words(rows_ptr, grad_ptr, first_step, end_step, words, row, column, ROWS, COLUMNS)
    else:
        words_ptr += (batch * key_count + column_piece) * 2
        low = tl.min(tl.load(words_ptr, mask=column < T, other=words), 0)
        high = tl.max(tl.load(words_ptr + 1, mask=column < T, other=0), 0)
        g = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(low, high, _WORDS):
            word = first + tl.arange(0, _WORDS)
            start, end = load_span(key_spans_ptr + batch * words * 2, word, words, T)
            holds = (start[:, None] <= column[None, :]) & (column[None, :] < end[:, None])
            of_words = _gradient_of_words(rows_ptr, grad_ptr, first_step, end_step, words, row, word, ROWS, _WORDS)
            g = selected_sums(of_words, holds.to(tl.float32), g)
        return g
