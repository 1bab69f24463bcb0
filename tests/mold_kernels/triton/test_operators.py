"""The ops as torch operators: schema, fake kernels and autograd, by torch's own check."""

import pytest
import torch

from mold_kernels import attention_with_lse, layer_mixture_kl, reference, span_attention, value_pool
from mold_kernels.testing import random_mask, random_qkv, random_spans

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (tensor.requires_grad_() for tensor in random_qkv(GENERATOR, 2, 4, 2, 9, 16))
LSE = reference.attention_lse(Q, K).detach().requires_grad_()
MASK = random_mask(GENERATOR, 2, 9, "right")
RANGES = torch.stack([torch.zeros(9), torch.full((9,), 9)]).int()
SPANS = random_spans(GENERATOR, 2, 3, 9), random_spans(GENERATOR, 2, 4, 9)
MAPS = torch.rand(3, 2, 4, 5, generator=GENERATOR)
COUNTS = torch.tensor([4, 2]), torch.tensor([5, 3])
MIXTURE = MAPS, MAPS.clone().requires_grad_(), torch.full((2, 3), 1 / 3, requires_grad=True), *COUNTS, 0.1, False

CASES = {
    "cpu_attention": (Q, K, V, MASK, None, 0.3, None),
    "native_attention": (Q, K, V, MASK, None, 0.3, None),
    "triton_attention": (Q, K, V, MASK, RANGES, 0.3, 5.0),
    "triton_attention_lse": (Q, K, None, None, 0.3, None),
    "torch_span_attention": (Q, K, LSE, *SPANS, None, 0.3, None, False),
    "native_span_attention": (Q, K, LSE, *SPANS, None, 0.3, None, True),
    "triton_span_attention": (Q, K, LSE, *SPANS, RANGES, 0.3, 5.0, True),
    "value_pool": (V, MASK, 1e-6, "triton"),
    "native_layer_mixture_kl": MIXTURE,
    "triton_layer_mixture_kl": MIXTURE,
}


@pytest.fixture(autouse=True)
def no_poison(poisoned_allocations):
    """opcheck compares fresh allocations of fake and real kernels by value; NaN is unequal to itself."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.mold, name).default, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_an_error(name):
    output = getattr(torch.ops.mold, name)(*CASES[name])
    output = output[0] if isinstance(output, tuple) else output
    inputs = [x for x in CASES[name] if isinstance(x, torch.Tensor) and x.requires_grad]
    gradient = torch.autograd.grad(output.square().sum(), inputs, create_graph=True, allow_unused=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_as_one_graph(backend):
    weight = torch.ones(32)

    def step(q, k, v):
        out, lse = attention_with_lse(q, k, v, sliding_window=7, engine="triton")
        pooled = span_attention(q, k, lse, *SPANS, sliding_window=7, backend="triton")
        features = value_pool(v, weight, MASK, 1e-6, backend="triton")
        maps, counts = torch.stack([pooled, pooled * 2]), (torch.tensor([3, 2]), torch.tensor([4, 4]))
        loss = layer_mixture_kl(maps.detach() + 1, maps, features[:, :2].softmax(-1), *counts, backend="triton")
        return out.square().sum() + loss.sum()

    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        loss = function(Q, K, V)
        results.append([loss, *torch.autograd.grad(loss, (Q, K, V))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
