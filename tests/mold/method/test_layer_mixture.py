"""A loss of the mixture, against autograd through the sum of all layers."""

import pytest
import torch

from mold.method import layer_mixture
from mold.method.layer_mixture import loss_of_mixture


def make(layers=5, batch=3, steps=4, keys=6):
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(layers, batch, steps, keys, dtype=torch.float64, generator=generator)
    weights = torch.rand(batch, layers, dtype=torch.float64, generator=generator)
    return weights.requires_grad_(), [layer.requires_grad_() for layer in attention.unbind()]


def energy(mixed):
    return (mixed.softmax(-1) * mixed.exp()).sum((1, 2))


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 3 * 4 * 6 * 8, 1 << 20])
def test_gradients_are_those_of_the_whole_sum(monkeypatch, chunk_bytes):
    monkeypatch.setattr(layer_mixture, "_CHUNK_BYTES", chunk_bytes)
    weights, layers = make()
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = loss_of_mixture(energy, weights, layers)
    expected = energy(torch.einsum("bl,lbsm->bsm", weights, torch.stack(layers)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = zip(
        *(torch.autograd.grad((loss * scale).sum(), [weights, *layers]) for loss in (found, expected)), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_only_what_is_asked_for_has_a_gradient():
    weights, layers = make()
    layers = [layer.detach() for layer in layers]
    loss_of_mixture(energy, weights, layers).sum().backward()
    assert weights.grad is not None
    with torch.no_grad():
        assert not loss_of_mixture(energy, weights, layers).requires_grad


def test_no_layer_is_kept():
    weights, layers = make()
    loss = loss_of_mixture(energy, weights, [layer * 2 for layer in layers])
    kept = {tensor.shape for tensor in loss.grad_fn.saved_tensors}
    assert kept == {torch.Size([3, 4, 6]), torch.Size([3, 5])}
