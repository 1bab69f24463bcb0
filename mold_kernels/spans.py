"""Span tensors: validation, membership of tokens in spans, weights of rows.

A span tensor is an integer tensor [B, S, 2] of half-open token ranges ``[start, end)``; an empty range
(``start == end``) is padding. Spans of one example may overlap and need not be sorted.
"""

from __future__ import annotations

import numpy as np
import torch


def check_spans(name: str, spans: torch.Tensor, batch: int, length: int | torch.Tensor) -> None:
    """Raise a ValueError that names the argument unless `spans` is a valid span tensor of the batch.

    The ranges themselves are checked on CPU tensors only, and not inside torch.compile: reading them on a device would
    wait for it, reading them in a graph would break it. There `within` makes them harmless.

    Args:
        name: the argument's name, for the message.
        spans: int32 or int64 [B, S, 2].
        batch: B.
        length: T, the number of tokens a span may reach; or int32 [B], of each example.
    """
    if spans.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: dtype is {spans.dtype}, must be torch.int32 or torch.int64")
    if spans.ndim != 3 or spans.shape[0] != batch or spans.shape[2] != 2:
        raise ValueError(f"{name}: shape is {list(spans.shape)}, must be [{batch}, number of spans, 2]")
    if spans.device.type == "cpu" and spans.numel() and not torch.compiler.is_compiling():
        # In numpy: these few comparisons take torch longer than many a kernel takes for the whole of the spans.
        start, end = spans.numpy()[..., 0], spans.numpy()[..., 1]
        most = length.numpy() if isinstance(length, torch.Tensor) else np.full(batch, length)
        wrong = (start < 0) | (end < start) | (end > most[:, None])
        if wrong.any():
            example, index = (int(axis[0]) for axis in wrong.nonzero())
            raise ValueError(
                f"{name}: span {index} of example {example} is {spans[example, index].tolist()}, "
                f"must be a half-open range within [0, {most[example]}] (start == end is padding)"
            )


def within(spans: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    """Contiguous int32 spans, cut where they leave [0, length]; one that ends before it starts becomes empty."""
    spans = spans.clamp(min=0).clamp(max=length).int().contiguous()
    spans[..., 1] = spans.amax(-1)
    return spans


def span_membership(spans: torch.Tensor, length: int) -> torch.Tensor:
    """Which tokens each span holds: bool [B, S, length] of span tensor [B, S, 2]."""
    token = torch.arange(length, device=spans.device)
    return (spans[..., :1] <= token) & (token < spans[..., 1:])


def row_weights(row_spans: torch.Tensor, length: int, row_reduction: str, dtype: torch.dtype) -> torch.Tensor:
    """Weight of each token's row in each step, [B, S, length]: 1, or 1 / rows of the step for "mean"."""
    weights = span_membership(row_spans, length).to(dtype)
    if row_reduction == "mean":
        weights = weights / (row_spans[..., 1:] - row_spans[..., :1]).clamp(min=1)
    elif row_reduction != "sum":
        raise ValueError(f'row_reduction: is {row_reduction!r}, must be "sum" or "mean"')
    return weights
