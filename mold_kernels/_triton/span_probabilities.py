"""Probabilities at the key columns, which every kernel of span attention computes: of which rows, at which columns.

A program reads the spans of its example out of `Seen` and takes a row piece of them. `piece_and_columns` bounds the
columns that its rows may see; what lies between the bounds and is not seen, `probabilities` makes 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mold_kernels._triton.scores import (
    capped_scores,
    first_position,
    load_padding,
    load_rows,
    product,
    within_ranges,
)
from mold_kernels.span_pieces import Pieces


class Seen(NamedTuple):
    """What a row may see: the pieces and columns of a batch's spans, its padding, and the options of visibility."""

    pieces: Pieces
    valid: torch.Tensor | None  # [B, Tk] which keys are real
    padding: torch.Tensor | None  # [B, 3] of `load_padding`
    first: torch.Tensor | None  # [B] the position of row 0
    ranges: torch.Tensor | None  # [2, Tk] of `mold_kernels.visibility.visible_ranges`


@triton.jit
def of_example(seen, batch, TQ, TK, row_count, key_count):
    """Of one example, apart from what is looked up by `batch`."""
    pieces = Pieces(
        row_piece=seen.pieces.row_piece + batch * (TQ + 1),
        row_start=seen.pieces.row_start + batch * (row_count + 1),
        key_piece=seen.pieces.key_piece + batch * (TK + 1),
        key_first=seen.pieces.key_first + batch * (key_count + 1),
        before=seen.pieces.before + batch * (TK + 1),
        columns=seen.pieces.columns + batch * TK,
        column_piece=seen.pieces.column_piece + batch * TK,
    )
    valid = seen.valid
    if valid is not None:
        valid += batch * TK
    return Seen(pieces=pieces, valid=valid, padding=seen.padding, first=seen.first, ranges=seen.ranges)


@triton.jit
def piece_rows(pieces, piece):
    """(first row, row after the last, whether a step holds the piece)"""
    start = tl.load(pieces.row_start + piece)
    return start // 2, tl.load(pieces.row_start + piece + 1) // 2, start % 2 == 1


@triton.jit
def piece_and_columns(seen, row_piece, low, high, batch, T, CAUSAL: tl.constexpr):
    """(a piece's first row, row after its last, position of row 0, first, end of the columns that its rows may see)

    Of the columns [low, high); of none where no step holds the piece.
    """
    before = seen.pieces.before
    first_row, end_row, held = piece_rows(seen.pieces, row_piece)
    offset = first_position(seen.first, batch)
    high = tl.where(held, high, low)
    if held:
        begin = offset + first_row
        end = offset + end_row
        if CAUSAL:
            high = tl.minimum(high, tl.load(before + end))
        if seen.ranges is not None:
            low = tl.maximum(low, tl.load(before + tl.load(seen.ranges + begin)))
            if not CAUSAL:
                high = tl.minimum(high, tl.load(before + tl.load(seen.ranges + T + end - 1)))
        if seen.padding is not None:
            first_real, end_real, _ = load_padding(seen.padding, batch)
            low = tl.maximum(low, tl.load(before + first_real))
            high = tl.minimum(high, tl.load(before + end_real))
            if CAUSAL:
                high = tl.where(begin < end_real, high, low)
    return first_row, end_row, offset, low, high


@triton.jit
def load_columns(seen, place, end, T):
    """The keys of the columns at `place`; T, which no row sees and nobody reads, for padding and from `end` on."""
    column = tl.load(seen.pieces.columns + place, mask=place < end, other=T)
    if seen.valid is not None:
        column = tl.where(tl.load(seen.valid + column, mask=column < T, other=0).to(tl.int1), column, T)
    return column


@triton.jit
def load_queries(
    q,
    lse_ptr,
    seen,
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
    if seen.valid is not None and CAUSAL:
        inside = inside & tl.load(seen.valid + position, mask=inside, other=0).to(tl.int1)
    lse_ptr += head * TQ + row
    return load_rows(q, batch, head, row, inside, D, BLOCK_D), tl.load(lse_ptr, mask=inside, other=float("inf"))


@triton.jit
def probabilities(scores, lse, position, column, seen, T, CAUSAL: tl.constexpr):
    """exp(score - lse) where the row at `position` sees the column; all broadcast.

    Not in base 2 as in the flash kernels: lse rounded in base 2 would shift whole rows.
    """
    visible = column <= position if CAUSAL else column < T
    visible = within_ranges(visible, position, column, seen.ranges, T, CAUSAL)
    return tl.where(visible, tl.exp(scores - lse), 0.0)


@triton.jit
def column_probabilities(
    keys,
    column,
    q,
    lse_ptr,
    seen,
    batch,
    head,
    row,
    position,
    inside,
    TQ,
    TK,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(probabilities, scores [columns, rows], queries) of the rows `inside`, which stand at `position`."""
    queries, lse = load_queries(q, lse_ptr, seen, batch, head, row, position, inside, TQ, CAUSAL, D, BLOCK_D)
    scores = capped_scores(product(keys, queries.T, None), scale, softcap, 1.0)
    return probabilities(scores, lse[None, :], position[None, :], column[:, None], seen, TK, CAUSAL), scores, queries
