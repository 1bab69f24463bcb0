"""Attention pooled over steps and key words, without a T x T map.

    A[b, s, m] = 1/Hq sum_h sum_{i in row span s} sum_{j in key span m} P[b, h, i, j]
    P[b, h, i, j] = exp(scale q_i . k_j - lse[h, i])   for j <= i, else 0

With the log-sum-exp of any flash attention, P is needed at the N key columns only. Let R [B, S, T] be the weight of
row i in step s, C [B, M, N] the membership of column n in key word m, and

    g[i, n] = 1/Hq sum_{s, m} R[s, i] dA[s, m] C[m, n]

Then, with W = P o g,

    dq_i += scale sum_n W[i, n] k_n        dk_n += scale sum_i W[i, n] q_i        dlse_i = -sum_n W[i, n]

so everything dense stays inside the attention's own backward, which takes dlse at no cost
(see `mold_kernels.attention`).

Cost: forward 2 B Hq T N D FLOPs, backward 6 B Hq T N D; reads q, the N key columns and lse once. P is recomputed in
the backward pass: nothing of size T is kept beyond the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mold_kernels import native, reference
from mold_kernels.attention import check_attention_inputs
from mold_kernels.backends import choose_backend
from mold_kernels.spans import check_spans, key_columns, row_weights

_BLOCK_ELEMENTS = 1 << 22
"""Most probabilities that the torch backend holds at once (16 MiB in float32)."""


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor,
    *,
    scale: float | None = None,
    row_reduction: str = "sum",
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention probabilities, averaged over heads and pooled over spans of rows and of keys.

    Replaces ``softmax(scale * q @ k.mT + causal).mean(1)`` followed by a sum over each rectangle.

    Args:
        q: [B, Hq, T, D] queries, any strides.
        k: [B, Hkv, T, D] keys, any strides; Hq is a multiple of Hkv.
        lse: [B, Hq, T] natural log-sum-exp of the rows' scaled scores; float32 (float64 with float64 q).
        row_spans: int [B, S, 2], half-open token ranges of the steps; empty is padding and gives zeros.
        key_spans: int [B, M, 2], likewise of the key words. They must not hold padded tokens: `lse` alone cannot
            tell that a key was masked.
        scale: of the scores; 1 / sqrt(D) where None.
        row_reduction: "sum" over the rows of a step (the paper), or "mean".
        backend: "auto", "native" (CPU; float32, float64, bfloat16), "torch" or "reference". A named backend is used
            or refused, never replaced.

    Returns:
        [B, S, M], float32 (float64 with float64 q), differentiable in q, k and lse.

    Raises:
        ValueError: a shape, dtype or span does not fit, or the backend is not available; names the argument.

    Source: MoLSAKI (EMNLP 2025), equations 2 and 3; the gradient is derived in this module's docstring.
    """
    check_attention_inputs(q, k)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: shape is {list(lse.shape)}, must be {list(q.shape[:3])} (batch, heads, tokens of q)")
    if lse.dtype != reference.accumulation_dtype(q.dtype):
        raise ValueError(f"lse: dtype is {lse.dtype}, must be {reference.accumulation_dtype(q.dtype)}")
    check_spans("row_spans", row_spans, q.shape[0], q.shape[2])
    check_spans("key_spans", key_spans, q.shape[0], q.shape[2])
    if row_reduction not in ("sum", "mean"):
        raise ValueError(f'row_reduction: is {row_reduction!r}, must be "sum" or "mean"')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    candidates = ["native", "torch", "reference"] if q.dtype in native.DTYPES else ["torch", "reference"]
    match choose_backend("span_attention", backend, candidates, q.device):
        case "native":
            return _NativeSpanAttention.apply(q, k, lse, row_spans, key_spans, scale, row_reduction)
        case "torch":
            return _SpanAttention.apply(q, k, lse, row_spans, key_spans, scale, row_reduction)
        case "reference":
            return reference.span_attention(q, k, lse, row_spans, key_spans, scale=scale, row_reduction=row_reduction)


class _NativeSpanAttention(torch.autograd.Function):
    """The native backend: as the torch one, but only the rows of a step and the columns that they see."""

    @staticmethod
    def forward(ctx, q, k, lse, row_spans, key_spans, scale, row_reduction):
        ctx.save_for_backward(q, k, lse, row_spans, key_spans)
        ctx.options = scale, row_reduction
        return native.span_attention_forward(q, k, lse, row_spans, key_spans, scale, row_reduction)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *native.span_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _SpanAttention(torch.autograd.Function):
    """The torch backend: two thin matrix products a block of rows."""

    @staticmethod
    def forward(ctx, q, k, lse, row_spans, key_spans, scale, row_reduction):
        dtype = lse.dtype
        columns, membership = key_columns(key_spans, q.shape[2])
        rows = row_weights(row_spans, q.shape[2], row_reduction, dtype)
        ctx.save_for_backward(q, k, lse, columns, membership, rows)
        ctx.scale = scale
        pooled = torch.zeros(*rows.shape[:2], columns.shape[1], dtype=dtype, device=q.device)
        for block, _, probabilities in _blocks(q, k, lse, columns, rows, scale):
            pooled += rows[:, :, block] @ probabilities.sum((1, 2))
        return pooled @ membership.to(dtype).mT / q.shape[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, lse, columns, membership, rows = ctx.saved_tensors
        scale, dtype = ctx.scale, lse.dtype
        column_grad = grad @ membership.to(dtype) / q.shape[1]
        dq, dlse = torch.zeros_like(q), torch.zeros_like(lse)
        keys = _gather_keys(k, columns).to(dtype)
        dkeys = torch.zeros_like(keys)
        for block, queries, probabilities in _blocks(q, k, lse, columns, rows, scale):
            weights = probabilities.mul_((rows[:, :, block].mT @ column_grad)[:, None, None])
            dlse[:, :, block] = -weights.sum(-1).flatten(1, 2)
            weights *= scale
            dq[:, :, block] = (weights @ keys[:, :, None]).flatten(1, 2)
            dkeys += (weights.mT @ queries).sum(2)
        index = columns[:, None, :, None].expand_as(dkeys)
        # Padding columns all point at token 0 and add exact zeros there.
        dk = torch.zeros(k.shape, dtype=dtype, device=k.device).scatter_add_(2, index, dkeys)
        return dq, dk.to(k.dtype), dlse, None, None, None, None


def _gather_keys(k: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The key vectors of the columns, [B, Hkv, N, D]."""
    return k.gather(2, columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


def _blocks(q, k, lse, columns, rows, scale) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Blocks of the rows that any step holds: (rows, queries [B, Hkv, G, R, D], P [B, Hkv, G, R, N])."""
    batch, heads, _, head_dim = q.shape
    kv_heads, dtype = k.shape[1], lse.dtype
    used = rows.any(1).any(0).nonzero()
    if not used.numel() or not columns.shape[1]:
        return
    keys = _gather_keys(k, columns).to(dtype)[:, :, None].mT
    size = max(1, _BLOCK_ELEMENTS // (batch * heads * columns.shape[1]))
    first, last = int(used[0]), int(used[-1]) + 1
    for start in range(first, last, size):
        block = slice(start, min(start + size, last))
        queries = q[:, :, block].to(dtype).view(batch, kv_heads, heads // kv_heads, -1, head_dim)
        row = torch.arange(block.start, block.stop, device=q.device)
        hidden = columns[:, None, :] > row[:, None]
        scores = (queries @ keys).mul_(scale).sub_(lse[:, :, block].view(*queries.shape[:-1], 1))
        yield block, queries, scores.masked_fill_(hidden[:, None, None], -torch.inf).exp_()
