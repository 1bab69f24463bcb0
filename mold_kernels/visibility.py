"""Which keys a row of attention sees: shapes of q and k, padding, windows, packed sequences, soft-capping.

Rows need not be keys. Row i of example b stands at the **position** ``query_start[b] + i`` among the keys, and what is
said of a row is said of its position: causality, windows, sequences, padding. Where attention is not causal, only
sequences ask where a row stands, and rows are keys there.
"""

from __future__ import annotations

import math

import torch


def check_heads(q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> None:
    """Raise a ValueError that names the argument unless q [B, Hq, Tq, D] and k [B, Hkv, Tk, D] fit each other."""
    if q.ndim != 4 or not q.is_floating_point() or not q.shape[1] or not q.shape[3]:
        raise ValueError(
            f"q: is {q.dtype} {list(q.shape)}, must be floating point [batch, heads, tokens, head dim], at least one "
            "head of at least one dimension"
        )
    batch, heads, rows, head_dim = q.shape
    least = rows if causal else min(rows, 1)
    fits = k.ndim == 4 and (k.shape[0], k.shape[3]) == (batch, head_dim) and k.shape[2] >= least
    if not fits or not k.shape[1] or heads % k.shape[1]:
        raise ValueError(
            f"k: shape is {list(k.shape)}, "
            f"must be [{batch}, a divisor of {heads}, at least {least}, {head_dim}] to fit q"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: is {k.dtype} on {k.device}, must be {q.dtype} on {q.device} as q")


def check_scale(scale: float | None) -> None:
    """Raise a ValueError unless `scale` is None or a number."""
    if scale is not None and not -math.inf < scale < math.inf:
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
    k: torch.Tensor,
    *,
    causal: bool = True,
    query_start: int | torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Raise a ValueError that names the argument unless the options fit q [B, Hq, Tq, D] and k [B, Hkv, Tk, D].

    Values on a device, and inside torch.compile, are not looked at: `first_positions` and `visible_ranges` keep them
    within the keys.
    """
    (batch, _, rows, _), length, device = q.shape, k.shape[2], q.device
    if not causal:
        for name, value in (("query_start", query_start), ("sliding_window", sliding_window)):
            if value is not None:
                raise ValueError(f"{name}: is given with causal=False, must be None: rows see keys on both sides")
    _check_query_start(query_start, batch, length - rows, device)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: is {sliding_window}, must be at least 1 (a row sees itself) or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: is {softcap}, must be finite and greater than 0, or None")
    mask = key_padding_mask
    if mask is not None and (mask.dtype, mask.shape, mask.device) != (torch.bool, (batch, length), device):
        raise ValueError(
            f"key_padding_mask: is {mask.dtype} {list(mask.shape)} on {mask.device}, "
            f"must be torch.bool {[batch, length]} on {device}"
        )
    if not causal and cu_seqlens is not None and rows != length:
        raise ValueError(f"cu_seqlens: given with {rows} rows over {length} keys and causal=False, must be as many")
    check_cu_seqlens(cu_seqlens, batch, length, device)


def check_cu_seqlens(cu_seqlens: torch.Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise a ValueError unless these are None or the borders of sequences in the one row of a batch."""
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


def _check_query_start(query_start, batch, most, device):
    if isinstance(query_start, torch.Tensor):
        integers = query_start.dtype in (torch.int32, torch.int64)
        if not integers or query_start.shape != (batch,) or query_start.device != device:
            raise ValueError(
                f"query_start: is {query_start.dtype} {list(query_start.shape)} on {query_start.device}, "
                f"must be an int, or torch.int32 or torch.int64 {[batch]} on {device}"
            )
        if device.type != "cpu" or torch.compiler.is_compiling():
            return
        values = query_start.tolist()
    else:
        values = [] if query_start is None else [query_start]
    if any(not 0 <= value <= most for value in values):
        raise ValueError(f"query_start: is {query_start}, must be within [0, {most}]: every row stands at a key")


def first_positions(
    q: torch.Tensor, k: torch.Tensor, causal: bool, query_start: int | torch.Tensor | None
) -> torch.Tensor | None:
    """Position of each example's first row, int32 [B]; None where rows are keys, or see keys on both sides.

    Where nothing else is said, the last row stands at the last key, as the rows of a cache do.
    """
    most = k.shape[2] - q.shape[2]
    if not causal or (most == 0 and query_start is None):
        return None
    if isinstance(query_start, torch.Tensor):
        return query_start.clamp(0, most).int().contiguous()
    return torch.full((len(q),), most if query_start is None else query_start, dtype=torch.int32, device=q.device)


def given_options(
    q: torch.Tensor, k: torch.Tensor, causal: bool, query_start: int | torch.Tensor | None, **options
) -> dict[str, object]:
    """The options of an attention by their names in the table of backends, None where one is not given."""
    moved = causal and (query_start is not None or q.shape[2] != k.shape[2])
    return {"causal=False": None if causal else False, "query_start": True if moved else None, **options}


def visible_ranges(
    length: int, sliding_window: int | None, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """What positions see beside what causality hides, int32 [2, Tk]; None where that is everything.

    Causal: position i sees the keys j with ``ranges[0, i] <= j <= i``; key j is seen by ``j <= i < ranges[1, j]``.
    Otherwise i sees ``ranges[0, i] <= j < ranges[1, i]``, and key j is seen by the same positions. Both rows ascend, so
    a tile of rows sees keys that are neighbours. A position sees itself, and nothing outside [0, Tk), whatever
    `cu_seqlens` holds.
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


def row_positions(rows: slice, first: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Positions [B or 1, R] of these rows; `first` of `first_positions`."""
    position = torch.arange(rows.start, rows.stop, device=device)[None]
    return position if first is None else position + first[:, None]


def visible_keys(
    position: torch.Tensor,
    key: torch.Tensor,
    length: int,
    mask: torch.Tensor | None,
    ranges: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """Which keys rows see: bool [B or 1, R, N].

    Args:
        position: [B or 1, R] of `row_positions`.
        key: [N] or [B, N]; one from Tk on is seen by no row.
        length: Tk.
        mask: bool [B, Tk], True at real tokens; None: no padding.
        ranges: of `visible_ranges`.
        causal: whether a row sees no key behind its position.
    """
    if mask is not None:
        position, key = position.expand(len(mask), -1), key.expand(len(mask), -1)
    position, key = position[..., None], (key[None] if key.ndim == 1 else key)[:, None]
    visible = key < length
    if causal:
        visible = key <= position
    if ranges is not None:
        visible = visible & (key >= ranges[0][position])
        if not causal:
            visible = visible & (key < ranges[1][position])
    if mask is not None:
        visible = visible & mask[:, None].gather(2, key.clamp(max=length - 1).long())
        if causal:
            visible = visible & mask[..., None].gather(1, position.long())
    return visible.expand(-1, position.shape[1], -1)


def capped_scores(products: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of scaled products q . k, whose memory they may take, and d score / d product; None: it is 1."""
    if softcap is None:
        return products, None
    capped = products.div_(softcap).tanh_()
    return capped * softcap, 1 - capped.square()
