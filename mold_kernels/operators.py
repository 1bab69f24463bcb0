"""Kernels as torch operators: `torch.compile` takes each as one node, fake tensors pass through.

What `torch.library.custom_op` with `register_autograd` makes, with less Python in a call: 24 us instead of 54, which is
what a kernel takes for a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = str(__package__)
"""Of the operators: of the package's own name, so that a copy that was published for `kernels` may stand beside it."""

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_operator(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """The operator mold_kernels::`schema`, without a gradient.

    Args:
        schema: "name(Tensor q, float scale) -> Tensor". No output may be an input or share its memory.
        implementation: takes the inputs, returns the outputs; on every device.
        fake: likewise, with tensors that have shapes and strides but no memory.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, torch.compiler.disable(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_gradient(operator: torch._ops.OpOverload, keep: Callable, differentiate: Callable) -> None:
    """Make `operator` differentiable, once and backwards: a second derivative, or a tangent, is an error.

    Args:
        operator: of `register_operator`.
        keep: (ctx, inputs, output) stores what the gradient needs.
        differentiate: (ctx, *output gradients) returns a gradient, or None, of every input.
    """

    def forward(ctx, *inputs):
        output = below_autograd(*inputs)
        keep(ctx, inputs, output)
        return output

    def below_autograd(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def autograd(*inputs):
        if forward_ad._current_level >= 0:
            refuse_tangents(inputs)
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return function.apply(*inputs)
        return below_autograd(*inputs)

    def refuse_tangents(inputs):
        for x in inputs:
            if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{operator.name()}: has no forward-mode derivative; differentiate backwards, or choose "
                    'backend="reference"'
                )

    backward = torch.autograd.function.once_differentiable(differentiate)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(operator.name(), (torch.autograd.Function,), methods)
    _LIBRARY.impl(operator.name().removeprefix(f"{NAMESPACE}::"), autograd, "Autograd")
