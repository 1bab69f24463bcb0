"""Pieces that every attention kernel shares: rows, padding, scores, soft-capping and its slope, options of a launch."""

import torch
import triton
import triton.language as tl

from mold_kernels import _triton
from mold_kernels._triton.tiles import SCAN_BLOCK, Tile, choose_tile

_INTERPRETED = tl.constexpr(_triton.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def with_strides(tensor: torch.Tensor | None) -> tuple | None:
    """A kernel's argument for a tensor: (pointer, strides of batch, head, token, column or fewer); None stays."""
    return None if tensor is None else (tensor, *tensor.stride())


@triton.jit
def _pointers(tensor, batch, head, row, BLOCK_D: tl.constexpr):
    """Of the given rows of a head; `head` is a number or one of each row."""
    offset = (head * tensor[2] + row.to(tl.int64) * tensor[3])[:, None]
    return tensor[0] + batch * tensor[1] + offset + tl.arange(0, BLOCK_D)[None, :] * tensor[4]


@triton.jit
def _mask(inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = inside[:, None]
    if BLOCK_D != D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    return inside


@triton.jit
def load_rows(tensor, batch, head, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The given rows of a head [T, D] of a tensor with its strides; 0 where `inside` is False."""
    return tl.load(_pointers(tensor, batch, head, row, BLOCK_D), mask=_mask(inside, D, BLOCK_D), other=0.0)


@triton.jit
def store_rows(tensor, batch, head, row, inside, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the given rows of a head where `inside` is True."""
    values = values.to(tensor[0].dtype.element_ty)
    tl.store(_pointers(tensor, batch, head, row, BLOCK_D), values, mask=_mask(inside, D, BLOCK_D))


@triton.jit
def product(a, b, acc):
    """acc + a b in float32, without the rounding of float32 factors that matrix units would make."""
    if _INTERPRETED:  # its tl.dot multiplies the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def selected_sums(a, b, acc):
    """acc + a b in float32, where one factor is 0 or 1 alone: three products of matrix units, exact to 2^-22.

    Without them both factors would lie in registers, whole.
    """
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def first_position(first_ptr, batch):
    """The position of an example's first row."""
    if first_ptr is None:
        return 0
    else:
        return tl.load(first_ptr + batch)


@triton.jit(do_not_specialize=["T"])
def _padding_kernel(valid_ptr, padding_ptr, T, BLOCK: tl.constexpr):
    """Of each example: the first real key, the end of the real ones, and whether padding lies between."""
    batch = tl.program_id(0).to(tl.int64)
    begin = T
    end = 0
    count = 0
    for start in range(0, T, BLOCK):
        key = start + tl.arange(0, BLOCK)
        real = tl.load(valid_ptr + batch * T + key, mask=key < T, other=0).to(tl.int1)
        begin = tl.minimum(begin, tl.min(tl.where(real, key, T), 0))
        end = tl.maximum(end, tl.max(tl.where(real, key + 1, 0), 0))
        count += tl.sum(tl.where(real, 1, 0), 0)
    tl.store(padding_ptr + batch * 3, begin)
    tl.store(padding_ptr + batch * 3 + 1, end)
    tl.store(padding_ptr + batch * 3 + 2, (count < end - begin).to(tl.int32))


def padding_ends(valid: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the mask, contiguous; int32 [B, 3] of what `_padding_kernel` finds in it), found without waiting for the GPU."""
    if valid is None:
        return None, None
    valid = valid.contiguous()
    padding = torch.empty(len(valid), 3, dtype=torch.int32, device=valid.device)
    _padding_kernel[len(valid),](valid, padding, valid.shape[1], BLOCK=SCAN_BLOCK, enable_fp_fusion=True)
    return valid, padding


@triton.jit
def load_padding(padding_ptr, batch):
    """(first real key, end of the real ones, whether padding lies between)"""
    padding_ptr += batch * 3
    return tl.load(padding_ptr), tl.load(padding_ptr + 1), tl.load(padding_ptr + 2) != 0


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) cancels near 0, where a series is exact to float32's rounding instead.
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
    decay = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -tail, tail))


@triton.jit
def capped_scores(products, scale, softcap, UNIT: tl.constexpr):
    """Scores of the products q . k, times UNIT: 1, or log2(e) for scores in base 2."""
    if softcap is None:
        return products * (scale * UNIT)
    else:
        return _tanh(products * (scale / softcap)) * (softcap * UNIT)


@triton.jit
def score_slope(scores, softcap, UNIT: tl.constexpr):
    """d score / d (scale q . k), from what `capped_scores` gave: 1 without soft-capping."""
    if softcap is None:
        return 1.0
    else:
        ratio = scores / (softcap * UNIT)
        return 1.0 - ratio * ratio


@triton.jit
def within_ranges(visible, position, key, range_ptr, T, CAUSAL: tl.constexpr):
    """`visible` where the ranges, if any, let the row at `position` see the key; all broadcast."""
    if range_ptr is not None:
        visible = visible & (key >= tl.load(range_ptr + position, mask=position < T, other=0))
        if not CAUSAL:
            visible = visible & (key < tl.load(range_ptr + T + position, mask=position < T, other=0))
    return visible


def tile_options(kernel: str, q: torch.Tensor) -> tuple[Tile, dict]:
    """The kernel's tile, and what its launch takes beside its arguments."""
    tile = choose_tile(kernel, q)
    return tile, {
        "D": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
