"""Span tensors: validation, membership of tokens in spans, key columns.

A span tensor is an integer tensor [B, S, 2] of half-open token ranges ``[start, end)``; an empty range
(``start == end``) is padding. Spans of one example may overlap and need not be sorted.
"""

from __future__ import annotations

import torch


def check_spans(name: str, spans: torch.Tensor, batch: int, length: int) -> None:
    """Raise a ValueError that names the argument unless `spans` is a valid span tensor of the batch.

    The ranges themselves are checked on CPU tensors only, and not inside torch.compile: reading them on a device would
    wait for it, reading them in a graph would break it.

    Args:
        name: the argument's name, for the message.
        spans: int32 or int64 [B, S, 2].
        batch: B.
        length: T, the number of tokens a span may reach.
    """
    if spans.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: dtype is {spans.dtype}, must be torch.int32 or torch.int64")
    if spans.ndim != 3 or spans.shape[0] != batch or spans.shape[2] != 2:
        raise ValueError(f"{name}: shape is {list(spans.shape)}, must be [{batch}, number of spans, 2]")
    if spans.device.type == "cpu" and spans.numel() and not torch.compiler.is_compiling():
        # In numpy: these few comparisons take torch longer than many a kernel takes for the whole of the spans.
        start, end = spans.numpy()[..., 0], spans.numpy()[..., 1]
        wrong = (start < 0) | (end < start) | (end > length)
        if wrong.any():
            example, index = (int(axis[0]) for axis in wrong.nonzero())
            raise ValueError(
                f"{name}: span {index} of example {example} is {spans[example, index].tolist()}, "
                f"must be a half-open range within [0, {length}] (start == end is padding)"
            )


def check_sequences(cu_seqlens: torch.Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise a ValueError that names the argument unless `cu_seqlens` cuts one row of `length` tokens into sequences.

    Its values are checked on CPU tensors only, as those of spans are.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.device != device:
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
    Both ascend, so a tile of rows sees the keys between its first row's start and its last row.
    """
    if sliding_window is None and cu_seqlens is None:
        return None
    token = torch.arange(length, dtype=torch.int32, device=device)
    start, end = torch.zeros_like(token), torch.full_like(token, length)
    if cu_seqlens is not None:
        after = torch.searchsorted(cu_seqlens, token, right=True)
        start, end = cu_seqlens[after - 1], cu_seqlens[after]
    if sliding_window is not None:
        start, end = start.maximum(token - (sliding_window - 1)), end.minimum(token + sliding_window)
    return torch.stack([start, end])


def span_membership(spans: torch.Tensor, length: int) -> torch.Tensor:
    """Which tokens each span holds: bool [B, S, length] of span tensor [B, S, 2]."""
    token = torch.arange(length, device=spans.device)
    return (spans[..., :1] <= token) & (token < spans[..., 1:])


def key_columns(key_spans: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct tokens that any key span of an example holds.

    Args:
        key_spans: [B, M, 2].
        length: T.

    Returns:
        columns: int64 [B, N], ascending, N the largest count in the batch; padded with 0.
        membership: bool [B, M, N], whether key word m holds column n; False throughout at padding.
    """
    membership = span_membership(key_spans, length)
    covered = membership.any(1)
    # A stable descending sort of the flags lists the covered tokens first, in order.
    order = covered.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    columns = order[:, : int(covered.sum(-1).max())]
    real = covered.gather(-1, columns)
    columns = columns.masked_fill(~real, 0)
    index = columns.unsqueeze(1).expand(-1, key_spans.shape[1], -1)
    return columns, membership.gather(-1, index) & real.unsqueeze(1)


def row_weights(row_spans: torch.Tensor, length: int, row_reduction: str, dtype: torch.dtype) -> torch.Tensor:
    """Weight of each token's row in each step, [B, S, length]: 1, or 1 / rows of the step for "mean"."""
    weights = span_membership(row_spans, length).to(dtype)
    if row_reduction == "mean":
        weights = weights / (row_spans[..., 1:] - row_spans[..., :1]).clamp(min=1)
    elif row_reduction != "sum":
        raise ValueError(f'row_reduction: is {row_reduction!r}, must be "sum" or "mean"')
    return weights
