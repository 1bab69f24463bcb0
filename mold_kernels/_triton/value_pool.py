"""Sum over valid tokens of the RMS-normalised values of all heads, and its gradient; v is read once in either.

The derivation is in `mold_kernels.value_pool`. Forward: a program takes a share of an example's tokens, all heads of a
token side by side, and leaves one partial sum; the shares are added by a second, tiny reduction in a fixed order.
Backward: a program takes a tile of tokens and writes their dv. Packed sequences have programs each, as examples have.

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
def _tokens(cu_seqlens_ptr, sequence, T, PACKED: tl.constexpr):
    """(example, its first token, the one behind its last) of a sequence: of T tokens, or packed in the one example."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence)
        return sequence * 0, tl.maximum(start, 0), tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), T)
    else:
        return sequence, 0, T


@triton.jit
def _load_tokens(v, mask_ptr, batch, token, end, T, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(values [tokens, BLOCK] in float32, 0 where a token is not valid; which tokens are)"""
    valid = tl.load(mask_ptr + batch * T + token, mask=token < end, other=0) != 0
    mask = (tl.arange(0, BLOCK) < DIM)[None, :] & valid[:, None]
    return tl.load(_pointers(v, batch, token, D, BLOCK), mask=mask, other=0.0).to(tl.float32), valid


@triton.jit(do_not_specialize=["T"])
def _value_pool_forward_kernel(
    v,
    mask_ptr,
    cu_seqlens_ptr,
    partial_ptr,
    T,
    eps,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PACKED: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    batch, start, end = _tokens(cu_seqlens_ptr, sequence, T, PACKED)
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for first in range(start + tl.program_id(0) * BLOCK_T, end, tl.num_programs(0) * BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        values, _ = _load_tokens(v, mask_ptr, batch, token, end, T, D, DIM, BLOCK)
        acc += values * tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    column = tl.arange(0, BLOCK)
    line = (tl.program_id(0) * tl.num_programs(1) + sequence) * DIM
    tl.store(partial_ptr + line + column, tl.sum(acc, 0), mask=column < DIM)


@triton.jit(do_not_specialize=["T"])
def _value_pool_backward_kernel(
    u,
    v,
    mask_ptr,
    cu_seqlens_ptr,
    dv,
    T,
    eps,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PACKED: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    batch, start, end = _tokens(cu_seqlens_ptr, sequence, T, PACKED)
    token = start + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK)
    gradient = tl.load(u[0] + sequence * u[1] + column * u[2], mask=column < DIM, other=0.0)[None, :]
    values, valid = _load_tokens(v, mask_ptr, batch, token, end, T, D, DIM, BLOCK)
    scale = tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)
    along = scale * scale * scale * tl.sum(values * gradient, 1) / DIM
    gradient = tl.where(valid[:, None], scale[:, None] * gradient - along[:, None] * values, 0.0)
    inside = (column < DIM)[None, :] & (token < end)[:, None]
    tl.store(_pointers(dv, batch, token, D, BLOCK), gradient.to(dv[0].dtype.element_ty), mask=inside)


def value_pool_forward(v, mask, cu_seqlens, eps) -> torch.Tensor:
    """[B, Hkv * D], or [sequences, Hkv * D], float32."""
    batch, heads, length, head_dim = v.shape
    mask, options = mask.contiguous(), _options(v, cu_seqlens)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shares = min(triton.cdiv(length, options["BLOCK_T"]), triton.cdiv(_PROGRAMS, max(sequences, 1)))
    partial = v.new_empty(shares, sequences, heads * head_dim, dtype=torch.float32)
    _value_pool_forward_kernel[shares, sequences](*(with_strides(v), mask, cu_seqlens, partial, length, eps), **options)
    return partial.sum(0)


def value_pool_backward(u, v, mask, cu_seqlens, eps) -> torch.Tensor:
    """dv in v's dtype, from u [B, Hkv * D], or [sequences, Hkv * D], in float32."""
    mask, options = mask.contiguous(), _options(v, cu_seqlens)
    # Borders on a device are not looked at: a token may be of no sequence.
    dv = torch.empty_like(v) if cu_seqlens is None else torch.zeros_like(v)
    _value_pool_backward_kernel[triton.cdiv(v.shape[2], options["BLOCK_T"]), len(u)](
        *(with_strides(u), with_strides(v), mask, cu_seqlens, with_strides(dv), v.shape[2], eps), **options
    )
    return dv


def _options(v, cu_seqlens):
    width = v.shape[1] * v.shape[3]
    block = triton.next_power_of_2(width)
    return {
        "D": v.shape[3],
        "DIM": width,
        "BLOCK": block,
        "BLOCK_T": max(1, min(16, tiles.VALUE_POOL_ELEMENTS // block)),
        "PACKED": cu_seqlens is not None,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }
