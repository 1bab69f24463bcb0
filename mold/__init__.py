"""Distil where a teacher looks while it reasons (MoLSAKI, EMNLP 2025) without storing attention maps.

Importing this package registers the "mold" attention in transformers.
"""

from mold.attention_interface import LayerAttention, stack_attention, use_mold_attention
from mold.config import MoldConfig
from mold.data import Example
from mold.loss import MoldLoss
from mold.readers import read_examples
from mold.router import LayerRouter
from mold.sft import StepwiseAttentionMixin
from mold.signals import SignalCache, SignalSettings, extract_signals
from mold.trainer import MoldTrainer

__version__ = "0.1.0"

__all__ = [
    "Example",
    "LayerAttention",
    "LayerRouter",
    "MoldConfig",
    "MoldLoss",
    "MoldTrainer",
    "SignalCache",
    "SignalSettings",
    "StepwiseAttentionMixin",
    "extract_signals",
    "read_examples",
    "stack_attention",
    "use_mold_attention",
]
