"""Attention with a differentiable log-sum-exp, and the log-sum-exp alone. Sums are over the keys j that row i sees:

    lse_i = log sum_j exp(scale q_i . k_j)   P_ij = exp(scale q_i . k_j - lse_i)   out_i = sum_j P_ij v_j

**The gradient of lse costs nothing inside a flash backward.** With dP_ij = dout_i . v_j and dlse_i given,

    dS_ij = P_ij (dP_ij - D_i + dlse_i),   D_i = dout_i . out_i

so D_i - dlse_i takes the place of D_i and nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch

from mold_kernels import _triton, foreign_attention, native, reference
from mold_kernels.backends import Backend, Op
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
"""Most scores that `attention_lse` holds at once (16 MiB in float32)."""


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    query_start: int | torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the natural log-sum-exp of its rows, both differentiable.

    Replaces ``F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)``, and the same over a cache.

    Args:
        q: [B, Hq, Tq, D] queries, any strides.
        k: [B, Hkv, Tk, D] keys; Hq is a multiple of Hkv, Tq at most Tk.
        v: [B, Hkv, Tk, D] values.
        scale: of the scores; 1 / sqrt(D) where None.
        causal: whether a row sees no key behind its position. False: it sees them all, and Tq and Tk are free.
        query_start: the key at whose position the first row stands, an int, or one an example: int32 or int64 [B].
            None: Tk - Tq, so that the last row stands at the last key, as those of a cache do.
        key_padding_mask: bool [B, Tk], True at real tokens, False at padding (as transformers' attention_mask), which
            no row sees, and whose own rows see no key where attention is causal. None: no padding.
        sliding_window: how many keys a row sees, its own included; None: all before it.
        softcap: scores become softcap tanh(scores / softcap), as in Gemma 2; None: they stay.
        cu_seqlens: int32 [sequences + 1], where packed sequences begin among the keys of a batch of 1, and Tk at the
            end; a row sees its own sequence only. None: one sequence an example.
        backend: "auto" or a name of the table in docs/backends.md, which is used or refused, never replaced.

    Returns:
        out: [B, Hq, Tq, D] in q's dtype. Zero in a row that sees no key (padding).
        lse: [B, Hq, Tq], float32 (float64 with float64 q). +inf in a row that sees no key, so that
            exp(score - lse) is 0 there.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend is not available or lacks an option that
            was given; names the argument.

    Source: FlashAttention-2 (arXiv:2307.08691) for the backward; the gradient of lse is derived in this module.
    """
    check_heads(q, k, causal)
    if v.shape != k.shape or v.dtype != q.dtype or v.device != q.device:
        raise ValueError(
            f"v: is {v.dtype} {list(v.shape)} on {v.device}, must be {q.dtype} {list(k.shape)} on {q.device} as k"
        )
    check_scale(scale)
    options: dict[str, Any] = {
        "causal": causal,
        "query_start": query_start,
        "key_padding_mask": key_padding_mask,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "cu_seqlens": cu_seqlens,
    }
    check_visibility(q, k, **options)
    chosen = ATTENTION_WITH_LSE.choose(backend, q, given_options(q, k, **options), _needs_gradient(q, k, v))
    if chosen.backward is None:
        return chosen.forward(q, k, v, scale=scale, **options)
    q, scale = positive_scale(q, scale)
    first = first_positions(q, k, causal, query_start)
    ranges = visible_ranges(k.shape[2], sliding_window, cu_seqlens, q.device)
    return ATTENTION_WITH_LSE(q, k, v, key_padding_mask, first, ranges, scale, softcap, causal, chosen.name)


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    query_start: int | torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Natural log-sum-exp of the attention rows alone, for models whose own attention does not return it.

    Forward 2 P D FLOPs for P pairs of a row and a key it sees, backward three times that (four times with "triton").
    Never Tq x Tk.

    Args:
        q: [B, Hq, Tq, D] queries, any strides.
        k: [B, Hkv, Tk, D] keys; Hq is a multiple of Hkv.
        scale: of the scores; 1 / sqrt(D) where None.
        causal, query_start, key_padding_mask, sliding_window, softcap, cu_seqlens: as of `attention_with_lse`.
        backend: "auto" or a name of the table in docs/backends.md, which is used or refused, never replaced.

    Returns:
        [B, Hq, Tq], float32 (float64 with float64 q), differentiable in q and k. +inf in a row that sees no key.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend is not available or lacks an option that was
            given; names the argument.

    Source: dq_i = scale dlse_i sum_j P_ij k_j and dk_j = scale sum_i dlse_i P_ij q_i, from dlse_i/dS_ij = P_ij.
    """
    check_heads(q, k, causal)
    check_scale(scale)
    options: dict[str, Any] = {
        "causal": causal,
        "query_start": query_start,
        "key_padding_mask": key_padding_mask,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "cu_seqlens": cu_seqlens,
    }
    check_visibility(q, k, **options)
    chosen = ATTENTION_LSE.choose(backend, q, given_options(q, k, **options), _needs_gradient(q, k))
    if chosen.backward is None:
        return chosen.forward(q, k, scale=scale, **options)
    q, scale = positive_scale(q, scale)
    first = first_positions(q, k, causal, query_start)
    ranges = visible_ranges(k.shape[2], sliding_window, cu_seqlens, q.device)
    return ATTENTION_LSE(q, k, key_padding_mask, first, ranges, scale, softcap, causal, chosen.name)


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _torch_lse_forward(q, k, mask, first, ranges, scale, softcap, causal):
    lse = torch.empty(q.shape[:3], dtype=reference.accumulation_dtype(q.dtype), device=q.device)
    for block, _, _, scores, _ in _score_blocks(q, k, mask, first, ranges, scale, softcap, causal):
        lse[:, :, block] = scores.logsumexp(-1).flatten(1, 2)
    return lse.masked_fill_(lse == -torch.inf, torch.inf)


def _torch_lse_backward(grad, q, k, lse, mask, first, ranges, scale, softcap, causal):
    dq, dk = native.empty_heads(q), torch.zeros_like(native.empty_heads(k, lse.dtype))
    for block, queries, keys, scores, slope in _score_blocks(q, k, mask, first, ranges, scale, softcap, causal):
        rows = (*queries.shape[:-1], 1)
        weights = scores.sub_(lse[:, :, block].view(rows)).exp_()
        weights *= (grad[:, :, block] * scale).reshape(rows)
        if slope is not None:
            weights *= slope
        dq[:, :, block] = (weights @ keys).flatten(1, 2)
        dk[:, :, : keys.shape[3]] += (weights.mT @ queries).sum(2)
    return dq, dk.to(k.dtype)


def _score_blocks(q, k, mask, first, ranges, scale, softcap, causal):
    """Blocks of rows: (rows, queries [B, Hkv, G, R, D], keys [B, Hkv, 1, C, D], scores [B, Hkv, G, R, C], slope)."""
    batch, heads, rows, head_dim = q.shape
    kv_heads, length, dtype = k.shape[1], k.shape[2], reference.accumulation_dtype(q.dtype)
    size = max(1, _BLOCK_ELEMENTS // (batch * heads * length))
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        seen = length - rows + block.stop if causal else length  # no row stands later among the keys
        keys, key = k[:, :, None, :seen].to(dtype), torch.arange(seen, device=q.device)
        queries = q[:, :, block].to(dtype).view(batch, kv_heads, heads // kv_heads, -1, head_dim)
        scores, slope = capped_scores((queries @ keys.mT).mul_(scale), softcap)
        position = row_positions(block, first, q.device)
        visible = visible_keys(position, key, length, mask, ranges, causal)
        yield block, queries, keys, scores.masked_fill_(~visible[:, None, None], -torch.inf), slope


_OPTIONS = ("causal=False", "query_start", "key_padding_mask", "sliding_window", "softcap", "cu_seqlens")


def _fake(q, *_):
    return native.empty_heads(q), _fake_lse(q)


def _fake_lse(q, *_):
    return q.new_empty(q.shape[:3], dtype=reference.accumulation_dtype(q.dtype))


ATTENTION_WITH_LSE = Op(
    "attention_with_lse",
    inputs="Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? first, Tensor? ranges, float scale, float? softcap, "
    "bool causal",
    outputs="Tensor out, Tensor lse",
    options=_OPTIONS,
    backends=[
        Backend(
            "native",
            native.attention_with_lse_forward,
            native.attention_with_lse_backward,
            dtypes=native.DTYPES,
        ),
        Backend("aten", foreign_attention.aten_forward, foreign_attention.aten_backward, options=("key_padding_mask",)),
        Backend.of_triton("attention", "attention_with_lse", head_dim=_triton.HEAD_DIM),
        Backend("flex", foreign_attention.flex_attention_with_lse, gradient=("cuda",)),
        Backend(
            "fa4",
            foreign_attention.fa4_attention_with_lse,
            dtypes=(torch.bfloat16, torch.float16),
            options=("sliding_window", "softcap", "cu_seqlens"),
        ),
        Backend("reference", reference.attention_with_lse),
    ],
    fake=_fake,
    gradients="q, k, v",
    kept="q, k, v, out, lse, mask, first, ranges, scale, softcap, causal",
    fake_backward=lambda grad_out, grad_lse, q, k, v, *_: tuple(map(native.empty_heads, (q, k, v))),
)

ATTENTION_LSE = Op(
    "attention_lse",
    inputs="Tensor q, Tensor k, Tensor? mask, Tensor? first, Tensor? ranges, float scale, float? softcap, bool causal",
    outputs="Tensor lse",
    options=_OPTIONS,
    backends=[
        Backend("native", native.attention_lse_forward, native.attention_lse_backward, dtypes=native.DTYPES),
        Backend.of_triton("attention", "attention_lse", head_dim=_triton.HEAD_DIM),
        Backend("torch", _torch_lse_forward, _torch_lse_backward),
        Backend("reference", reference.attention_lse),
    ],
    fake=_fake_lse,
    gradients="q, k",
    kept="q, k, lse, mask, first, ranges, scale, softcap, causal",
    fake_backward=lambda grad, q, k, *_: (native.empty_heads(q), native.empty_heads(k)),
)
