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
from typing import Any

import torch

from mold_kernels import _triton, cuda, native, reference
from mold_kernels._triton.tiles import choose_tile
from mold_kernels.backends import Backend, Op
from mold_kernels.span_pieces import SpanPlan
from mold_kernels.spans import row_weights
from mold_kernels.visibility import check_heads, check_scale, check_visibility, positive_scale, visible_ranges

_BLOCK_ELEMENTS = 1 << 22
"""Most probabilities that the torch backend holds at once (16 MiB in float32)."""

_NATIVE_ROWS = 192
"""Most rows of a piece, over all the query heads of a key head: its scores and queries stay in the cache."""


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
    plan: SpanPlan | None = None,
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
        plan: `SpanPlan(row_spans, key_spans, T)`, for layers that have the same spans; None: it is made here.
        backend: "auto" or a name of the README's table, which is used or refused, never replaced.

    Returns:
        [B, S, M], float32 (float64 with float64 q), differentiable in q, k and lse.

    Raises:
        ValueError: a shape, dtype, device or span does not fit, or the backend is not available; names the argument.

    Source: MoLSAKI (EMNLP 2025), equations 2 and 3; the gradient is derived in this module's docstring.
    """
    check_heads(q, k)
    check_scale(scale)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: shape is {list(lse.shape)}, must be {list(q.shape[:3])} (batch, heads, tokens of q)")
    if lse.dtype != reference.accumulation_dtype(q.dtype):
        raise ValueError(f"lse: dtype is {lse.dtype}, must be {reference.accumulation_dtype(q.dtype)}")
    for name, tensor in (("lse", lse), ("row_spans", row_spans), ("key_spans", key_spans)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {q.device} as q")
    batch, length = q.shape[0], q.shape[2]
    if row_spans.shape[:1] != (batch,):
        raise ValueError(f"row_spans: shape is {list(row_spans.shape)}, must be [{batch}, number of spans, 2]")
    if plan is None:
        plan = SpanPlan(row_spans, key_spans, length)
    elif not plan.is_of(row_spans, key_spans, length):
        raise ValueError("plan: is of other spans, must be made of row_spans and key_spans as they are, and of q's T")
    if row_reduction not in ("sum", "mean"):
        raise ValueError(f'row_reduction: is {row_reduction!r}, must be "sum" or "mean"')
    options: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap, "cu_seqlens": cu_seqlens}
    check_visibility(q, **options)
    chosen = SPAN_ATTENTION.choose(backend, q, options)
    if chosen.backward is None:
        spans = plan.row_spans, plan.key_spans
        return chosen.forward(q, k, lse, *spans, scale=scale, row_reduction=row_reduction, **options)
    q, scale = positive_scale(q, scale)
    ranges = visible_ranges(length, sliding_window, cu_seqlens, q.device)
    tensors = q, k, lse, plan.row_spans, plan.key_spans, ranges, _PREPARE[chosen.name](plan, q, k)
    return SPAN_ATTENTION.operator(*tensors, scale, softcap, row_reduction == "mean", chosen.name)


_PREPARE = {
    "native": lambda plan, q, k: list(plan.pieces(max(1, _NATIVE_ROWS * k.shape[1] // q.shape[1]))),
    "triton": lambda plan, q, k: list(plan.pieces(choose_tile("span_attention_backward_dk", q).m)),
    "cuda": lambda plan, q, k: list(plan.columns(cuda.TILE)),
    "torch": lambda plan, q, k: list(plan.columns(1)),
}
"""What a backend reads of the spans: pieces of so many rows, or columns, so many at once."""


def _torch_forward(q, k, lse, row_spans, key_spans, ranges, columns, scale, softcap, mean):
    """The torch backend: two thin matrix products a block of rows."""
    dtype, (columns, before) = lse.dtype, columns
    membership = _membership(columns, before, key_spans)
    rows = row_weights(row_spans, q.shape[2], "mean" if mean else "sum", dtype)
    pooled = torch.zeros(*rows.shape[:2], columns.shape[1], dtype=dtype, device=q.device)
    for block, _, probabilities, _ in _blocks(q, k, lse, columns, rows, ranges, scale, softcap):
        pooled += rows[:, :, block] @ probabilities.sum((1, 2))
    return pooled @ membership.to(dtype).mT / q.shape[1]


def _torch_backward(grad, q, k, lse, row_spans, key_spans, ranges, columns, scale, softcap, mean):
    dtype, (columns, before) = lse.dtype, columns
    membership = _membership(columns, before, key_spans)
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
    index = columns.clamp(max=q.shape[2] - 1).long()[:, None, :, None].expand_as(dkeys)
    # Padding columns, which no row sees, all point at the last token and add exact zeros there.
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device).scatter_add_(2, index, dkeys)
    return dq, dk.to(k.dtype), dlse


def _membership(columns, before, key_spans):
    """Which columns each key word has: bool [B, M, N]. A span's tokens are neighbours among the columns too."""
    start, end = key_spans.long().unbind(-1)
    place = torch.arange(columns.shape[1], device=columns.device)
    return (before.gather(1, start)[..., None] <= place) & (place < before.gather(1, end)[..., None])


def _gather_keys(k: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The key vectors of the columns, [B, Hkv, N, D]; anything at padding."""
    index = columns.clamp(max=k.shape[2] - 1).long()
    return k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


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


SPAN_ATTENTION = Op(
    "span_attention",
    inputs="Tensor q, Tensor k, Tensor lse, Tensor row_spans, Tensor key_spans, Tensor? ranges, Tensor[] pieces, "
    "float scale, float? softcap, bool mean",
    outputs="Tensor pooled",
    options=("sliding_window", "softcap", "cu_seqlens"),
    backends=[
        Backend("native", native.span_attention_forward, native.span_attention_backward, dtypes=native.DTYPES),
        Backend.of_triton("span_attention", "span_attention", head_dim=_triton.HEAD_DIM),
        Backend(
            "cuda",
            cuda.span_attention_forward,
            cuda.span_attention_backward,
            dtypes=cuda.DTYPES,
            options=(),
            head_dim=cuda.HEAD_DIM,
        ),
        Backend("torch", _torch_forward, _torch_backward),
        Backend("reference", reference.span_attention),
    ],
    fake=lambda q, k, lse, row_spans, key_spans, *_: lse.new_empty(len(q), row_spans.shape[1], key_spans.shape[1]),
    gradients="q, k, lse",
    kept="q, k, lse, row_spans, key_spans, ranges, pieces, scale, softcap, mean",
    fake_backward=lambda grad, q, k, lse, *_: (torch.empty_like(q), k.new_empty(k.shape), lse.new_empty(lse.shape)),
)
