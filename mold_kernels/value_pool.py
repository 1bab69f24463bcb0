"""h[b] = sum over valid tokens of RMSNorm(v_i) * w, over the concatenated heads: what the layer router looks at.

With dim = Hkv * D and r_i = (|v_i|^2 / dim + eps)^(-1/2), the weight leaves the sum:

    p = sum_i mask_i r_i v_i            h = w p

Backwards from dh, with u = w dh, and from dr_i / dv_i = -r_i^3 v_i / dim:

    dw   = sum_b dh p                   p is kept, so v need not be read again
    dv_i = mask_i (r_i u - r_i^3 <u, v_i> v_i / dim)

r_i is computed again in the backward, which reads v anyway for <u, v_i>.
Kept for the backward: v itself, p, and no tensor of v's size besides. Cost with n = B T dim and an element of e bytes:
forward 4 n FLOPs and n e bytes, backward 7 n FLOPs and 2 n e bytes.
"""

import torch

from mold_kernels import _triton, native, reference
from mold_kernels.backends import choose_backend
from mold_kernels.operators import register_gradient, register_operator


def value_pool(
    v: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, eps: float, *, backend: str = "auto"
) -> torch.Tensor:
    """RMS-normalised value states, summed over the valid tokens.

        h[b] = sum_{i: mask[b, i]} v_i / sqrt(mean(v_i^2) + eps) * weight,   v_i = concat of v[b, :, i] over heads

    Args:
        v: [B, Hkv, T, D] floating, any strides.
        weight: [Hkv * D] floating, of the RMSNorm.
        mask: [B, T] bool, True where a token is valid. What v holds elsewhere is ignored, NaN included.
        eps: added to the mean square, positive.
        backend: "auto", "triton" (GPU; no float64), "native" (CPU; float32, float64, bfloat16), "torch" or "reference".

    Returns:
        [B, Hkv * D] float32, or float64 for float64 v. Zeros where no token is valid.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend cannot run here.

    Source: MoLSAKI (EMNLP 2025), the router's input in eq. 5; derivation at the top of this file.
    """
    _check(v, weight, mask, eps)
    candidates = [*(["native"] if v.dtype in native.DTYPES else []), "torch", "reference"]
    if v.dtype in _triton.DTYPES:
        candidates.insert(0 if v.is_cuda else -1, "triton")
    chosen = choose_backend("value_pool", backend, candidates, v.device)
    if chosen == "reference":
        return reference.value_pool(v, weight, mask, eps)
    pooled = _operator(v, mask, eps, chosen)
    return pooled * weight.to(pooled.dtype)


def _keep(ctx, inputs, output):
    v, mask, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(v, mask)


def _differentiate(ctx, u):
    return _backward_operator(u, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None, None


_operator = register_operator(
    "value_pool(Tensor v, Tensor mask, float eps, str backend) -> Tensor",
    lambda *inputs: _implementation(inputs[-1])[0](*inputs[:-1]),
    lambda v, *_: v.new_empty(v.shape[0], v.shape[1] * v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32)),
)
_backward_operator = register_operator(
    "value_pool_backward(Tensor u, Tensor v, Tensor mask, float eps, str backend) -> Tensor",
    lambda *inputs: _implementation(inputs[-1])[1](*inputs[:-1]),
    lambda u, v, *_: torch.empty_like(v),
)
register_gradient(_operator, _keep, _differentiate)


def _implementation(backend):
    """(forward, backward) of a backend."""
    match backend:
        case "triton":
            from mold_kernels._triton import value_pool as triton_kernels

            return triton_kernels.value_pool_forward, triton_kernels.value_pool_backward
        case "native":
            return native.value_pool_forward, native.value_pool_backward
        case _:
            return _torch_forward, _torch_backward


def _torch_forward(v, mask, eps):
    v = v.masked_fill(~mask[:, None, :, None], 0)
    return (v * _inverse_rms(v, mask, eps)).sum(2).flatten(1)


def _torch_backward(u, v, mask, eps):
    _, heads, _, width = v.shape
    u = u.view(-1, heads, 1, width)
    v = v.masked_fill(~mask[:, None, :, None], 0)
    r = _inverse_rms(v, mask, eps)
    along = r.pow(3) * (v * u).sum((1, 3), keepdim=True) / (heads * width)
    return (r * u - along * v).to(v.dtype)


def _inverse_rms(v, mask, eps):
    """r of the derivation, [B, 1, T, 1] in the accumulator's dtype, 0 where the token is not valid."""
    accumulator = torch.promote_types(v.dtype, torch.float32)
    mean_square = v.to(accumulator).square().mean((1, 3), keepdim=True)
    return torch.rsqrt(mean_square + eps) * mask[:, None, :, None]


def _check(v, weight, mask, eps):
    if v.ndim != 4 or not v.is_floating_point():
        raise ValueError(f"v was {v.dtype} of shape {tuple(v.shape)}, must be floating [B, Hkv, T, D]")
    batch, heads, length, width = v.shape
    if weight.shape != (heads * width,) or not weight.is_floating_point():
        raise ValueError(
            f"weight was {weight.dtype} of shape {tuple(weight.shape)}, must be floating [Hkv * D] = [{heads * width}]"
        )
    if mask.shape != (batch, length) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask was {mask.dtype} of shape {tuple(mask.shape)}, must be torch.bool [B, T] = [{batch}, {length}]"
        )
    for name, tensor in (("weight", weight), ("mask", mask)):
        if tensor.device != v.device:
            raise ValueError(f"{name} was on {tensor.device}, must be on {v.device} as v is")
    if not eps > 0:
        raise ValueError(f"eps was {eps}, must be positive")
