"""span_attention against the float64 reference, values and gradients, on structured and random spans."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mold_kernels import attention_with_lse, native, reference, span_attention
from mold_kernels.testing import assert_as_accurate_as, random_qkv, random_spans
from tests.conftest import LEVELS
from tests.covering import covering
from tests.mold_kernels.test_attention import visibilities

needs_native = pytest.mark.skipif(not native.is_available(), reason=str(native.why_missing()))


def values_and_gradients(function, q, k, lse, upstream, dtype):
    tensors = [q.detach().to(dtype), k.detach().to(dtype), lse.detach().to(reference.accumulation_dtype(dtype))]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    pooled = function(*tensors)
    return [pooled, *torch.autograd.grad((pooled * upstream.to(pooled.dtype)).sum(), tensors)]


def assert_matches_reference(
    q,
    k,
    row_spans,
    key_spans,
    row_reduction,
    backend,
    seed=0,
    heads="mean",
    lse_of_padding=torch.inf,
    factor=2.0,
    **options,
):
    # The log-sum-exp is an input: all three computations take the same one, as exact as its dtype holds it.
    lse = reference.attention_lse(q.double(), k.double(), scale=0.4, **options).to(
        reference.accumulation_dtype(q.dtype)
    )
    lse = lse.masked_fill(lse.isinf(), lse_of_padding)
    options |= {"scale": 0.4, "heads": heads, "row_reduction": row_reduction}

    def fast(q, k, lse):
        return span_attention(q, k, lse, row_spans, key_spans, backend=backend, **options)

    def slow(q, k, lse):
        return reference.span_attention(q, k, lse, row_spans, key_spans, **options)

    groups = [] if heads == "mean" else [reference.head_groups(heads, q, k)]
    shape = len(row_spans), *groups, row_spans.shape[1], k.shape[2] if key_spans is None else key_spans.shape[1]
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    actual = values_and_gradients(fast, q, k, lse, upstream, q.dtype)
    low = values_and_gradients(slow, q, k, lse, upstream, q.dtype)
    exact = values_and_gradients(slow, q, k, lse, upstream, torch.float64)
    for name, a, b, c in zip(["A", "dq", "dk", "dlse"], actual, low, exact, strict=True):
        assert_as_accurate_as(a, b, c, name, factor)
    return actual


SHAPES = [
    pytest.param(5, 6, 2, 1, 16, 1, 1, id="one-token"),
    pytest.param(2, 4, 2, 37, 16, 5, 7, id="gqa-odd-length"),
    pytest.param(1, 9, 3, 257, 64, 11, 20, id="smollm2-heads"),
    pytest.param(3, 2, 2, 65, 80, 4, 3, id="head-dim-80"),
    pytest.param(2, 6, 1, 301, 20, 7, 9, id="pieces-cut-and-odd-head-dim"),
]


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "head_dim", "steps", "keys", "row_reduction", "dtype", "backend"),
    covering(
        SHAPES,
        ["sum", "mean"],
        [torch.float64, torch.float32, torch.bfloat16, torch.float16],
        ["torch", *LEVELS],
        strength=3,
    ),
    indirect=["backend"],
)
def test_span_attention(batch, heads, kv_heads, length, head_dim, steps, keys, row_reduction, backend, dtype):
    if backend == "native" and dtype == torch.float16:
        backend = "auto"
    generator = torch.Generator().manual_seed(length)
    q, k, _ = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)
    row_spans = random_spans(generator, batch, steps, length)
    key_spans = random_spans(generator, batch, keys, length)
    assert_matches_reference(q, k, row_spans, key_spans, row_reduction, backend)


VISIBILITY = [
    pytest.param({"sliding_window": 12}, id="window"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"cu_seqlens": torch.tensor([0, 5, 5, 20, 37], dtype=torch.int32)}, id="packed"),
    pytest.param(
        {"cu_seqlens": torch.tensor([0, 30, 37], dtype=torch.int32), "sliding_window": 9, "softcap": 30.0}, id="all"
    ),
]


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VISIBILITY)
def test_windows_packing_and_soft_capping(options, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, _ = random_qkv(generator, 1, 4, 2, 37, 16, dtype=dtype)
    spans = random_spans(generator, 1, 5, 37), random_spans(generator, 1, 7, 37)
    assert_matches_reference(q, k, *spans, "sum", backend, **options)


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    st.data(), st.integers(1, 300), st.sampled_from([(1, 1), (4, 2), (7, 1)]), st.integers(1, 40), st.integers(0, 99)
)
def test_any_visibility(data, length, heads, head_dim, seed):
    """Several blocks of rows and of columns, which a window, a text's end or the diagonal cuts anywhere."""
    generator = torch.Generator().manual_seed(seed)
    q, k, _ = random_qkv(generator, 1, *heads, length, head_dim, dtype=torch.float64)
    spans = random_spans(generator, 1, 4, length), random_spans(generator, 1, 9, length)
    assert_matches_reference(q, k, *spans, "sum", "native", seed, **data.draw(visibilities(length)))


def test_many_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(sys.modules["mold_kernels.span_attention"], "_BLOCK_ELEMENTS", 300)
    test_span_attention(2, 4, 2, 37, 16, 5, 7, "sum", "torch", torch.float32)


def spans(count):
    span = st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted)
    return st.lists(span, min_size=count, max_size=count)


@settings(deadline=None, max_examples=60)
@given(st.lists(spans(3), min_size=2, max_size=2), st.lists(spans(4), min_size=2, max_size=2), st.integers(0, 99))
def test_any_spans(row_spans, key_spans, seed):
    # In float64: of a single float32 value, twice the reference's error may be less than a rounding.
    q, k, _ = random_qkv(torch.Generator().manual_seed(seed), 2, 4, 2, 23, 8, dtype=torch.float64)
    row_spans, key_spans = torch.tensor(row_spans, dtype=torch.int32), torch.tensor(key_spans, dtype=torch.int32)
    for backend in ("torch", "native") if native.is_available() else ("torch",):
        assert_matches_reference(q, k, row_spans, key_spans, "sum", backend, seed)


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.integers(0, 99)
)
def test_any_shape_and_layout(batch, kv_heads, group, length, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=generator).tolist()
    back = sorted(range(4), key=order.__getitem__)

    def any_layout(heads):
        shape = (batch, heads, length, head_dim)
        # Every second element of a tensor whose dimensions lie in memory in any order.
        sizes = [shape[i] * (2 if i == 3 else 1) for i in order]
        return torch.randn(sizes, generator=generator, dtype=torch.float64).permute(back)[..., ::2]

    q, k = any_layout(kv_heads * group), any_layout(kv_heads)
    row_spans, key_spans = random_spans(generator, batch, 5, length), random_spans(generator, batch, 4, length)
    # Spans may be of any integer dtype and layout too.
    row_spans = row_spans.long().transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches_reference(q, k, row_spans, key_spans, "mean", "native", seed)


@needs_native
def test_native_does_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    q, k, _ = random_qkv(generator, 2, 6, 2, 300, 16)
    row_spans, key_spans = random_spans(generator, 2, 9, 300), random_spans(generator, 2, 8, 300)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(assert_matches_reference(q, k, row_spans, key_spans, "sum", "native"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for name, first, second in zip(["A", "dq", "dk", "dlse"], results[0], other, strict=True):
            assert torch.equal(first, second), name


def test_empty_spans_give_exact_zeros(backend):
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 12, 8)
    none = torch.zeros(2, 3, 2, dtype=torch.int32)
    some = torch.tensor([[[0, 4], [5, 5], [4, 9]]], dtype=torch.int32).expand(2, -1, -1)
    for row_spans, key_spans in ((none, none), (none, some), (some, none)):
        for tensor in assert_matches_reference(q, k, row_spans, key_spans, "sum", backend):
            assert not tensor.any()
    pooled = assert_matches_reference(q, k, some, some, "mean", backend)[0]
    assert not pooled[:, 1].any()
    assert not pooled[:, :, 1].any()
    assert (pooled[:, [0, 2], 0] > 0).all()


def test_no_spans_at_all(backend):
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 12, 8)
    lse = reference.attention_lse(q, k)
    none, empty = torch.zeros(2, 0, 2, dtype=torch.int32), torch.zeros(2, 3, 2, dtype=torch.int32)
    assert span_attention(q, k, lse, none, empty, backend=backend).shape == (2, 0, 3)
    assert span_attention(q, k, lse, empty, none, backend=backend).shape == (2, 3, 0)


def test_a_span_over_everything_holds_all_attention():
    q, k, v = random_qkv(torch.Generator().manual_seed(1), 2, 4, 2, 31, 16)
    everything = torch.tensor([[[0, 31]]] * 2, dtype=torch.int32)
    _, lse = attention_with_lse(q, k, v)
    torch.testing.assert_close(
        span_attention(q, k, lse, everything, everything), torch.full((2, 1, 1), 31.0), rtol=1e-5, atol=0
    )


def test_composition_with_attention_equals_the_gradient_of_eager_attention():
    """The whole claim: lse carries the dense part of the gradient."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = random_qkv(generator, 2, 6, 2, 41, 16, dtype=torch.float64)
    row_spans, key_spans = random_spans(generator, 2, 4, 41), random_spans(generator, 2, 5, 41)
    grad_out = torch.randn(2, 6, 41, 16, generator=generator, dtype=torch.float64)
    grad_pooled = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, 35:] = False
    row_spans, key_spans = row_spans.clamp(6, 35), key_spans.clamp(6, 35)

    def fused(q, k, v):
        out, lse = attention_with_lse(q, k, v, key_padding_mask=mask)
        return out, span_attention(q, k, lse, row_spans, key_spans)

    def eager(q, k, v):
        probabilities = reference.masked_scores(q, k, key_padding_mask=mask).softmax(-1).nan_to_num()
        pooled = torch.stack(
            [
                torch.stack([torch.stack([p[:, i:j, m:n].mean(0).sum() for m, n in keys]) for i, j in rows])
                for p, rows, keys in zip(probabilities, row_spans.tolist(), key_spans.tolist(), strict=True)
            ]
        )
        return probabilities @ v.repeat_interleave(3, dim=1), pooled

    results = []
    for function in (fused, eager):
        tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out, pooled = function(*tensors)
        loss = (out * grad_out).sum() + (pooled * grad_pooled).sum()
        results.append([out, pooled, *torch.autograd.grad(loss, tensors)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_reference_gradients():
    generator = torch.Generator().manual_seed(0)
    q, k, _ = random_qkv(generator, 1, 2, 1, 6, 4, dtype=torch.float64)
    lse = reference.attention_lse(q, k)
    spans = torch.tensor([[[0, 3], [2, 6]]], dtype=torch.int32)
    tensors = [tensor.detach().requires_grad_() for tensor in (q, k, lse)]
    assert torch.autograd.gradcheck(lambda *t: reference.span_attention(*t, spans, spans), tensors)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lse", torch.zeros(1, 2, 5), r"lse: shape is \[1, 2, 5\], must be \[1, 2, 6\]"),
        ("lse", torch.zeros(1, 2, 6, dtype=torch.float64), "lse: dtype is torch.float64, must be torch.float32"),
        ("row_spans", torch.zeros(1, 3, 2), "row_spans: dtype is torch.float32"),
        ("row_spans", torch.zeros(2, 3, 2, dtype=torch.int32), r"row_spans: shape is \[2, 3, 2\]"),
        ("key_spans", torch.tensor([[[0, 7]]]), r"key_spans: span 0 of example 0 is \[0, 7\]"),
        ("key_spans", torch.tensor([[[0, 2], [4, 3]]]), r"key_spans: span 1 of example 0 is \[4, 3\]"),
        ("lse", torch.zeros(1, 2, 6, device="meta"), "lse: is on meta, must be on cpu as q"),
        ("key_spans", torch.zeros(1, 3, 2, dtype=torch.int32, device="meta"), "key_spans: is on meta"),
        (
            "key_padding_mask",
            torch.ones(1, 6),
            r"key_padding_mask: is torch.float32 \[1, 6\] on cpu, must be torch.bool",
        ),
        ("row_reduction", "most", "row_reduction: is 'most', must be 'sum', 'mean' or 'max'"),
        ("backend", "fastest", "backend"),
    ],
)
def test_wrong_input_names_the_argument(name, value, message):
    span = torch.tensor([[[0, 2]]])
    arguments = {"lse": torch.zeros(1, 2, 6), "row_spans": span, "key_spans": span, name: value}
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, 6, 8)
    with pytest.raises(ValueError, match=message):
        span_attention(q, k, **arguments)
