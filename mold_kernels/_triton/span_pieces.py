"""Pieces of spans on the GPU without waiting for it, and sums over them; `mold_kernels.span_pieces` says what they are.

Two launches: `_mark_kernel` counts where spans start and end (integer atomics: any order gives the same), and
`_scan_kernel` walks the tokens of an example and numbers pieces and columns. `pool_spans` adds pieces up into spans,
or spreads spans over pieces.
"""

import torch
import triton
import triton.language as tl

from mold_kernels._triton import tiles
from mold_kernels._triton.scores import product

_CLOSED = tl.constexpr(1 << 32)
"""A mark counts the spans that open at a token below this, those that close in its multiples."""


@triton.jit
def load_span(spans_ptr, index, count, T):
    """(start, end) of the spans, within [0, T] whatever they hold; (0, 0) from `count` on."""
    start = tl.load(spans_ptr + 2 * index, mask=index < count, other=0)
    end = tl.load(spans_ptr + 2 * index + 1, mask=index < count, other=0)
    start = tl.minimum(tl.maximum(start, 0), T)
    return start, tl.minimum(tl.maximum(end, start), T)


@triton.jit
def _mark(marks_ptr, spans_ptr, count, T, BLOCK: tl.constexpr):
    index = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    start, end = load_span(spans_ptr, index, count, T)
    tl.atomic_add(marks_ptr + start, tl.full([BLOCK], 1, tl.int64), mask=index < count, sem="relaxed")
    tl.atomic_add(marks_ptr + end, tl.full([BLOCK], _CLOSED, tl.int64), mask=index < count, sem="relaxed")


@triton.jit(do_not_specialize=["steps", "keys", "TQ", "TK"])
def _mark_kernel(marks_ptr, row_spans_ptr, key_spans_ptr, steps, keys, TQ, TK, BLOCK: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    marks_ptr += batch * (TQ + TK + 2)
    if tl.program_id(1) == 0:
        _mark(marks_ptr, row_spans_ptr + batch * steps * 2, steps, TQ, BLOCK)
    else:
        _mark(marks_ptr + TQ + 1, key_spans_ptr + batch * keys * 2, keys, TK, BLOCK)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _read_marks(marks_ptr, first, T, depth, BLOCK: tl.constexpr):
    """(tokens, which are within [0, T], their marks, whether a span holds each, spans open behind them)"""
    token = first + tl.arange(0, BLOCK)
    inside = token <= T
    mark = tl.load(marks_ptr + token, mask=inside, other=0)
    change = (mark % _CLOSED).to(tl.int32) - (mark // _CLOSED).to(tl.int32)
    return token, inside, mark, depth + tl.cumsum(change, 0) > 0, depth + tl.sum(change, 0)


@triton.jit
def _scan_rows(marks_ptr, piece_ptr, start_ptr, T, capacity, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    count = 0
    depth = 0
    cut = 0
    for first in range(0, T + 1, BLOCK):
        token, inside, mark, held, depth = _read_marks(marks_ptr, first, T, depth, BLOCK)
        last_cut = tl.associative_scan(tl.where(mark != 0, token, cut), 0, _larger)
        cut = tl.max(last_cut, 0)
        begins = inside & ((token - last_cut) % ROWS == 0)
        piece = count + tl.cumsum(begins.to(tl.int32), 0) - 1
        count += tl.sum(begins.to(tl.int32), 0)
        tl.store(piece_ptr + token, piece, mask=inside)
        tl.store(start_ptr + piece, 2 * token + held.to(tl.int32), mask=begins)
    for first in range(count, capacity + 1, BLOCK):
        unused = first + tl.arange(0, BLOCK)
        tl.store(start_ptr + unused, tl.zeros_like(unused) + 2 * T, mask=unused <= capacity)


@triton.jit
def _scan_keys(
    marks_ptr, piece_ptr, first_ptr, before_ptr, columns_ptr, column_piece_ptr, T, capacity, BLOCK: tl.constexpr
):
    count = 0
    depth = 0
    columns = 0
    for first in range(0, T + 1, BLOCK):
        token, inside, mark, held, depth = _read_marks(marks_ptr, first, T, depth, BLOCK)
        held = held & inside
        begins = held & (mark != 0)
        piece = count + tl.cumsum(begins.to(tl.int32), 0) - 1
        count += tl.sum(begins.to(tl.int32), 0)
        before = columns + tl.cumsum(held.to(tl.int32), 0) - held.to(tl.int32)
        columns += tl.sum(held.to(tl.int32), 0)
        tl.store(piece_ptr + token, piece + 1 - begins.to(tl.int32), mask=inside)
        tl.store(before_ptr + token, before, mask=inside)
        tl.store(first_ptr + piece, before, mask=begins)
        tl.store(columns_ptr + before, token, mask=held)
        tl.store(column_piece_ptr + before, piece, mask=held)
    for first in range(count, capacity + 1, BLOCK):
        unused = first + tl.arange(0, BLOCK)
        tl.store(first_ptr + unused, tl.zeros_like(unused) + columns, mask=unused <= capacity)


@triton.jit(do_not_specialize=["TQ", "TK", "row_count", "key_count"])
def _scan_kernel(
    marks_ptr,
    row_piece_ptr,
    row_start_ptr,
    key_piece_ptr,
    key_first_ptr,
    before_ptr,
    columns_ptr,
    column_piece_ptr,
    TQ,
    TK,
    row_count,
    key_count,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    marks_ptr += batch * (TQ + TK + 2)
    if tl.program_id(1) == 0:
        _scan_rows(
            marks_ptr,
            row_piece_ptr + batch * (TQ + 1),
            row_start_ptr + batch * (row_count + 1),
            TQ,
            row_count,
            ROWS,
            BLOCK,
        )
    else:
        _scan_keys(
            marks_ptr + TQ + 1,
            key_piece_ptr + batch * (TK + 1),
            key_first_ptr + batch * (key_count + 1),
            before_ptr + batch * (TK + 1),
            columns_ptr + batch * TK,
            column_piece_ptr + batch * TK,
            TK,
            key_count,
            BLOCK,
        )


def span_pieces(row_spans: torch.Tensor, key_spans: torch.Tensor, rows: int, pieces) -> None:
    """Fills the `pieces` of contiguous int32 [B, S, 2] and [B, M, 2]; no row piece has more than `rows`."""
    (batch, steps, _), keys = row_spans.shape, key_spans.shape[1]
    lengths = pieces.row_piece.shape[1] - 1, pieces.columns.shape[1]
    marks = torch.zeros(batch, sum(lengths) + 2, dtype=torch.int64, device=row_spans.device)
    _mark_kernel[batch, 2, triton.cdiv(max(steps, keys), tiles.MARK_BLOCK)](
        marks, row_spans, key_spans, steps, keys, *lengths, BLOCK=tiles.MARK_BLOCK, enable_fp_fusion=True
    )
    _scan_kernel[batch, 2](
        *(marks, *pieces, *lengths, pieces.row_count, pieces.key_count),
        ROWS=rows,
        BLOCK=tiles.SCAN_BLOCK,
        enable_fp_fusion=True,
    )


@triton.jit(
    do_not_specialize=[
        "out_batch",
        "out_row",
        "out_column",
        "in_part",
        "in_batch",
        "in_row",
        "in_column",
        "parts",
        "outputs",
        "inputs",
        "width",
        "count",
        "T",
        "groups",
    ]
)
def _pool_spans_kernel(
    out_ptr,
    in_ptr,
    spans_ptr,
    piece_ptr,
    out_batch,
    out_row,
    out_column,
    in_part,
    in_batch,
    in_row,
    in_column,
    parts,
    outputs,
    inputs,
    width,
    count,
    T,
    groups,
    factor,
    MEAN: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r, c] = sum_k W[r, k] sum_part in[part, k, c]: W[span, piece] tells which pieces a span has.

    Strides are arguments of their own: those in a tuple would be specialised.
    """
    batch = tl.program_id(2).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    spans_ptr += batch // groups * count * 2
    piece_ptr += batch // groups * (T + 1)
    in_ptr += batch * in_batch
    low = 0
    high = inputs
    weight = tl.full([BLOCK], factor, tl.float32)
    if not SPREAD:
        start, end = load_span(spans_ptr, output, count, T)
        from_piece = tl.load(piece_ptr + start)
        to_piece = tl.load(piece_ptr + end)
        low = tl.min(tl.where(start < end, from_piece, inputs), 0)
        high = tl.max(tl.where(start < end, to_piece, 0), 0)
        if MEAN:
            weight = weight / tl.maximum(end - start, 1)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(low, high, BLOCK):
        index = first + tl.arange(0, BLOCK)
        if SPREAD:
            start, end = load_span(spans_ptr, index, count, T)
            from_piece = tl.load(piece_ptr + start)
            to_piece = tl.load(piece_ptr + end)
            holds = (
                (from_piece[None, :] <= output[:, None])
                & (output[:, None] < to_piece[None, :])
                & (start < end)[None, :]
            )
            share = holds.to(tl.float32)
            if MEAN:
                share = share / tl.maximum(end - start, 1)[None, :]
        else:
            holds = (
                (from_piece[:, None] <= index[None, :]) & (index[None, :] < to_piece[:, None]) & (start < end)[:, None]
            )
            share = holds.to(tl.float32)
        if tl.max(tl.max(holds.to(tl.int32), 1), 0) > 0:
            values = tl.zeros([BLOCK, BLOCK], tl.float32)
            pointers = in_ptr + index.to(tl.int64)[:, None] * in_row + column.to(tl.int64)[None, :] * in_column
            inside = (index < high)[:, None] & (column < width)[None, :]
            for _ in range(parts):
                values += tl.load(pointers, mask=inside, other=0.0)
                pointers += in_part
            acc = product(share, values, acc)
    out_ptr += batch * out_batch
    pointers = out_ptr + output.to(tl.int64)[:, None] * out_row + column.to(tl.int64)[None, :] * out_column
    tl.store(pointers, acc * weight[:, None], mask=(output < outputs)[:, None] & (column < width)[None, :])


def pool_spans(
    out: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor,
    piece: torch.Tensor,
    *,
    spread: bool,
    mean: bool = False,
    factor: float = 1.0,
) -> None:
    """Fill out [B H', spans, C] with sums of values [parts, B H', pieces, C] over each span's pieces, times `factor`.

    With `spread` the other way: out [B H', pieces, C] from values [parts, B H', spans, C], a piece adding up the spans
    that hold it. `mean` divides by a span's length. `piece` is `row_piece` or `key_piece`.
    """
    (batch, outputs, width), inputs = out.shape, values.shape[2]
    if not out.numel():
        return
    grid = triton.cdiv(width, tiles.POOL_BLOCK), triton.cdiv(outputs, tiles.POOL_BLOCK), batch
    _pool_spans_kernel[grid](
        *(out, values, spans, piece, *out.stride(), *values.stride()),
        *(values.shape[0], outputs, inputs, width, spans.shape[1], piece.shape[1] - 1),
        *(batch // len(spans), factor),
        MEAN=mean,
        SPREAD=spread,
        BLOCK=tiles.POOL_BLOCK,
        enable_fp_fusion=True,
    )
