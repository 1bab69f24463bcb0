"""What of transformers is replaced while a watch is open: it does what it did, and tells the watched layers.

A model asks the attention interface for the function that computes its attention. What it is given calls that same
function with the same arguments, hands its output on untouched, and shows the layer the queries, the keys and the mask.
"""

from __future__ import annotations

import functools
import threading

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, GenerationMixin

from mold.method.attention_interface import mold_attention_forward
from mold.method.watched_layer import WatchedLayer
from mold.method.watched_masks import make_mask

_watched: dict[torch.nn.Module, list[WatchedLayer]] = {}
_lock = threading.Lock()


def _get_interface(self, attn_implementation, default):
    """What a layer asks for its attention function, while a watch is open."""
    function = _plain[AttentionInterface, "get_interface"](self, attn_implementation, default)
    return functools.partial(_attend, function, attn_implementation)


def _attend(function, name, module, /, query, key, value, attention_mask=None, **options):
    layers = _watched.get(module, ())
    found: list[torch.Tensor] = []
    ours = {"lse_to": found} if layers and function is mold_attention_forward else {}
    result = function(module, query, key, value, attention_mask, **options, **ours)
    for layer in layers:
        layer.observe(name, found[0] if found else None, query, key, attention_mask, **options)
    return result


def _get_mask_function(self, name):
    """What a model asks for the function that makes its mask, while a watch is open."""
    return functools.partial(make_mask, _plain[AttentionMaskInterface, "__getitem__"](self, name))


def _layers_with(cache):
    return [layer for layers in list(_watched.values()) for layer in layers if layer.has(cache)]


def _refuse_beams(is_watched):
    if is_watched:
        raise ValueError(
            "num_beams: beam search reorders the texts of a batch, whose rows a watch has already seen; must be 1"
        )


def _reorder_cache(self, beam_idx):
    _refuse_beams(_layers_with(self))
    return _plain[Cache, "reorder_cache"](self, beam_idx)


def _beam_search(self, *args, **kwargs):
    # Without a cache nothing else tells.
    _refuse_beams(any(module in _watched for module in self.modules()))
    return _plain[GenerationMixin, "_beam_search"](self, *args, **kwargs)


def _crop(self, *args, **kwargs):
    result = _plain[Cache, "crop"](self, *args, **kwargs)
    for layer in _layers_with(self):
        layer.crop(self.get_seq_length())
    return result


_REPLACED = {
    (AttentionInterface, "get_interface"): _get_interface,
    (AttentionMaskInterface, "__getitem__"): _get_mask_function,
    (GenerationMixin, "_beam_search"): _beam_search,
    (Cache, "reorder_cache"): _reorder_cache,  # those of an EncoderDecoderCache call these
    (Cache, "crop"): _crop,
}
_plain = {(owner, name): getattr(owner, name) for owner, name in _REPLACED}


def attach(layers: list[WatchedLayer]) -> None:
    """Show these layers what their modules' attention is called with."""
    with _lock:
        for layer in layers:
            _watched.setdefault(layer.module, []).append(layer)
        for (owner, name), function in _REPLACED.items():
            setattr(owner, name, function)


def detach(layers: list[WatchedLayer]) -> None:
    """No longer; transformers is as it was where no layer is left."""
    with _lock:
        for layer in layers:
            _watched[layer.module].remove(layer)
            if not _watched[layer.module]:
                del _watched[layer.module]
        if not _watched:
            for (owner, name), function in _plain.items():
                setattr(owner, name, function)
