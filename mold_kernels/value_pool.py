"""p[b] = sum over valid tokens of v_i / rms(v_i), over the concatenated heads: what the layer router looks at.

With dim = Hkv * D and r_i = (|v_i|^2 / dim + eps)^(-1/2):

    p = sum_i mask_i r_i v_i

The weight of an RMS norm leaves the sum: whoever has one multiplies p by it. Backwards from u = dp, and from
dr_i / dv_i = -r_i^3 v_i / dim:

    dv_i = mask_i (r_i u - r_i^3 <u, v_i> v_i / dim)

r_i is computed again in the backward, which reads v anyway for <u, v_i>.
Kept for the backward: v itself, and no tensor of v's size besides. Cost with n = B T dim and an element of e bytes:
forward 4 n FLOPs and n e bytes, backward 7 n FLOPs and 2 n e bytes.
"""

import math

import torch

from mold_kernels import native, reference
from mold_kernels.backends import Backend, Op
from mold_kernels.visibility import check_cu_seqlens


def value_pool(
    v: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
    *,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """RMS-normalised value states, summed over the valid tokens.

        p[b] = sum_{i: mask[b, i]} v_i / sqrt(mean(v_i^2) + eps),   v_i = concat of v[b, :, i] over heads

    Args:
        v: [B, Hkv, T, D] floating, any strides.
        mask: [B, T] bool, True where a token is valid. What v holds elsewhere is ignored, NaN included.
        eps: added to the mean square, positive.
        cu_seqlens: int32 [sequences + 1], where each of the sequences begins that stand in the one row of v, and T;
            each is summed for itself.
        backend: "auto" or a name of the table in docs/backends.md, which is used or refused, never replaced.

    Returns:
        [B, Hkv * D], or [sequences, Hkv * D]; float32, or float64 for float64 v. Zeros where no token is valid.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend cannot run here.

    Source: MoLSAKI (EMNLP 2025), the router's input in eq. 5; derivation at the top of this file.
    """
    if v.ndim != 4 or not v.is_floating_point() or not v.shape[1] or not v.shape[3]:
        raise ValueError(
            f"v: is {v.dtype} {list(v.shape)}, must be floating point [batch, heads, tokens, head dim], at least one "
            "head of at least one dimension"
        )
    valid = [v.shape[0], v.shape[2]]
    if list(mask.shape) != valid or mask.dtype != torch.bool:
        raise ValueError(f"mask: is {mask.dtype} {list(mask.shape)}, must be torch.bool {valid}")
    if mask.device != v.device:
        raise ValueError(f"mask: is on {mask.device}, must be on {v.device} as v")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: is {eps}, must be finite and greater than 0")
    check_cu_seqlens(cu_seqlens, v.shape[0], v.shape[2], v.device)
    chosen = VALUE_POOL.choose(backend, v, {"cu_seqlens": cu_seqlens})
    if chosen.backward is None:
        return chosen.forward(v, mask, eps, cu_seqlens)
    return VALUE_POOL.operator(v, mask, cu_seqlens, eps, chosen.name)


def _torch_forward(v, mask, cu_seqlens, eps):
    v = v.masked_fill(~mask[:, None, :, None], 0)
    normalised = v * _inverse_rms(v, mask, eps)
    if cu_seqlens is None:
        return normalised.sum(2).flatten(1)
    return reference.sequence_membership(cu_seqlens, v.shape[2]).to(normalised.dtype) @ normalised[0].transpose(
        0, 1
    ).flatten(1)


def _torch_backward(u, v, mask, cu_seqlens, eps):
    _, heads, length, width = v.shape
    if cu_seqlens is None:
        u = u.view(-1, heads, 1, width)
    else:
        of_tokens = reference.sequence_membership(cu_seqlens, length).to(u.dtype).mT @ u
        u = of_tokens.view(1, length, heads, width).transpose(1, 2)
    v = v.masked_fill(~mask[:, None, :, None], 0)
    r = _inverse_rms(v, mask, eps)
    along = r.pow(3) * (v * u).sum((1, 3), keepdim=True) / (heads * width)
    return (r * u - along * v).to(v.dtype)


def _inverse_rms(v, mask, eps):
    """r of the derivation, [B, 1, T, 1] in the accumulator's dtype, 0 where the token is not valid."""
    accumulator = torch.promote_types(v.dtype, torch.float32)
    mean_square = v.to(accumulator).square().mean((1, 3), keepdim=True)
    return torch.rsqrt(mean_square + eps) * mask[:, None, :, None]


VALUE_POOL = Op(
    "value_pool",
    inputs="Tensor v, Tensor mask, Tensor? cu_seqlens, float eps",
    outputs="Tensor pooled",
    backends=[
        Backend("native", native.value_pool_forward, native.value_pool_backward, dtypes=native.DTYPES),
        Backend.of_triton("value_pool", "value_pool"),
        Backend("torch", _torch_forward, _torch_backward),
        Backend("reference", reference.value_pool),
    ],
    fake=lambda v, mask, cu_seqlens, *_: v.new_empty(
        v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        v.shape[1] * v.shape[3],
        dtype=torch.promote_types(v.dtype, torch.float32),
    ),
    options=("cu_seqlens",),
    gradients="v",
    kept="v, mask, cu_seqlens, eps",
    fake_backward=lambda u, v, *_: torch.empty_like(v),
)
