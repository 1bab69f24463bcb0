"""The Triton backend of attention_with_lse and attention_lse against the float64 reference, values and gradients."""

import pytest
import torch

from mold_kernels import attention_lse, attention_with_lse, reference
from mold_kernels._triton import tiles
from mold_kernels.testing import random_qkv
from tests.mold_kernels.test_attention import assert_matches_reference, padding_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = torch.tensor([0, 5, 5, 20, 37], dtype=torch.int32)


def check(batch, heads, kv_heads, length, head_dim, dtype, layout=lambda tensor: tensor, **options):
    generator = torch.Generator().manual_seed(length)
    tensors = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)
    tensors = [layout(tensor) for tensor in tensors]
    upstream = [
        torch.randn(batch, heads, length, head_dim, generator=generator, dtype=torch.float64),
        torch.randn(batch, heads, length, generator=generator, dtype=torch.float64),
    ]
    assert_matches_reference(
        lambda q, k, v: attention_with_lse(q, k, v, backend="triton", **options),
        lambda q, k, v: reference.attention_with_lse(q, k, v, **options),
        tensors,
        upstream,
        ["out", "lse", "dq", "dk", "dv"],
    )
    assert_matches_reference(
        lambda q, k: attention_lse(q, k, backend="triton", **options),
        lambda q, k: reference.attention_lse(q, k, **options),
        tensors[:2],
        upstream[1:],
        ["lse", "dq", "dk"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_length_and_grouped_heads(dtype):
    check(2, 4, 2, 37, 16, dtype)


def test_every_tile(tile):
    check(1, 4, 2, 37, 16, torch.float32)


@pytest.mark.parametrize("head_dim", [8, 80, 96, 128])
def test_head_dims(head_dim):
    check(1, 3, 1, 35, head_dim, torch.bfloat16)


@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_lengths(length):
    check(1, 2, 1, length, 16, torch.float32)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding(padding):
    check(2, 2, 1, 37, 16, torch.float32, key_padding_mask=padding_mask(padding, 2, 37))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param({"sliding_window": 1}, torch.float32, id="window-1"),
        pytest.param({"sliding_window": 20}, torch.float32, id="window-20"),
        pytest.param({"sliding_window": 99}, torch.float32, id="window-longer-than-the-row"),
        pytest.param({"softcap": 2.0}, torch.float32, id="softcap"),
        pytest.param({"cu_seqlens": PACKED}, torch.float32, id="packed"),
        *(
            pytest.param(
                {"cu_seqlens": PACKED, "sliding_window": 4, "softcap": 30.0}, dtype, id=f"packed-window-softcap-{dtype}"
            )
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_options(options, dtype):
    check(1, 4, 2, 37, 16, dtype, **options)


@pytest.mark.parametrize("options", [{"sliding_window": 18}, {"cu_seqlens": PACKED}], ids=["window", "packed"])
def test_ranges_in_every_tile(tile, options):
    check(1, 2, 1, 37, 16, torch.float32, **options)


def test_everything_at_once(tile):
    options = {"sliding_window": 9, "softcap": 5.0, "scale": 0.7}
    check(2, 2, 1, 37, 16, torch.float32, key_padding_mask=padding_mask("both", 2, 37), **options)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.contiguous(), id="contiguous"),
        pytest.param(lambda t: t.repeat(1, 1, 1, 2)[..., ::2], id="every-second-column"),
        pytest.param(lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), id="tokens-innermost"),
        pytest.param(lambda t: t[:1].expand(2, -1, -1, -1), id="expanded"),
    ],
)
def test_layouts(layout):
    check(2, 4, 2, 21, 16, torch.float32, layout=layout)


def test_production_tiles(monkeypatch):
    """128 x 64: rows of a tile reach over several tiles of keys."""
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tile(128, 64))
    check(1, 2, 1, 200, 16, torch.float32)
    check(1, 2, 1, 200, 16, torch.float32, sliding_window=70)


def test_scores_too_large_for_exp():
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, 37, 16)
    out, lse = attention_with_lse(q * 50, k * 50, v, backend="triton")
    expected = reference.attention_with_lse(q.double() * 50, k.double() * 50, v.double())
    torch.testing.assert_close(out, expected[0].float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, expected[1].float(), rtol=1e-6, atol=1e-3)


def test_two_runs_are_equal_bit_by_bit():
    tensors = [tensor.requires_grad_() for tensor in random_qkv(torch.Generator().manual_seed(0), 1, 4, 2, 40, 16)]
    runs = []
    for _ in range(2):
        out, lse = attention_with_lse(*tensors, backend="triton")
        runs.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), tensors)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_float64_and_wide_heads_are_refused():
    for tensors, reason in (
        (random_qkv(torch.Generator(), 1, 1, 1, 4, 16, dtype=torch.float64), "float32, bfloat16 or float16"),
        (random_qkv(torch.Generator(), 1, 1, 1, 4, 264), "head dimensions up to 256"),
    ):
        with pytest.raises(ValueError, match=f"backend: is 'triton', must be .*: triton takes {reason}"):
            attention_with_lse(*tensors, backend="triton")
