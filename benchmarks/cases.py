"""Every op on one layer's tensors, beside plain PyTorch: what `benchmarks/test_ops.py` and `benchmarks.gpu` measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import mold_kernels
from benchmarks.cpu_attention import make_spans
from benchmarks.roofline import Shape
from mold_kernels import SpanPlan
from mold_kernels.backends import Op
from mold_kernels.testing import random_qkv

DIRECTIONS = "forward", "backward"


@dataclass(frozen=True)
class Case:
    """An op on tensors that need gradients: `ours` takes the backend's name, `baseline` nothing.

    The baseline is torch's SDPA for attention_with_lse, the backend "torch" for the other ops.
    """

    op: Op
    leaves: tuple[torch.Tensor, ...]
    ours: Callable[[str], torch.Tensor]
    baseline: Callable[[], torch.Tensor]

    def refusal(self, backend: str, direction: str) -> str | None:
        """Why the backend cannot run it in the direction here; None where it can."""
        return self.op.backends[backend].refusal(self.leaves[0], (), needs_gradient=direction == "backward")


def make_case(op: Op, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The op on random tensors of a layer of the shape, the same each time."""
    leaves, ours = {
        "attention_with_lse": _attention_with_lse,
        "attention_lse": _attention_lse,
        "span_attention": _span_attention,
        "value_pool": _value_pool,
        "layer_mixture_kl": _layer_mixture_kl,
    }[op.name](shape, dtype, device)
    if op.name == "attention_with_lse":
        return Case(op, leaves, ours, lambda: F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True))
    return Case(op, leaves, ours, lambda: ours("torch"))


def one_direction(run: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], direction: str) -> Callable:
    """A function that runs one direction and returns a tuple of what it made; backward is the backward pass alone."""

    def forward():
        with torch.no_grad():
            return (run(),)

    if direction == "forward":
        return forward
    output = run()
    upstream = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True)


def _attention_with_lse(shape, dtype, device):
    q, k, v = leaves = _qkv(shape, dtype, device)
    return leaves, lambda backend: mold_kernels.attention_with_lse(q, k, v, backend=backend)[0]


def _attention_lse(shape, dtype, device):
    q, k, _ = _qkv(shape, dtype, device)
    return (q, k), lambda backend: mold_kernels.attention_lse(q, k, backend=backend)


def _span_attention(shape, dtype, device):
    q, k, _ = _qkv(shape, dtype, device)
    with torch.no_grad():
        lse = mold_kernels.attention_lse(q, k)
    rows, keys = (spans.to(device) for spans in make_spans(shape.length))
    plan = SpanPlan(rows, keys, shape.length)  # a training step makes one for all layers
    leaves = q, k, lse.requires_grad_()
    return leaves, lambda backend: mold_kernels.span_attention(*leaves, rows, keys, plan=plan, backend=backend)


def _value_pool(shape, dtype, device):
    _, _, v = _qkv(shape, dtype, device)
    mask = torch.ones(1, shape.length, dtype=torch.bool, device=device)
    return (v,), lambda backend: mold_kernels.value_pool(v, mask, 1e-6, backend=backend)


def _layer_mixture_kl(shape, dtype, device):
    steps, keys = (spans.shape[1] for spans in make_spans(shape.length))
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.rand(layers, 1, steps, keys, generator=generator).to(device)
        for layers in (shape.teacher_layers, shape.layers)
    )
    weights = torch.full((1, shape.layers), 1 / shape.layers, device=device)
    counts = (torch.tensor([count], device=device) for count in (steps, keys))
    inputs = teacher, student.requires_grad_(), weights.requires_grad_(), *counts
    return inputs[1:3], lambda backend: mold_kernels.layer_mixture_kl(*inputs, backend=backend)


def _qkv(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    tensors = random_qkv(generator, 1, shape.heads, shape.kv_heads, shape.length, shape.head_dim, dtype)
    return tuple(tensor.to(device).requires_grad_() for tensor in tensors)
