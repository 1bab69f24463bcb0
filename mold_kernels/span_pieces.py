"""Spans of a batch as pieces of tokens: what every kernel of span attention reads, found once for all layers.

The starts and ends of all spans of an example cut its tokens into **pieces**, so that a span is a run of pieces and
spans overlap as they like: whatever is summed once a piece is summed over a span by adding its pieces. Row pieces are
cut further so that none has more than a given number of rows; of the key pieces only those count that some key span
holds. Their tokens are the **columns**, N of them.

Rows and keys have tokens of their own, Tq and Tk of them. Sizes come from shapes alone, never from values, which on a
GPU would have to be waited for: S spans over T tokens make at most min(2 S + T / rows + 1, T + 1) pieces; unused ones
are empty and last. Spans are cut to [0, T]: no piece and no column lies outside, whatever they hold.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from mold_kernels import native
from mold_kernels.backends import Backend, Op, lazily
from mold_kernels.spans import check_spans, within


class Pieces(NamedTuple):
    """Row pieces, key pieces and columns of a batch, all int32 and contiguous."""

    row_piece: torch.Tensor  # [B, Tq + 1] the piece of a row
    row_start: torch.Tensor  # [B, G + 1] twice a piece's first row, plus 1 where a step holds it; then 2 Tq
    key_piece: torch.Tensor  # [B, Tk + 1] key pieces that begin before a key
    key_first: torch.Tensor  # [B, E + 1] a piece's first column; then N
    before: torch.Tensor  # [B, Tk + 1] columns before a key; N at Tk
    columns: torch.Tensor  # [B, Tk] the columns' keys, ascending; N of them, then Tk
    column_piece: torch.Tensor  # [B, Tk] the key pieces that they are in; then 0

    @property
    def row_count(self) -> int:
        """G, the most row pieces there can be."""
        return self.row_start.shape[1] - 1

    @property
    def key_count(self) -> int:
        """E, the most key pieces there can be."""
        return self.key_first.shape[1] - 1


class SpanPlan:
    """The spans of a batch, checked once, and their pieces, found once: for all layers that have the same spans.

    Args:
        row_spans: int [B, S, 2], half-open ranges of rows, the steps; empty is padding.
        key_spans: int [B, M, 2], likewise of keys, the key words; None: every key of the example or sequence.
        length: Tq, the number of rows.
        key_length: Tk, the number of keys; None: as many.
        cu_seqlens: int32 [B + 1], where B sequences begin in one row, from which their spans count. None: each example
            has a row of its own.

    Raises:
        ValueError: the spans do not fit each other or the lengths; names the argument.
    """

    def __init__(
        self,
        row_spans: torch.Tensor,
        key_spans: torch.Tensor | None,
        length: int,
        key_length: int | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ):
        batch = len(row_spans) if row_spans.ndim else 0
        if cu_seqlens is not None and len(cu_seqlens) != batch + 1:
            raise ValueError(f"row_spans: are of {batch} sequences, must be of the {len(cu_seqlens) - 1} of cu_seqlens")
        self._given = [(tensor, _version(tensor)) for tensor in (row_spans, key_spans, cu_seqlens)]
        self.length, self.key_length = length, length if key_length is None else key_length
        self.every_key = key_spans is None
        with _outside_inference_mode():
            self.row_spans = _placed("row_spans", row_spans, batch, length, cu_seqlens)
            if key_spans is None:
                every = row_spans.new_full((batch, 1, 1), self.key_length, dtype=torch.int32)
                every = torch.nn.functional.pad(every, (1, 0))
                borders = None if cu_seqlens is None else torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1)[:, None]
                self.key_spans = every if borders is None else within(borders, self.key_length)
            elif key_spans.device != row_spans.device:
                raise ValueError(f"key_spans: is on {key_spans.device}, must be on {row_spans.device} as row_spans")
            else:
                self.key_spans = _placed("key_spans", key_spans, batch, self.key_length, cu_seqlens)
        self._pieces: dict[tuple[int, bool, bool], Pieces] = {}
        self._columns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def is_of(
        self,
        row_spans: torch.Tensor,
        key_spans: torch.Tensor | None,
        length: int,
        key_length: int | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> bool:
        """Whether it was made of these very tensors, and none has been written to since.

        Writes to tensors of torch.inference_mode, and inside torch.compile, cannot be seen.
        """
        return (self.length, self.key_length) == (length, length if key_length is None else key_length) and all(
            mine is tensor and _version(tensor) in (None, version)
            for (mine, version), tensor in zip(self._given, (row_spans, key_spans, cu_seqlens), strict=True)
        )

    def pieces(self, rows: int, *, joined: bool = False, each_key: bool = False) -> Pieces:
        """The pieces, none of more than `rows` rows.

        `joined`: of all sequences as one example's; `each_key`: every key is a piece, whatever the key spans.
        """
        if (rows, joined, each_key) not in self._pieces:
            keys = self.key_spans
            if each_key:
                key = torch.arange(self.key_length + 1, dtype=torch.int32, device=keys.device)
                keys = torch.stack([key[:-1], key[1:]], 1).repeat(1 if joined else len(keys), 1, 1)
            spans = [spans.view(1, -1, 2) if joined else spans for spans in (self.row_spans, keys)]
            backend = SPAN_PIECES.choose("auto", self.row_spans).name
            with _outside_inference_mode():
                pieces = SPAN_PIECES.operator(*(*spans, self.length, self.key_length, rows, backend))
            self._pieces[rows, joined, each_key] = Pieces(*pieces)
        return self._pieces[rows, joined, each_key]

    def columns(self, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, before): the columns as int32 [B, N], N rounded up to a multiple, and `Pieces.before`.

        Ascending; padded with Tk, which no row sees. Waits for the device once, to read N.
        """
        if multiple not in self._columns:
            found = [pieces for (_, *other), pieces in self._pieces.items() if not any(other)]
            pieces = found[0] if found else self.pieces(max(self.length, 1))
            with _outside_inference_mode():
                # Inside torch.compile nothing is read: there are as many columns as there can be.
                most = (
                    self.key_length if torch.compiler.is_compiling() else max(pieces.before[:, -1].tolist(), default=0)
                )
                count = -(-most // multiple) * multiple
                padding = 0, max(0, count - self.key_length)
                tokens = torch.nn.functional.pad(pieces.columns[:, :count], padding, value=self.key_length)
            self._columns[multiple] = tokens, pieces.before
        return self._columns[multiple]


def _outside_inference_mode():
    """A plan made there must serve a forward that is differentiated, too."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _placed(name, spans, batch, length, cu_seqlens):
    """Contiguous int32 spans within [0, length), counted from there."""
    if cu_seqlens is None:
        check_spans(name, spans, batch, length)
        return within(spans, length)
    check_spans(name, spans, batch, cu_seqlens.diff())
    start = cu_seqlens[:-1, None, None].clamp(0, length)
    end = cu_seqlens[1:, None, None].clamp(0, length).maximum(start)
    return within(within(spans, end - start) + start, length)


def _version(tensor: torch.Tensor | None) -> int | None:
    if tensor is None or torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _empty(row_spans, key_spans, length, key_length, rows, *_):
    (batch, steps, _), keys = row_spans.shape, key_spans.shape[1]
    row_count, key_count = min(2 * steps + length // rows + 1, length + 1), min(2 * keys, key_length + 1)
    sizes = length + 1, row_count + 1, key_length + 1, key_count + 1, key_length + 1, key_length, key_length
    return Pieces(*(row_spans.new_empty(batch, size) for size in sizes))


def _filled_by(fill):
    def forward(row_spans, key_spans, length, key_length, rows):
        pieces = _empty(row_spans, key_spans, length, key_length, rows)
        pieces.columns.fill_(key_length)
        pieces.column_piece.zero_()
        fill(row_spans, key_spans, rows, pieces)
        return tuple(pieces)

    return forward


def _fill(row_spans, key_spans, rows, pieces):
    length = pieces.row_piece.shape[1] - 1
    marks, held = _marks(row_spans, length)
    token = torch.arange(length + 1, dtype=torch.int32, device=row_spans.device).expand(len(row_spans), -1)
    cut = token.masked_fill(~marks, 0).cummax(1).values
    begins = (token - cut) % rows == 0
    pieces.row_piece.copy_(begins.cumsum(1) - 1)
    _scatter(pieces.row_start.fill_(2 * length), pieces.row_piece, 2 * token + held, begins)

    length = pieces.columns.shape[1]
    marks, held = _marks(key_spans, length)
    token = torch.arange(length + 1, dtype=torch.int32, device=row_spans.device).expand(len(row_spans), -1)
    begins = marks & held
    piece, until = begins.cumsum(1, dtype=torch.int32), held.cumsum(1, dtype=torch.int32)
    pieces.key_piece.copy_(piece - begins.int())
    pieces.before.copy_(until - held.int())
    _scatter(pieces.key_first.copy_(until[:, -1:].expand_as(pieces.key_first)), piece - 1, pieces.before, begins)
    _scatter(pieces.columns, pieces.before, token, held)
    _scatter(pieces.column_piece, pieces.before, piece - 1, held)


def _marks(spans, length):
    """Where a span starts or ends, and which tokens any span holds: bool [B, T + 1] each."""
    start, end = within(spans, length).long().unbind(-1)
    one = torch.ones_like(spans[..., 0])
    opened, closed = (one.new_zeros(len(spans), length + 1).scatter_add_(1, at, one) for at in (start, end))
    return opened + closed > 0, (opened - closed).cumsum(1) > 0


def _scatter(target, places, values, where):
    """target[b, places[b, i]] = values[b, i] where `where` is True."""
    unused = target.shape[1]
    slots = torch.nn.functional.pad(target, (0, 1))
    slots.scatter_(1, places.masked_fill(~where, unused).long(), values.int())
    target.copy_(slots[:, :unused])


SPAN_PIECES = Op(
    "span_pieces",
    inputs="Tensor row_spans, Tensor key_spans, SymInt length, SymInt key_length, int rows",
    outputs=", ".join(f"Tensor {name}" for name in Pieces._fields),
    backends=[
        Backend("native", _filled_by(native.span_pieces), dtypes=(torch.int32,)),
        Backend("triton", _filled_by(lazily("_triton.span_pieces", "span_pieces")), dtypes=(torch.int32,)),
        Backend("torch", _filled_by(_fill), dtypes=(torch.int32,)),
    ],
    fake=lambda *inputs: tuple(_empty(*inputs)),
)
