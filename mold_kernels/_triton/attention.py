"""Flash attention with a differentiable log-sum-exp, and the log-sum-exp alone: the same kernels without v.

The derivation is in `mold_kernels.attention`. Forward: a program holds BLOCK_M rows of one head and walks the keys they
see. Backward, deterministic without atomics: one kernel for dq (a program holds rows and walks keys; it also stores
delta = rowsum(dout o out) - dlse), then one for dk and dv (a program holds keys and walks the rows that see them, of
all the query heads of its key head).

Cost with P = B Hq T^2 / 2 visible pairs: forward 4 P D FLOPs; backward 6 P D for dq and 8 P D for dk and dv, where
5 products of 2 P D would do with atomics. Without v: 2 P D, and 4 P D in either part of the backward.
"""

import torch
import triton
import triton.language as tl

from mold_kernels._triton.scores import LN_2, LOG2_E, capped_scores, load_tile, product, score_slope, store_rows
from mold_kernels._triton.tiles import choose_tile
from mold_kernels.native import empty_heads


@triton.jit
def _hide(
    scores,
    row,
    key,
    T,
    range_ptr,
    valid_base,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """-inf where a row must not see a key; `row` and `key` broadcast to the scores' shape."""
    visible = (key <= row) & (key < T)
    if HAS_RANGES:
        visible = visible & (key >= tl.load(range_ptr + row, mask=row < T, other=0))
    if HAS_VALID:
        visible = visible & tl.load(valid_base + key, mask=key < T, other=0).to(tl.int1)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _forward_keys(
    state,
    q,
    k_base,
    v_base,
    k_strides,
    v_strides,
    low,
    high,
    row,
    T,
    scale,
    softcap,
    range_ptr,
    valid_base,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Rows' running sums (acc, total, peak) over the keys [low, high); MASKED where some row must not see one."""
    acc, total, peak = state
    for start in range(low, high, BLOCK_N):
        k = load_tile(k_base, start, k_strides, T, D, BLOCK_N, BLOCK_D)
        scores = capped_scores(product(q, k.T, None), scale * LOG2_E, softcap * LOG2_E, HAS_SOFTCAP)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            scores = _hide(scores, row[:, None], key[None, :], T, range_ptr, valid_base, HAS_RANGES, HAS_VALID)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # -inf - -inf would be NaN in a row that has seen no key so far.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(p, 1)
        if HAS_VALUE:
            v = load_tile(v_base, start, v_strides, T, D, BLOCK_N, BLOCK_D)
            acc = product(p.to(v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["T"])
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    valid_ptr,
    range_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    heads,
    group,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    # The last rows see most keys: they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr + batch * q_strides[0] + head * q_strides[1], first, q_strides[2:], T, D, BLOCK_M, BLOCK_D)
    k_base = k_ptr + batch * k_strides[0] + (head // group) * k_strides[1]
    v_base = v_ptr + batch * v_strides[0] + (head // group) * v_strides[1]
    valid_base = valid_ptr + batch * T
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    low = 0
    diagonal = first // BLOCK_N * BLOCK_N
    high = tl.minimum(first + BLOCK_M, T)
    if HAS_RANGES:
        low = tl.load(range_ptr + first) // BLOCK_N * BLOCK_N
    if HAS_RANGES or HAS_VALID:
        diagonal = low
    state = acc, total, peak
    if not (HAS_RANGES or HAS_VALID):
        state = _forward_keys(
            state, q, k_base, v_base, k_strides[2:], v_strides[2:], low, diagonal, row, T, scale, softcap, range_ptr,
            valid_base, D, BLOCK_D, BLOCK_N, False, HAS_VALUE, HAS_RANGES, HAS_VALID, HAS_SOFTCAP,
        )  # fmt: skip
    acc, total, peak = _forward_keys(
        state, q, k_base, v_base, k_strides[2:], v_strides[2:], diagonal, high, row, T, scale, softcap, range_ptr,
        valid_base, D, BLOCK_D, BLOCK_N, True, HAS_VALUE, HAS_RANGES, HAS_VALID, HAS_SOFTCAP,
    )  # fmt: skip

    sees = total > 0
    lse = tl.where(sees, (peak + tl.log2(total)) * LN_2, float("inf"))
    tl.store(lse_ptr + (batch * heads + head) * T + row, lse, mask=row < T)
    if HAS_VALUE:
        acc = acc / tl.where(sees, total, 1.0)[:, None]
        out_base = out_ptr + batch * out_strides[0] + head * out_strides[1]
        store_rows(out_base, row, row < T, out_strides[2:], acc, D, BLOCK_D)


@triton.jit
def _dq_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    k_base,
    v_base,
    k_strides,
    v_strides,
    low,
    high,
    row,
    T,
    scale,
    softcap,
    range_ptr,
    valid_base,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """dq / scale of the keys [low, high), added; `lse` is in base 2."""
    for start in range(low, high, BLOCK_N):
        k = load_tile(k_base, start, k_strides, T, D, BLOCK_N, BLOCK_D)
        scores = capped_scores(product(q, k.T, None), scale * LOG2_E, softcap * LOG2_E, HAS_SOFTCAP)
        slope = score_slope(scores, softcap * LOG2_E, HAS_SOFTCAP)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            scores = _hide(scores, row[:, None], key[None, :], T, range_ptr, valid_base, HAS_RANGES, HAS_VALID)
        ds = -delta[:, None]
        if HAS_VALUE:
            v = load_tile(v_base, start, v_strides, T, D, BLOCK_N, BLOCK_D)
            ds = product(dout, v.T, None) + ds
        ds *= tl.exp2(scores - lse[:, None]) * slope
        dq = product(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["T"])
def _attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    dq_ptr,
    valid_ptr,
    range_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    heads,
    group,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < T
    line = (batch * heads + head) * T
    q = load_tile(q_ptr + batch * q_strides[0] + head * q_strides[1], first, q_strides[2:], T, D, BLOCK_M, BLOCK_D)
    k_base = k_ptr + batch * k_strides[0] + (head // group) * k_strides[1]
    v_base = v_ptr + batch * v_strides[0] + (head // group) * v_strides[1]
    valid_base = valid_ptr + batch * T
    delta = tl.zeros([BLOCK_M], tl.float32)
    dout = q
    if HAS_VALUE:
        dout_base = dout_ptr + batch * dout_strides[0] + head * dout_strides[1]
        dout = load_tile(dout_base, first, dout_strides[2:], T, D, BLOCK_M, BLOCK_D)
        out_base = out_ptr + batch * out_strides[0] + head * out_strides[1]
        out = load_tile(out_base, first, out_strides[2:], T, D, BLOCK_M, BLOCK_D)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + line + row, mask=inside, other=0.0)
    tl.store(delta_ptr + line + row, delta, mask=inside)
    lse = tl.load(lse_ptr + line + row, mask=inside, other=float("inf")) * LOG2_E

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = 0
    diagonal = first // BLOCK_N * BLOCK_N
    high = tl.minimum(first + BLOCK_M, T)
    if HAS_RANGES:
        low = tl.load(range_ptr + first) // BLOCK_N * BLOCK_N
    if HAS_RANGES or HAS_VALID:
        diagonal = low
    else:
        dq = _dq_keys(
            dq, q, dout, lse, delta, k_base, v_base, k_strides[2:], v_strides[2:], low, diagonal, row, T, scale,
            softcap, range_ptr, valid_base, D, BLOCK_D, BLOCK_N, False, HAS_VALUE, HAS_RANGES,
            HAS_VALID, HAS_SOFTCAP,
        )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, lse, delta, k_base, v_base, k_strides[2:], v_strides[2:], diagonal, high, row, T, scale,
        softcap, range_ptr, valid_base, D, BLOCK_D, BLOCK_N, True, HAS_VALUE, HAS_RANGES,
        HAS_VALID, HAS_SOFTCAP,
    )  # fmt: skip
    dq_base = dq_ptr + batch * dq_strides[0] + head * dq_strides[1]
    store_rows(dq_base, row, inside, dq_strides[2:], dq * scale, D, BLOCK_D)


@triton.jit
def _dk_rows(
    dk,
    dv,
    k,
    v,
    key,
    q_base,
    dout_base,
    q_strides,
    dout_strides,
    lse_base,
    delta_base,
    low,
    high,
    T,
    scale,
    softcap,
    range_ptr,
    valid_base,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """dk / scale and dv of the rows [low, high), added. Tiles are [keys, rows]: no transpose of what was computed."""
    for start in range(low, high, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = load_tile(q_base, start, q_strides, T, D, BLOCK_M, BLOCK_D)
        # Rows from T on have lse = +inf: their probabilities are 0.
        lse = tl.load(lse_base + row, mask=row < T, other=float("inf")) * LOG2_E
        delta = tl.load(delta_base + row, mask=row < T, other=0.0)
        scores = capped_scores(product(k, q.T, None), scale * LOG2_E, softcap * LOG2_E, HAS_SOFTCAP)
        slope = score_slope(scores, softcap * LOG2_E, HAS_SOFTCAP)
        if MASKED:
            scores = _hide(scores, row[None, :], key[:, None], T, range_ptr, valid_base, HAS_RANGES, HAS_VALID)
        p = tl.exp2(scores - lse[None, :])
        ds = -delta[None, :]
        if HAS_VALUE:
            dout = load_tile(dout_base, start, dout_strides, T, D, BLOCK_M, BLOCK_D)
            dv = product(p.to(dout.dtype), dout, dv)
            ds = product(v, dout.T, None) + ds
        ds *= p * slope
        dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def _attention_backward_dk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    valid_ptr,
    range_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    kv_heads,
    group,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    key = first + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr + batch * k_strides[0] + kv_head * k_strides[1], first, k_strides[2:], T, D, BLOCK_N, BLOCK_D)
    v = k
    if HAS_VALUE:
        v_base = v_ptr + batch * v_strides[0] + kv_head * v_strides[1]
        v = load_tile(v_base, first, v_strides[2:], T, D, BLOCK_N, BLOCK_D)
    valid_base = valid_ptr + batch * T

    low = first // BLOCK_M * BLOCK_M
    high = T
    diagonal = tl.minimum((first + BLOCK_N + BLOCK_M - 1) // BLOCK_M * BLOCK_M, T)
    if HAS_RANGES:
        high = tl.load(range_ptr + T + tl.minimum(first + BLOCK_N, T) - 1)
    if HAS_RANGES or HAS_VALID:
        diagonal = high
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_base = q_ptr + batch * q_strides[0] + head * q_strides[1]
        dout_base = dout_ptr + batch * dout_strides[0] + head * dout_strides[1]
        line = (batch * kv_heads * group + head) * T
        dk, dv = _dk_rows(
            dk, dv, k, v, key, q_base, dout_base, q_strides[2:], dout_strides[2:], lse_ptr + line, delta_ptr + line,
            low, diagonal, T, scale, softcap, range_ptr, valid_base, D, BLOCK_D, BLOCK_M, True,
            HAS_VALUE, HAS_RANGES, HAS_VALID, HAS_SOFTCAP,
        )  # fmt: skip
        if not (HAS_RANGES or HAS_VALID):
            dk, dv = _dk_rows(
                dk, dv, k, v, key, q_base, dout_base, q_strides[2:], dout_strides[2:], lse_ptr + line,
                delta_ptr + line, diagonal, T, T, scale, softcap, range_ptr, valid_base, D, BLOCK_D,
                BLOCK_M, False, HAS_VALUE, HAS_RANGES, HAS_VALID, HAS_SOFTCAP,
            )  # fmt: skip
    store_rows(
        dk_ptr + batch * dk_strides[0] + kv_head * dk_strides[1], key, key < T, dk_strides[2:], dk * scale, D, BLOCK_D
    )
    if HAS_VALUE:
        store_rows(
            dv_ptr + batch * dv_strides[0] + kv_head * dv_strides[1], key, key < T, dv_strides[2:], dv, D, BLOCK_D
        )


def attention_with_lse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    valid: torch.Tensor | None,
    ranges: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(out [B, Hq, T, D], lse [B, Hq, T]); out is None without v."""
    valid = None if valid is None else valid.contiguous()
    batch, heads, length, _ = q.shape
    tile, options = _options("attention_forward", q, v, valid, ranges, softcap)
    out = None if v is None else empty_heads(q)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    _attention_forward_kernel[triton.cdiv(length, tile.m), batch * heads](
        *(q, k, _or(v, q), _or(out, q), lse, _or(valid, q), _or(ranges, q)),
        *(q.stride(), k.stride(), _or(v, q).stride(), _or(out, q).stride()),
        *(heads, heads // k.shape[1], length, scale, softcap or 1.0),
        **options,
    )
    return out, lse


def attention_with_lse_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    valid: torch.Tensor | None,
    ranges: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv). Without dout only lse has a gradient: neither v nor out is read, dv is 0, or None without v."""
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    valid, dlse = (None if small is None else small.contiguous() for small in (valid, dlse))
    dq, dk, dv = empty_heads(q), empty_heads(k), None if v is None else empty_heads(v)
    if dout is None:
        v = out = None
        dv = None if dv is None else dv.zero_()
    delta = torch.empty_like(lse)
    v_, out_, dout_ = _or(v, q), _or(out, q), _or(dout, q)
    valid_, ranges_, dlse_ = _or(valid, q), _or(ranges, q), _or(dlse, lse)
    scalars = heads // kv_heads, length, scale, softcap or 1.0
    tile, options = _options("attention_backward_dq", q, v, valid, ranges, softcap)
    _attention_backward_dq_kernel[triton.cdiv(length, tile.m), batch * heads](
        *(q, k, v_, out_, lse, dout_, dlse_, delta, dq, valid_, ranges_),
        *(q.stride(), k.stride(), v_.stride(), out_.stride(), dout_.stride(), dq.stride(), heads, *scalars),
        HAS_DLSE=dlse is not None,
        **options,
    )
    tile, options = _options("attention_backward_dk", q, v, valid, ranges, softcap)
    _attention_backward_dk_kernel[triton.cdiv(length, tile.n), batch * kv_heads](
        *(q, k, v_, lse, dout_, delta, dk, _or(dv, dk), valid_, ranges_),
        *(q.stride(), k.stride(), v_.stride(), dout_.stride(), dk.stride(), _or(dv, dk).stride()),
        *(kv_heads, *scalars),
        **options,
    )
    return dq, dk, dv


def attention_lse_forward(q, k, valid, ranges, scale, softcap) -> torch.Tensor:
    """lse [B, Hq, T]."""
    return attention_with_lse_forward(q, k, None, valid, ranges, scale, softcap)[1]


def attention_lse_backward(dlse, q, k, lse, valid, ranges, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk)"""
    return attention_with_lse_backward(None, dlse, q, k, None, None, lse, valid, ranges, scale, softcap)[:2]


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer argument: `unused` stands in for a tensor that is not there and will not be read."""
    return unused if tensor is None else tensor


def _options(kernel, q, v, valid, ranges, softcap):
    tile = choose_tile(kernel, q)
    return tile, {
        "D": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "HAS_VALUE": v is not None,
        "HAS_RANGES": ranges is not None,
        "HAS_VALID": valid is not None,
        "HAS_SOFTCAP": softcap is not None,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
