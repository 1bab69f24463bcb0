"""The specification: every op in plain PyTorch, on any device and dtype, differentiable by autograd.

These functions materialise whatever is easiest to read (T x T probabilities included). Products are made in the
dtype of the inputs, everything after them in float32 (float64 for float64 inputs), as eager attention does.
"""

from __future__ import annotations

import torch

from mold_kernels.spans import row_weights, span_membership
from mold_kernels.visibility import first_positions, row_positions, visible_keys, visible_ranges

L1_EPSILON = 1e-6
"""Added to every entry before `row_norm="l1"` divides a row by its sum, so that an all-zero row is uniform."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def masked_scores(
    q,
    k,
    scale=None,
    key_padding_mask=None,
    *,
    causal=True,
    query_start=None,
    sliding_window=None,
    softcap=None,
    cu_seqlens=None,
):
    """Scaled scores [B, Hq, Tq, Tk] in the accumulation dtype, -inf where row i must not see column j."""
    repeats, length = q.shape[1] // k.shape[1], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.repeat_interleave(repeats, dim=1).mT).to(accumulation_dtype(q.dtype)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    position = row_positions(slice(0, q.shape[2]), first_positions(q, k, causal, query_start), q.device)
    ranges = visible_ranges(length, sliding_window, cu_seqlens, q.device)
    key = torch.arange(length, device=q.device)
    visible = visible_keys(position, key, length, key_padding_mask, ranges, causal)
    return scores.masked_fill(~visible[:, None], -torch.inf)


def attention_lse(q, k, *, scale=None, key_padding_mask=None, **options):
    """Log-sum-exp of every row's scores; see `mold_kernels.attention_lse`."""
    lse = masked_scores(q, k, scale, key_padding_mask, **options).logsumexp(-1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def attention_with_lse(q, k, v, *, scale=None, key_padding_mask=None, **options):
    """Attention and its log-sum-exp; see `mold_kernels.attention_with_lse`."""
    lse = attention_lse(q, k, scale=scale, key_padding_mask=key_padding_mask, **options)
    # exp(-inf - inf) = 0: a row that sees no key is zero, where a softmax would be NaN.
    probabilities = (masked_scores(q, k, scale, key_padding_mask, **options) - lse.unsqueeze(-1)).exp()
    repeats = q.shape[1] // v.shape[1]
    return probabilities.to(v.dtype) @ v.repeat_interleave(repeats, dim=1), lse


def span_attention(q, k, lse, row_spans, key_spans, *, scale=None, row_reduction="sum", heads="mean", **options):
    """Attention pooled over steps and key words, counted from the row's start; see `mold_kernels.span_attention`."""
    dtype, groups = accumulation_dtype(q.dtype), head_groups(heads, q, k)
    scores = masked_scores(q, k, scale, **options)
    maps = (scores - lse.to(dtype).unsqueeze(-1)).exp().unflatten(1, (groups, -1)).mean(2)
    words = None if key_spans is None else span_membership(key_spans, k.shape[2])[:, None].to(dtype).mT
    if row_reduction == "max":
        pooled = _first_maximum(maps if words is None else maps @ words, span_membership(row_spans, q.shape[2]))
    else:
        pooled = row_weights(row_spans, q.shape[2], row_reduction, dtype)[:, None] @ maps
        pooled = pooled if words is None else pooled @ words
    return pooled.squeeze(1) if heads == "mean" else pooled


def head_groups(heads, q, k):
    """H', over how many groups of query heads `heads` averages."""
    return {"mean": 1, "group": k.shape[1], "all": q.shape[1]}[heads]


def _first_maximum(maps, inside):
    """Of maps [B, H', Tq, M] the largest entry of the rows inside [B, S, Tq], 0 where there is none."""
    # No probability is below the row of zeros that comes last.
    rows = maps[:, :, None].masked_fill(~inside[:, None, :, :, None], -1)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    # max would share its gradient among equal rows, argmax take any.
    row = torch.arange(rows.shape[3], device=maps.device)[:, None]
    most = rows.isnan() | (rows == rows.amax(3, keepdim=True))  # NaN, which equals nothing, is more than any
    first = torch.where(most, row, len(row)).amin(3, keepdim=True)
    return rows.gather(3, first).squeeze(3)


def value_pool(v, mask, eps, cu_seqlens=None):
    """Sum over valid tokens of the normalised values of all heads; see `mold_kernels.value_pool`."""
    batch, heads, length, head_dim = v.shape
    values = v.transpose(1, 2).reshape(batch, length, heads * head_dim).to(accumulation_dtype(v.dtype))
    values = values.masked_fill(~mask.unsqueeze(-1), 0)
    normalised = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if cu_seqlens is None:
        return normalised.sum(1)
    return sequence_membership(cu_seqlens, length).to(normalised.dtype) @ normalised[0]


def sequence_membership(cu_seqlens, length):
    """Which tokens each packed sequence has: bool [sequences, T]."""
    token = torch.arange(length, device=cu_seqlens.device)
    return (cu_seqlens[:-1, None] <= token) & (token < cu_seqlens[1:, None])


def teacher_layer_weights(attention, num_steps, num_keys, tau=0.1):
    """Softmax over layers of the mean difference of neighbouring columns; see `mold_kernels.teacher_layer_weights`."""
    step_valid, key_valid = valid_cells(attention, num_steps, num_keys)
    attention = attention.masked_fill(~(step_valid[:, :, None] & key_valid[:, None, :]), 0)
    pair_valid = step_valid[:, :, None] & key_valid[:, None, 1:]
    difference = (attention[..., 1:] - attention[..., :-1]).abs().masked_fill(~pair_valid, 0)
    pairs = (num_steps * (num_keys - 1)).clamp(min=1)
    return (difference.sum((-2, -1)) / pairs / tau).softmax(0).mT


def layer_mixture_kl(
    teacher_attention, student_attention, student_weights, num_steps, num_keys, *, tau=0.1, row_norm="softmax"
):
    """KL of the mixed step distributions, teacher to student; see `mold_kernels.layer_mixture_kl`."""
    step_valid, key_valid = valid_cells(student_attention, num_steps, num_keys)
    teacher_weights = teacher_layer_weights(teacher_attention, num_steps, num_keys, tau)
    log_p = log_rows(torch.einsum("bl,lbsm->bsm", teacher_weights, teacher_attention), key_valid, row_norm)
    log_q = log_rows(torch.einsum("bl,lbsm->bsm", student_weights, student_attention), key_valid, row_norm)
    valid = step_valid[:, :, None] & key_valid[:, None, :]
    divergence = (log_p.exp() * (log_p - log_q)).masked_fill(~valid, 0)
    return divergence.sum((-2, -1)) / num_steps.clamp(min=1)


def valid_cells(attention, num_steps, num_keys):
    """Steps [B, S] and key words [B, M] that are no padding. An example without key words has no valid step."""
    step = torch.arange(attention.shape[2], device=attention.device)
    key = torch.arange(attention.shape[3], device=attention.device)
    step_valid = (step < num_steps[:, None]) & (num_keys > 0)[:, None]
    return step_valid, key < num_keys[:, None]


def log_rows(attention, key_valid, row_norm):
    """Logarithm of each row made a distribution over the valid key words; 0 elsewhere."""
    key_valid = key_valid[:, None, :]
    if row_norm == "softmax":
        rows = attention.masked_fill(~key_valid, -torch.inf).log_softmax(-1)
    elif row_norm == "l1":
        mass = (attention + L1_EPSILON).masked_fill(~key_valid, 0)
        # Padding becomes log 1: the gradient of log 0 would turn everything into NaN.
        rows = (mass / mass.sum(-1, keepdim=True)).masked_fill(~key_valid, 1).log()
    else:
        raise ValueError(f'row_norm: is {row_norm!r}, must be "softmax" or "l1"')
    return rows.masked_fill(~key_valid, 0)
