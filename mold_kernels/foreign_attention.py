"""Backends of `attention_with_lse` that others wrote: aten's flash attention for the CPU, torch's FlexAttention and
flash-attn-4.

aten's backward has no input for dlse, but it uses `out` for D_i alone (`mold_kernels.attention` derives what that is).
Handing it `out` with one entry a row moved,

    out'_i0 = out_i0 - dlse_i / dout_i0   gives   D'_i = dout_i . out'_i = D_i - dlse_i

to rounding, without padded copies of q, k, v. Where |dout_i0| is (nearly) zero it is replaced by a value far below the
rounding error of everything it meets.
"""

from __future__ import annotations

import functools

import torch

from mold_kernels.visibility import first_positions, visible_ranges


def aten_forward(q, k, v, mask, first, ranges, scale, softcap, causal):
    """(out, lse) of a mask and a scale: the op's table does not list the options of the others."""
    dtype, (q, k, v) = q.dtype, _without_float16(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, attn_mask=_bias(mask, q.dtype), scale=scale
    )
    if mask is not None:  # its mask hides keys alone
        out.masked_fill_(~mask[:, None, :, None], 0)
        lse = lse.masked_fill(~mask[:, None], torch.inf)
    return out.to(dtype), lse.contiguous()


def aten_backward(grad_out, grad_lse, q, k, v, out, lse, mask, first, ranges, scale, softcap, causal):
    """(dq, dk, dv); a gradient that is None is zero."""
    dtype, (q, k, v, out) = q.dtype, _without_float16(q, k, v, out)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype)
    if grad_lse is not None:
        grad_out, out = _fold_lse_gradient(grad_out, out, grad_lse)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, True, attn_mask=_bias(mask, q.dtype), scale=scale
    )
    return tuple(gradient.to(dtype) for gradient in gradients)


def _without_float16(*tensors):
    """The replaced entries of out need float32's exponent range."""
    return [tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in tensors]


def _bias(mask, dtype):
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, None, None]


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


def flex_attention_with_lse(
    q, k, v, *, scale, causal, query_start, key_padding_mask, sliding_window, softcap, cu_seqlens
):
    """`mold_kernels.attention_with_lse` by FlexAttention: compiled on a GPU, T x T on the CPU."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    rows, length = q.shape[2], k.shape[2]
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(
            q.shape[:3], torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        )
    first = first_positions(q, k, causal, query_start)
    ranges = visible_ranges(length, sliding_window, cu_seqlens, q.device)

    def visible(batch, head, row, key):
        position = row if first is None else row + first[batch]
        seen = position >= key if causal else key < length
        if ranges is not None:
            seen = seen & (key >= ranges[0, position])
            if not causal:
                seen = seen & (key < ranges[1, position])
        if key_padding_mask is not None:
            seen = seen & key_padding_mask[batch, key]
            if causal:
                seen = seen & key_padding_mask[batch, position]
        return seen

    def capped(score, batch, head, row, key):
        return softcap * torch.tanh(score / softcap)

    if not torch.is_grad_enabled():  # on the CPU it refuses what requires a gradient, even where none is made
        q, k, v = (tensor.detach() for tensor in (q, k, v))
    batch = None if key_padding_mask is None and first is None else q.shape[0]
    out, aux = _flex_attention(q.device.type)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=create_block_mask(visible, batch, None, rows, length, device=q.device),
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse.masked_fill(aux.lse == -torch.inf, torch.inf)


@functools.cache
def _flex_attention(device_type):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def fa4_attention_with_lse(q, k, v, *, scale, sliding_window, softcap, cu_seqlens, **_):
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
