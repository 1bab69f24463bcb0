"""Cross-entropy of an output layer without [tokens, vocabulary] logits.

A chunk of tokens at a time: logits z = cap(h W^T + b), loss = logsumexp(z) - z[target]; the backward makes the logits
again. Kept: h, W, b. Cost: one more product with W than plain cross-entropy, 4 against 3. Losses are float32 and the
gradients of W and b are summed over the chunks in float32, whatever the model's dtype is.

torch's `linear_cross_entropy` (2.13) rounds every loss to the model's dtype, has no soft-capping, and is not there in
older versions. liger-kernel's, for GPUs, is a choice beside ours: it makes a chunk's loss and gradient in one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 25
"""Logits that are made at once (128 MiB in float32)."""


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    function: type[torch.autograd.Function] | None = None,
) -> torch.Tensor:
    """Cross-entropy of each token, ``F.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")``.

    Args:
        hidden: [N, H].
        weight: [V, H] in hidden's dtype, or in any under autocast.
        targets: int64 [N].
        bias: [V] or None.
        softcap: logits become softcap tanh(logits / softcap), as in Gemma 2; None: they stay.
        chunk_size: tokens at once; None: CHUNK_ELEMENTS / V.
        function: what stands in for `ChunkedCrossEntropy`, as in a plan.

    Returns:
        [N] float32 (float64 with float64 hidden), differentiable in hidden, weight and bias.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    chunk_size = chunk_size or max(1, CHUNK_ELEMENTS // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return (function or ChunkedCrossEntropy).apply(hidden, weight, bias, targets, softcap, chunk_size)


def liger_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`chunked_cross_entropy` by liger-kernel's fused kernels, on GPUs."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight, bias = _autocast(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return liger_fused_linear_cross_entropy(
            hidden, weight, targets, bias, reduction="none", accum_dtype=torch.float32
        )


def _autocast(*tensors):
    """The tensors as a matrix product under autocast would take them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, chunk_size):
        losses = [
            F.cross_entropy(logits_of(rows, weight, bias, softcap), wanted, reduction="none")
            for rows, wanted in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.softcap, ctx.chunk_size = softcap, chunk_size
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros(weight.shape, dtype=grad.dtype, device=weight.device) if needs_weight else None
        dbias = torch.zeros(bias.shape, dtype=grad.dtype, device=bias.device) if needs_bias else None
        for start in range(0, len(hidden), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits = logits_of(hidden[chunk], weight, bias, ctx.softcap)
            dlogits = logits.softmax(-1)
            dlogits[torch.arange(len(dlogits), device=grad.device), targets[chunk]] -= 1
            dlogits *= grad[chunk, None]
            if ctx.softcap is not None:
                dlogits *= 1 - (logits / ctx.softcap) ** 2
            if needs_bias:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(hidden.dtype)
            if needs_hidden:
                torch.mm(dlogits, weight, out=dhidden[chunk])
            if needs_weight:
                dweight += dlogits.T @ hidden[chunk]
        dweight, dbias = (None if d is None else d.to(weight.dtype) for d in (dweight, dbias))
        return dhidden, dweight, dbias, None, None, None


def logits_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """The logits [..., V] of hidden [..., H], at least float32."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else softcap * (logits / softcap).tanh()
