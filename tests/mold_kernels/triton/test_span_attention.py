"""The Triton backend of span_attention against the float64 reference, values and gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mold_kernels import reference, span_attention
from mold_kernels._triton import tiles
from mold_kernels.testing import random_qkv, random_spans
from tests.mold_kernels.test_span_attention import VISIBILITY, assert_matches_reference, spans
from tests.mold_kernels.test_span_pieces import check_pieces

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(batch, heads, kv_heads, length, head_dim, steps, keys, dtype, row_reduction="sum", **options):
    generator = torch.Generator().manual_seed(length)
    q, k, _ = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)
    row_spans = random_spans(generator, batch, steps, length)
    key_spans = random_spans(generator, batch, keys, length)
    # Key words are short, but for one; many of them give more columns than a tile has.
    key_spans[:, 1:, 1] = torch.minimum(key_spans[:, 1:, 1], key_spans[:, 1:, 0] + 3)
    return assert_matches_reference(q, k, row_spans, key_spans, row_reduction, "triton", **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_overlapping_spans(dtype):
    check(2, 4, 2, 37, 16, 5, 7, dtype)


def test_every_tile(tile):
    check(1, 4, 2, 37, 16, 5, 7, torch.float32)


def test_mean_over_rows():
    check(2, 4, 2, 37, 16, 5, 7, torch.float32, "mean")


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_head_dims(head_dim):
    check(1, 3, 1, 35, head_dim, 4, 5, torch.bfloat16)


@pytest.mark.parametrize("options", VISIBILITY)
def test_options(options):
    """Many spans: the error of a few numbers is that of the largest one's last bit, which the reference may hit."""
    check(1, 4, 2, 37, 16, 15, 20, torch.float32, **options)


def test_many_steps_and_key_words():
    """More pieces than a block of the sums over pieces has."""
    check(1, 2, 1, 150, 16, 40, 50, torch.float32)


def test_more_tokens_than_a_block_of_the_scan(monkeypatch):
    monkeypatch.setattr(tiles, "SCAN_BLOCK", 16)
    monkeypatch.setattr(tiles, "MARK_BLOCK", 4)
    check(2, 2, 1, 53, 16, 6, 9, torch.float32)


def test_shares_of_rows_and_of_heads(monkeypatch):
    for programs in (1, 30, 512):
        monkeypatch.setattr(tiles, "SPAN_PROGRAMS", programs)
        check(1, 6, 3, 61, 16, 5, 7, torch.float32)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(spans(3), spans(4))
def test_any_spans(row_spans, key_spans):
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, 23, 16)
    row_spans, key_spans = (torch.tensor([each], dtype=torch.int32) for each in (row_spans, key_spans))
    assert_matches_reference(q, k, row_spans, key_spans, "sum", "triton")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(spans(4), spans(5))
def test_pieces(row_spans, key_spans):
    check_pieces("triton", row_spans, key_spans)


def test_empty_spans_give_exact_zeros():
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 12, 16)
    none = torch.zeros(2, 3, 2, dtype=torch.int32)
    some = torch.tensor([[[0, 4], [5, 5], [4, 9]]], dtype=torch.int32).expand(2, -1, -1)
    for row_spans, key_spans in ((none, none), (none, some), (some, none)):
        for tensor in assert_matches_reference(q, k, row_spans, key_spans, "sum", "triton"):
            assert not tensor.any()


def test_no_spans_at_all():
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 12, 16)
    no_steps, keys = torch.zeros(2, 0, 2, dtype=torch.int32), torch.zeros(2, 3, 2, dtype=torch.int32)
    pooled = span_attention(q, k, reference.attention_lse(q, k), no_steps, keys, backend="triton")
    assert pooled.shape == (2, 0, 3)


def test_float16_keeps_small_gradients():
    """A gradient of 1e-9 is nothing in float16: the weights are scaled before they are rounded."""
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, 20, 16, dtype=torch.float16)
    spans_ = torch.tensor([[[0, 10], [10, 20]]], dtype=torch.int32)
    lse = reference.attention_lse(q.double(), k.double()).float().requires_grad_()
    gradients = []
    for scale in (1.0, 1e-9):
        pooled = span_attention(q, k, lse, spans_, spans_, backend="triton")
        gradients.append(torch.autograd.grad(pooled.sum() * scale, lse)[0] / scale)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=0)


def test_layouts():
    generator = torch.Generator().manual_seed(0)
    q, k, _ = random_qkv(generator, 2, 4, 2, 21, 16)
    rows, keys = random_spans(generator, 2, 4, 21), random_spans(generator, 2, 5, 21)
    for layout in (
        lambda t: t.contiguous(),
        lambda t: t.repeat(1, 1, 1, 2)[..., ::2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t[:1].expand(2, -1, -1, -1),
    ):
        assert_matches_reference(layout(q), layout(k), rows, keys, "sum", "triton")


def test_production_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tile(64, 64))
    check(1, 4, 2, 190, 16, 9, 40, torch.float32)
