"""The Triton backend where rows are not keys, attention is not causal, heads are kept apart, sequences are packed."""

import pytest
import torch

from mold_kernels import attention_lse, attention_with_lse, reference, span_attention
from mold_kernels.testing import random_spans
from tests.mold_kernels.test_pooling import (
    check_attention,
    check_packed_sequences,
    check_padding,
    make_qkv,
    paddings,
)
from tests.mold_kernels.test_span_attention import assert_matches_reference, values_and_gradients

CASES = [
    pytest.param(1, 37, {}, id="decoding"),
    pytest.param(21, 53, {}, id="prefill-over-a-cache"),
    pytest.param(21, 53, {"sliding_window": 18}, id="window-over-a-cache"),
    pytest.param(21, 53, {"query_start": torch.tensor([0, 9]), "softcap": 5.0}, id="starts"),
    pytest.param(37, 37, {"causal": False}, id="both-sides"),
    pytest.param(11, 40, {"causal": False, "softcap": 5.0}, id="across"),
    pytest.param(40, 11, {"causal": False}, id="more-rows-than-keys"),
]
PACKED = pytest.param(37, 37, {"causal": False, "cu_seqlens": torch.tensor([0, 5, 5, 20, 37]).int()}, id="packed")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "keys", "options"), [*CASES, PACKED])
def test_attention(rows, keys, options, masked):
    batch = 1 if "cu_seqlens" in options else 2
    q, k, v = make_qkv(rows, keys, (2, 1), dtype=torch.float32, batch=batch)
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[0, : keys // 4], mask[-1, keys - keys // 3 :] = False, False
    options = {**options, "key_padding_mask": mask if masked else None}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (q.shape, q.shape[:3])]
    check_attention(attention_lse, reference.attention_lse, (q, k), grads[1:], ["lse", "dq", "dk"], "triton", options)
    outputs = ["out", "lse", "dq", "dk", "dv"]
    check_attention(attention_with_lse, reference.attention_with_lse, (q, k, v), grads, outputs, "triton", options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("real", [(32, 96), (0, 64), (32, 64), (40, 59), (96, 96)])
def test_padding_is_not_walked(real, causal):
    """Whole tiles of padding hold what would spoil every sum that it were in, were it hidden or not."""
    q, k, v = make_qkv(96, 96, (2, 1), dtype=torch.float32)
    mask = torch.zeros(2, 96, dtype=torch.bool)
    mask[:, slice(*real)] = True
    poisoned = [tensor.clone() for tensor in (k, v)]
    for tensor in poisoned:
        tensor[:, :, : real[0] // 32 * 32] = torch.nan
        tensor[:, :, -(-real[1] // 32) * 32 :] = torch.nan
    if real[0] % 32 == 0:  # a tile begins with the first real key
        options = {"key_padding_mask": mask, "causal": causal}
        out, lse = attention_with_lse(q, *poisoned, backend="triton", **options)
        expected = reference.attention_with_lse(q, k, v, **options)
        torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (q.shape, q.shape[:3])]
    options = {"causal": causal, "key_padding_mask": mask}
    outputs = ["out", "lse", "dq", "dk", "dv"]
    check_attention(attention_with_lse, reference.attention_with_lse, (q, k, v), grads, outputs, "triton", options)


def test_padding_between_real_keys():
    q, k, v = make_qkv(80, 80, (2, 1), dtype=torch.float32)
    mask = torch.rand(2, 80, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[1] = torch.arange(80) >= 16
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (q.shape, q.shape[:3])]
    outputs = ["out", "lse", "dq", "dk", "dv"]
    for causal in (True, False):
        options = {"causal": causal, "key_padding_mask": mask}
        check_attention(attention_with_lse, reference.attention_with_lse, (q, k, v), grads, outputs, "triton", options)


def test_every_tile_over_a_cache(tile):
    test_attention(21, 53, {}, False)
    test_attention(37, 37, {"causal": False}, False)


@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize(("rows", "keys", "options"), [*CASES, PACKED])
def test_span_attention(rows, keys, options, every_key):
    batch = 1 if "cu_seqlens" in options else 2
    q, k, _ = make_qkv(rows, keys, (4, 2), dtype=torch.float32, batch=batch)
    generator = torch.Generator().manual_seed(2)
    row_spans, key_spans = random_spans(generator, batch, 6, rows), random_spans(generator, batch, 9, keys)
    key_spans = None if every_key else key_spans
    # exp2 rounds the scores once more than exp, which in float32 a few large probabilities alone may show.
    assert_matches_reference(q, k, row_spans, key_spans, "mean", "triton", heads="all", factor=3, **options)


@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize(("rows", "keys", "options"), CASES[3:5])
def test_span_attention_with_padding(rows, keys, options, every_key):
    check_padding(rows, keys, options, "mean", "group", every_key, torch.float32, "triton")


def check_maxima(rows, keys, options, every_key, heads, batch=1):
    q, k, _ = make_qkv(rows, keys, (4, 2), dtype=torch.float32, batch=batch)
    generator = torch.Generator().manual_seed(2)
    row_spans, key_spans = random_spans(generator, batch, 6, rows), random_spans(generator, batch, 20, keys)
    key_spans[:, 1:, 1] = torch.minimum(key_spans[:, 1:, 1], key_spans[:, 1:, 0] + 3)
    key_spans[:, 0] = torch.tensor([keys // 3, keys - 1])  # over several tiles
    spans = row_spans, None if every_key else key_spans
    return assert_matches_reference(q, k, *spans, "max", "triton", heads=heads, **options)


@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize(("case", "heads"), [(0, "group"), (2, "all"), (3, "group"), (4, "mean"), (6, "all")])
def test_maxima(case, heads, every_key):
    rows, keys, options = CASES[case].values
    check_maxima(rows, keys, options, every_key, heads, batch=2 if "query_start" in options else 1)


@pytest.mark.parametrize("every_key", [False, True])
def test_maxima_with_padding(every_key):
    mask = paddings(53)[:3]
    options = {"key_padding_mask": mask, "query_start": torch.tensor([32, 9, 20])}
    check_maxima(21, 53, options, every_key, "group", batch=3)


@pytest.mark.parametrize("every_key", [False, True])
def test_the_first_of_equal_rows_has_the_gradient(every_key):
    """Of rows in one piece and in several."""
    q, k, _ = make_qkv(53, 53, (2, 1), dtype=torch.float32, batch=1)
    q = q[:, :, :1].expand(-1, -1, 53, -1).clone().requires_grad_()
    row_spans, key_spans = torch.tensor([[[7, 50], [20, 23], [4, 4]]]), torch.tensor([[[2, 4], [0, 53]]])
    lse = reference.attention_lse(q, k, causal=False)
    options = {"row_reduction": "max", "causal": False, "backend": "triton"}
    pooled = span_attention(q, k, lse, row_spans, None if every_key else key_spans, **options)
    (grad,) = torch.autograd.grad(pooled.sum(), q)
    assert grad[0].any(-1).any(0).nonzero().flatten().tolist() == [7, 20]


@pytest.mark.parametrize("every_key", [False, True])
def test_a_score_that_is_not_a_number_is_seen_in_its_maximum(every_key):
    q, k, _ = make_qkv(40, 40, (2, 1), dtype=torch.float32, batch=1)
    lse, row_spans = reference.attention_lse(q, k), torch.tensor([[[0, 9], [3, 40], [30, 40]]])
    q[0, 0, 20] = torch.nan
    key_spans = None if every_key else torch.tensor([[[2, 4], [25, 26]]])
    results = [
        span_attention(q, k, lse, row_spans, key_spans, row_reduction="max", backend=backend).isnan()
        for backend in ("triton", "reference")
    ]
    assert results[1].any()
    assert torch.equal(*results)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_read(causal):
    q, k, _ = make_qkv(53, 53, (2, 1), dtype=torch.float32, batch=5)
    mask = paddings(53)
    generator = torch.Generator().manual_seed(2)
    spans = random_spans(generator, 5, 6, 53), random_spans(generator, 5, 9, 53)
    options = {"causal": causal, "key_padding_mask": mask}
    lse = attention_lse(q, k, backend="reference", **options)
    upstream = torch.randn(5, 6, 9, generator=generator)
    hidden = ~mask[:, None, :, None]
    poisoned = q.masked_fill(hidden, torch.nan) if causal else q, k.masked_fill(hidden, torch.nan)
    results = []
    for tensors in ((q, k, lse), (*poisoned, lse)):

        def pooled(q, k, lse):
            return span_attention(q, k, lse, *spans, backend="triton", **options)

        results.append(values_and_gradients(pooled, *tensors, upstream, torch.float32))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize("heads", ["mean", "group", "all"])
def test_seven_heads_of_a_key_head(heads, every_key):
    q, k, _ = make_qkv(21, 53, (7, 1), dtype=torch.bfloat16, batch=1)
    generator = torch.Generator().manual_seed(2)
    row_spans, key_spans = random_spans(generator, 1, 6, 21), random_spans(generator, 1, 9, 53)
    assert_matches_reference(q, k, row_spans, None if every_key else key_spans, "sum", "triton", heads=heads)


@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize("heads", ["mean", "all"])
def test_packed_sequences(heads, every_key):
    reduction = "sum" if heads == "mean" else "max"
    check_packed_sequences([0, 5, 5, 20, 37], heads, every_key, torch.float32, "triton", reduction)
