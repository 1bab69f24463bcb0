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

from mold_kernels._triton.scores import (
    LN_2,
    LOG2_E,
    capped_scores,
    load_rows,
    product,
    score_slope,
    store_rows,
    tile_options,
    with_strides,
)
from mold_kernels.native import empty_heads

# Tensors [B, H, T, D] are (pointer, four strides). An argument that is None is compiled away with all that it does.


@triton.jit
def _hide(scores, row, key, T, range_ptr, valid_ptr):
    """-inf where a row must not see a key; `row` and `key` broadcast to the scores' shape."""
    visible = (key <= row) & (key < T)
    if range_ptr is not None:
        visible = visible & (key >= tl.load(range_ptr + row, mask=row < T, other=0))
    if valid_ptr is not None:
        visible = visible & tl.load(valid_ptr + key, mask=key < T, other=0).to(tl.int1)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _forward_keys(
    state,
    q,
    k,
    v,
    batch,
    kv_head,
    low,
    high,
    row,
    T,
    scale,
    softcap,
    range_ptr,
    valid_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows' running sums (acc, total, peak) over the keys [low, high); MASKED where some row must not see one."""
    acc, total, peak = state
    for start in range(low, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, batch, kv_head, key, key < T, D, BLOCK_D)
        scores = capped_scores(product(q, keys.T, None), scale, softcap, LOG2_E)
        if MASKED:
            scores = _hide(scores, row[:, None], key[None, :], T, range_ptr, valid_ptr)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # -inf - -inf would be NaN in a row that has seen no key so far.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(p, 1)
        if v is not None:
            values = load_rows(v, batch, kv_head, key, key < T, D, BLOCK_D)
            acc = product(p.to(values.dtype), values, acc * shrink[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit
def _first_key(range_ptr, first_row, BLOCK_N: tl.constexpr):
    """The first tile of keys that a tile of rows sees."""
    if range_ptr is None:
        return 0
    else:
        return tl.load(range_ptr + first_row) // BLOCK_N * BLOCK_N


@triton.jit(do_not_specialize=["T"])
def _attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    valid_ptr,
    range_ptr,
    heads,
    group,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last rows see most keys: they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // group
    row = first + tl.arange(0, BLOCK_M)
    inside = row < T
    real = inside
    if valid_ptr is not None:
        valid_ptr += batch * T
        real = tl.load(valid_ptr + row, mask=inside, other=0).to(tl.int1)
    queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    low = _first_key(range_ptr, first, BLOCK_N)
    high = tl.minimum(first + BLOCK_M, T)
    state = acc, total, peak
    if range_ptr is None and valid_ptr is None:
        diagonal = first // BLOCK_N * BLOCK_N
        state = _forward_keys(
            state, queries, k, v, batch, kv_head, low, diagonal, row, T, scale, softcap, range_ptr, valid_ptr, D,
            BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
        low = diagonal
    acc, total, peak = _forward_keys(
        state, queries, k, v, batch, kv_head, low, high, row, T, scale, softcap, range_ptr, valid_ptr, D, BLOCK_D,
        BLOCK_N, True,
    )  # fmt: skip

    sees = real & (total > 0)
    lse = tl.where(sees, (peak + tl.log2(total)) * LN_2, float("inf"))
    tl.store(lse_ptr + (batch * heads + head) * T + row, lse, mask=inside)
    if v is not None:
        acc = tl.where(sees[:, None], acc / tl.where(sees, total, 1.0)[:, None], 0.0)
        store_rows(out, batch, head, row, inside, acc, D, BLOCK_D)


@triton.jit
def _dq_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    k,
    v,
    batch,
    kv_head,
    low,
    high,
    row,
    T,
    scale,
    softcap,
    range_ptr,
    valid_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq / scale of the keys [low, high), added; `lse` is in base 2."""
    for start in range(low, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, batch, kv_head, key, key < T, D, BLOCK_D)
        scores = capped_scores(product(q, keys.T, None), scale, softcap, LOG2_E)
        slope = score_slope(scores, softcap, LOG2_E)
        if MASKED:
            scores = _hide(scores, row[:, None], key[None, :], T, range_ptr, valid_ptr)
        ds = -delta[:, None]
        if v is not None:
            values = load_rows(v, batch, kv_head, key, key < T, D, BLOCK_D)
            ds = product(dout, values.T, None) + ds
        ds *= tl.exp2(scores - lse[:, None]) * slope
        dq = product(ds.to(keys.dtype), keys, dq)
    return dq


@triton.jit(do_not_specialize=["T"])
def _attention_backward_dq_kernel(
    q,
    k,
    v,
    out,
    dout,
    dq,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    valid_ptr,
    range_ptr,
    heads,
    group,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // group
    row = first + tl.arange(0, BLOCK_M)
    inside = row < T
    line = (batch * heads + head) * T
    if valid_ptr is not None:
        valid_ptr += batch * T
    queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
    delta = tl.zeros([BLOCK_M], tl.float32)
    gradient = queries
    if v is not None:
        gradient = load_rows(dout, batch, head, row, inside, D, BLOCK_D)
        outputs = load_rows(out, batch, head, row, inside, D, BLOCK_D)
        delta = tl.sum(gradient.to(tl.float32) * outputs.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + line + row, mask=inside, other=0.0)
    tl.store(delta_ptr + line + row, delta, mask=inside)
    lse = tl.load(lse_ptr + line + row, mask=inside, other=float("inf")) * LOG2_E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = _first_key(range_ptr, first, BLOCK_N)
    high = tl.minimum(first + BLOCK_M, T)
    if range_ptr is None and valid_ptr is None:
        diagonal = first // BLOCK_N * BLOCK_N
        acc = _dq_keys(
            acc, queries, gradient, lse, delta, k, v, batch, kv_head, low, diagonal, row, T, scale, softcap, range_ptr,
            valid_ptr, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
        low = diagonal
    acc = _dq_keys(
        acc, queries, gradient, lse, delta, k, v, batch, kv_head, low, high, row, T, scale, softcap, range_ptr,
        valid_ptr, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    store_rows(dq, batch, head, row, inside, acc * scale, D, BLOCK_D)


@triton.jit
def _dk_rows(
    dk,
    dv,
    keys,
    values,
    key,
    q,
    dout,
    batch,
    head,
    lse_ptr,
    delta_ptr,
    low,
    high,
    T,
    scale,
    softcap,
    range_ptr,
    valid_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk / scale and dv of the rows [low, high), added. Tiles are [keys, rows]: no transpose of what was computed."""
    for start in range(low, high, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < T
        queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
        # Rows from T on have lse = +inf: their probabilities are 0.
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        scores = capped_scores(product(keys, queries.T, None), scale, softcap, LOG2_E)
        slope = score_slope(scores, softcap, LOG2_E)
        if MASKED:
            scores = _hide(scores, row[None, :], key[:, None], T, range_ptr, valid_ptr)
        p = tl.exp2(scores - lse[None, :])
        ds = -delta[None, :]
        if dout is not None:
            gradient = load_rows(dout, batch, head, row, inside, D, BLOCK_D)
            dv = product(p.to(gradient.dtype), gradient, dv)
            ds = product(values, gradient.T, None) + ds
        ds *= p * slope
        dk = product(ds.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def _attention_backward_dk_kernel(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    lse_ptr,
    delta_ptr,
    valid_ptr,
    range_ptr,
    kv_heads,
    group,
    T,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    key = first + tl.arange(0, BLOCK_N)
    keys = load_rows(k, batch, kv_head, key, key < T, D, BLOCK_D)
    values = keys
    if v is not None:
        values = load_rows(v, batch, kv_head, key, key < T, D, BLOCK_D)
    if valid_ptr is not None:
        valid_ptr += batch * T

    low = first // BLOCK_M * BLOCK_M
    # Rows until `masked` may be such as must not see a key of the tile.
    masked = tl.minimum((first + BLOCK_N + BLOCK_M - 1) // BLOCK_M * BLOCK_M, T)
    if range_ptr is not None:
        masked = tl.load(range_ptr + T + tl.minimum(first + BLOCK_N, T) - 1)
    elif valid_ptr is not None:
        masked = T
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        line = (batch * kv_heads * group + head) * T
        key_sum, value_sum = _dk_rows(
            key_sum, value_sum, keys, values, key, q, dout, batch, head, lse_ptr + line, delta_ptr + line, low, masked,
            T, scale, softcap, range_ptr, valid_ptr, D, BLOCK_D, BLOCK_M, True,
        )  # fmt: skip
        if range_ptr is None and valid_ptr is None:
            key_sum, value_sum = _dk_rows(
                key_sum, value_sum, keys, values, key, q, dout, batch, head, lse_ptr + line, delta_ptr + line, masked,
                T, T, scale, softcap, range_ptr, valid_ptr, D, BLOCK_D, BLOCK_M, False,
            )  # fmt: skip
    store_rows(dk, batch, kv_head, key, key < T, key_sum * scale, D, BLOCK_D)
    if v is not None:
        store_rows(dv, batch, kv_head, key, key < T, value_sum, D, BLOCK_D)


def attention_with_lse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    valid: torch.Tensor | None,
    first: torch.Tensor | None,
    ranges: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(out [B, Hq, T, D], lse [B, Hq, T]); out is None without v."""
    valid = None if valid is None else valid.contiguous()
    batch, heads, length, _ = q.shape
    tile, options = tile_options("attention_forward", q)
    out = None if v is None else empty_heads(q)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    _attention_forward_kernel[triton.cdiv(length, tile.m), batch * heads](
        *(*map(with_strides, (q, k, v, out)), lse, valid, ranges, heads, heads // k.shape[1], length, scale, softcap),
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
    first: torch.Tensor | None,
    ranges: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
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
    scalars = heads // kv_heads, length, scale, softcap
    tile, options = tile_options("attention_backward_dq", q)
    _attention_backward_dq_kernel[triton.cdiv(length, tile.m), batch * heads](
        *(*map(with_strides, (q, k, v, out, dout, dq)), lse, dlse, delta, valid, ranges, heads, *scalars), **options
    )
    tile, options = tile_options("attention_backward_dk", q)
    _attention_backward_dk_kernel[triton.cdiv(length, tile.n), batch * kv_heads](
        *(*map(with_strides, (q, k, v, dout, dk, None if v is None else dv)), lse, delta, valid, ranges),
        *(kv_heads, *scalars),
        **options,
    )
    return dq, dk, dv


def attention_lse_forward(q, k, valid, first, ranges, scale, softcap, causal) -> torch.Tensor:
    """lse [B, Hq, T]."""
    return attention_with_lse_forward(q, k, None, valid, first, ranges, scale, softcap, causal)[1]


def attention_lse_backward(
    dlse, q, k, lse, valid, first, ranges, scale, softcap, causal
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk)"""
    return attention_with_lse_backward(None, dlse, q, k, None, None, lse, valid, first, ranges, scale, softcap, causal)[
        :2
    ]
