"""Pieces that every attention kernel shares: tiles, scores, soft-capping and its derivative."""

import triton
import triton.language as tl

from mold_kernels import _triton

_INTERPRETED = tl.constexpr(_triton.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(base, start, strides, limit, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [start, start + ROWS) of a [T, D] matrix with the strides (row, column); 0 from row `limit` on."""
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * strides[0] + column[None, :] * strides[1]
    inside = (row < limit)[:, None]
    if BLOCK_D != D:
        inside = inside & (column < D)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_rows(base, row, inside, strides, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The given rows of a [T, D] matrix with the strides (row, column); 0 where `inside` is False."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * strides[0] + column[None, :] * strides[1]
    inside = inside[:, None]
    if BLOCK_D != D:
        inside = inside & (column < D)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(base, row, inside, strides, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the given rows of a [T, D] matrix with the strides (row, column) where `inside` is True."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * strides[0] + column[None, :] * strides[1]
    inside = inside[:, None]
    if BLOCK_D != D:
        inside = inside & (column < D)[None, :]
    tl.store(pointers, values.to(base.dtype.scalar.element_ty), mask=inside)


@triton.jit
def product(a, b, acc):
    """acc + a b in float32, without the rounding of float32 factors that matrix units would make."""
    if _INTERPRETED:  # its tl.dot multiplies the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) cancels near 0, where a series is exact to float32's rounding instead.
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
    decay = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -tail, tail))


@triton.jit
def capped_scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores of the products q . k; in base 2 where scale and softcap are given times log2(e)."""
    if HAS_SOFTCAP:
        return _tanh(products * (scale / softcap)) * softcap
    else:
        return products * scale


@triton.jit
def score_slope(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """d score / d (scale q . k), from what `capped_scores` gave: 1 without soft-capping."""
    if HAS_SOFTCAP:
        ratio = scores / softcap
        return 1.0 - ratio * ratio
    else:
        return 1.0
