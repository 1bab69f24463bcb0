"""What lies at the edges of every op and backend: nothing at all, scales of any sign, spans that nobody checked,
tangents. Right, or an error that names the argument; never NaN, never a stray write.

In Triton's interpreter the Triton backends are among those tried (`test_triton.py`).
"""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from mold_kernels import (
    attention_lse,
    attention_with_lse,
    layer_mixture_kl,
    reference,
    span_attention,
    tables,
    value_pool,
)
from mold_kernels.backends import RUNTIMES
from mold_kernels.testing import assert_as_accurate_as, random_qkv, random_spans

HERE = [
    (op.name, line.name)
    for op in tables.OPS
    for line in op.backends.values()
    if "cpu" in (RUNTIMES[line.name].devices or ("cpu",)) and RUNTIMES[line.name].why_missing() is None
]
ATTENTIONS = [pair for pair in HERE if "attention" in pair[0]]


def make_inputs(op, batch=2, heads=4, kv_heads=2, length=9, head_dim=8, steps=3, keys=4, layers=3):
    """The tensors of an op: (those with a gradient, the others)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, length, head_dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, length, head_dim, generator=generator)
    match op:
        case "attention_with_lse":
            return [q, k, v], []
        case "attention_lse":
            return [q, k], []
        case "span_attention":
            spans = [torch.zeros(batch, count, 2, dtype=torch.int32) for count in (steps, keys)]
            for each in spans:
                each[:, :, 1] = min(length, 5)
            return [q, k, torch.randn(batch, heads, length, generator=generator)], spans
        case "value_pool":
            return [v], [torch.ones(batch, length, dtype=torch.bool)]
        case "layer_mixture_kl":
            maps = torch.rand(layers, batch, steps, keys, generator=generator)
            counts = torch.full((batch,), steps), torch.full((batch,), keys)
            return [maps, torch.full((batch, layers), 1 / max(layers, 1))], [maps.flip(0), *counts]


def call(op, backend, tensors, others, **options):
    match op:
        case "attention_with_lse":
            return attention_with_lse(*tensors, backend=backend, **options)
        case "attention_lse":
            return (attention_lse(*tensors, backend=backend, **options),)
        case "span_attention":
            return (span_attention(*tensors, *others, backend=backend, **options),)
        case "value_pool":
            return (value_pool(*tensors, *others, 1e-6, backend=backend),)
        case "layer_mixture_kl":
            return (layer_mixture_kl(others[0], *tensors, *others[1:], backend=backend),)


@pytest.mark.parametrize(("op", "backend"), HERE)
@pytest.mark.parametrize("nothing", ["batch", "length", "steps", "keys"])
def test_nothing_gives_nothing(op, backend, nothing):
    tensors, others = make_inputs(op, **{nothing: 0})
    results = call(op, backend, tensors, others)
    expected = call(op, "reference", tensors, others)
    for result, of_reference in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (of_reference.shape, of_reference.dtype)
        torch.testing.assert_close(result, of_reference)
    if backend != "flex":  # it has no gradient here
        tensors = [tensor.requires_grad_() for tensor in tensors]
        gradients = torch.autograd.grad(sum(result.sum() for result in call(op, backend, tensors, others)), tensors)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("op", "backend"), HERE)
@pytest.mark.parametrize(
    ("nothing", "names"),
    [("heads", "q"), ("kv_heads", "k|v"), ("head_dim", "q|v"), ("layers", "teacher_attention")],
)
def test_what_has_no_result_is_refused(op, backend, nothing, names):
    sizes = {nothing: 0}
    if (op == "value_pool" and nothing == "heads") or (op == "layer_mixture_kl") != (nothing == "layers"):
        pytest.skip(f"{op} has none")
    tensors, others = make_inputs(op, **sizes)
    with pytest.raises(ValueError, match=f"^({names}): .* must be"):
        call(op, backend, tensors, others)


@pytest.mark.parametrize("scale", [-0.7, 0.0, -1e-3, 0.7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("op", "backend"), ATTENTIONS)
def test_any_scale_is_right(op, backend, padded, scale):
    tensors, others = make_inputs(op, length=70)
    options = {"scale": scale}
    if padded:
        options["key_padding_mask"] = torch.ones(2, 70, dtype=torch.bool)
        options["key_padding_mask"][0, :20] = False
    if op == "span_attention":
        tensors[2] = reference.attention_lse(*tensors[:2], **options)
        others = [random_spans(torch.Generator().manual_seed(count), 2, count, 70) for count in (3, 4)]

    def run(backend, dtype):
        inputs = [tensor.to(dtype).requires_grad_(backend != "flex") for tensor in tensors]
        results = [result.masked_fill(result.isinf(), 0) for result in call(op, backend, inputs, others, **options)]
        if backend == "flex":
            return results
        loss = sum((result * torch.linspace(-1, 2, result.numel()).view(result.shape)).sum() for result in results)
        return [*results, *torch.autograd.grad(loss, inputs)]

    actual, low, exact = run(backend, torch.float32), run("reference", torch.float32), run("reference", torch.float64)
    for index, (a, b, c) in enumerate(zip(actual, low, exact, strict=backend != "flex")):
        assert_as_accurate_as(a, b, c, f"result {index}")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
@pytest.mark.parametrize(("op", "backend"), ATTENTIONS)
def test_a_scale_that_is_no_number_is_refused(op, backend, scale):
    with pytest.raises(ValueError, match=f"scale: is {scale}, must be finite or None"):
        call(op, backend, *make_inputs(op), scale=scale)


@pytest.mark.parametrize(("op", "backend"), HERE)
@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tangent_is_right_or_an_error(op, backend, index, grad):
    tensors, others = make_inputs(op)
    tensors = [tensor.requires_grad_(grad and backend != "flex") for tensor in tensors]
    with forward_ad.dual_level():
        tangent = torch.linspace(-1, 2, tensors[index].numel()).view(tensors[index].shape)
        tensors[index] = forward_ad.make_dual(tensors[index], tangent)
        if backend != "reference":
            with pytest.raises((NotImplementedError, RuntimeError), match=r"forward|Forward|jvp"):
                call(op, backend, tensors, others)
            return
        tangents = [forward_ad.unpack_dual(result).tangent for result in call(op, backend, tensors, others)]
    assert any(tangent is not None and tangent.any() for tangent in tangents)


@pytest.mark.parametrize(("op", "backend"), [pair for pair in HERE if pair[1] not in ("reference", "flex")])
def test_torch_func_jvp_is_an_error(op, backend):
    (first, *rest), others = make_inputs(op)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: call(op, backend, [x, *rest], others)[0], (first,), (torch.ones_like(first),))


UNCHECKED = """
import sys
import torch
from mold_kernels import reference, span_attention
backend, length = sys.argv[1], 9
generator = torch.Generator().manual_seed(0)
q, k = torch.randn(1, 4, length, 8, generator=generator), torch.randn(1, 2, length, 8, generator=generator)
lse = reference.attention_lse(q, k)

def run(spans, compiled):
    def step(q, k, lse, spans):
        pooled = span_attention(q, k, lse, spans, spans, row_reduction="mean", backend=backend)
        return pooled, torch.autograd.grad(pooled.square().sum(), (q, k, lse)) if not compiled else None

    tensors = [tensor.clone().requires_grad_() for tensor in (q, k, lse)]
    if not compiled:
        return step(*tensors, spans)
    pooled, _ = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors, spans)
    return pooled, torch.autograd.grad(pooled.square().sum(), tensors)


for stray in sys.argv[2:]:
    print(stray, file=sys.stderr, flush=True)
    spans = torch.tensor(eval(stray))
    cut = spans.clamp(0, length)
    cut[..., 1] = cut.amax(-1)
    expected, gradients = run(cut, False)
    actual, compiled_gradients = run(spans, True)
    torch.testing.assert_close((actual, *compiled_gradients), (expected, *gradients))
"""


@pytest.mark.parametrize("backend", [backend for op, backend in HERE if op == "span_attention"])
def test_unchecked_spans_of_a_compiled_function_are_cut(backend):
    """In a process of its own, which says what it is at: a stray write would end this one."""
    spans = "[[[0, 4], [4, 10]]]", "[[[-7, 4], [4, 100000000]]]", "[[[6, 2], [2**40, -(2**40)], [3, 5]]]"
    command = [sys.executable, "-c", UNCHECKED, backend, *spans]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_unchecked_packing_stays_within_the_text():
    from mold_kernels.visibility import visible_ranges

    for borders in ([0, 4, 100], [-50, 3, 9], [0, 9, 4], [5, 2], [0, 3]):
        for window in (None, 3):
            start, end = visible_ranges(9, window, torch.tensor(borders, dtype=torch.int32), torch.device("cpu"))
            token = torch.arange(9)
            assert ((start >= 0) & (start <= token) & (end > token) & (end <= 9)).all()


@pytest.mark.parametrize("name", ["num_steps", "num_keys"])
@pytest.mark.parametrize("count", [-1, 7])
@pytest.mark.parametrize("backend", [backend for op, backend in HERE if op == "layer_mixture_kl"])
def test_counts_outside_the_maps_are_refused(backend, name, count):
    maps, counts = torch.rand(2, 2, 6, 6), {"num_steps": torch.tensor([6, 0]), "num_keys": torch.tensor([0, 6])}
    counts[name] = torch.tensor([3, count])
    with pytest.raises(ValueError, match=f"{name}: is {count} in example 1, must be within \\[0, 6\\]"):
        layer_mixture_kl(maps, maps, torch.full((2, 2), 0.5), **counts, backend=backend)


def test_random_qkv_is_what_the_ops_take():
    for batch in (0, 1):
        q, k, v = random_qkv(torch.Generator().manual_seed(0), batch, 2, 1, 3, 8)
        assert attention_with_lse(q, k, v)[0].shape == q.shape
