"""A loss of the mixture of layers, whose attention is not kept for the backward.

The loss of an example b is a function f of the mixture X = sum_l w_l A_l alone, so that with G = df/dX

    dA_l = w_l G        dw_l = sum_{s, m} A_l[s, m] G[s, m]

G is known in the forward, and what the backward needs is [B, S, M] and not [L, B, S, M]. What is held at most is one
gradient of every layer, made when the backward begins; the layers' attention itself can be gone by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 1 << 24
"""Most bytes of attention that are stacked at once: small layers share an operator, large ones have one each."""


def loss_of_mixture(
    loss: Callable[[torch.Tensor], torch.Tensor], weights: torch.Tensor, layers: Sequence[torch.Tensor]
) -> torch.Tensor:
    """loss(sum_l weights[:, l] layers[l]), differentiable in weights and layers.

    Args:
        loss: of mixtures [B, S, M], [B]; the loss of an example depends on its own mixture alone.
        weights: [B, L].
        layers: L tensors [B, S, M]. Beside them the forward takes as much as two of them, and the backward one gradient
            of each.
    """
    if torch.compiler.is_compiling():  # which takes no gradients in a forward, and decides itself what is kept
        return loss(torch.einsum("bl,lbsm->bsm", weights, torch.stack(tuple(layers))))
    return _LossOfMixture.apply(loss, weights, *layers)


class _LossOfMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, weights, *layers):
        mixed = torch.zeros_like(layers[0])
        for chunk, stacked in _stacked(layers):
            mixed += torch.einsum("bl,lbsm->bsm", weights[:, chunk], stacked)
        if not any(ctx.needs_input_grad):
            return loss(mixed)
        with torch.enable_grad():
            value = loss(mixed.requires_grad_())
            (mixture_grad,) = torch.autograd.grad(value.sum(), mixed)
        weight_grads = [torch.einsum("lbsm,bsm->bl", stacked, mixture_grad) for _, stacked in _stacked(layers)]
        ctx.save_for_backward(mixture_grad, torch.cat(weight_grads, 1), weights)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mixture_grad, weight_grad, weights = ctx.saved_tensors
        mixture_grad = mixture_grad * grad[:, None, None]
        grads = []
        for chunk in _slices(weights.shape[1], mixture_grad.nbytes):
            grads += (weights.mT[chunk, :, None, None] * mixture_grad).unbind()
        return None, weight_grad * grad[:, None], *grads


def _slices(count: int, size: int) -> Iterator[slice]:
    """Of so many layers of so many bytes."""
    step = max(1, _CHUNK_BYTES // max(1, size))
    return (slice(start, start + step) for start in range(0, count, step))


def _stacked(layers: Sequence[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    for chunk in _slices(len(layers), layers[0].nbytes):
        some = tuple(layers[chunk])
        yield chunk, torch.stack(some) if len(some) > 1 else some[0][None]
