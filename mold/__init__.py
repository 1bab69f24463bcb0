"""Distil where a teacher looks while it reasons (MoLSAKI, EMNLP 2025) without storing attention maps.

Importing this package registers the "mold" attention in transformers.
"""

from mold.data.examples import Example
from mold.data.readers import read_examples
from mold.method.attention_interface import LayerAttention, stack_attention, use_mold_attention
from mold.method.loss import MoldLoss
from mold.method.router import LayerRouter
from mold.method.signals import SignalCache, SignalSettings, extract_signals
from mold.training.config import MoldConfig
from mold.training.sft import StepwiseAttentionMixin
from mold.training.trainer import MoldTrainer

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
