"""Pooled attention over token spans, its exact gradient, layer mixtures and their loss."""

from mold_kernels.attention import attention_lse, attention_with_lse
from mold_kernels.layer_mixture_kl import layer_mixture_kl, teacher_layer_weights
from mold_kernels.span_attention import span_attention
from mold_kernels.span_pieces import SpanPlan
from mold_kernels.tables import prefer_backend
from mold_kernels.value_pool import value_pool

__all__ = [
    "SpanPlan",
    "attention_lse",
    "attention_with_lse",
    "layer_mixture_kl",
    "prefer_backend",
    "span_attention",
    "teacher_layer_weights",
    "value_pool",
]
