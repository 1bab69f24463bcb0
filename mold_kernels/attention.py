"""Causal attention with a differentiable log-sum-exp, and the log-sum-exp alone.

    lse_i = log sum_{j <= i} exp(scale q_i . k_j)   P_ij = exp(scale q_i . k_j - lse_i)   out_i = sum_{j <= i} P_ij v_j

**The gradient of lse costs nothing inside a flash backward.** With dP_ij = dout_i . v_j and dlse_i given,

    dS_ij = P_ij (dP_ij - D_i + dlse_i),   D_i = dout_i . out_i

so D_i - dlse_i takes the place of D_i and nothing else changes. aten's CPU backward has no input for dlse, but it
uses `out` for D_i alone. Handing it `out` with one entry a row moved,

    out'_i0 = out_i0 - dlse_i / dout_i0   gives   D'_i = dout_i . out'_i = D_i - dlse_i

to rounding, without padded copies of q, k, v. Where |dout_i0| is (nearly) zero it is replaced by a value far below the
rounding error of everything it meets.
"""

from __future__ import annotations

import warnings

import torch

from mold_kernels import _triton, engines, native, reference
from mold_kernels.backends import choose_backend
from mold_kernels.operators import register_gradient, register_operator
from mold_kernels.spans import check_sequences, visible_ranges

_BLOCK_ELEMENTS = 1 << 22
"""Most scores that `attention_lse` holds at once (16 MiB in float32)."""


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    engine: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention and the natural log-sum-exp of its rows, both differentiable.

    Replaces ``F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)``.

    Args:
        q: [B, Hq, T, D] queries, any strides.
        k: [B, Hkv, T, D] keys; Hq is a multiple of Hkv.
        v: [B, Hkv, T, D] values.
        scale: of the scores; 1 / sqrt(D) where None.
        key_padding_mask: bool [B, T], True at real tokens, False at padding (as transformers' attention_mask).
            None: no padding.
        sliding_window: how many keys a row sees, itself included; None: all before it.
        softcap: scores become softcap tanh(scores / softcap), as in Gemma 2; None: they stay.
        cu_seqlens: int32 [sequences + 1], where packed sequences begin in the one row of a batch of 1, and T at the
            end; a row sees its own sequence only. None: one sequence a row.
        engine: "auto", "triton" (GPU; D up to 256, no float64), "native" (ours for the CPU; float32, float64, bfloat16;
            padding is its only option), "cpu" (aten's flash attention; likewise), "flex" (torch's FlexAttention; no
            gradient on the CPU), "fa4" (flash-attn-4, where it is installed; bfloat16 and float16, no padding) or
            "reference" (materialises T x T). A named engine is used or refused, never replaced.

    Returns:
        out: [B, Hq, T, D] in q's dtype. Zero in a row that sees no key (padding on the left).
        lse: [B, Hq, T], float32 (float64 with float64 q). +inf in a row that sees no key, so that
            exp(score - lse) is 0 there.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the engine is not available or lacks an option that was
            given; names the argument.

    Source: FlashAttention-2 (arXiv:2307.08691) for the backward; the gradient of lse is derived in this module.
    """
    check_attention_inputs(q, k)
    if v.shape != k.shape or v.dtype != q.dtype:
        raise ValueError(f"v: is {v.dtype} {list(v.shape)}, must be {q.dtype} {list(k.shape)} as k")
    check_visibility(q, key_padding_mask, sliding_window, softcap, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {
        "key_padding_mask": key_padding_mask,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "cu_seqlens": cu_seqlens,
    }
    engines_here = ("native", "cpu", "triton", "flex", "fa4", "reference")
    match _choose_engine("attention_with_lse", engine, engines_here, q, options):
        case "flex":
            return engines.flex_attention_with_lse(q, k, v, scale, **options)
        case "fa4":
            del options["key_padding_mask"]
            return engines.fa4_attention_with_lse(q, k, v, scale, **options)
        case "reference":
            return reference.attention_with_lse(q, k, v, scale=scale, **options)
        case "cpu" if q.dtype == torch.float16:  # the replaced entries of out need float32's exponent range
            out, lse = _OPERATORS["cpu"](q.float(), k.float(), v.float(), key_padding_mask, None, scale, None)
            return out.half(), lse
        case chosen:
            ranges = visible_ranges(q.shape[2], sliding_window, cu_seqlens, q.device)
            return _OPERATORS[chosen](q, k, v, key_padding_mask, ranges, scale, softcap)


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Natural log-sum-exp of the causal attention rows alone, for models whose own attention does not return it.

    Forward 2 B Hq T^2 D / 2 FLOPs, backward three times that (four times with "triton"). Never T x T.

    Args:
        q: [B, Hq, T, D] queries, any strides.
        k: [B, Hkv, T, D] keys; Hq is a multiple of Hkv.
        scale: of the scores; 1 / sqrt(D) where None.
        key_padding_mask: bool [B, T], True at real tokens. None: no padding.
        sliding_window, softcap, cu_seqlens: as of `attention_with_lse`.
        backend: "auto", "triton" (GPU; D up to 256, no float64), "torch" (padding is the only option it has) or
            "reference". A named backend is used or refused, never replaced.

    Returns:
        [B, Hq, T], float32 (float64 with float64 q), differentiable in q and k. +inf in a row that sees no key.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend is not available or lacks an option that was
            given; names the argument.

    Source: dq_i = scale dlse_i sum_j P_ij k_j and dk_j = scale sum_i dlse_i P_ij q_i, from dlse_i/dS_ij = P_ij.
    """
    check_attention_inputs(q, k)
    check_visibility(q, key_padding_mask, sliding_window, softcap, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {
        "key_padding_mask": key_padding_mask,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "cu_seqlens": cu_seqlens,
    }
    candidates = ("triton", "torch", "reference") if q.is_cuda else ("torch", "triton", "reference")
    match _choose_engine("attention_lse", backend, candidates, q, options, argument="backend"):
        case "triton":
            ranges = visible_ranges(q.shape[2], sliding_window, cu_seqlens, q.device)
            return _lse(q, k, key_padding_mask, ranges, scale, softcap)
        case "torch":
            return _AttentionLse.apply(q, k, key_padding_mask, scale)
        case "reference":
            return reference.attention_lse(q, k, scale=scale, **options)


def check_attention_inputs(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise a ValueError that names the argument unless q [B, Hq, T, D] and k [B, Hkv, T, D] fit each other."""
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: is {q.dtype} {list(q.shape)}, must be floating point [batch, heads, tokens, head dim]")
    batch, heads, length, head_dim = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (batch, length, head_dim) or heads % k.shape[1]:
        raise ValueError(
            f"k: shape is {list(k.shape)}, must be [{batch}, a divisor of {heads}, {length}, {head_dim}] to fit q"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: is {k.dtype} on {k.device}, must be {q.dtype} on {q.device} as q")


def check_visibility(
    q: torch.Tensor,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Raise a ValueError that names the argument unless the options fit q [B, Hq, T, D]."""
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: is {sliding_window}, must be at least 1 (a row sees itself) or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: is {softcap}, must be greater than 0 or None")
    check_sequences(cu_seqlens, q.shape[0], q.shape[2], q.device)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], q.shape[2])):
        raise ValueError(
            f"key_padding_mask: is {mask.dtype} {list(mask.shape)}, must be torch.bool {[q.shape[0], q.shape[2]]}"
        )


_HAS = {
    "native": {"key_padding_mask"},
    "cpu": {"key_padding_mask"},
    "torch": {"key_padding_mask"},
    "fa4": {"sliding_window", "softcap", "cu_seqlens"},
}
"""The options that an engine has, where it does not have all."""


def _choose_engine(op, requested, candidates, q, options, argument="engine"):
    """`choose_backend` among the engines that take q and have every option that was given."""
    given = {name for name, value in options.items() if value is not None}
    lacking = given - _HAS.get(requested, given)
    if lacking:
        raise ValueError(f"{min(lacking)}: {argument} {requested!r} does not have it; leave one of the two out")
    takes = [name for name in candidates if given <= _HAS.get(name, given) and _ENGINE_TAKES.get(name, _any)(q)]
    if requested == "auto":  # FlexAttention and flash-attn-4 are for whoever names them
        takes = [name for name in takes if name not in ("flex", "fa4")]
    chosen = choose_backend(op, requested, takes, q.device, argument)
    if (requested, chosen) == ("auto", "reference"):
        what = ", ".join([str(q.dtype).removeprefix("torch."), *sorted(given)])
        warnings.warn(
            f"{op}: no fast {argument} here takes {what} on {q.device.type}; the reference stores T x T scores",
            stacklevel=3,
        )
    return chosen


def _any(q):
    return True


_ENGINE_TAKES = {
    "native": lambda q: q.dtype in native.DTYPES,
    "flex": lambda q: q.is_cuda or not q.requires_grad,
    "triton": _triton.takes,
    "fa4": lambda q: q.dtype in (torch.bfloat16, torch.float16),
}


def _cpu_forward(q, k, v, mask, ranges, scale, softcap):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, attn_mask=_bias(mask, q.dtype), scale=scale
    )
    if mask is not None:  # aten leaves a finite number in rows that see no key
        lse = lse.masked_fill((mask.cumsum(-1) == 0)[:, None], torch.inf)
    return out, lse


def _cpu_backward(grad_out, grad_lse, q, k, v, out, lse, mask, ranges, scale, softcap):
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_lse is not None:
        grad_out, out = _fold_lse_gradient(grad_out, out, grad_lse)
    return _aten_backward(grad_out, q, k, v, out, lse, mask, scale)


def _aten_backward(grad_out, q, k, v, out, lse, mask, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, True, attn_mask=_bias(mask, q.dtype), scale=scale
    )


def _bias(mask, dtype):
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, None, None]


def _fold_lse_gradient(grad_out, out, grad_lse):
    """(grad_out', out') with rowsum(grad_out' o out') = rowsum(grad_out o out) - grad_lse, as the module derives."""
    entry = grad_out[..., 0]
    wide = grad_out.dtype == torch.float64
    largest = max(entry.abs().max().item(), grad_lse.abs().max().item())
    smallest = max(largest * (1e-30 if wide else 1e-18), 1e-200 if wide else 1e-36)
    tiny = entry.abs() < smallest
    if tiny.any():
        entry = entry.masked_fill(tiny, smallest)
        grad_out = grad_out.clone()
        grad_out[..., 0] = entry
    out = out.clone()
    out[..., 0] -= (grad_lse / entry).to(out.dtype)
    return grad_out, out


_OPTIONS = "Tensor? mask, Tensor? ranges, float scale, float? softcap"


def _register(name, forward, backward, fake_forward, fake_backward):
    operator = register_operator(
        f"{name}(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", forward, fake_forward
    )
    backward_operator = register_operator(
        f"{name}_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        backward,
        fake_backward,
    )

    def keep(ctx, inputs, output):
        q, k, v, mask, ranges, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(q, k, v, *output, mask, ranges)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        return *backward_operator(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.softcap), *[None] * 4

    register_gradient(operator, keep, differentiate)
    return operator


def _fake_cpu_backward(grad_out, grad_lse, q, k, v, out, lse, mask, ranges, scale, softcap):
    return _aten_backward(torch.empty_like(out), q, k, v, out, lse, mask, scale)


def _native_forward(q, k, v, mask, ranges, scale, softcap):
    return native.attention_forward(q, k, v, mask, scale)


def _native_backward(grad_out, grad_lse, q, k, v, out, lse, mask, ranges, scale, softcap):
    return native.attention_backward(grad_out, grad_lse, q, k, v, out, lse, mask, scale)


def _fake_native_forward(q, *_):
    return native.attention_outputs(q)


def _fake_native_backward(grad_out, grad_lse, q, k, v, *_):
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _triton_forward(*inputs):
    from mold_kernels._triton.attention import attention_forward

    return attention_forward(*inputs)


def _triton_backward(grad_out, grad_lse, q, k, v, *others):
    from mold_kernels._triton.attention import attention_backward

    dq, dk, dv = attention_backward(grad_out, grad_lse, q, k, v, *others)
    return dq, dk, torch.zeros_like(v) if dv is None else dv


def _fake_triton_forward(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_triton_backward(grad_out, grad_lse, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_OPERATORS = {
    "cpu": _register("cpu_attention", _cpu_forward, _cpu_backward, _cpu_forward, _fake_cpu_backward),
    "native": _register(
        "native_attention", _native_forward, _native_backward, _fake_native_forward, _fake_native_backward
    ),
    "triton": _register(
        "triton_attention", _triton_forward, _triton_backward, _fake_triton_forward, _fake_triton_backward
    ),
}


def _triton_lse_forward(q, k, *options):
    return _triton_forward(q, k, None, *options)[1]


def _triton_lse_backward(grad, q, k, lse, *options):
    from mold_kernels._triton.attention import attention_backward

    return attention_backward(None, grad, q, k, None, None, lse, *options)[:2]


def _keep_lse(ctx, inputs, output):
    q, k, mask, ranges, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, output, mask, ranges)


def _differentiate_lse(ctx, grad):
    return *_lse_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap), *[None] * 4


_lse = register_operator(
    f"triton_attention_lse(Tensor q, Tensor k, {_OPTIONS}) -> Tensor",
    _triton_lse_forward,
    lambda q, *_: q.new_empty(q.shape[:3], dtype=torch.float32),
)
_lse_backward = register_operator(
    f"triton_attention_lse_backward(Tensor grad, Tensor q, Tensor k, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor)",
    _triton_lse_backward,
    lambda grad, q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
)
register_gradient(_lse, _keep_lse, _differentiate_lse)


class _AttentionLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, mask, scale):
        lse = torch.empty(q.shape[:3], dtype=reference.accumulation_dtype(q.dtype), device=q.device)
        for block, _, _, scores in _score_blocks(q, k, mask, scale):
            lse[:, :, block] = scores.logsumexp(-1).flatten(1, 2)
        lse = lse.masked_fill_(lse == -torch.inf, torch.inf)
        ctx.save_for_backward(q, k, mask, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, mask, lse = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
        for block, queries, keys, scores in _score_blocks(q, k, mask, ctx.scale):
            rows = (*queries.shape[:-1], 1)
            weights = scores.sub_(lse[:, :, block].view(rows)).exp_()
            weights *= (grad[:, :, block] * ctx.scale).reshape(rows)
            dq[:, :, block] = (weights @ keys).flatten(1, 2)
            dk[:, :, : block.stop] += (weights.mT @ queries).sum(2)
        return dq, dk.to(k.dtype), None, None


def _score_blocks(q, k, mask, scale):
    """Blocks of rows: (rows, queries [B, Hkv, G, R, D], keys [B, Hkv, 1, C, D], scores [B, Hkv, G, R, C])."""
    batch, heads, length, head_dim = q.shape
    kv_heads, dtype = k.shape[1], reference.accumulation_dtype(q.dtype)
    size = max(1, _BLOCK_ELEMENTS // (batch * heads * length))
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        queries = q[:, :, block].to(dtype).view(batch, kv_heads, heads // kv_heads, -1, head_dim)
        keys = k[:, :, None, : block.stop].to(dtype)
        token = torch.arange(block.stop, device=q.device)
        hidden = token > token[block.start :, None]
        if mask is not None:
            hidden = hidden | ~mask[:, None, None, None, : block.stop]
        yield block, queries, keys, (queries @ keys.mT).mul_(scale).masked_fill_(hidden, -torch.inf)
