"""The ops as torch operators: schema, fake kernels and autograd, by torch's own check."""

import pytest
import torch

from mold_kernels import SpanPlan, attention_with_lse, layer_mixture_kl, reference, span_attention, value_pool
from mold_kernels.attention import ATTENTION_LSE, ATTENTION_WITH_LSE
from mold_kernels.layer_mixture_kl import LAYER_MIXTURE_KL
from mold_kernels.span_attention import SPAN_ATTENTION
from mold_kernels.span_pieces import SPAN_PIECES
from mold_kernels.testing import random_mask, random_qkv, random_spans
from mold_kernels.value_pool import VALUE_POOL

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (tensor.requires_grad_() for tensor in random_qkv(GENERATOR, 2, 4, 2, 9, 16))
LSE = reference.attention_lse(Q, K).detach().requires_grad_()
MASK = random_mask(GENERATOR, 2, 9, "right")
RANGES = torch.stack([torch.zeros(9), torch.full((9,), 9)]).int()
SPANS = random_spans(GENERATOR, 2, 3, 9), random_spans(GENERATOR, 2, 4, 9)
MAPS = torch.rand(3, 2, 4, 5, generator=GENERATOR)
COUNTS = torch.tensor([4, 2]), torch.tensor([5, 3])
MIXTURE = (
    MAPS,
    MAPS.clone().requires_grad_(),
    torch.full((2, 3), 1 / 3, requires_grad=True),
    *COUNTS,
    0.1,
    "softmax",
    1e-6,
)

FIRST = torch.tensor([0, 2]).int()
SHORT = Q.detach()[:, :, :7].requires_grad_()
HEADS, LSE_ONLY = (Q, K, V, MASK, None, None, 0.3, None, True), (Q, K, MASK, None, None, 0.3, None, True)
PIECES = list(SpanPlan(*SPANS, 9).pieces(4))
COLUMNS = list(SpanPlan(*SPANS, 9).columns(1))
POOLED = Q, K, LSE, *(spans.int() for spans in SPANS)

CASES = {
    ("attention_with_lse", "aten"): HEADS,
    ("attention_with_lse", "native"): (Q, K, V, MASK, None, RANGES, 0.3, 5.0, True),
    ("attention_with_lse", "triton"): (Q, K, V, MASK, None, RANGES, 0.3, 5.0, True),
    ("attention_lse", "native"): (Q, K, MASK, None, RANGES, 0.3, 5.0, True),
    ("attention_lse", "torch"): (SHORT, K, MASK, FIRST, RANGES, 0.3, 5.0, True),
    ("attention_lse", "triton"): LSE_ONLY,
    ("span_attention", "torch"): (*POOLED, MASK, None, None, COLUMNS, 0.3, None, False, 2, "max"),
    ("span_attention", "native"): (*POOLED, MASK, None, RANGES, PIECES, 0.3, 5.0, True, 1, "mean"),
    ("span_attention", "triton"): (*POOLED, MASK, None, RANGES, PIECES, 0.3, 5.0, True, 1, "mean"),
    **{("value_pool", backend): (V, MASK, None, 1e-6) for backend in ("native", "torch", "triton")},
    **{("layer_mixture_kl", backend): MIXTURE for backend in ("native", "torch", "triton")},
}
NOT_DIFFERENTIABLE = {("span_pieces", backend): (*SPANS, 9, 9, 4) for backend in ("native", "torch", "triton")}


def test_every_line_with_a_backward_has_a_case():
    ops = ATTENTION_WITH_LSE, ATTENTION_LSE, SPAN_ATTENTION, VALUE_POOL, LAYER_MIXTURE_KL
    lines = {(op.name, name) for op in ops for name, line in op.backends.items() if line.backward}
    lines -= {("span_attention", "cuda"), ("layer_mixture_kl", "cuda")}  # not here
    assert lines == set(CASES)
    assert set(SPAN_PIECES.backends) == {backend for _, backend in NOT_DIFFERENTIABLE}


@pytest.fixture(autouse=True)
def no_poison(poisoned_allocations):
    """opcheck compares fresh allocations of fake and real kernels by value; NaN is unequal to itself."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "backend"), CASES | NOT_DIFFERENTIABLE)
def test_opcheck(name, backend):
    inputs = (CASES | NOT_DIFFERENTIABLE)[name, backend]
    torch.library.opcheck(getattr(torch.ops.mold_kernels, name).default, (*inputs, backend))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_second_derivative_is_an_error(name, backend):
    output = getattr(torch.ops.mold_kernels, name)(*CASES[name, backend], backend)
    output = output[0] if isinstance(output, tuple) else output
    inputs = [x for x in CASES[name, backend] if isinstance(x, torch.Tensor) and x.requires_grad]
    gradient = torch.autograd.grad(output.square().sum(), inputs, create_graph=True, allow_unused=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_as_one_graph(backend):
    def step(q, k, v):
        out, lse = attention_with_lse(q, k, v, sliding_window=7, backend="triton")
        pooled = span_attention(q, k, lse, *SPANS, sliding_window=7, backend="triton")
        features = value_pool(v, MASK, 1e-6, backend="triton")
        maps, counts = torch.stack([pooled, pooled * 2]), (torch.tensor([3, 2]), torch.tensor([4, 4]))
        loss = layer_mixture_kl(maps.detach() + 1, maps, features[:, :2].softmax(-1), *counts, backend="triton")
        return out.square().sum() + loss.sum()

    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        loss = function(Q, K, V)
        results.append([loss, *torch.autograd.grad(loss, (Q, K, V))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
