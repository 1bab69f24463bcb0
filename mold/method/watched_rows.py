"""What rows of one call of an attention function look at.

Many rows that see all before them, or all there are, but padding, take the kernels of `mold_kernels`. A few rows,
those behind a mask that says more, and on a CPU maps that nothing is summed over, are a product and a softmax, in
blocks of rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from transformers import Cache

from mold_kernels import SpanPlan, attention_lse, span_attention
from mold_kernels.spans import span_membership

_BLOCK_ELEMENTS = 1 << 22
"""Most probabilities that are held at once beside the result (16 MiB in float32)."""


class What:
    """What is watched. Spans are int32 [1 or B, M, 2] on the CPU; `last` is the most rows of a forward without any.

    What the layers of a forward have in common is made once.
    """

    def __init__(self, keys, row_spans, last: int, heads: str, row_reduction: str, grad: bool):
        self.keys, self.row_spans, self.last = keys, row_spans, last
        self.heads, self.row_reduction, self.grad = heads, row_reduction, grad
        self.rows_end = 0 if row_spans is None else int(row_spans.max())
        self._total: tuple[Cache | None, int, int] = None, 0, 0
        self.local = functools.lru_cache(8)(self._local)
        self.weights = functools.lru_cache(8)(self._weights)
        self.plan = functools.lru_cache(8)(self._plan)

    def check_batch(self, batch):
        for name, spans in (("keys", self.keys), ("row_spans", self.row_spans)):
            if spans is not None and len(spans) not in (1, batch):
                raise ValueError(
                    f"{name}: are spans of {len(spans)} examples, must be of 1 or {batch}, as the batch has"
                )

    def _local(self, name, shift, length, batch, device):
        """The spans of that name as [B, M, 2] of a call's rows or keys."""
        spans = getattr(self, name)
        return (spans - shift).clamp(0, length).expand(batch, -1, -1).contiguous().to(device)

    def _weights(self, name, shift, length, batch, device, dtype):
        """Likewise as a matrix [B, 1, M, length] of zeros and ones."""
        return span_membership(self.local(name, shift, length, batch, device), length)[:, None].to(dtype)

    def _plan(self, spans_from, count, first_key, length, batch, device):
        """(row spans, key spans, their plan); the rows are a span each where `spans_from` is None."""
        if spans_from is None:
            row = torch.arange(count, dtype=torch.int32, device=device)
            rows = torch.stack([row, row + 1], -1).expand(batch, -1, -1).contiguous()
        else:
            rows = self.local("row_spans", spans_from, count, batch, device)
        keys = None if self.keys is None else self.local("keys", first_key, length, batch, device)
        return rows, keys, SpanPlan(rows, keys, count, length)

    def total(self, cache, forwards):
        """How many tokens a cache holds, which the attention has just put its own into.

        Static caches keep it on the device, which is waited for once a forward.
        """
        if self._total[0] is not cache or self._total[1] != forwards:
            self._total = cache, forwards, int(cache.get_seq_length())
        return self._total[2]

    def group(self, probabilities, kv_heads):
        """[B, H', R, M] of [B, Hq, R, M]."""
        if self.heads == "all":
            return probabilities
        grouped = probabilities.unflatten(1, (1 if self.heads == "mean" else kv_heads, -1))
        # As a product: a mean over a dimension in the middle takes torch ten times as long on a CPU.
        weights = grouped.new_full((1, grouped.shape[2]), 1 / grouped.shape[2])
        return (weights @ grouped.flatten(3)).view(*grouped.shape[:2], *probabilities.shape[2:])


class Call(NamedTuple):
    """One call of an attention function, its keys cut to those that are filled."""

    query: torch.Tensor  # [B, Hq, Tq, D]
    key: torch.Tensor  # [B, Hkv, Tk, D]
    mask: Any  # None, a tensor, or FlexAttention's BlockMask
    row: int  # the key at which the first row stands
    causal: bool  # whether rows see no key behind them, where the mask does not say it
    scale: float
    window: int | None  # likewise
    softcap: float | None
    sinks: torch.Tensor | None
    bias: torch.Tensor | None
    lse: torch.Tensor | None  # [B, Hq, Tq] of the attention itself, where it told, the sinks included


def watched_rows(call: Call, rows: slice, spans_from: int | None, first_key: int, what: What) -> torch.Tensor:
    """[B, H', R, M] of these rows of a call, or of the row spans, which count from position `spans_from`."""
    (batch, heads, _, _), length = call.query.shape, call.key.shape[2]
    # What fits into one block is faster there, as are on a CPU maps that nothing is summed over.
    maps = what.heads == "all" and what.keys is None and spans_from is None and call.query.device.type == "cpu"
    several = batch * heads * (rows.stop - rows.start) * length > _BLOCK_ELEMENTS and not maps
    padding = isinstance(call.mask, torch.Tensor) and call.mask.ndim == 2
    if several and (call.mask is None or padding) and call.bias is None:
        return _by_kernels(call, rows, spans_from, first_key, what)
    return _in_blocks(call, rows, spans_from, first_key, what)


def _by_kernels(call: Call, rows: slice, spans_from: int | None, first_key: int, what: What) -> torch.Tensor:
    """[B, H', R, M] of rows that see every key, or all before them, but no padding."""
    query, key = call.query[:, :, rows], call.key.to(call.query.dtype)
    (batch, _, count, _), length, device = query.shape, key.shape[2], query.device
    options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap, "causal": call.causal}
    if call.causal:
        options |= {"query_start": call.row + rows.start, "sliding_window": call.window}
    if call.mask is not None:
        options["key_padding_mask"] = call.mask[:, :length].bool()
    lse = attention_lse(query, key, **options) if call.lse is None else call.lse[:, :, rows]
    if call.sinks is not None and call.lse is None:
        lse = lse + torch.nn.functional.softplus(call.sinks[:, None].to(lse.dtype) - lse)
    spans, keys, plan = what.plan(spans_from, count, first_key, length, batch, device)
    reduction = "max" if what.row_reduction == "max" and spans_from is not None else "sum"
    options |= {"heads": what.heads, "row_reduction": reduction, "plan": plan}
    pooled = span_attention(query, key, lse, spans, keys, **options)
    return pooled[:, None] if what.heads == "mean" else pooled


def _in_blocks(call: Call, rows: slice, spans_from: int | None, first_key: int, what: What) -> torch.Tensor:
    """[B, H', R, M] of a single row, and of rows whose keys a mask tells."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, keys = call.query[:, :, rows], call.key.to(dtype).mT
    (batch, heads, count, _), length, device = query.shape, keys.shape[3], query.device
    words = None if what.keys is None else what.weights("keys", first_key, length, batch, device, dtype).mT
    steps = None
    if spans_from is not None:
        steps = what.weights("row_spans", spans_from, count, batch, device, dtype)
    size = max(1, _BLOCK_ELEMENTS // (batch * heads * length))
    width = length if words is None else words.shape[3]
    result: Any = None
    for first in range(0, count, size):
        block = slice(first, min(first + size, count))
        # No row of the block looks behind its last one.
        seen = min(call.row + rows.start + block.stop, length) if call.causal and call.mask is None else length
        found = _looks(call, query[:, :, block], keys[..., :seen], words, rows.start + first, what)
        if steps is None:
            if size >= count and found.shape[3] == width:
                return found
            if result is None:
                result = found.new_empty(*found.shape[:2], count, width)
            result[:, :, block, : found.shape[3]], result[:, :, block, found.shape[3] :] = found, 0
            continue
        if what.row_reduction == "max":
            inside = steps[..., block, None] > 0  # [B, 1, S, R, 1]
            part = torch.stack([torch.where(inside[:, :, step], found, 0).amax(2) for step in range(steps.shape[2])], 2)
        else:
            part = steps[..., block] @ found
        part = torch.nn.functional.pad(part, (0, width - part.shape[3]))
        result = (
            part if result is None else torch.maximum(result, part) if what.row_reduction == "max" else result + part
        )
    return result


def _looks(call, query, keys, words, first, what):
    """[B, H', R, M] of the call's rows from `first` on, each for itself."""
    found = _probabilities(call, query.to(keys.dtype), keys, first)
    found = what.group(found, keys.shape[1])
    return found if words is None else found @ words[..., : keys.shape[3], :]


def _probabilities(call, query, keys, first):
    """[B, Hq, R, Tk] of the call's rows from `first` on; keys are [B, Hkv, D, Tk]."""
    batch, heads, count, head_dim = query.shape
    scores = (query * call.scale).reshape(batch, keys.shape[1], -1, head_dim) @ keys
    scores = scores.view(batch, heads, count, -1)
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    block = slice(first, first + count)
    if call.bias is not None:
        scores = scores + _of_block(call.bias, block, scores)
    mask, hidden = call.mask, None
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = _of_block(mask, block, scores)
        if mask.dtype == torch.bool:
            hidden = ~mask
        else:
            hidden, scores = mask <= torch.finfo(mask.dtype).min, scores + mask
    elif mask is not None or call.window is not None:
        hidden = _hidden(call, block, scores)
    elif call.causal:  # a row sees itself, and nothing is to be looked for before the first row
        later = call.row + first + 1
        square = torch.ones(count, max(0, scores.shape[3] - later), dtype=torch.bool, device=scores.device)
        scores[..., later:].masked_fill_(square.triu(), -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    if call.sinks is None:
        found = scores.softmax(-1)
    else:
        sinks = call.sinks[:, None, None].to(scores.dtype).expand(batch, -1, count, 1)
        found = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    # A row that sees no key would be NaN.
    return found if hidden is None else found.masked_fill(hidden, 0)


def _of_block(mask, block, scores):
    """The block's rows of a mask or bias, [1 or B, 1 or Hq, 1 or R, Tk]."""
    rows = mask[:, :, block] if mask.shape[2] > 1 else mask
    return rows[..., : scores.shape[3]]


def _hidden(call, block, scores):
    """Which keys rows do not see, where it must be found out: [1 or B, 1, R, Tk]."""
    row = torch.arange(block.start, block.stop, device=scores.device)[:, None]
    key, mask = torch.arange(scores.shape[3], device=scores.device), call.mask
    if mask is not None and not isinstance(mask, torch.Tensor):  # FlexAttention's, whose rows count from the call's
        example = torch.arange(len(scores), device=scores.device)[:, None, None, None]
        return ~mask.mask_mod(example, torch.zeros_like(example), row, key).expand(len(scores), 1, -1, -1)
    place = call.row + row
    hidden = torch.zeros_like(place > key)
    if call.causal:
        hidden = key > place
    if call.window is not None:
        hidden = hidden | (key <= place - call.window)
    if mask is None:
        return hidden[None, None]
    real = mask[:, : scores.shape[3]].bool()
    hidden = hidden | ~real[:, None, None]
    return hidden | ~real[:, None, place] if call.causal else hidden
