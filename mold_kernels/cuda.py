"""The only file that touches the compiled CUDA module: tensors on one side, addresses, strides, a stream on the other.

Importing it never fails; `why_missing` says why the kernels cannot run. Arguments were checked by the public function.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

try:
    from mold_kernels import _cuda
except ImportError as error:
    _cuda = None
    _why_missing = (
        f"the compiled module mold_kernels._cuda cannot be imported: {error} "
        "(it is built where nvcc of CUDA 12.8 or newer is found)"
    )

_TILE = 64
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


def takes(q: torch.Tensor) -> bool:
    """Whether `span_attention` is implemented for the dtype and head dimension of q."""
    return q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.shape[-1] <= 256


@dataclass(frozen=True)
class Columns:
    """The distinct tokens that any key span of an example holds, and where the spans are among them.

    A span's tokens are neighbours among the columns too, so two numbers a key word say which columns it has.
    """

    tokens: torch.Tensor  # int32 [B, N], ascending; padded with T, which no row sees, to a multiple of the tile
    spans: torch.Tensor  # int32 [B, M, 2], half-open ranges of columns
    index: torch.Tensor  # int32 [B, T], the column of a token, or -1


_last_columns: tuple[weakref.ref, tuple[int, int], Columns] | None = None


def key_columns(key_spans: torch.Tensor, length: int) -> Columns:
    """The columns of int [B, M, 2] key spans within [0, length].

    N decides grids and working memory, and reading it waits for the device. The answer of the last call is kept, so
    that this happens once a batch and not once a layer.
    """
    global _last_columns
    if key_spans.is_inference():  # has no version: a change in place would go unseen
        return _make_columns(key_spans, length)
    state = key_spans._version, length
    if _last_columns is None or _last_columns[0]() is not key_spans or _last_columns[1] != state:
        _last_columns = weakref.ref(key_spans), state, _make_columns(key_spans, length)
    return _last_columns[2]


def _make_columns(key_spans: torch.Tensor, length: int) -> Columns:
    spans = key_spans.clamp(0, length).long().flatten(1)
    start = spans[:, 0::2]
    end = spans[:, 1::2].maximum(start)
    one = torch.ones_like(start)
    edges = spans.new_zeros(spans.shape[0], length + 1).scatter_add_(1, start, one).scatter_add_(1, end, -one)
    covered = edges.cumsum(1)[:, :length] > 0
    until = covered.cumsum(1)
    before = torch.nn.functional.pad(until, (1, 0))
    count = -(-int(before[:, -1].max()) // _TILE) * _TILE
    wanted = torch.arange(count, device=spans.device).repeat(spans.shape[0], 1)
    return Columns(
        tokens=torch.searchsorted(until, wanted, right=True, out_int32=True),
        spans=before.gather(1, spans).int().view(key_spans.shape),
        index=before[:, :length].masked_fill(~covered, -1).int(),
    )


def span_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    columns: Columns,
    scale: float,
    row_reduction: str,
) -> torch.Tensor:
    """[B, S, M] float32; row_spans are int32 and within [0, T]."""
    batch, steps, keys = *row_spans.shape[:2], columns.spans.shape[1]
    count = columns.tokens.shape[1]
    if not count or not steps:
        return lse.new_zeros(batch, steps, keys)
    splits = _splits(batch * steps * count // _TILE, most=k.shape[1])
    partial = lse.new_empty(splits, batch, steps, count)
    pooled = lse.new_empty(batch, steps, keys)
    _call(
        "span_attention_forward",
        _dtype_name(q),
        *(q, k, lse, row_spans, columns.tokens, columns.spans),
        scale,
        row_reduction == "mean",
        partial,
        pooled,
    )
    return pooled


def span_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    row_spans: torch.Tensor,
    columns: Columns,
    scale: float,
    row_reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dlse of grad [B, S, M]."""
    batch, heads, length, head_dim = q.shape
    kv_heads, steps, count = k.shape[1], row_spans.shape[1], columns.tokens.shape[1]
    if not count or not steps:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(lse)
    # A power of two that brings the largest entry to between 1/2 and 1, so that the weights fit float16.
    largest = grad.abs().amax()
    unit = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)
    row_tiles = -(-length // _TILE)
    splits = _splits(batch * kv_heads * count // _TILE, most=row_tiles * (heads // kv_heads))
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dlse = lse.new_empty(batch, heads, length)
    _call(
        "span_attention_backward",
        _dtype_name(q),
        *((grad / unit).contiguous(), unit, q, k, lse, row_spans, columns.tokens, columns.spans, columns.index),
        scale,
        row_reduction == "mean",
        lse.new_empty(batch, steps, count),
        row_spans.new_empty(batch, row_tiles + count // _TILE, 2),
        lse.new_empty(splits, batch, kv_heads, count, -(-head_dim // 16) * 16),
        *(dq, dk, dlse),
    )
    return dq, dk, dlse


def layer_mixture_kl_forward(
    teacher_attention: torch.Tensor,
    student_attention: torch.Tensor,
    student_weights: torch.Tensor,
    num_steps: torch.Tensor,
    num_keys: torch.Tensor,
    tau: float,
    row_norm: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] and its gradient [B, S, M] in the student's mixture."""
    mixture = student_attention.new_empty(student_attention.shape[1:])
    mixture_grad = torch.empty_like(mixture)
    loss = mixture.new_empty(mixture.shape[0])
    _call(
        "layer_mixture_kl_forward",
        *(teacher_attention, student_attention, student_weights),
        *(num_steps.long().contiguous(), num_keys.long().contiguous()),
        tau,
        row_norm == "softmax",
        *(mixture, mixture_grad, loss),
    )
    return loss, mixture_grad


def layer_mixture_kl_backward(
    grad: torch.Tensor, mixture_grad: torch.Tensor, student_attention: torch.Tensor, student_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients [L, B, S, M] and [B, L] of grad [B]."""
    attention_grad = student_attention.new_empty(student_attention.shape)
    weights_grad = student_weights.new_empty(student_weights.shape)
    _call(
        "layer_mixture_kl_backward",
        *(grad.contiguous(), mixture_grad, student_attention, student_weights, attention_grad, weights_grad),
    )
    return attention_grad, weights_grad


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
