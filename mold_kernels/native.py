"""The only file that touches the compiled module: torch tensors on one side, addresses and strides on the other.

Importing it never fails; `why_missing` says why the module is not there. Arguments were checked by the public function.
"""

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

_native: Any
try:
    _native = importlib.import_module(f"{__package__}._native")
except ImportError as error:  # not built, built for another Python, or a library that it needs is not there
    _native = None
    _why_missing = (
        f"the compiled module mold_kernels._native cannot be imported: {error} (with a C++17 compiler, "
        "pip install --verbose --no-cache-dir --force-reinstall --no-deps builds it or says why it does not)"
    )

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SPAN_ROWS = 192
"""Most rows of a piece, over all the query heads of a key head: its scores and queries stay in the cache."""


def is_available() -> bool:
    """Whether the compiled module is here."""
    return _native is not None


def why_missing() -> str | None:
    """None where the compiled module is here, otherwise the reason."""
    return None if is_available() else _why_missing


def build_info() -> dict[str, str] | None:
    """Version, compiler, standard, instruction sets and threads of the compiled module, or None without one."""
    return _native.build_info() if is_available() else None


def supported_levels() -> list[str]:
    """The instruction sets that the module was built for and this CPU has, the best one last."""
    return _native.supported_levels()


def set_level(name: str) -> None:
    """Use the kernels of this instruction set from now on, in the whole process. For tests and benchmarks."""
    _native.set_level(name)


def attention_with_lse_forward(q, k, v, mask, first, ranges, scale, softcap, causal):
    """(out, lse)"""
    out, lse = empty_heads(q), _empty_lse(q)
    seen = _seen(mask, first, ranges, scale, softcap, causal)
    _native.attention_with_lse_forward(*_views(q, k, v), seen, *_views(out, lse), torch.get_num_threads())
    return out, lse


def attention_with_lse_backward(grad_out, grad_lse, q, k, v, out, lse, mask, first, ranges, scale, softcap, causal):
    """(dq, dk, dv); a gradient that is None is zero."""
    grad_out = out.new_zeros(()).expand_as(out) if grad_out is None else grad_out
    grad_lse = lse.new_zeros(()).expand_as(lse) if grad_lse is None else grad_lse
    dq, dk, dv = empty_heads(q), empty_heads(k, lse.dtype).zero_(), empty_heads(v, lse.dtype).zero_()
    seen = _seen(mask, first, ranges, scale, softcap, causal)
    results = _views(out, lse, dq, dk, dv)
    _native.attention_with_lse_backward(*_views(grad_out, grad_lse, q, k, v), seen, *results, torch.get_num_threads())
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def attention_lse_forward(q, k, mask, first, ranges, scale, softcap, causal) -> torch.Tensor:
    """[B, Hq, Tq]"""
    lse, seen = _empty_lse(q), _seen(mask, first, ranges, scale, softcap, causal)
    _native.attention_with_lse_forward(*_views(q, k, None), seen, *_views(None, lse), torch.get_num_threads())
    return lse


def attention_lse_backward(grad, q, k, lse, mask, first, ranges, scale, softcap, causal):
    """(dq, dk)"""
    dq, dk = empty_heads(q), empty_heads(k, lse.dtype).zero_()
    seen = _seen(mask, first, ranges, scale, softcap, causal)
    results = _views(None, lse, dq, dk, None)
    _native.attention_with_lse_backward(*_views(None, grad, q, k, None), seen, *results, torch.get_num_threads())
    return dq, dk.to(k.dtype)


def _seen(mask, first, ranges, scale, softcap, causal):
    return *_views(mask, first, ranges), scale, softcap or 0.0, causal


def _empty_lse(q):
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def empty_heads(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised [B, H, T, D], in memory [B, T, H, D], so that joining the heads copies nothing."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width, dtype=dtype or tensor.dtype).transpose(1, 2)


def span_pieces(row_spans, key_spans, rows, pieces) -> None:
    """Fills `pieces`, as `mold_kernels.span_pieces` describes them."""
    _native.span_pieces(_view(row_spans), _view(key_spans), rows, *map(_view, pieces))


def span_attention_forward(
    q, k, lse, row_spans, key_spans, mask, first, ranges, every, scale, softcap, causal, groups, row_reduction
) -> torch.Tensor:
    """[B, H', S, M]"""
    pooled = _empty_pooled(k, lse, row_spans, key_spans, groups)
    seen = mask, first, ranges, scale, softcap, causal
    _pool(pooled, None, q, k, lse, row_spans, key_spans, every, seen, row_reduction)
    return pooled


def span_attention_backward(
    grad, q, k, lse, row_spans, key_spans, mask, first, ranges, every, scale, softcap, causal, groups, row_reduction
):
    """(dq, dk, dlse)"""
    # The kernel writes the rows and columns of the spans. Sequences in one row share it: none holds another's.
    dq, dk, dlse = torch.zeros_like(q), lse.new_zeros(k.shape), lse.new_zeros(lse.shape)
    maxima, dtype = None, k.dtype
    if row_reduction == "max":  # which rows they are of: the forward once more
        pooled = _empty_pooled(k, lse, row_spans, key_spans, groups)
        maxima = torch.full(pooled.shape, -1, dtype=torch.int32)
        seen = mask, first, ranges, scale, softcap, causal
        _pool(pooled, maxima, q, k, lse, row_spans, key_spans, every, seen, row_reduction)
    spans = _spans(q, k, row_spans, key_spans, every, row_reduction)
    q, k, lse, mask, first, *results = _shared(len(row_spans), q, k, lse, mask, first, dq, dk, dlse)
    seen = _seen(mask, first, ranges, scale, softcap, causal)
    tensors, results = _views(grad, q, k, lse, maxima), _views(*results)
    _native.span_attention_backward(*tensors, spans, seen, *results, torch.get_num_threads())
    return dq, dk.to(dtype), dlse


def _empty_pooled(k, lse, row_spans, key_spans, groups):
    (batch, steps, _), words = row_spans.shape, k.shape[2] if key_spans is None else key_spans.shape[1]
    return lse.new_empty(batch, groups, steps, words)


def _pool(pooled, maxima, q, k, lse, row_spans, key_spans, every, seen, row_reduction):
    spans = _spans(q, k, row_spans, key_spans, every, row_reduction)
    mask, first, *others = seen
    q, k, lse, mask, first = _shared(len(row_spans), q, k, lse, mask, first)
    seen = _seen(mask, first, *others)
    _native.span_attention_forward(*_views(q, k, lse), spans, seen, *_views(pooled, maxima), torch.get_num_threads())


def _shared(batch, q, *others):
    """Tensors of one row as those of all sequences that stand in it, without a copy."""
    if len(q) == batch:
        return q, *others
    return [tensor if tensor is None else tensor.expand(batch, *tensor.shape[1:]) for tensor in (q, *others)]


def _spans(q, k, row_spans, key_spans, every, row_reduction):
    """`every` has the keys of each example, which are key words each where there are no key spans."""
    keys = every[0] if key_spans is None else key_spans
    rows = max(1, _SPAN_ROWS * k.shape[1] // q.shape[1])
    return *_views(row_spans, keys), key_spans is None, rows, row_reduction


def layer_mixture_kl_forward(teacher, student, weights, num_steps, num_keys, tau, row_norm, l1_epsilon):
    """(loss [B], its gradient by the mixed student attention [B, S, M])"""
    loss, mixture_grad = student.new_empty(student.shape[1]), student.new_empty(student.shape[1:])
    # Held here until the kernel returns; a view does not own its memory.
    counts = num_steps.long(), num_keys.long()
    views = map(_view, (teacher, student, weights, *counts))
    results = _view(loss), _view(mixture_grad)
    _native.layer_mixture_kl_forward(*views, tau, row_norm, l1_epsilon, *results, torch.get_num_threads())
    return loss, mixture_grad


def layer_mixture_kl_backward(grad, mixture_grad, student, weights):
    """(dstudent, dweights)"""
    dstudent, dweights = student.new_empty(student.shape), weights.new_empty(weights.shape)
    views = map(_view, (grad, mixture_grad, student, weights, dstudent, dweights))
    _native.layer_mixture_kl_backward(*views, torch.get_num_threads())
    return dstudent, dweights


def value_pool_forward(v, mask, cu_seqlens, eps) -> torch.Tensor:
    sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    pooled = v.new_zeros(sequences, v.shape[1] * v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32))
    for rows, tokens in _sequences(cu_seqlens):
        views = [_view(part) for part in (v[:, :, tokens], mask[:, tokens], pooled[rows])]
        _native.value_pool_forward(*views[:2], eps, views[2], torch.get_num_threads())
    return pooled


def value_pool_backward(u, v, mask, cu_seqlens, eps) -> torch.Tensor:
    dv, u = torch.empty_like(v), u.contiguous()
    for rows, tokens in _sequences(cu_seqlens):
        views = [_view(part) for part in (u[rows], v[:, :, tokens], mask[:, tokens], dv[:, :, tokens])]
        _native.value_pool_backward(*views[:3], eps, views[3], torch.get_num_threads())
    return dv


def _sequences(cu_seqlens: torch.Tensor | None) -> Iterator[tuple[slice, slice]]:
    """(rows of the result, tokens) of each packed sequence that has tokens; without borders all of both."""
    if cu_seqlens is None:
        yield slice(None), slice(None)
        return
    for row, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if start < end:
            yield slice(row, row + 1), slice(start, end)


def _views(*tensors: torch.Tensor | None) -> list:
    return [None if tensor is None else _view(tensor) for tensor in tensors]


def _view(tensor: torch.Tensor):
    # The view does not own the memory: the caller holds the tensor until the kernel returns.
    return _native.View(tensor.data_ptr(), _CODES[tensor.dtype], tensor.shape, tensor.stride())


_CODES = {getattr(torch, name): code for name, code in _native.Dtype.__members__.items()} if is_available() else {}
