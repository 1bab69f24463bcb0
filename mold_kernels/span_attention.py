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

from mold_kernels import _triton, cuda, native, reference
from mold_kernels.attention import check_attention_inputs, check_visibility
from mold_kernels.backends import choose_backend
from mold_kernels.operators import register_gradient, register_operator
from mold_kernels.spans import check_spans, key_columns, row_weights, visible_ranges

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
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
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
        sliding_window, softcap, cu_seqlens: as of `mold_kernels.attention_with_lse`, which made `lse`. Probabilities
            are 0 outside a row's window or sequence.
        backend: "auto", "triton" (GPU; D up to 256, no float64), "cuda" (likewise, none of the three options above),
            "native" (CPU; no float16, none of the three options), "torch" or "reference". A named backend is used or
            refused, never replaced.

    Returns:
        [B, S, M], float32 (float64 with float64 q), differentiable in q, k and lse.

    Raises:
        ValueError: a shape, dtype, device or span does not fit, or the backend is not available; names the argument.

    Source: MoLSAKI (EMNLP 2025), equations 2 and 3; the gradient is derived in this module's docstring.
    """
    check_attention_inputs(q, k)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: shape is {list(lse.shape)}, must be {list(q.shape[:3])} (batch, heads, tokens of q)")
    if lse.dtype != reference.accumulation_dtype(q.dtype):
        raise ValueError(f"lse: dtype is {lse.dtype}, must be {reference.accumulation_dtype(q.dtype)}")
    for name, tensor in (("lse", lse), ("row_spans", row_spans), ("key_spans", key_spans)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {q.device} as q")
    check_spans("row_spans", row_spans, q.shape[0], q.shape[2])
    check_spans("key_spans", key_spans, q.shape[0], q.shape[2])
    if row_reduction not in ("sum", "mean"):
        raise ValueError(f'row_reduction: is {row_reduction!r}, must be "sum" or "mean"')
    check_visibility(q, None, sliding_window, softcap, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ranges = visible_ranges(q.shape[2], sliding_window, cu_seqlens, q.device)
    candidates = ["torch", "reference"]
    if _triton.takes(q):
        candidates.insert(0 if q.is_cuda else 1, "triton")
    if q.dtype in native.DTYPES and ranges is None and softcap is None:
        candidates.insert(0, "native")
    if cuda.takes(q) and ranges is None and softcap is None:
        candidates.append("cuda")
    match choose_backend("span_attention", backend, candidates, q.device):
        case "reference":
            options = {"sliding_window": sliding_window, "softcap": softcap, "cu_seqlens": cu_seqlens}
            return reference.span_attention(
                q, k, lse, row_spans, key_spans, scale=scale, row_reduction=row_reduction, **options
            )
        case "cuda":
            return _CudaSpanAttention.apply(q, k, lse, row_spans, key_spans, scale, row_reduction)
        case chosen:
            mean = row_reduction == "mean"
            return _OPERATORS[chosen](q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean)


def _torch_forward(q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean):
    """The torch backend: two thin matrix products a block of rows."""
    dtype = lse.dtype
    columns, membership = key_columns(key_spans, q.shape[2])
    rows = row_weights(row_spans, q.shape[2], "mean" if mean else "sum", dtype)
    pooled = torch.zeros(*rows.shape[:2], columns.shape[1], dtype=dtype, device=q.device)
    for block, _, probabilities, _ in _blocks(q, k, lse, columns, rows, ranges, scale, softcap):
        pooled += rows[:, :, block] @ probabilities.sum((1, 2))
    return pooled @ membership.to(dtype).mT / q.shape[1]


def _torch_backward(grad, q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean):
    dtype = lse.dtype
    columns, membership = key_columns(key_spans, q.shape[2])
    rows = row_weights(row_spans, q.shape[2], "mean" if mean else "sum", dtype)
    column_grad = grad @ membership.to(dtype) / q.shape[1]
    dq, dlse = torch.zeros_like(q), torch.zeros(lse.shape, dtype=dtype, device=q.device)
    keys = _gather_keys(k, columns).to(dtype)
    dkeys = torch.zeros_like(keys)
    for block, queries, probabilities, slope in _blocks(q, k, lse, columns, rows, ranges, scale, softcap):
        weights = probabilities.mul_((rows[:, :, block].mT @ column_grad)[:, None, None])
        dlse[:, :, block] = -weights.sum(-1).flatten(1, 2)
        weights *= scale if slope is None else slope.mul_(scale)
        dq[:, :, block] = (weights @ keys[:, :, None]).flatten(1, 2)
        dkeys += (weights.mT @ queries).sum(2)
    index = columns[:, None, :, None].expand_as(dkeys)
    # Padding columns all point at token 0 and add exact zeros there.
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device).scatter_add_(2, index, dkeys)
    return dq, dk.to(k.dtype), dlse


class _CudaSpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, lse, row_spans, key_spans, scale, row_reduction):
        ctx.save_for_backward(q, k, lse)
        rows = row_spans.clamp(0, q.shape[2]).int().contiguous()
        ctx.arguments = rows, cuda.key_columns(key_spans, q.shape[2]), scale, row_reduction
        return cuda.span_attention_forward(q, k, lse, *ctx.arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *cuda.span_attention_backward(grad, *ctx.saved_tensors, *ctx.arguments), *[None] * 4


def _gather_keys(k: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The key vectors of the columns, [B, Hkv, N, D]."""
    return k.gather(2, columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


def _blocks(q, k, lse, columns, rows, ranges, scale, softcap) -> Iterator[tuple]:
    """Blocks of the rows that any step holds: (rows, queries [B, Hkv, G, R, D], P and d score [B, Hkv, G, R, N])."""
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
        if ranges is not None:
            hidden |= columns[:, None, :] < ranges[0, block, None]
        scores, slope = (queries @ keys).mul_(scale), None
        if softcap is not None:
            capped = scores.div_(softcap).tanh_()
            slope, scores = 1 - capped.square(), capped * softcap
        scores = scores.sub_(lse[:, :, block].view(*queries.shape[:-1], 1))
        yield block, queries, scores.masked_fill_(hidden[:, None, None], -torch.inf).exp_(), slope


_INPUTS = (
    "Tensor q, Tensor k, Tensor lse, Tensor row_spans, Tensor key_spans, Tensor? ranges, float scale, float? softcap, "
    "bool mean"
)


def _register(name, forward, backward):
    operator = register_operator(f"{name}({_INPUTS}) -> Tensor", forward, _fake_forward)
    backward_schema = f"{name}_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
    backward_operator = register_operator(backward_schema, backward, _fake_backward)

    def keep(ctx, inputs, output):
        *tensors, ctx.scale, ctx.softcap, ctx.mean = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx, grad):
        return *backward_operator(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap, ctx.mean), *[None] * 6

    register_gradient(operator, keep, differentiate)
    return operator


def _fake_forward(q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean):
    return lse.new_empty(q.shape[0], row_spans.shape[1], key_spans.shape[1])


def _fake_backward(grad, q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean):
    return torch.empty_like(q), k.new_empty(k.shape), lse.new_empty(lse.shape)


def _triton_forward(*arguments):
    from mold_kernels._triton.span_attention import span_attention_forward

    return span_attention_forward(*arguments)


def _triton_backward(*arguments):
    from mold_kernels._triton.span_attention import span_attention_backward

    return span_attention_backward(*arguments)


def _native_forward(q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean):
    return native.span_attention_forward(q, k, lse, row_spans, key_spans, scale, mean)


def _native_backward(grad, q, k, lse, row_spans, key_spans, ranges, scale, softcap, mean):
    return native.span_attention_backward(grad, q, k, lse, row_spans, key_spans, scale, mean)


_OPERATORS = {
    "native": _register("native_span_attention", _native_forward, _native_backward),
    "torch": _register("torch_span_attention", _torch_forward, _torch_backward),
    "triton": _register("triton_span_attention", _triton_forward, _triton_backward),
}
