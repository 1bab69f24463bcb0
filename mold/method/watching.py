"""The attention to some tokens, watched while any transformers model runs, without a T x T map.

    with mold.watch(model, keys=[(3, 9)], rows="last:64", layers=[14, -1]) as seen:
        model.generate(**inputs)
    seen.attention     # [B, H', rows, keys] of each of the two layers

Nothing of the model or its configuration is changed, so masks, caches and every branch that asks for the implementation
are as they were: `watched_interfaces` says what is replaced in their stead. A hook of each watched module tells which
cache it was called with, from which follows where its rows and keys stand in the text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mold.method.watched_interfaces import attach, detach
from mold.method.watched_layer import WatchedLayer
from mold.method.watched_modules import choose_modules, first_to_last
from mold.method.watched_rows import What

Spans = torch.Tensor | Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]
"""Half-open ranges of tokens: of every example [(start, end), ...], or for each its own; or an integer tensor."""

_HEADS, _REDUCTIONS = ("mean", "group", "all"), ("mean", "sum", "max")


@contextmanager
def watch(
    model: torch.nn.Module,
    keys: Spans | None = None,
    rows: str | Spans = "last:64",
    layers: int | Sequence[int] | str | Sequence[str] | None = None,
    heads: str = "all",
    *,
    row_reduction: str = "mean",
    grad: bool = False,
) -> Iterator[Seen]:
    """Watch where a model looks while it runs: its forwards and `generate`, with any attention and any cache.

    The model computes what it computes without, bit for bit. Positions count the columns of the input, padding on the
    left included; those of generated tokens follow.

    Args:
        model: any whose layers call transformers' attention interface, or a part of one; causal or not.
        keys: spans of the watched keys, whose probabilities are summed; None: every key is a column.
        rows: "last:N", the last N rows of each forward; "all"; or spans of the prompt, pooled by `row_reduction`,
            behind which every generated token (a forward of one row) has a row of its own.
        layers: a number, or numbers, of layers of the model's decoder, of its encoder where it has no decoder, negative
            ones counted from the end; or names of attention modules, with wildcards: "*.encoder_attn" are the
            cross-attentions of Whisper. None: all that numbers can name.
        heads: "all", the mean of a "group" (the query heads of a key head), or the "mean" of all.
        row_reduction: of the rows of a span: "mean", "sum" or "max".
        grad: whether the result is differentiable. Rows that a mask is made for then keep their probabilities.

    Yields:
        A `Seen`, whose `attention` holds a tensor a layer.

    Raises:
        ValueError: an argument is not what it must be; the model, or a layer of it, has an attention that cannot be
            watched; a second text, or beam search, comes before `Seen.clear`; spans lie behind the text; or a watched
            layer did not run.
    """
    for name, value, known in (("heads", heads, _HEADS), ("row_reduction", row_reduction, _REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{name}: is {value!r}, must be one of {', '.join(map(repr, known))}")
    row_spans, last = _checked_rows(rows)
    what = What(None if keys is None else _checked_spans("keys", keys), row_spans, last, heads, row_reduction, grad)
    watched = [WatchedLayer(name, module, what) for name, module in choose_modules(model, layers).items()]
    seen = Seen(watched)
    hooks = [layer.module.register_forward_pre_hook(layer.begin, with_kwargs=True) for layer in watched]
    attach(watched)
    try:
        yield seen
    finally:
        detach(watched)
        for hook in hooks:
            hook.remove()
        for layer in watched:
            layer.release()
    _check_complete(watched)


class Seen:
    """What a watch has seen.

    Attributes:
        names: of the watched modules, one for each tensor of `attention`.
    """

    def __init__(self, layers: list[WatchedLayer]):
        self._layers = layers
        self.names: list[str] = [layer.name for layer in layers]

    @property
    def attention(self) -> list[torch.Tensor]:
        """[B, H', R, M] of each layer, float32 (float64 of a float64 model): attention probabilities.

        H' are all heads, those of the keys, or one. R are the watched rows of the forwards, one forward behind the
        other; a row that is computed again (without a cache, behind rejected drafts) takes the place of the former. M
        are the key spans or, without, the keys that there were in the end: a row is zero at those behind it, as it is
        at padding, and everywhere if it is padding itself.
        """
        return [layer.joined() for layer in self._layers]

    @property
    def positions(self) -> list[int]:
        """The positions in the text that the rows of `attention` stand at; -1 for each row span."""
        return self._layers[0].positions()

    def clear(self) -> None:
        """Forget what was seen: the next forward begins another text."""
        for layer in self._layers:
            layer.clear()


def _check_complete(layers):
    silent = [layer.name for layer in layers if not layer.forwards]
    if silent:
        raise ValueError(
            f"watch: saw nothing of {first_to_last(silent)}, must see a forward of every watched layer before it is "
            "closed (what torch.compile made before does not come by)"
        )
    for layer in layers:
        layer.check_spans()


def _checked_rows(rows) -> tuple[torch.Tensor | None, int]:
    """(row spans or None, the most rows of a forward without them)."""
    if not isinstance(rows, str):
        return _checked_spans("rows", rows), 0
    number = re.fullmatch(r"last:([1-9]\d*)", rows)
    if number is None and rows != "all":
        raise ValueError(f'rows: is {rows!r}, must be "last:N" of at least one row, "all", or spans')
    return None, int(number[1]) if number else sys.maxsize


def _checked_spans(name, spans) -> torch.Tensor:
    """int32 [1 or B, M, 2] on the CPU."""
    try:
        if not isinstance(spans, torch.Tensor) and len(spans) and not isinstance(spans[0][0], int):
            most = max(map(len, spans))
            spans = [[*example, *[(0, 0)] * (most - len(example))] for example in spans]
        tensor = torch.as_tensor(spans).cpu()
        tensor = tensor[None] if tensor.ndim == 2 else tensor
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
        right = whole and tensor.ndim == 3 and tensor.shape[1:].numel() and tensor.shape[2] == 2
    except (TypeError, ValueError, IndexError, RuntimeError):
        right = False
    if not right:
        raise ValueError(
            f"{name}: is {spans}, must be spans [(start, end), ...] of every example, or such a list of each"
        )
    start, end = tensor.unbind(-1)
    if ((start < 0) | (end < start)).any():
        wrong = tensor[(start < 0) | (end < start)][0].tolist()
        raise ValueError(
            f"{name}: holds {wrong}, must be half-open ranges of tokens from 0 on (start == end is padding)"
        )
    return tensor.int()
