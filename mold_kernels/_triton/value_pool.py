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

_PROGRAMS = 1024


@triton.jit
def _load_tokens(v_ptr, mask_ptr, token, T, strides, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(values [tokens, BLOCK] in float32, pointers' offsets, where they are): 0 where a token is not valid."""
    column = tl.arange(0, BLOCK)
    valid = tl.load(mask_ptr + token, mask=token < T, other=0) != 0
    offsets = token.to(tl.int64)[:, None] * strides[2]
    offsets += (column // D).to(tl.int64)[None, :] * strides[1] + (column % D)[None, :] * strides[3]
    inside = (column < DIM)[None, :]
    values = tl.load(v_ptr + offsets, mask=inside & valid[:, None], other=0.0).to(tl.float32)
    return values, offsets, inside & (token < T)[:, None], valid


@triton.jit(do_not_specialize=["T"])
def _value_pool_forward_kernel(
    v_ptr,
    mask_ptr,
    partial_ptr,
    v_strides,
    T,
    eps,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    v_ptr += batch * v_strides[0]
    mask_ptr += batch * T
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        values, _, _, _ = _load_tokens(v_ptr, mask_ptr, token, T, v_strides, D, DIM, BLOCK)
        acc += values * tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    column = tl.arange(0, BLOCK)
    line = (tl.program_id(0) * tl.num_programs(1) + batch) * DIM
    tl.store(partial_ptr + line + column, tl.sum(acc, 0), mask=column < DIM)


@triton.jit(do_not_specialize=["T"])
def _value_pool_backward_kernel(
    u_ptr,
    v_ptr,
    mask_ptr,
    dv_ptr,
    u_strides,
    v_strides,
    dv_strides,
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
    u = tl.load(u_ptr + batch * u_strides[0] + column * u_strides[1], mask=column < DIM, other=0.0)[None, :]
    values, _, inside, valid = _load_tokens(
        v_ptr + batch * v_strides[0], mask_ptr + batch * T, token, T, v_strides, D, DIM,
        BLOCK,
    )  # fmt: skip
    scale = tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)
    along = scale * scale * scale * tl.sum(values * u, 1) / DIM
    dv = tl.where(valid[:, None], scale[:, None] * u - along[:, None] * values, 0.0)
    offsets = token.to(tl.int64)[:, None] * dv_strides[2]
    offsets += (column // D).to(tl.int64)[None, :] * dv_strides[1] + (column % D)[None, :] * dv_strides[3]
    tl.store(dv_ptr + batch * dv_strides[0] + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def value_pool_forward(v: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """[B, Hkv * D] float32."""
    batch, heads, length, head_dim = v.shape
    mask, options = mask.contiguous(), _options(v)
    shares = min(triton.cdiv(length, options["BLOCK_T"]), triton.cdiv(_PROGRAMS, max(batch, 1)))
    partial = v.new_empty(shares, batch, heads * head_dim, dtype=torch.float32)
    _value_pool_forward_kernel[shares, batch](v, mask, partial, v.stride(), length, eps, **options)
    return partial.sum(0)


def value_pool_backward(u: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """dv in v's dtype, from u [B, Hkv * D] in float32."""
    dv, mask, options = torch.empty_like(v), mask.contiguous(), _options(v)
    _value_pool_backward_kernel[triton.cdiv(v.shape[2], options["BLOCK_T"]), v.shape[0]](
        u, v, mask, dv, u.stride(), v.stride(), dv.stride(), v.shape[2], eps, **options
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
