"""Sum over valid tokens of the RMS-normalised values of all heads, and its gradient; v is read once in either.

The derivation is in `mold_kernels.value_pool`. Forward: a program takes a share of an example's tokens, all heads of a
token side by side, and leaves one partial sum; the shares are added by a second, tiny reduction in a fixed order.
Backward: a program takes a tile of tokens and writes their dv.

Cost with n = B T Hkv D elements of e bytes: forward 4 n FLOPs and n e bytes, backward 7 n FLOPs and 2 n e bytes.
"""

import torch
import triton
import triton.language as tl

from mold_kernels._triton import tiles
from mold_kernels._triton.scores import with_strides

_PROGRAMS = 1024


@triton.jit
def _pointers(tensor, batch, token, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens' heads side by side, [tokens, BLOCK]."""
    column = tl.arange(0, BLOCK)
    offsets = token.to(tl.int64)[:, None] * tensor[3]
    offsets += (column // D).to(tl.int64)[None, :] * tensor[2] + (column % D)[None, :] * tensor[4]
    return tensor[0] + batch * tensor[1] + offsets


@triton.jit
def _load_tokens(v, mask_ptr, batch, token, T, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(values [tokens, BLOCK] in float32, 0 where a token is not valid; which tokens are)"""
    valid = tl.load(mask_ptr + batch * T + token, mask=token < T, other=0) != 0
    mask = (tl.arange(0, BLOCK) < DIM)[None, :] & valid[:, None]
    return tl.load(_pointers(v, batch, token, D, BLOCK), mask=mask, other=0.0).to(tl.float32), valid


@triton.jit(do_not_specialize=["T"])
def _value_pool_forward_kernel(
    v, mask_ptr, partial_ptr, T, eps, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr
):
    batch = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        values, _ = _load_tokens(v, mask_ptr, batch, token, T, D, DIM, BLOCK)
        acc += values * tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    column = tl.arange(0, BLOCK)
    line = (tl.program_id(0) * tl.num_programs(1) + batch) * DIM
    tl.store(partial_ptr + line + column, tl.sum(acc, 0), mask=column < DIM)


@triton.jit(do_not_specialize=["T"])
def _value_pool_backward_kernel(
    u,
    v,
    mask_ptr,
    dv,
    T,
    eps,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK)
    gradient = tl.load(u[0] + batch * u[1] + column * u[2], mask=column < DIM, other=0.0)[None, :]
    values, valid = _load_tokens(v, mask_ptr, batch, token, T, D, DIM, BLOCK)
    scale = tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)
    along = scale * scale * scale * tl.sum(values * gradient, 1) / DIM
    gradient = tl.where(valid[:, None], scale[:, None] * gradient - along[:, None] * values, 0.0)
    inside = (column < DIM)[None, :] & (token < T)[:, None]
    tl.store(_pointers(dv, batch, token, D, BLOCK), gradient.to(dv[0].dtype.element_ty), mask=inside)


def value_pool_forward(v: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """[B, Hkv * D] float32."""
    batch, heads, length, head_dim = v.shape
    mask, options = mask.contiguous(), _options(v)
    shares = min(triton.cdiv(length, options["BLOCK_T"]), triton.cdiv(_PROGRAMS, max(batch, 1)))
    partial = v.new_empty(shares, batch, heads * head_dim, dtype=torch.float32)
    _value_pool_forward_kernel[shares, batch](with_strides(v), mask, partial, length, eps, **options)
    return partial.sum(0)


def value_pool_backward(u: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """dv in v's dtype, from u [B, Hkv * D] in float32."""
    dv, mask, options = torch.empty_like(v), mask.contiguous(), _options(v)
    _value_pool_backward_kernel[triton.cdiv(v.shape[2], options["BLOCK_T"]), v.shape[0]](
        *(with_strides(u), with_strides(v), mask, with_strides(dv), v.shape[2], eps), **options
    )
    return dv


def _options(v):
    width = v.shape[1] * v.shape[3]
    block = triton.next_power_of_2(width)
    return {
        "D": v.shape[3],
        "DIM": width,
        "BLOCK": block,
        "BLOCK_T": max(1, min(16, tiles.VALUE_POOL_ELEMENTS // block)),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }
