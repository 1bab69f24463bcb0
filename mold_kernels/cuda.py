"""The only file that touches the compiled CUDA module: tensors on one side, addresses, strides, a stream on the other.

Importing it never fails; `why_missing` says why the kernels cannot run. Arguments were checked by the public function.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cuda: Any
try:
    _cuda = importlib.import_module(f"{__package__}._cuda")
except ImportError as error:
    _cuda = None
    _why_missing = (
        f"the compiled module mold_kernels._cuda cannot be imported: {error} "
        "(build it by nvcc of CUDA 12.8 or newer: pip install with --config-settings=cmake.define.MOLD_CUDA=ON)"
    )

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 256
TILE = 64
"""`span_attention` takes as many columns as fill such tiles."""
_BLOCKS = 512
"""Enough blocks to fill a GPU of 132 to 148 multiprocessors a few times: work is split until there are as many."""


@functools.cache  # asked at every call of an op
def why_missing() -> str | None:
    """None where the kernels can run, otherwise the reason."""
    if _cuda is None:
        return _why_missing
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}, must be 8.0 or newer"
    return f"the CUDA runtime says: {reason}" if (reason := _cuda.device_error()) else None


def build_info() -> dict[str, str] | None:
    """CUDA version and architectures of the compiled module, or None without one."""
    return _cuda.build_info() if _cuda else None


def span_attention_forward(
    q, k, lse, row_spans, key_spans, mask, first, ranges, columns, scale, softcap, causal, groups, row_reduction
) -> torch.Tensor:
    """[B, 1, S, M] float32. Of the options none but `row_reduction`: the op's table lists no others."""
    (tokens, before), (batch, steps, _), keys = columns, row_spans.shape, key_spans.shape[1]
    count = tokens.shape[1]
    if not count:
        return lse.new_zeros(batch, 1, steps, keys)
    splits = _splits(batch * steps * count // TILE, most=k.shape[1])
    partial = lse.new_empty(splits, batch, steps, count)
    pooled = lse.new_empty(batch, steps, keys)
    spans = row_spans, tokens, _column_spans(key_spans, before)
    _call("span_attention_forward", _dtype_name(q), q, k, lse, *spans, scale, row_reduction == "mean", partial, pooled)
    return pooled[:, None]


def span_attention_backward(
    grad, q, k, lse, row_spans, key_spans, mask, first, ranges, columns, scale, softcap, causal, groups, row_reduction
):
    """(dq, dk, dlse) of grad [B, 1, S, M]."""
    grad, (tokens, before) = grad[:, 0], columns
    batch, heads, length, head_dim = q.shape
    kv_heads, steps, count = k.shape[1], row_spans.shape[1], tokens.shape[1]
    if not count:
        return torch.zeros_like(q), k.new_zeros(k.shape), lse.new_zeros(lse.shape)
    # A power of two that brings the largest entry to between 1/2 and 1, so that the weights fit float16.
    largest = grad.abs().amax()
    unit = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)
    row_tiles = -(-length // TILE)
    splits = _splits(batch * kv_heads * count // TILE, most=row_tiles * (heads // kv_heads))
    dq, dk = torch.empty_like(q), k.new_empty(k.shape)
    dlse = lse.new_empty(batch, heads, length)
    index = before[:, :-1].masked_fill(before.diff(dim=1) == 0, -1)
    _call(
        "span_attention_backward",
        _dtype_name(q),
        *((grad / unit).contiguous(), unit, q, k, lse, row_spans, tokens),
        *(_column_spans(key_spans, before), index, scale, row_reduction == "mean"),
        lse.new_empty(batch, steps, count),
        row_spans.new_empty(batch, row_tiles + count // TILE, 2),
        lse.new_empty(splits, batch, kv_heads, count, -(-head_dim // 16) * 16),
        *(dq, dk, dlse),
    )
    return dq, dk, dlse


def _column_spans(key_spans, before):
    """The key spans as ranges of columns: a span's tokens are neighbours among the columns too."""
    return before.gather(1, key_spans.long().flatten(1)).view(key_spans.shape)


def layer_mixture_kl_forward(teacher, student, weights, num_steps, num_keys, tau, row_norm, l1_epsilon):
    """(loss [B], its gradient in the student's mixture [B, S, M])"""
    mixture = student.new_empty(student.shape[1:])
    mixture_grad = torch.empty_like(mixture)
    loss = mixture.new_empty(mixture.shape[0])
    counts = num_steps.long().contiguous(), num_keys.long().contiguous()
    options = tau, row_norm, l1_epsilon
    _call("layer_mixture_kl_forward", teacher, student, weights, *counts, *options, mixture, mixture_grad, loss)
    return loss, mixture_grad


def layer_mixture_kl_backward(grad, mixture_grad, student, weights):
    """(dstudent [L, B, S, M], dweights [B, L]) of grad [B]."""
    dstudent, dweights = student.new_empty(student.shape), weights.new_empty(weights.shape)
    _call("layer_mixture_kl_backward", grad.contiguous(), mixture_grad, student, weights, dstudent, dweights)
    return dstudent, dweights


def _splits(blocks: int, most: int) -> int:
    return min(most, -(-_BLOCKS // blocks))


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _call(name: str, *arguments) -> None:
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    # The views do not own the memory, and need not: torch gives it to nobody but later work of the same stream.
    views = [
        _cuda.Tensor(argument.data_ptr(), argument.shape, argument.stride())
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in arguments
    ]
    with _stream(device) as stream:
        getattr(_cuda, name)(*views, stream)


@contextmanager
def _stream(device: torch.device) -> Iterator:
    with torch.cuda.device(device):  # the launch makes its device the current one: this puts the old one back
        yield _cuda.Stream(device.index, torch.cuda.current_stream().cuda_stream)
