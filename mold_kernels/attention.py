"""Causal attention with a differentiable log-sum-exp, and the log-sum-exp alone.

    lse_i = log sum_{j <= i} exp(scale q_i . k_j)   P_ij = exp(scale q_i . k_j - lse_i)   out_i = sum_{j <= i} P_ij v_j

**The gradient of lse costs nothing inside a flash backward.** With dP_ij = dout_i . v_j and dlse_i given,

    dS_ij = P_ij (dP_ij - D_i + dlse_i),   D_i = dout_i . out_i

so D_i - dlse_i takes the place of D_i and nothing else changes. aten's CPU backward has no input for dlse, but it
uses `out` for D_i alone. Handing it `out` with one entry a row moved,

    out'_i0 = out_i0 - dlse_i / dout_i0   gives   D'_i = dout_i . out'_i = D_i - dlse_i

to rounding, without padded copies of q, k, v. Where |dout_i0| is (nearly) zero it is replaced by a value far below the
rounding error of everything it meets.
"""

from __future__ import annotations

import torch

from mold_kernels import native, reference
from mold_kernels.backends import choose_backend

_BLOCK_ELEMENTS = 1 << 22
"""Most scores that `attention_lse` holds at once (16 MiB in float32)."""


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    engine: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention and the natural log-sum-exp of its rows, both differentiable.

    Replaces ``F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)``.

    Args:
        q: [B, Hq, T, D] queries, any strides.
        k: [B, Hkv, T, D] keys; Hq is a multiple of Hkv.
        v: [B, Hkv, T, D] values.
        scale: of the scores; 1 / sqrt(D) where None.
        key_padding_mask: bool [B, T], True at real tokens, False at padding (as transformers' attention_mask).
            None: no padding.
        engine: "auto", "cpu" (aten's flash attention) or "reference" (materialises T x T). A named engine is used or
            refused, never replaced.

    Returns:
        out: [B, Hq, T, D] in q's dtype. Zero in a row that sees no key (padding on the left).
        lse: [B, Hq, T], float32 (float64 with float64 q). +inf in a row that sees no key, so that
            exp(score - lse) is 0 there.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the engine is not available; names the argument.

    Source: FlashAttention-2 (arXiv:2307.08691) for the backward; the gradient of lse is derived in this module.
    """
    check_attention_inputs(q, k)
    if v.shape != k.shape or v.dtype != q.dtype:
        raise ValueError(f"v: is {v.dtype} {list(v.shape)}, must be {q.dtype} {list(k.shape)} as k")
    _check_padding_mask(key_padding_mask, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    candidates = ["native", "cpu", "reference"] if q.dtype in native.DTYPES else ["cpu", "reference"]
    match choose_backend("attention_with_lse", engine, candidates, q.device, argument="engine"):
        case "native":
            return _NativeAttention.apply(q, k, v, key_padding_mask, scale)
        case "cpu":
            if q.dtype == torch.float16:  # the replaced entries of out need float32's exponent range
                out, lse = _FlashCpu.apply(q.float(), k.float(), v.float(), key_padding_mask, scale)
                return out.half(), lse
            return _FlashCpu.apply(q, k, v, key_padding_mask, scale)
        case "reference":
            return reference.attention_with_lse(q, k, v, scale=scale, key_padding_mask=key_padding_mask)


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Natural log-sum-exp of the causal attention rows alone, for models whose own attention does not return it.

    Forward 2 B Hq T^2 D / 2 FLOPs, backward three times that. Blocks of rows against all keys they see; never T x T.

    Args:
        q: [B, Hq, T, D] queries, any strides.
        k: [B, Hkv, T, D] keys; Hq is a multiple of Hkv.
        scale: of the scores; 1 / sqrt(D) where None.
        key_padding_mask: bool [B, T], True at real tokens. None: no padding.

    Returns:
        [B, Hq, T], float32 (float64 with float64 q), differentiable in q and k. +inf in a row that sees no key.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the argument.

    Source: dq_i = scale dlse_i sum_j P_ij k_j and dk_j = scale sum_i dlse_i P_ij q_i, from dlse_i/dS_ij = P_ij.
    """
    check_attention_inputs(q, k)
    _check_padding_mask(key_padding_mask, q)
    return _AttentionLse.apply(q, k, key_padding_mask, q.shape[-1] ** -0.5 if scale is None else scale)


def check_attention_inputs(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise a ValueError that names the argument unless q [B, Hq, T, D] and k [B, Hkv, T, D] fit each other."""
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: is {q.dtype} {list(q.shape)}, must be floating point [batch, heads, tokens, head dim]")
    batch, heads, length, head_dim = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (batch, length, head_dim) or heads % k.shape[1]:
        raise ValueError(
            f"k: shape is {list(k.shape)}, must be [{batch}, a divisor of {heads}, {length}, {head_dim}] to fit q"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: is {k.dtype} on {k.device}, must be {q.dtype} on {q.device} as q")


def _check_padding_mask(mask: torch.Tensor | None, q: torch.Tensor) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], q.shape[2])):
        raise ValueError(
            f"key_padding_mask: is {mask.dtype} {list(mask.shape)}, must be torch.bool {[q.shape[0], q.shape[2]]}"
        )


class _NativeAttention(torch.autograd.Function):
    """Our own flash attention for the CPU."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        out, lse = native.attention_forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, mask, out, lse = ctx.saved_tensors
        # A gradient that is not there is one zero, expanded.
        grad_out = out.new_zeros(()).expand_as(out) if grad_out is None else grad_out
        grad_lse = lse.new_zeros(()).expand_as(lse) if grad_lse is None else grad_lse
        return *native.attention_backward(grad_out, grad_lse, q, k, v, mask, ctx.scale, out, lse), None, None


class _FlashCpu(torch.autograd.Function):
    """aten's CPU flash attention, its backward fed with the gradient of lse."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[:, None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, attn_mask=bias, scale=scale
        )
        if mask is not None:  # aten leaves a finite number in rows that see no key
            lse = lse.masked_fill((mask.cumsum(-1) == 0)[:, None], torch.inf)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, bias = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None, None
            grad_out = torch.zeros_like(out)
        if grad_lse is not None:
            grad_out, out = _fold_lse_gradient(grad_out, out, grad_lse)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, True, attn_mask=bias, scale=ctx.scale
        )
        return dq, dk, dv, None, None


def _fold_lse_gradient(grad_out, out, grad_lse):
    """(grad_out', out') with rowsum(grad_out' o out') = rowsum(grad_out o out) - grad_lse, as the module derives."""
    entry = grad_out[..., 0]
    wide = grad_out.dtype == torch.float64
    largest = max(entry.abs().max().item(), grad_lse.abs().max().item())
    smallest = max(largest * (1e-30 if wide else 1e-18), 1e-200 if wide else 1e-36)
    tiny = entry.abs() < smallest
    if tiny.any():
        entry = entry.masked_fill(tiny, smallest)
        grad_out = grad_out.clone()
        grad_out[..., 0] = entry
    out = out.clone()
    out[..., 0] -= (grad_lse / entry).to(out.dtype)
    return grad_out, out


class _AttentionLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, mask, scale):
        lse = torch.empty(q.shape[:3], dtype=reference.accumulation_dtype(q.dtype), device=q.device)
        for block, _, _, scores in _score_blocks(q, k, mask, scale):
            lse[:, :, block] = scores.logsumexp(-1).flatten(1, 2)
        lse = lse.masked_fill_(lse == -torch.inf, torch.inf)
        ctx.save_for_backward(q, k, mask, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, mask, lse = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
        for block, queries, keys, scores in _score_blocks(q, k, mask, ctx.scale):
            rows = (*queries.shape[:-1], 1)
            weights = scores.sub_(lse[:, :, block].view(rows)).exp_()
            weights *= (grad[:, :, block] * ctx.scale).reshape(rows)
            dq[:, :, block] = (weights @ keys).flatten(1, 2)
            dk[:, :, : block.stop] += (weights.mT @ queries).sum(2)
        return dq, dk.to(k.dtype), None, None


def _score_blocks(q, k, mask, scale):
    """Blocks of rows: (rows, queries [B, Hkv, G, R, D], keys [B, Hkv, 1, C, D], scores [B, Hkv, G, R, C])."""
    batch, heads, length, head_dim = q.shape
    kv_heads, dtype = k.shape[1], reference.accumulation_dtype(q.dtype)
    size = max(1, _BLOCK_ELEMENTS // (batch * heads * length))
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        queries = q[:, :, block].to(dtype).view(batch, kv_heads, heads // kv_heads, -1, head_dim)
        keys = k[:, :, None, : block.stop].to(dtype)
        token = torch.arange(block.stop, device=q.device)
        hidden = token > token[block.start :, None]
        if mask is not None:
            hidden = hidden | ~mask[:, None, None, None, : block.stop]
        yield block, queries, keys, (queries @ keys.mT).mul_(scale).masked_fill_(hidden, -torch.inf)
