"""The Triton backend of layer_mixture_kl against the float64 reference, values and gradients."""

import pytest
import torch

from mold_kernels import layer_mixture_kl, reference
from mold_kernels._triton import tiles
from mold_kernels.testing import assert_as_accurate_as


def run(function, teacher, student, weights, counts, dtype, **options):
    student, weights = student.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
    loss = function(teacher.to(dtype), student, weights, *counts, **options)
    upstream = torch.linspace(-1, 2, len(loss), dtype=dtype)
    return [loss, *torch.autograd.grad((loss * upstream).sum(), (student, weights))]


def check(layers, batch, steps, keys, layout=lambda maps: maps, **options):
    generator = torch.Generator().manual_seed(keys)
    teacher, student = (layout(torch.rand(count, batch, steps, keys, generator=generator)) for count in layers)
    weights = torch.randn(batch, layers[1], generator=generator).softmax(-1)
    counts = [torch.randint(0, most + 1, (batch,), generator=generator) for most in (steps, keys)]
    counts[0][0], counts[1][0] = steps, keys
    case = teacher, student, weights, counts
    actual = run(layer_mixture_kl, *case, torch.float32, backend="triton", **options)
    low = run(reference.layer_mixture_kl, *case, torch.float32, **options)
    truth = run(reference.layer_mixture_kl, *case, torch.float64, **options)
    for name, a, b, c in zip(["loss", "dA", "dp"], actual, low, truth, strict=True):
        assert_as_accurate_as(a, b, c, name)


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
@pytest.mark.parametrize(
    ("layers", "batch", "steps", "keys"),
    [
        pytest.param((5, 3), 4, 6, 7, id="small"),
        pytest.param((30, 6), 3, 11, 20, id="more-teacher-layers"),
        pytest.param((1, 2), 5, 37, 65, id="one-teacher-layer"),
        pytest.param((128, 128), 2, 3, 130, id="128-layers"),
    ],
)
def test_values_and_gradients(layers, batch, steps, keys, row_norm):
    check(layers, batch, steps, keys, row_norm=row_norm)


def test_512_steps_and_key_words():
    check((1, 1), 1, 512, 512)


def test_rows_over_several_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "MIXTURE_ELEMENTS", 32)
    check((3, 2), 3, 11, 9, tau=1.0)


def test_any_strides():
    check((3, 4), 3, 5, 6, layout=lambda maps: maps.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0))


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
def test_padding_may_hold_anything(row_norm):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 4, 3, 6, 7, generator=generator)
    counts = torch.tensor([6, 2, 0]), torch.tensor([7, 3, 2])
    valid = (torch.arange(6) < counts[0][:, None])[:, :, None] & (torch.arange(7) < counts[1][:, None])[:, None]
    weights = torch.full((3, 4), 0.25)
    clean = run(layer_mixture_kl, *maps, weights, counts, torch.float32, backend="triton", row_norm=row_norm)
    dirty = maps.masked_fill(~valid, float("nan"))
    for a, b in zip(
        run(layer_mixture_kl, *dirty, weights, counts, torch.float32, backend="triton", row_norm=row_norm),
        clean,
        strict=True,
    ):
        assert torch.equal(a, b)
    assert clean[0][2] == 0
