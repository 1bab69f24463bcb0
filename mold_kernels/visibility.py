"""Which keys a row of causal attention sees: shapes of q and k, padding, windows, packed sequences, soft-capping."""

from __future__ import annotations

import math

import torch


def check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise a ValueError that names the argument unless q [B, Hq, T, D] and k [B, Hkv, T, D] fit each other."""
    if q.ndim != 4 or not q.is_floating_point() or not q.shape[1] or not q.shape[3]:
        raise ValueError(
            f"q: is {q.dtype} {list(q.shape)}, must be floating point [batch, heads, tokens, head dim], at least one "
            "head of at least one dimension"
        )
    batch, heads, length, head_dim = q.shape
    fits = k.ndim == 4 and (k.shape[0], k.shape[2], k.shape[3]) == (batch, length, head_dim)
    if not fits or not k.shape[1] or heads % k.shape[1]:
        raise ValueError(
            f"k: shape is {list(k.shape)}, must be [{batch}, a divisor of {heads}, {length}, {head_dim}] to fit q"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: is {k.dtype} on {k.device}, must be {q.dtype} on {q.device} as q")


def check_scale(scale: float | None) -> None:
    """Raise a ValueError unless `scale` is None or a number."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: is {scale}, must be finite or None")


def positive_scale(q: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float]:
    """q and a scale above 0 that give the same scores as q and `scale` (None: 1 / sqrt(D)), without rounding.

    The kernels hide keys before they multiply by the scale, which must therefore keep -infinity what it is.
    """
    if scale is None:
        return q, q.shape[-1] ** -0.5
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


def check_visibility(
    q: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Raise a ValueError that names the argument unless the options fit q [B, Hq, T, D].

    Values on a device, and inside torch.compile, are not looked at: `visible_ranges` keeps them within the row.
    """
    (batch, _, length, _), device = q.shape, q.device
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: is {sliding_window}, must be at least 1 (a row sees itself) or None")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: is {softcap}, must be finite and greater than 0, or None")
    mask = key_padding_mask
    if mask is not None and (mask.dtype, mask.shape, mask.device) != (torch.bool, (batch, length), device):
        raise ValueError(
            f"key_padding_mask: is {mask.dtype} {list(mask.shape)} on {mask.device}, "
            f"must be torch.bool {[batch, length]} on {device}"
        )
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens: is {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}, "
            f"must be torch.int32 [sequences + 1] on {device}"
        )
    if batch != 1:
        raise ValueError(f"cu_seqlens: given with a batch of {batch}, must be 1: packed sequences are one long row")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (cu_seqlens.diff() < 0).any() or cu_seqlens[:1].tolist() != [0] or cu_seqlens[-1] != length
        if wrong:
            raise ValueError(f"cu_seqlens: is {cu_seqlens.tolist()}, must ascend from 0 to {length}")


def visible_ranges(
    length: int, sliding_window: int | None, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """What causal rows see besides being causal, int32 [2, T]; None where they see everything before them.

    Row i sees the keys j with ``ranges[0, i] <= j <= i``; key j is seen by the rows i with ``j <= i < ranges[1, j]``.
    Both ascend, so a tile of rows sees the keys between its first row's start and its last row. A row sees itself,
    and nothing outside [0, T), whatever `cu_seqlens` holds.
    """
    if sliding_window is None and cu_seqlens is None:
        return None
    token = torch.arange(length, dtype=torch.int32, device=device)
    start, end = torch.zeros_like(token), torch.full_like(token, length)
    if cu_seqlens is not None:
        after = torch.searchsorted(cu_seqlens, token, right=True).clamp(1, len(cu_seqlens) - 1)
        start, end = cu_seqlens[after - 1].clamp(min=0).minimum(token), cu_seqlens[after].clamp(max=length)
    if sliding_window is not None:
        start, end = start.maximum(token - (sliding_window - 1)), end.minimum(token + sliding_window)
    return torch.stack([start, end.maximum(token + 1)])
