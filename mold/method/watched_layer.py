"""One watched attention module: where its calls stand in the text, and what they gave."""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from mold.method.watched_masks import made_of
from mold.method.watched_rows import Call, What, watched_rows

_WAITING = 256
"""Most rows that wait for each other: the keys are read, and the result is written, once for all of them."""

_REFUSED = ("indices", "block_indices", "sinks", "cu_seqlens", "cu_seq_lens_q")
"""Options of an attention function that change which keys a row sees, or how much, and are not followed here."""

_CROSS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""Arguments by which a module is given keys of another sequence than its own."""


class _Piece(NamedTuple):
    """What one call of an attention gave: [B, H', R, M], whose first row and first column stand there."""

    row: int  # -1: row spans, as far as the call had their rows
    key: int
    values: torch.Tensor


class _Waiting:
    """Rows behind one another that are computed at once, over the keys that a growing cache has by then."""

    def __init__(self, first: int, call: Call, cached: DynamicLayer):
        nothing = call.query.new_empty(0)  # so that no other rows, nor keys, are held
        self.call = call._replace(query=nothing, key=nothing, lse=None)
        self.first = self.end = first
        self.cached, self.keys = cached, call.key
        self.rows: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # queries and masks

    def add(self, query, mask, keys):
        self.rows.append((query.detach() if query.requires_grad else query, mask))
        self.end += query.shape[2]
        self.keys = keys

    def fits(self, mask):
        """Whether a row has a mask as the others have."""
        return mask is None if self.rows[0][1] is None else getattr(mask, "ndim", 0) == 4

    def before(self, row, keys):
        """Those before this one, over so many keys; None where there are none."""
        rows, self.rows, self.end = self.rows, [], self.first
        for query, mask in rows:
            if self.end < row:
                self.add(query[:, :, : row - self.end], mask, self.keys[:, :, :keys])
        return self if self.rows else None

    def as_call(self, causal):
        """All of them as one call."""
        queries, masks = zip(*self.rows, strict=True)
        mask = None
        if masks[0] is not None:
            hidden = False if masks[0].dtype == torch.bool else torch.finfo(masks[0].dtype).min
            length = self.keys.shape[2]
            mask = torch.cat([torch.nn.functional.pad(m, (0, length - m.shape[3]), value=hidden) for m in masks], 2)
        return self.call._replace(query=torch.cat(queries, 2), key=self.keys, mask=mask, row=self.first, causal=causal)


class WatchedLayer:
    """One watched attention module."""

    def __init__(self, name: str, module: torch.nn.Module, what: What):
        self.name, self.module, self.what = name, module, what
        self._always_cross = getattr(module, "is_cross_attention", False)
        self.cache: Cache | None = None
        self.forwards = 0
        self.clear()

    def clear(self):
        self.pieces: list[_Piece] = []
        self._waiting: _Waiting | None = None
        self._joined: torch.Tensor | None = None
        self._differentiable = False  # as the last call was
        self.end: int | None = None  # tokens so far
        self._batch: int | None = None
        self.text: Cache | None = None  # the cache that holds it

    def begin(self, module, args, kwargs):
        """Before the module's forward: its cache, and whether its keys are of another sequence."""
        cache = kwargs.get("cache")  # past_key_values and layer_past in older versions
        if cache is None:
            cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
        self.cache = cache
        self._cross = self._always_cross
        for name in _CROSS:
            if kwargs.get(name) is not None:
                self._cross = True
        self.forwards += 1
        self._within = 0  # a forward may call its attention once for each of several packed pieces

    def has(self, cache):
        """Whether it is this cache that the layer was called with, or a part of it."""
        mine = self.cache
        parts = [mine.self_attention_cache, mine.cross_attention_cache] if isinstance(mine, EncoderDecoderCache) else []
        return any(part is cache for part in (mine, *parts))

    def release(self):
        """Hold no cache, nor its memory."""
        self._settle()
        self.cache = self.text = None
        self.what._total = None, 0, 0

    def observe(self, name, lse, query, key, mask, **options):
        """One call of the module's attention function, which the implementation of that name computed."""
        if name is not None and name.startswith("paged|"):
            raise ValueError(f"watch: {self.name} runs with {name!r}, whose keys are of several texts at once")
        again = torch._C._current_graph_task_id() != -1  # a checkpoint computes in the backward what was seen
        if again and not self.what.grad:
            return
        if again and not self._differentiable:
            raise ValueError(
                f"watch: {self.name} is checkpointed with use_reentrant=True, which cuts the gradient that grad=True "
                "asks for; must be False"
            )
        self._differentiable = torch.is_grad_enabled()
        for option in _REFUSED:
            if options.get(option) is not None:
                raise ValueError(f"watch: {self.name} has an attention with {option}, which cannot be watched")
        if self._waiting is not None and not again and self._is_next(self._waiting, query, key, mask, options):
            self._keys = self.end = self._within = key.shape[2]
            self._wait(self._waiting, query, mask, key)
            return
        causal = options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if causal is None else causal
        count = query.shape[2]
        start, first_key, filled = self._place(count, key.shape[2])
        if self.end is None:
            self.what.check_batch(len(key))
        grows = self._check_follows(start, count, len(key)) if not again else False
        scale = options.get("scaling")
        by_mask = name in (None, "eager", "flex_attention")  # which look at nothing else
        causal, window = bool(causal) and not by_mask, None if by_mask else options.get("sliding_window")
        made = made_of(mask, filled) if count > 1 and not (first_key or self._cross) else None
        if made is not None:
            mask, window, causal = made.padding, made.window, True
        call = Call(
            query.expand(len(key), -1, -1, -1) if len(query) < len(key) else query,
            key[:, :, :filled] if filled < key.shape[2] else key,
            mask,
            start - first_key,
            causal and not self._cross and count > 1,
            query.shape[3] ** -0.5 if scale is None else scale,
            None if self._cross else window,
            options.get("softcap"),
            options.get("s_aux"),
            options.get("position_bias"),
            lse,
        )
        rows = self._rows_that_wait(call, start, first_key)
        pieces = []
        if rows is None:
            self._settle()
            with torch.set_grad_enabled(self.what.grad and torch.is_grad_enabled()), _no_autocast(query.device):
                pieces = self._pieces(call, start, first_key, grows)
            if again:
                return
        if grows:
            self._forget(min((piece.row for piece in pieces if piece.row >= 0), default=start + count))
        self.pieces += pieces
        self._joined = None
        self.end = self._within = start + count
        self._keys, self._batch, self.text = first_key + filled, len(key), self.cache
        if rows is not None:
            self._begin_to_wait(call, start + rows.start, rows)

    def _place(self, count, length):
        """(position of the first row, of the first key, how many keys are filled)."""
        cache = self.cache
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        total = 0 if cache is None else self.what.total(cache, self.forwards)
        if total < count:  # none, or none of this module
            return self._within + (0 if self._cross else length - count), 0 if self._cross else self._within, length
        if self._cross:
            return total - count, 0, length
        return total - count, max(total - length, 0), min(total, length)

    def _check_follows(self, start, count, batch):
        """Whether this forward computes the text anew, one token longer; an error if it is of another text."""
        if self.end is None or (start == self.end and batch == self._batch):
            return False
        if self.cache is None and self._within == 0 == start and (count, batch) == (self.end + 1, self._batch):
            return True
        raise ValueError(
            f"watch: {self.name} had a forward of {batch} x {count} tokens from position {start} on behind "
            f"{self._batch} x {self.end}, must go on with the same text, no token of which left its cache: clear() "
            "comes between two, or a watch for each"
        )

    def _rows_that_wait(self, call, start, first_key):
        """The rows of a call that may be computed later, together with those of the next ones; None: at once.

        So it is where the cache only ever puts keys behind those that it has, and keeps the very tensor.
        """
        if self.cache is None or self.what.grad or first_key or call.bias is not None or call.window is not None:
            return None
        count = call.query.shape[2]
        if count > 1 and not (call.causal and call.mask is None):
            return None
        if not (call.mask is None or getattr(call.mask, "ndim", 0) == 4):
            return None
        of_prompt = self.what.row_spans is not None
        rows = slice(0 if of_prompt else max(0, count - self.what.last), count)
        if count - rows.start > _WAITING or (of_prompt and (count > 1 or start < self.what.rows_end)):
            return None
        cached = self._cached()
        return rows if type(cached) is DynamicLayer and cached.keys is call.key else None

    def _cached(self):
        """The cache's layer of the module; None where there is none."""
        cache: Any = self.cache
        number = getattr(self.module, "layer_idx", None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if self._cross else cache.self_attention_cache
        return cache.layers[number] if number is not None and number < len(cache.layers) else None

    def _is_next(self, waiting, query, key, mask, options):
        """Whether this is one more row like those that wait: most are, and it is told in little time."""
        return (
            query.shape[2] == 1
            and waiting.cached.keys is key
            and key.shape[2] == waiting.end + 1
            and waiting.end == self.end
            and len(query) == self._batch
            and self.cache is self.text
            and not self._cross
            and waiting.fits(mask)
            and options.get("sliding_window") is None
            and options.get("position_bias") is None
        )

    def _begin_to_wait(self, call, first, rows):
        if self._waiting is not None and not (first == self._waiting.end and self._waiting.fits(call.mask)):
            self._settle()
        if self._waiting is None:
            self._waiting = _Waiting(first, call, self._cached())
        query = call.query[:, :, rows].clone() if call.query.shape[2] > 1 else call.query
        self._wait(self._waiting, query, call.mask, call.key)

    def _wait(self, waiting, query, mask, keys):
        waiting.add(query, mask, keys)
        self._joined = None
        if waiting.end - waiting.first >= _WAITING:
            self._settle()

    def _settle(self):
        """Compute the rows that waited."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        call = waiting.as_call(causal=not self._cross)
        with torch.no_grad(), _no_autocast(call.query.device):
            values = self._look(call, slice(0, call.query.shape[2]), None, 0)
        self.pieces.append(_Piece(waiting.first, 0, values))

    def crop(self, length):
        """Its cache gave back the tokens behind so many: drafts that were rejected."""
        # Rows of spans are pooled, so that none of them can be taken back: the next forward is refused.
        if self.end is not None and self.cache is self.text and self.what.rows_end < length < self.end:
            self._drop(length, sys.maxsize if self._cross else length)
            self.end = length
            self._joined = None

    def _drop(self, row, keys=sys.maxsize):
        """Forget the rows from this one on, and the keys behind so many."""
        if self._waiting is not None:
            self._waiting = self._waiting.before(row, keys)
        for index, (first, key, values) in enumerate(self.pieces):
            if first >= 0 and first + values.shape[2] > row:
                self.pieces[index] = _Piece(first, key, values[:, :, : max(0, row - first)])
        if self.what.keys is None:
            self.pieces = [_Piece(first, key, values[..., : max(0, keys - key)]) for first, key, values in self.pieces]
        self.pieces = [piece for piece in self.pieces if piece.values.shape[2]]

    def _forget(self, row):
        """Forget the rows from this one on, and row spans, which were computed anew."""
        self.pieces = [piece for piece in self.pieces if piece.row >= 0]
        self._drop(row)

    def _pieces(self, call, start, first_key, grows):
        """What the watched rows of a call gave."""
        what, count = self.what, call.query.shape[2]
        column = first_key if what.keys is None else 0
        if what.row_spans is None:
            rows = slice(max(0, count - what.last), count)
            return [_Piece(start + rows.start, column, self._look(call, rows, None, first_key))]
        pieces = []
        begin, end = what.row_spans.amin((0, 1))[0].item(), what.rows_end
        rows = slice(max(begin - start, 0), min(end - start, count))
        if rows.start < rows.stop:
            pieces.append(_Piece(-1, column, self._look(call, rows, start + rows.start, first_key)))
        if (count == 1 and start >= end) or grows:
            rows = slice(count - 1, count)
            pieces.append(_Piece(start + rows.start, column, self._look(call, rows, None, first_key)))
        return pieces

    def _look(self, call, rows, spans_from, first_key):
        """[B, H', R, M] of these rows of a call, or of the row spans, which count from position `spans_from`."""
        unsaid = call.mask is None or (isinstance(call.mask, torch.Tensor) and call.mask.ndim == 2)
        both_sides = call.window is not None and not call.causal and call.query.shape[2] > 1
        if unsaid and both_sides and call.window < call.key.shape[2]:
            raise ValueError(f"watch: {self.name} has a window on both sides that no mask tells, which is not followed")
        return watched_rows(call, rows, spans_from, first_key, self.what)

    def joined(self) -> torch.Tensor:
        """[B, H', R, M]: what all calls gave."""
        if self._joined is None:
            self._settle()
            self._joined = self._join()
        return self._joined

    def _join(self):
        what = self.what
        if not self.pieces:
            raise ValueError(f"attention: nothing was seen of {self.name}, must be read behind a forward of the model")
        width = max(piece.key + piece.values.shape[3] for piece in self.pieces)
        (_, key, first), several = self.pieces[0], len(self.pieces) > 1
        if what.row_spans is None and not (several or key):
            return first
        steps = 0 if what.row_spans is None else what.row_spans.shape[1]
        place, count = steps, sum(piece.values.shape[2] for piece in self.pieces if piece.row >= 0)
        joined = first.new_empty(*first.shape[:2], steps + count, width)
        if steps:
            joined[:, :, :steps] = self._of_spans([_of_width(piece, width) for piece in self.pieces if piece.row < 0])
        for index, (row, key, values) in enumerate(self.pieces):
            if row >= 0:
                part, end = joined[:, :, place : place + values.shape[2]], key + values.shape[3]
                part[..., :key], part[..., key:end], part[..., end:] = 0, values, 0
                self.pieces[index] = _Piece(row, 0, part)  # held once
                place += values.shape[2]
        return joined

    def _of_spans(self, parts):
        """The row spans, of parts that had some of their rows each."""
        if not parts:
            return 0
        whole = functools.reduce(torch.maximum if self.what.row_reduction == "max" else torch.add, parts)
        if self.what.row_reduction != "mean":
            return whole
        sizes = self.what.row_spans.diff().clamp(min=1).to(whole)
        return whole / sizes[:, None]

    def positions(self) -> list[int]:
        self._settle()
        rows = [] if self.what.row_spans is None else [-1] * self.what.row_spans.shape[1]
        for piece in self.pieces:
            if piece.row >= 0:
                rows += range(piece.row, piece.row + piece.values.shape[2])
        return rows

    def check_spans(self):
        """An error if spans lie behind what there was."""
        if self.end is None:
            return
        for name, spans, most in (("keys", self.what.keys, self._keys), ("rows", self.what.row_spans, self.end)):
            if spans is not None and spans.max() > most:
                raise ValueError(f"{name}: reach to {spans.max()}, must end within the {most} that {self.name} had")


def _no_autocast(device):
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _of_width(piece, width):
    padding = piece.key, width - piece.key - piece.values.shape[3]
    return torch.nn.functional.pad(piece.values, padding) if any(padding) else piece.values
