"""Distil where a teacher looks while it reasons (MoLSAKI, EMNLP 2025) without storing attention maps.

Importing this package imports neither torch nor transformers. It registers the "mold" attention in transformers, now or
when that gets imported. Its names are imported from where they live when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mold.after_import import after_import

if TYPE_CHECKING:
    from mold.data.chat import CHAT_TEMPLATE
    from mold.data.encoding import Collator, encode_example
    from mold.data.examples import DEFAULT_TEMPLATE, Example
    from mold.data.problems import generate_problems
    from mold.data.readers import read_examples, read_mixture
    from mold.data.tokens import token_spans
    from mold.method.attention_interface import LayerAttention, stack_attention, use_mold_attention
    from mold.method.extraction import extract_signals
    from mold.method.loss import MoldLoss
    from mold.method.online_teacher import OnlineTeacher
    from mold.method.router import LayerRouter
    from mold.method.signal_settings import SignalSettings
    from mold.method.signals import SignalCache
    from mold.method.watching import watch
    from mold.models import load_model, load_tokenizer, spread_layers, take_layers
    from mold.training.config import MoldConfig
    from mold.training.host_memory import freed_memory_kept
    from mold.training.sft import StepwiseAttentionMixin
    from mold.training.trainer import MoldTrainer

__version__ = "0.1.0"

__all__ = [
    "CHAT_TEMPLATE",
    "DEFAULT_TEMPLATE",
    "Collator",
    "Example",
    "LayerAttention",
    "LayerRouter",
    "MoldConfig",
    "MoldLoss",
    "MoldTrainer",
    "OnlineTeacher",
    "SignalCache",
    "SignalSettings",
    "StepwiseAttentionMixin",
    "encode_example",
    "extract_signals",
    "freed_memory_kept",
    "generate_problems",
    "load_model",
    "load_tokenizer",
    "read_examples",
    "read_mixture",
    "spread_layers",
    "stack_attention",
    "take_layers",
    "token_spans",
    "use_mold_attention",
    "watch",
]

# As the imports above, which only a type checker reads.
_HOMES = {
    "data.chat": ("CHAT_TEMPLATE",),
    "data.encoding": ("Collator", "encode_example"),
    "data.examples": ("DEFAULT_TEMPLATE", "Example"),
    "data.problems": ("generate_problems",),
    "data.readers": ("read_examples", "read_mixture"),
    "data.tokens": ("token_spans",),
    "method.attention_interface": ("LayerAttention", "stack_attention", "use_mold_attention"),
    "method.extraction": ("extract_signals",),
    "method.loss": ("MoldLoss",),
    "method.online_teacher": ("OnlineTeacher",),
    "method.router": ("LayerRouter",),
    "method.signal_settings": ("SignalSettings",),
    "method.signals": ("SignalCache",),
    "method.watching": ("watch",),
    "models": ("load_model", "load_tokenizer", "spread_layers", "take_layers"),
    "training.config": ("MoldConfig",),
    "training.host_memory": ("freed_memory_kept",),
    "training.sft": ("StepwiseAttentionMixin",),
    "training.trainer": ("MoldTrainer",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"mold.{home}"), name)
    raise AttributeError(f"module 'mold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# What is registered here imports the attention at its first call; the attention then registers itself in its place.


def _attention(*args, **kwargs):
    from mold.method.attention_interface import mold_attention_forward

    return mold_attention_forward(*args, **kwargs)


def _mask(*args, **kwargs):
    from mold.method.attention_interface import mold_mask

    return mold_mask(*args, **kwargs)


after_import("transformers.modeling_utils", lambda modeling: modeling.AttentionInterface.register("mold", _attention))
after_import("transformers.masking_utils", lambda masking: masking.AttentionMaskInterface.register("mold", _mask))
