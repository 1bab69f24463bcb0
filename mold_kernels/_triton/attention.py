"""Flash attention with a differentiable log-sum-exp, and the log-sum-exp alone: the same kernels without v.

The derivation is in `mold_kernels.attention`. Forward: a program holds BLOCK_M rows of one head and walks the keys they
see. Backward, deterministic without atomics: one kernel for dq (a program holds rows and walks keys; it also stores
delta = rowsum(dout o out) - dlse), then one for dk and dv (a program holds keys and walks the rows that see them, of
all the query heads of its key head). Padding before and behind an example's real keys is neither walked nor masked;
where some lies between them, every tile is masked.

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
    first_position,
    load_padding,
    load_rows,
    padding_ends,
    product,
    score_slope,
    store_rows,
    tile_options,
    with_strides,
    within_ranges,
)
from mold_kernels.native import empty_heads

# Tensors [B, H, T, D] are (pointer, four strides). An argument that is None is compiled away with all that it does.


@triton.jit
def _hide(scores, position, key, T, range_ptr, valid_ptr, CAUSAL: tl.constexpr):
    """-inf where a row must not see a key of T; its `position` and `key` broadcast to the scores' shape."""
    visible = key < T
    if CAUSAL:
        visible = visible & (key <= position)
    visible = within_ranges(visible, position, key, range_ptr, T, CAUSAL)
    if valid_ptr is not None:
        visible = visible & tl.load(valid_ptr + key, mask=key < T, other=0).to(tl.int1)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _seen_keys(range_ptr, padding_ptr, batch, position, end, T, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(first, first that some row may not see, end) of the keys that rows at [position, end) see, in tiles.

    A row that is padding may be said to see a key.
    """
    low = 0
    high = T
    if CAUSAL:
        high = tl.minimum(end, T)
    if range_ptr is not None:
        low = tl.load(range_ptr + position) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            high = tl.load(range_ptr + T + end - 1)
    if padding_ptr is not None:
        first_real, end_real, broken = load_padding(padding_ptr, batch)
        low = tl.maximum(low, first_real)
        high = tl.minimum(high, end_real)
        if CAUSAL:
            high = tl.where(position < end_real, high, 0)
    masked = low
    if range_ptr is None:
        of_all = high
        if CAUSAL:
            of_all = tl.minimum(high, position + 1)
        masked = low + tl.maximum(of_all - low, 0) // BLOCK_N * BLOCK_N
        if padding_ptr is not None:
            masked = tl.where(broken, low, masked)
    return low, masked, high


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
    position,
    T,
    scale,
    softcap,
    range_ptr,
    valid_ptr,
    CAUSAL: tl.constexpr,
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
            scores = _hide(scores, position[:, None], key[None, :], T, range_ptr, valid_ptr, CAUSAL)
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


@triton.jit(do_not_specialize=["TQ", "TK"])
def _attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    valid_ptr,
    padding_ptr,
    first_ptr,
    range_ptr,
    heads,
    group,
    TQ,
    TK,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
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
    inside = row < TQ
    position = first_position(first_ptr, batch) + row
    real = inside
    if valid_ptr is not None:
        valid_ptr += batch * TK
        if CAUSAL:
            real = tl.load(valid_ptr + position, mask=inside, other=0).to(tl.int1)
    queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    begin = first_position(first_ptr, batch) + first
    low, masked, high = _seen_keys(
        range_ptr, padding_ptr, batch, begin, begin + tl.minimum(BLOCK_M, TQ - first), TK, BLOCK_N, CAUSAL
    )
    state = acc, total, peak
    if range_ptr is None:
        state = _forward_keys(
            state, queries, k, v, batch, kv_head, low, masked, position, TK, scale, softcap, range_ptr, valid_ptr,
            CAUSAL, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    acc, total, peak = _forward_keys(
        state, queries, k, v, batch, kv_head, masked, high, position, TK, scale, softcap, range_ptr, valid_ptr,
        CAUSAL, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip

    sees = real & (total > 0)
    lse = tl.where(sees, (peak + tl.log2(total)) * LN_2, float("inf"))
    tl.store(lse_ptr + (batch * heads + head) * TQ + row, lse, mask=inside)
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
    position,
    T,
    scale,
    softcap,
    range_ptr,
    valid_ptr,
    CAUSAL: tl.constexpr,
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
            scores = _hide(scores, position[:, None], key[None, :], T, range_ptr, valid_ptr, CAUSAL)
        ds = -delta[:, None]
        if v is not None:
            values = load_rows(v, batch, kv_head, key, key < T, D, BLOCK_D)
            ds = product(dout, values.T, None) + ds
        ds *= tl.exp2(scores - lse[:, None]) * slope
        dq = product(ds.to(keys.dtype), keys, dq)
    return dq


@triton.jit(do_not_specialize=["TQ", "TK"])
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
    padding_ptr,
    first_ptr,
    range_ptr,
    heads,
    group,
    TQ,
    TK,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
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
    inside = row < TQ
    position = first_position(first_ptr, batch) + row
    line = (batch * heads + head) * TQ
    if valid_ptr is not None:
        valid_ptr += batch * TK
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
    begin = first_position(first_ptr, batch) + first
    low, masked, high = _seen_keys(
        range_ptr, padding_ptr, batch, begin, begin + tl.minimum(BLOCK_M, TQ - first), TK, BLOCK_N, CAUSAL
    )
    if range_ptr is None:
        acc = _dq_keys(
            acc, queries, gradient, lse, delta, k, v, batch, kv_head, low, masked, position, TK, scale, softcap,
            range_ptr, valid_ptr, CAUSAL, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    acc = _dq_keys(
        acc, queries, gradient, lse, delta, k, v, batch, kv_head, masked, high, position, TK, scale, softcap,
        range_ptr, valid_ptr, CAUSAL, D, BLOCK_D, BLOCK_N, True,
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
    position,
    TQ,
    TK,
    scale,
    softcap,
    range_ptr,
    valid_ptr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk / scale and dv of the rows [low, high), added; row 0 stands at `position`.

    Tiles are [keys, rows]: no transpose of what was computed.
    """
    for start in range(low, high, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < TQ
        queries = load_rows(q, batch, head, row, inside, D, BLOCK_D)
        # Rows from TQ on have lse = +inf: their probabilities are 0.
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        scores = capped_scores(product(keys, queries.T, None), scale, softcap, LOG2_E)
        slope = score_slope(scores, softcap, LOG2_E)
        if MASKED:
            scores = _hide(scores, (position + row)[None, :], key[:, None], TK, range_ptr, valid_ptr, CAUSAL)
        p = tl.exp2(scores - lse[None, :])
        ds = -delta[None, :]
        if dout is not None:
            gradient = load_rows(dout, batch, head, row, inside, D, BLOCK_D)
            dv = product(p.to(gradient.dtype), gradient, dv)
            ds = product(values, gradient.T, None) + ds
        ds *= p * slope
        dk = product(ds.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit(do_not_specialize=["TQ", "TK"])
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
    padding_ptr,
    first_ptr,
    range_ptr,
    kv_heads,
    group,
    TQ,
    TK,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    key = first + tl.arange(0, BLOCK_N)
    keys = load_rows(k, batch, kv_head, key, key < TK, D, BLOCK_D)
    values = keys
    if v is not None:
        values = load_rows(v, batch, kv_head, key, key < TK, D, BLOCK_D)
    if valid_ptr is not None:
        valid_ptr += batch * TK

    position = first_position(first_ptr, batch)
    low = 0
    high = TQ
    # Rows until `masked` may be such as must not see a key of the tile.
    masked = 0
    if CAUSAL:
        low = first
        masked = first + BLOCK_N
    if range_ptr is not None:
        if not CAUSAL:
            low = tl.load(range_ptr + first)
        masked = tl.load(range_ptr + TK + tl.minimum(first + BLOCK_N, TK) - 1)
    low = tl.maximum(low - position, 0) // BLOCK_M * BLOCK_M
    masked = tl.maximum(masked - position, 0)
    if padding_ptr is not None:
        first_real, end_real, broken = load_padding(padding_ptr, batch)
        if CAUSAL:  # rows from there on are padding
            high = tl.minimum(tl.maximum(end_real - position, 0), TQ)
        if range_ptr is None:
            cut = (first < first_real) | (tl.minimum(first + BLOCK_N, TK) > end_real)
            masked = tl.where(broken | cut, TQ, masked)
        high = tl.where((first + BLOCK_N <= first_real) | (first >= end_real), 0, high)
    if range_ptr is None:
        masked = (masked + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    masked = tl.minimum(masked, high)
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        line = (batch * kv_heads * group + head) * TQ
        key_sum, value_sum = _dk_rows(
            key_sum, value_sum, keys, values, key, q, dout, batch, head, lse_ptr + line, delta_ptr + line, low, masked,
            position, TQ, TK, scale, softcap, range_ptr, valid_ptr, CAUSAL, D, BLOCK_D, BLOCK_M, True,
        )  # fmt: skip
        if range_ptr is None:
            key_sum, value_sum = _dk_rows(
                key_sum, value_sum, keys, values, key, q, dout, batch, head, lse_ptr + line, delta_ptr + line, masked,
                high, position, TQ, TK, scale, softcap, range_ptr, valid_ptr, CAUSAL, D, BLOCK_D, BLOCK_M, False,
            )  # fmt: skip
    store_rows(dk, batch, kv_head, key, key < TK, key_sum * scale, D, BLOCK_D)
    if v is not None:
        store_rows(dv, batch, kv_head, key, key < TK, value_sum, D, BLOCK_D)


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
    """(out [B, Hq, Tq, D], lse [B, Hq, Tq]); out is None without v."""
    valid, padding = padding_ends(valid)
    batch, heads, length, _ = q.shape
    tile, options = tile_options("attention_forward", q)
    out = None if v is None else empty_heads(q)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    _attention_forward_kernel[triton.cdiv(length, tile.m), batch * heads](
        *(*map(with_strides, (q, k, v, out)), lse, valid, padding, first, ranges, heads, heads // k.shape[1], length),
        *(k.shape[2], scale, softcap),
        CAUSAL=causal,
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
    valid, padding = padding_ends(valid)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = empty_heads(q), empty_heads(k), None if v is None else empty_heads(v)
    if dout is None:
        v = out = None
        dv = None if dv is None else dv.zero_()
    delta = torch.empty_like(lse)
    scalars = heads // kv_heads, length, k.shape[2], scale, softcap
    tile, options = tile_options("attention_backward_dq", q)
    _attention_backward_dq_kernel[triton.cdiv(length, tile.m), batch * heads](
        *(*map(with_strides, (q, k, v, out, dout, dq)), lse, dlse, delta, valid, padding, first, ranges),
        *(heads, *scalars),
        CAUSAL=causal,
        **options,
    )
    tile, options = tile_options("attention_backward_dk", q)
    _attention_backward_dk_kernel[triton.cdiv(k.shape[2], tile.n), batch * kv_heads](
        *(*map(with_strides, (q, k, v, dout, dk, None if v is None else dv)), lse, delta, valid, padding, first),
        *(ranges, kv_heads, *scalars),
        CAUSAL=causal,
        **options,
    )
    return dq, dk, dv


def attention_lse_forward(q, k, valid, first, ranges, scale, softcap, causal) -> torch.Tensor:
    """lse [B, Hq, Tq]."""
    return attention_with_lse_forward(q, k, None, valid, first, ranges, scale, softcap, causal)[1]


def attention_lse_backward(
    dlse, q, k, lse, valid, first, ranges, scale, softcap, causal
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk)"""
    return attention_with_lse_backward(None, dlse, q, k, None, None, lse, valid, first, ranges, scale, softcap, causal)[
        :2
    ]
