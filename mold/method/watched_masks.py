"""What the masks say that a model has made while a watch is open, so that it need not be read off them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import causal_mask_function

from mold.method.attention_interface import is_window


class Made(NamedTuple):
    """What a mask of rows over keys says: rows see those before them, but no padding."""

    padding: torch.Tensor | None  # [B, T], True or 1 at real tokens
    window: int | None


_made = WeakIdKeyDictionary()


def make_mask(function, *args, **options):
    """What this function of transformers makes of its arguments, for `made_of` to know."""
    mask, padding, window = function(*args, **options), options.get("attention_mask"), options.get("local_size")
    kind, from_start = options.get("mask_function"), options.get("kv_offset", 0) == 0
    plain = kind is causal_mask_function
    if window is not None and options.get("allow_is_causal_skip"):
        plain = is_window(kind, window)
    if mask is not None and plain and from_start and getattr(padding, "ndim", 2) == 2:
        _made[mask] = Made(padding, window)
    return mask


def made_of(mask, length) -> Made | None:
    """What the mask says of so many keys, where it is known."""
    made = None if mask is None else _made.get(mask)
    return None if made is None or (made.padding is not None and made.padding.shape[1] < length) else made
