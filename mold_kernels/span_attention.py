"""Attention pooled over steps and key words, without a T x T map.

    A[b, x, s, m] = 1/|x| sum_{h in x} sum_{i in row span s} sum_{j in key span m} P[b, h, i, j]
    P[b, h, i, j] = exp(scale q_i . k_j - lse[h, i])   where row i sees key j, else 0

x is a group of query heads, one of H': all of them together, those of a key head, or each alone.

With the log-sum-exp of any flash attention, P is needed at the N key columns only. Let R [B, S, Tq] be the weight of
row i in step s, C [B, M, N] the membership of column n in key word m, and

    g[x, i, n] = 1/|x| sum_{s, m} R[s, i] dA[x, s, m] C[m, n]

Then, with W = P o g of each head's group,

    dq_i += scale sum_n W[i, n] k_n        dk_n += scale sum_i W[i, n] q_i        dlse_i = -sum_n W[i, n]

so everything dense stays inside the attention's own backward, which takes dlse at no cost
(see `mold_kernels.attention`).

With `row_reduction="max"` R picks, of each A[x, s, m], the first of the rows that have the most, and the gradient is
that of the row. Without key spans every key is a column and a key word: N = M = Tk.

Cost: forward 2 B Hq Tq N D FLOPs, backward 6 B Hq Tq N D; reads q, the N key columns and lse once. P is recomputed in
the backward pass: nothing of size Tq is kept beyond the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mold_kernels import _triton, cuda, native, reference
from mold_kernels._triton.tiles import choose_tile
from mold_kernels.backends import Backend, Op, listed
from mold_kernels.span_pieces import SpanPlan
from mold_kernels.spans import row_weights
from mold_kernels.visibility import (
    capped_scores,
    check_heads,
    check_scale,
    check_visibility,
    first_positions,
    given_options,
    positive_scale,
    row_positions,
    visible_keys,
    visible_ranges,
)

_BLOCK_ELEMENTS = 1 << 22
"""Most probabilities that the torch backend holds at once (16 MiB in float32)."""


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    key_spans: torch.Tensor | None,
    *,
    scale: float | None = None,
    heads: str = "mean",
    row_reduction: str = "sum",
    causal: bool = True,
    query_start: int | torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    plan: SpanPlan | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention probabilities, averaged over heads and pooled over spans of rows and of keys.

    Replaces ``softmax(scale * q @ k.mT + causal).mean(1)`` followed by a sum over each rectangle.

    Args:
        q: [B, Hq, Tq, D] queries, any strides.
        k: [B, Hkv, Tk, D] keys, any strides; Hq is a multiple of Hkv, Tq at most Tk.
        lse: [B, Hq, Tq] natural log-sum-exp of the rows' scaled scores; float32 (float64 with float64 q).
        row_spans: int [B, S, 2], half-open ranges of q's rows, the steps; empty is padding and gives zeros. With
            `cu_seqlens` also [sequences, S, 2], counted from the start of each sequence.
        key_spans: int [B, M, 2], likewise of k's keys, the key words. None: every key is one.
        scale: of the scores; 1 / sqrt(D) where None.
        heads: "mean" over all heads, over those of a "group" (the query heads of a key head), or "all" of them.
        row_reduction: "sum" over the rows of a step (the paper), "mean", or "max", after heads and keys; its gradient
            is that of the first row that has the most.
        causal, query_start, key_padding_mask, sliding_window, softcap, cu_seqlens: as of
            `mold_kernels.attention_with_lse`, which made `lse`. Probabilities are 0 outside of what a row sees; `lse`
            alone cannot tell that a key between them is padding.
        plan: `SpanPlan(row_spans, key_spans, Tq, Tk, cu_seqlens)`, for layers that have the same spans; None: it is
            made here.
        backend: "auto" or a name of the table in docs/backends.md, which is used or refused, never replaced.

    Returns:
        [B, S, M], or [B, H', S, M] of H' = Hkv groups or H' = Hq heads; float32 (float64 with float64 q),
        differentiable in q, k and lse. M is Tk without key spans; B is the number of sequences where spans are of
        sequences.

    Raises:
        ValueError: a shape, dtype, device or span does not fit, or the backend is not available or lacks an option that
            was given; names the argument.

    Source: MoLSAKI (EMNLP 2025), equations 2 and 3; the gradient is derived in this module's docstring.
    """
    check_heads(q, k, causal)
    check_scale(scale)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: shape is {list(lse.shape)}, must be {list(q.shape[:3])} (batch, heads, tokens of q)")
    if lse.dtype != reference.accumulation_dtype(q.dtype):
        raise ValueError(f"lse: dtype is {lse.dtype}, must be {reference.accumulation_dtype(q.dtype)}")
    for name, tensor in (("lse", lse), ("row_spans", row_spans), ("key_spans", key_spans)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {q.device} as q")
    for name, value, known in (("heads", heads, _HEADS), ("row_reduction", row_reduction, _REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{name}: is {value!r}, must be {listed(map(repr, known))}")
    options: dict[str, Any] = {
        "causal": causal,
        "query_start": query_start,
        "key_padding_mask": key_padding_mask,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "cu_seqlens": cu_seqlens,
    }
    check_visibility(q, k, **options)
    lengths = q.shape[2], k.shape[2]
    sequences = _check_batch(row_spans, len(q), cu_seqlens, lengths)
    if plan is None:
        plan = SpanPlan(row_spans, key_spans, *lengths, sequences)
    elif not plan.is_of(row_spans, key_spans, *lengths, sequences):
        raise ValueError(
            "plan: is of other spans, must be made of row_spans and key_spans as they are, and of the numbers of rows "
            "and keys"
        )
    given = given_options(q, k, **options)
    given |= {
        "heads": None if heads == "mean" else heads,
        'row_reduction="max"': None if row_reduction != "max" else row_reduction,
        "key_spans=None": True if key_spans is None else None,
        "spans of sequences": sequences,
    }
    chosen = SPAN_ATTENTION.choose(backend, q, given)
    spans = plan.row_spans, None if key_spans is None else plan.key_spans
    if chosen.backward is None:
        return chosen.forward(q, k, lse, *spans, scale=scale, heads=heads, row_reduction=row_reduction, **options)
    q, scale = positive_scale(q, scale)
    first = first_positions(q, k, causal, query_start)
    ranges = visible_ranges(k.shape[2], sliding_window, cu_seqlens, q.device)
    tensors = q, k, lse, *spans, key_padding_mask, first, ranges, _PREPARE[chosen.name](plan, q, k)
    groups = reference.head_groups(heads, q, k)
    pooled = SPAN_ATTENTION(*tensors, scale, softcap, causal, groups, row_reduction, chosen.name)
    return pooled.squeeze(1) if heads == "mean" else pooled


_HEADS, _REDUCTIONS = ("mean", "group", "all"), ("sum", "mean", "max")


def _check_batch(row_spans, batch, cu_seqlens, lengths):
    """`cu_seqlens` where spans are of its sequences, None where they are of the batch's examples."""
    if row_spans.shape[:1] == (batch,):
        return None
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    if row_spans.shape[:1] != (sequences,):
        several = "" if sequences is None else f" or [{sequences}, number of spans, 2], as there are sequences"
        raise ValueError(f"row_spans: shape is {list(row_spans.shape)}, must be [{batch}, number of spans, 2]{several}")
    if lengths[0] != lengths[1]:
        raise ValueError(f"row_spans: are of sequences with {lengths[0]} rows over {lengths[1]} keys, must be as many")
    return cu_seqlens


_PREPARE = {
    "native": lambda plan, q, k: [plan.key_spans],
    "triton": lambda plan, q, k: list(
        plan.pieces(
            choose_tile("span_attention_backward_dk", q).m,
            joined=len(plan.row_spans) > len(q),
            each_key=plan.every_key,
        )
    ),
    "cuda": lambda plan, q, k: list(plan.columns(cuda.TILE)),
    "torch": lambda plan, q, k: list(plan.columns(1)),
}
"""What a backend reads of the spans: pieces of so many rows, or columns, so many at once."""


def _torch_forward(
    q, k, lse, row_spans, key_spans, mask, first, ranges, columns, scale, softcap, causal, groups, reduction
):
    """The torch backend: two thin matrix products a block of rows."""
    seen = mask, first, ranges, scale, softcap, causal
    if len(row_spans) > len(q):
        return torch.cat(
            [
                _torch_forward(
                    q, k, lse, rows, keys, mask, first, ranges, one, scale, softcap, causal, groups, reduction
                )
                for rows, keys, one in _of_each(row_spans, key_spans, columns)
            ]
        )
    if reduction == "max":
        return _maxima(q, k, lse, row_spans, key_spans, columns, seen, groups)[0]
    rows = row_weights(row_spans, q.shape[2], reduction, lse.dtype)[:, None]
    pooled = lse.new_zeros(len(q), groups, rows.shape[2], columns[0].shape[1])
    for block, _, maps, _ in _blocks(q, k, lse, columns[0], row_spans, *seen):
        pooled += rows[..., block] @ maps.unflatten(1, (groups, -1)).sum(2)
    return _words(pooled, columns, key_spans) * (groups / q.shape[1])


def _torch_backward(
    grad, q, k, lse, row_spans, key_spans, mask, first, ranges, columns, scale, softcap, causal, groups, reduction
):
    seen = mask, first, ranges, scale, softcap, causal
    if len(row_spans) > len(q):
        total = torch.zeros_like(q), k.new_zeros(k.shape), torch.zeros_like(lse)
        for (rows, keys, one), part in zip(_of_each(row_spans, key_spans, columns), grad.split(1), strict=True):
            gradients = _torch_backward(
                part, q, k, lse, rows, keys, mask, first, ranges, one, scale, softcap, causal, groups, reduction
            )
            for of_all, of_one in zip(total, gradients, strict=True):
                of_all += of_one
        return total
    dtype, grad = lse.dtype, grad * (groups / q.shape[1])
    if reduction == "max":
        row = _maxima(q, k, lse, row_spans, key_spans, columns, seen, groups)[1]
    else:
        rows = row_weights(row_spans, q.shape[2], reduction, dtype)[:, None]
        grad = _columns_of_words(grad, columns, key_spans)
    dq, dlse = torch.zeros_like(q), torch.zeros(lse.shape, dtype=dtype, device=q.device)
    keys = _gather_keys(k, columns[0]).to(dtype)
    dkeys = torch.zeros_like(keys)
    for block, queries, weights, slope in _blocks(q, k, lse, columns[0], row_spans, *seen):
        if reduction == "max":
            of_rows = grad.new_zeros(*grad.shape[:2], block.stop - block.start, grad.shape[3])
            inside = (row >= block.start) & (row < block.stop)
            of_rows.scatter_add_(2, (row - block.start).where(inside, 0), grad.where(inside, 0))
            column_grad = _columns_of_words(of_rows, columns, key_spans)
        else:
            column_grad = rows[..., block].mT @ grad
        weights.unflatten(1, (groups, -1)).mul_(column_grad[:, :, None])
        dlse[:, :, block] = -weights.sum(-1)
        weights *= scale if slope is None else slope.mul_(scale)
        weights = weights.unflatten(1, queries.shape[1:3])
        dq[:, :, block] = (weights @ keys[:, :, None]).flatten(1, 2)
        dkeys += (weights.mT @ queries).sum(2)
    index = columns[0].clamp(max=k.shape[2] - 1).long()[:, None, :, None].expand_as(dkeys)
    # Padding columns, which no row sees, all point at the last token and add exact zeros there.
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device).scatter_add_(2, index, dkeys)
    return dq, dk.to(k.dtype), dlse


def _of_each(row_spans, key_spans, columns):
    """(row spans, key spans, columns) of the sequences that stand in one row, one after another."""
    tokens, before = columns
    for index, count in enumerate(before[:, -1].tolist()):
        one = slice(index, index + 1)
        yield row_spans[one], None if key_spans is None else key_spans[one], (tokens[one, :count], before[one])


def _maxima(q, k, lse, row_spans, key_spans, columns, seen, groups):
    """(largest entries [B, H', S, M] over the rows of each step, the first row that has each; -1 where all are 0)"""
    steps, words = row_spans.shape[1], k.shape[2] if key_spans is None else key_spans.shape[1]
    largest = lse.new_zeros(len(q), groups, steps, words)
    first = torch.full(largest.shape, -1, dtype=torch.int64, device=q.device)
    for block, _, maps, _ in _blocks(q, k, lse, columns[0], row_spans, *seen):
        values = _words(maps.unflatten(1, (groups, -1)).mean(2), columns, key_spans)
        row = torch.arange(block.start, block.stop, device=q.device)
        start, end = row_spans.long().unbind(-1)
        for step in range(steps):
            inside = (start[:, step, None] <= row) & (row < end[:, step, None])
            of_step = values.masked_fill(~inside[:, None, :, None], -1)
            most = of_step.amax(2)
            # Of equal rows argmax takes any.
            at = torch.where(of_step.isnan() | (of_step == most[:, :, None]), row[:, None], q.shape[2]).amin(2)
            more = most.isnan() | (most > largest[:, :, step])
            largest[:, :, step] = most.where(more, largest[:, :, step])
            first[:, :, step] = at.where(more, first[:, :, step])
    return largest, first


def _words(values, columns, key_spans):
    """Sums over each key word's columns: [..., R, M] of [B, H', R, N]."""
    if key_spans is not None:
        return values @ _membership(columns, key_spans).to(values.dtype).mT
    tokens, before = columns
    of_keys = values.new_zeros(*values.shape[:-1], before.shape[1] - 1)
    return of_keys.scatter_(-1, tokens.long()[:, None, None].expand_as(values), values)


def _columns_of_words(values, columns, key_spans):
    """Sums over the key words that hold each column: [..., R, N] of [B, H', R, M]."""
    if key_spans is not None:
        return values @ _membership(columns, key_spans).to(values.dtype)
    tokens = columns[0].long()[:, None, None]
    return values.gather(-1, tokens.expand(*values.shape[:-1], -1))


def _membership(columns, key_spans):
    """Which columns each key word has: bool [B, 1, M, N]. A span's keys are neighbours among the columns too."""
    tokens, before = columns
    start, end = key_spans.long().unbind(-1)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return ((before.gather(1, start)[..., None] <= place) & (place < before.gather(1, end)[..., None]))[:, None]


def _gather_keys(k: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The key vectors of the columns, [B, Hkv, N, D]; anything at padding."""
    index = columns.clamp(max=k.shape[2] - 1).long()
    return k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


def _blocks(q, k, lse, columns, row_spans, mask, first, ranges, scale, softcap, causal) -> Iterator[tuple]:
    """Blocks of the rows that a step holds: (rows, queries [B, Hkv, G, R, D], P [B, Hq, R, N], slope of the scores)."""
    batch, heads, _, head_dim = q.shape
    kv_heads, dtype = k.shape[1], lse.dtype
    held = row_spans[row_spans[..., 0] < row_spans[..., 1]]
    if not held.numel() or not columns.shape[1]:
        return
    keys = _gather_keys(k, columns).to(dtype)[:, :, None].mT
    size = max(1, _BLOCK_ELEMENTS // (batch * heads * columns.shape[1]))
    begin, end = int(held[:, 0].min()), int(held[:, 1].max())
    for start in range(begin, end, size):
        block = slice(start, min(start + size, end))
        queries = q[:, :, block].to(dtype).view(batch, kv_heads, heads // kv_heads, -1, head_dim)
        scores, slope = capped_scores((queries @ keys).mul_(scale), softcap)
        visible = visible_keys(row_positions(block, first, q.device), columns, k.shape[2], mask, ranges, causal)
        scores, slope = scores.flatten(1, 2), None if slope is None else slope.flatten(1, 2)
        scores = scores.sub_(lse[:, :, block, None])
        yield block, queries, scores.masked_fill_(~visible[:, None], -torch.inf).exp_(), slope


def _fake(q, k, lse, row_spans, key_spans, mask, first, ranges, pieces, scale, softcap, causal, groups, *_):
    words = k.shape[2] if key_spans is None else key_spans.shape[1]
    return lse.new_empty(len(row_spans), groups, row_spans.shape[1], words)


_OPTIONS = (
    *("heads", 'row_reduction="max"', "key_spans=None", "causal=False", "query_start", "key_padding_mask"),
    *("sliding_window", "softcap", "cu_seqlens", "spans of sequences"),
)

SPAN_ATTENTION = Op(
    "span_attention",
    inputs="Tensor q, Tensor k, Tensor lse, Tensor row_spans, Tensor? key_spans, Tensor? mask, Tensor? first, "
    "Tensor? ranges, Tensor[] pieces, float scale, float? softcap, bool causal, int groups, str row_reduction",
    outputs="Tensor pooled",
    options=_OPTIONS,
    backends=[
        Backend(
            "native",
            native.span_attention_forward,
            native.span_attention_backward,
            dtypes=native.DTYPES,
        ),
        Backend.of_triton(
            "span_attention",
            "span_attention",
            head_dim=_triton.HEAD_DIM,
        ),
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
    fake=_fake,
    gradients="q, k, lse",
    kept="q, k, lse, row_spans, key_spans, mask, first, ranges, pieces, scale, softcap, causal, groups, row_reduction",
    fake_backward=lambda grad, q, k, lse, *_: (torch.empty_like(q), k.new_empty(k.shape), lse.new_empty(lse.shape)),
)
