"""Two foreign engines of `attention_with_lse`, imported when named: torch's FlexAttention and flash-attn-4."""

from __future__ import annotations

import functools

import torch

from mold_kernels.spans import visible_ranges


def flex_attention_with_lse(q, k, v, scale, key_padding_mask, sliding_window, softcap, cu_seqlens):
    """`mold_kernels.attention_with_lse` by FlexAttention: compiled on a GPU, T x T on the CPU."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    length = q.shape[2]
    ranges = visible_ranges(length, sliding_window, cu_seqlens, q.device)

    def visible(batch, head, row, key):
        seen = row >= key
        if ranges is not None:
            seen = seen & (key >= ranges[0, row])
        if key_padding_mask is not None:
            seen = seen & key_padding_mask[batch, key]
        return seen

    def capped(score, batch, head, row, key):
        return softcap * torch.tanh(score / softcap)

    batch = None if key_padding_mask is None else q.shape[0]
    out, aux = _flex_attention(q.device.type)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=create_block_mask(visible, batch, None, length, length, device=q.device),
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse.masked_fill(aux.lse == -torch.inf, torch.inf)


@functools.cache
def _flex_attention(device_type):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def fa4_attention_with_lse(q, k, v, scale, sliding_window, softcap, cu_seqlens):
    """`mold_kernels.attention_with_lse` by flash-attn-4, which has [B, T, H, D] and whose backward takes dlse."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (None, None) if sliding_window is None else (sliding_window - 1, 0),
        "softcap": softcap or 0.0,
        "return_lse": True,
    }
    if cu_seqlens is None:
        out, lse = flash_attn_func(q, k, v, **options)
        return out.transpose(1, 2), lse
    length = q.shape[1]
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": length, "max_seqlen_k": length}
    out, lse = flash_attn_varlen_func(q[0], k[0], v[0], **lengths, **options)
    return out[None].transpose(1, 2), lse[None]
