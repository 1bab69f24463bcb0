"""The Triton backend of value_pool against the float64 reference, values and gradients."""

import pytest
import torch

from mold_kernels._triton import tiles
from mold_kernels._triton import value_pool as kernels
from mold_kernels.value_pool import value_pool
from tests.mold_kernels.test_value_pool import BORDERS, check_against_reference, make_case, value_and_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("length", "width", "padding"), [(1, 16, "no"), (37, 80, "left"), (130, 5, "no"), (700, 64, "right")]
)
def test_values_and_gradients(generator, dtype, length, width, padding):
    check_against_reference(generator, "triton", *make_case(generator, 2, 3, length, width, dtype, padding))


def test_several_tiles_a_share(generator, monkeypatch):
    monkeypatch.setattr(tiles, "VALUE_POOL_ELEMENTS", 256)
    monkeypatch.setattr(kernels, "_PROGRAMS", 6)
    check_against_reference(generator, "triton", *make_case(generator, 2, 3, 130, 16))


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v.contiguous(),
        lambda v: v.repeat(1, 1, 1, 2)[..., ::2],
        lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
        lambda v: v[:1].expand(2, -1, -1, -1),
    ],
    ids=["contiguous", "every second column", "tokens innermost", "expanded"],
)
def test_layouts(generator, view):
    v, mask = make_case(generator)
    check_against_reference(generator, "triton", view(v), mask.T.contiguous().T)


def test_padding_is_ignored_even_if_it_is_nan(generator):
    v, mask = make_case(generator, batch=3)
    mask[1] = False
    v.masked_fill_(~mask[:, None, :, None], float("nan"))
    result = value_and_gradient(value_pool, v, mask, torch.ones(3, 48), backend="triton")
    assert (result["pooled"][1] == 0).all()
    assert (result["dv"].transpose(1, 2)[~mask] == 0).all()
    assert all(tensor.isfinite().all() for tensor in result.values())


@pytest.mark.parametrize("borders", BORDERS, ids=str)
def test_packed_sequences(generator, monkeypatch, borders):
    monkeypatch.setattr(tiles, "VALUE_POOL_ELEMENTS", 256)
    check_against_reference(
        generator, "triton", *make_case(generator, 1, 3, 37, 16), torch.tensor(borders, dtype=torch.int32)
    )


def test_borders_that_end_early_leave_zeros(generator):
    """On a device they are not looked at."""
    v, mask = make_case(generator, 1, padding="no")
    u = torch.ones(1, 48)
    dv = kernels.value_pool_backward(u, v, mask, torch.tensor([0, 20], dtype=torch.int32), 1e-6)
    assert dv[:, :, :20].any()
    assert not dv[:, :, 20:].any()
