"""attention_with_lse and attention_lse against the float64 reference, values and gradients."""

import sys
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mold_kernels import attention_lse, attention_with_lse, native, reference
from mold_kernels.testing import assert_as_accurate_as, random_qkv
from tests.conftest import LEVELS, use_backend
from tests.covering import covering

SHAPES = [
    pytest.param(1, 1, 1, 2, 16, id="two-tokens"),
    pytest.param(2, 4, 2, 37, 16, id="gqa-odd-length"),
    pytest.param(1, 9, 3, 130, 64, id="smollm2-heads"),
    pytest.param(2, 2, 1, 65, 80, id="head-dim-80"),
    pytest.param(1, 1, 1, 401, 20, id="many-blocks-odd-head-dim"),
]


@pytest.fixture(params=["aten", *LEVELS])
def backend(request):
    yield use_backend(request.param)
    if LEVELS:
        use_backend(LEVELS[-1])


def padding_mask(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "left":
        mask[0, : length // 3] = False
    elif kind == "right":
        mask[-1, length - length // 3 :] = False
    elif kind == "both":
        mask[0, : length // 4] = False
        mask[-1, length - length // 3 :] = False
    return None if kind == "none" else mask


def values_and_gradients(function, tensors, upstream, dtype):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Rows without a key have lse = +inf by contract; they carry no gradient.
    loss = sum(
        (output.masked_fill(output.isinf(), 0) * grad.to(output.dtype)).sum()
        for output, grad in zip(outputs, upstream, strict=True)
    )
    return [*outputs, *torch.autograd.grad(loss, tensors)]


def assert_matches_reference(fast, slow, tensors, upstream, names):
    dtype = tensors[0].dtype
    # Rounded before all three: the truth must be that of the gradients which the tested dtype can hold.
    upstream = [grad.to(dtype) for grad in upstream]
    actual = values_and_gradients(fast, tensors, upstream, dtype)
    low = values_and_gradients(slow, tensors, upstream, dtype)
    exact = values_and_gradients(slow, tensors, upstream, torch.float64)
    for name, a, b, c in zip(names, actual, low, exact, strict=True):
        infinite = c.isinf()
        assert torch.equal(infinite, a.isinf()), f"{name}: +inf at other rows than the reference"
        assert_as_accurate_as(a.masked_fill(infinite, 0), b.masked_fill(infinite, 0), c.masked_fill(infinite, 0), name)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "head_dim", "padding", "dtype", "backend"),
    covering(
        SHAPES,
        ["none", "left", "right", "both"],
        [torch.float64, torch.float32, torch.bfloat16, torch.float16],
        ["aten", *LEVELS],
        strength=3,
    ),
    indirect=["backend"],
)
def test_attention_with_lse(batch, heads, kv_heads, length, head_dim, padding, dtype, backend):
    generator = torch.Generator().manual_seed(length)
    tensors = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)
    mask = padding_mask(padding, batch, length)
    upstream = [
        torch.randn(batch, heads, length, head_dim, generator=generator, dtype=torch.float64),
        torch.randn(batch, heads, length, generator=generator, dtype=torch.float64),
    ]
    assert_matches_reference(
        lambda q, k, v: attention_with_lse(q, k, v, key_padding_mask=mask, backend=backend),
        lambda q, k, v: reference.attention_with_lse(q, k, v, key_padding_mask=mask),
        tensors,
        upstream,
        ["out", "lse", "dq", "dk", "dv"],
    )


@pytest.mark.parametrize("options", [{}, {"sliding_window": 17}, {"softcap": 0.7, "sliding_window": 90}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
def test_padding_is_neither_read_nor_seen(options, dtype, level, request):
    """Padding on the left, on the right, between tokens and everywhere, of NaN; its gradients are zero."""
    request.addfinalizer(lambda: use_backend(LEVELS[-1]))
    backend = use_backend(level)
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(6, 211, dtype=torch.bool)
    mask[0, :66], mask[1, 130:], mask[2] = False, False, torch.rand(211, generator=generator) < 0.5
    mask[3], mask[4, 1:], mask[5, :210] = False, False, False
    tensors = random_qkv(generator, 6, 4, 2, 211, 18, dtype=dtype)
    zeros = [tensor.masked_fill(~mask[:, None, :, None], 0) for tensor in tensors]
    holes = [tensor.masked_fill(~mask[:, None, :, None], torch.nan) for tensor in tensors]
    upstream = [
        torch.randn(6, 4, 211, 18, generator=generator, dtype=torch.float64),
        torch.randn(6, 4, 211, generator=generator, dtype=torch.float64),
    ]

    def fast(*values):
        padded = [torch.where(mask[:, None, :, None], *pair) for pair in zip(values, holes, strict=True)]
        return attention_with_lse(*padded, key_padding_mask=mask, backend=backend, **options)

    assert_matches_reference(
        fast,
        lambda q, k, v: reference.attention_with_lse(q, k, v, key_padding_mask=mask, **options),
        zeros,
        upstream,
        ["out", "lse", "dq", "dk", "dv"],
    )
    queries = [tensor.detach().requires_grad_() for tensor in holes]
    out, lse = attention_with_lse(*queries, key_padding_mask=mask, backend=backend, **options)
    assert torch.equal(lse.isinf(), ~mask[:, None].expand_as(lse))
    (out.sum() + lse.masked_fill(~mask[:, None], 0).sum()).backward()
    for tensor in (out, *(query.grad for query in queries)):
        assert not tensor.masked_select(~mask[:, None, :, None]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", ["rows", "first-column", "tiny", "large-lse", "mixed"])
def test_lse_gradient_where_the_output_gradient_vanishes(zero, dtype, backend):
    """Rows without an output gradient are ordinary: prompt rows in the last layer have none."""
    generator = torch.Generator().manual_seed(3)
    tensors = random_qkv(generator, 2, 4, 2, 50, 16, dtype=dtype)
    grad_out = torch.randn(2, 4, 50, 16, generator=generator, dtype=torch.float64) * 1e-6
    grad_lse = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64) * 1e-3
    match zero:
        case "rows":
            grad_out[:, :, :20] = 0
        case "first-column":
            grad_out[..., 0] = 0
        case "tiny":
            grad_out *= 1e-25
            grad_lse *= 1e-25
        case "large-lse":
            grad_lse *= 1e6
        case "mixed":
            grad_out *= 10.0 ** torch.randint(-12, 3, grad_out.shape, generator=generator)
    assert_matches_reference(
        lambda q, k, v: attention_with_lse(q, k, v, scale=0.3, backend=backend),
        lambda q, k, v: reference.attention_with_lse(q, k, v, scale=0.3),
        tensors,
        [grad_out, grad_lse],
        ["out", "lse", "dq", "dk", "dv"],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_output_gradient_of_zeros_leaves_the_values_alone(dtype, backend):
    q, k, v = (t.requires_grad_() for t in random_qkv(torch.Generator().manual_seed(3), 2, 4, 2, 50, 16, dtype=dtype))
    out, lse = attention_with_lse(q, k, v, backend=backend)
    (out * 0 + lse.unsqueeze(-1)).sum().backward()
    assert v.grad.abs().max() < 1e-14 * k.grad.abs().max()


def test_each_output_alone_is_differentiable(backend):
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 4, 2, 20, 16, dtype=torch.float64)
    for output in (0, 1):
        gradients = []
        for function in (partial(attention_with_lse, backend=backend), reference.attention_with_lse):
            tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            function(*tensors)[output].square().sum().backward()
            gradients.append([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "head_dim", "padding", "dtype", "name"),
    covering(SHAPES, ["none", "both"], [torch.float64, torch.float32, torch.bfloat16], ["torch", *LEVELS], strength=3),
)
def test_attention_lse(batch, heads, kv_heads, length, head_dim, padding, dtype, name):
    backend = use_backend(name)
    generator = torch.Generator().manual_seed(length)
    tensors = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)[:2]
    mask = padding_mask(padding, batch, length)
    upstream = [torch.randn(batch, heads, length, generator=generator, dtype=torch.float64)]
    assert_matches_reference(
        lambda q, k: attention_lse(q, k, key_padding_mask=mask, backend=backend),
        lambda q, k: reference.attention_lse(q, k, key_padding_mask=mask),
        tensors,
        upstream,
        ["lse", "dq", "dk"],
    )


def test_attention_lse_over_many_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["mold_kernels.attention"], "_BLOCK_ELEMENTS", 700)
    test_attention_lse(2, 4, 2, 37, 16, "both", torch.float32, "torch")


OPTIONS = [
    pytest.param({"sliding_window": 1}, id="window-1"),
    pytest.param({"sliding_window": 7}, id="window-7"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"cu_seqlens": torch.tensor([0, 4, 4, 15, 21], dtype=torch.int32)}, id="packed"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_reference_by_hand(options):
    """A row at a time: which keys it sees, their capped scores, their softmax."""
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, 21, 8, dtype=torch.float64)
    out, lse = attention_with_lse(q, k, v, backend="reference", **options)
    borders = options.get("cu_seqlens", torch.tensor([0, 21])).tolist()
    for row in range(21):
        first = max(border for border in borders[:-1] if border <= row)
        first = max(first, row + 1 - options.get("sliding_window", 21))
        scores = (q[0, :, row] @ k[0, 0, first : row + 1].mT) * 8**-0.5
        if "softcap" in options:
            scores = options["softcap"] * (scores / options["softcap"]).tanh()
        torch.testing.assert_close(lse[0, :, row], scores.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out[0, :, row], scores.softmax(-1) @ v[0, 0, first : row + 1])


SEEDS = st.integers(0, 99)


@st.composite
def visibilities(draw, length):
    """Options of a text, or of packed ones, of `length` tokens."""
    cuts = draw(st.none() | st.lists(st.integers(0, length), max_size=4).map(sorted))
    return {
        "sliding_window": draw(st.none() | st.integers(1, length + 1)),
        "softcap": draw(st.none() | st.floats(0.25, 50)),
        "cu_seqlens": None if cuts is None else torch.tensor([0, *cuts, length], dtype=torch.int32),
    }


def assert_sees_what_the_reference_sees(length, heads, head_dim, seed, dtype, options):
    """Of the native kernels, with the output and for the log-sum-exp alone."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = random_qkv(generator, 1, *heads, length, head_dim, dtype=dtype)
    out, lse = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (q, q[..., 0]))
    for fast, slow, tensors, upstream, names in (
        (attention_with_lse, reference.attention_with_lse, (q, k, v), [out, lse], ["out", "lse", "dq", "dk", "dv"]),
        (attention_lse, reference.attention_lse, (q, k), [lse], ["lse", "dq", "dk"]),
    ):
        fast = partial(fast, backend="native", **options)
        assert_matches_reference(fast, partial(slow, **options), tensors, upstream, names)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 70},
        {"softcap": 2.0},
        {"cu_seqlens": torch.tensor([0, 4, 4, 150, 301]).int()},
        {"cu_seqlens": torch.tensor([0, 128, 301]).int(), "sliding_window": 33, "softcap": 30.0},
        {"key_padding_mask": (torch.arange(301) > 66)[None], "sliding_window": 80, "softcap": 0.5},
    ],
)
def test_windows_packing_and_soft_capping_in_native_kernels(options, dtype, level):
    use_backend(level)
    assert_sees_what_the_reference_sees(301, (6, 2), 20, 0, dtype, options)
    use_backend(LEVELS[-1])


@pytest.mark.skipif(not LEVELS, reason=str(native.why_missing()))
@settings(deadline=None, max_examples=60)
@given(
    st.data(), st.integers(1, 400), st.sampled_from([(1, 1), (4, 2), (7, 1)]), st.integers(1, 40), st.integers(0, 99)
)
def test_any_visibility(data, length, heads, head_dim, seed):
    """Several blocks of rows and of columns, which a window, a text's end or the diagonal cuts anywhere."""
    assert_sees_what_the_reference_sees(length, heads, head_dim, seed, torch.float64, data.draw(visibilities(length)))


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 7, "softcap": 2.0}, *(param.values[0] for param in OPTIONS)]
)
@pytest.mark.parametrize("padding", ["none", "both"])
def test_flex(options, padding):
    batch = 1 if "cu_seqlens" in options else 2
    generator = torch.Generator().manual_seed(0)
    tensors = random_qkv(generator, batch, 4, 2, 21, 16)
    options = {**options, "key_padding_mask": padding_mask(padding, batch, 21)}
    actual = attention_with_lse(*tensors, backend="flex", **options)
    expected = reference.attention_with_lse(*tensors, **options)
    torch.testing.assert_close(actual, expected)


def test_flex_has_no_gradient_on_the_cpu():
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 4, 2, 6, 8)
    with pytest.raises(ValueError, match="flex has a gradient on cuda only"):
        attention_with_lse(q.requires_grad_(), k, v, backend="flex")
    with torch.no_grad():
        actual = attention_with_lse(q, k, v, backend="flex")
        torch.testing.assert_close(actual, reference.attention_with_lse(q, k, v))


@pytest.mark.parametrize(
    "option", [{"sliding_window": 3}, {"softcap": 2.0}, {"cu_seqlens": torch.tensor([0, 6]).int()}]
)
def test_a_backend_without_an_option_refuses_it_by_name(option):
    (name,) = option
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 4, 2, 6, 8)
    with pytest.raises(ValueError, match=f"is 'aten', must be .* with {name} on cpu: aten does not have {name}"):
        attention_with_lse(q, k, v, backend="aten", **option)
    for fast, slow in (
        (attention_with_lse(q, k, v, **option)[1], reference.attention_with_lse(q, k, v, **option)[1]),
        (attention_lse(q, k, **option), reference.attention_lse(q, k, **option)),
        (attention_lse(q, k, backend="torch", **option), reference.attention_lse(q, k, **option)),
    ):
        torch.testing.assert_close(fast, slow)  # "auto" finds a backend that has it, and torch has it for the lse


def test_fa4_is_named_where_it_is_missing():
    q, k, v = random_qkv(torch.Generator(), 1, 4, 2, 6, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend: is 'fa4', must be .*: fa4 runs on cuda"):
        attention_with_lse(q, k, v, backend="fa4")


def test_reference_gradients():
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, 5, 4, dtype=torch.float64)
    tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: reference.attention_with_lse(*t), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v, {}), "q: is .* must be floating point"),
        (lambda q, k, v: (q, k[:, :, :-1], v, {}), "k: shape is"),
        (lambda q, k, v: (q, k.double(), v, {}), "k: is torch.float64"),
        (lambda q, k, v: (q, k, v[..., :-1], {}), "v: is"),
        (lambda q, k, v: (q, k, v, {"key_padding_mask": torch.ones(2, 6)}), "key_padding_mask: is torch.float32"),
        (lambda q, k, v: (q, k, v, {"backend": "flash"}), "attention_with_lse has no backend of that name"),
        (lambda q, k, v: (q, k, v, {"sliding_window": 0}), "sliding_window: is 0, must be at least 1"),
        (lambda q, k, v: (q, k, v, {"softcap": 0.0}), "softcap: is 0.0, must be finite and greater than 0"),
        (lambda q, k, v: (q, k, v, {"cu_seqlens": torch.tensor([0, 6])}), "cu_seqlens: is torch.int64"),
        (lambda q, k, v: (q, k, v, {"cu_seqlens": torch.tensor([0, 6]).int()}), "cu_seqlens: given with a batch of 2"),
        (lambda q, k, v: (q[:1], k[:1], v[:1], {"cu_seqlens": torch.tensor([0, 5]).int()}), r"cu_seqlens: is \[0, 5\]"),
    ],
)
def test_wrong_input_names_the_argument(change, message):
    q, k, v, options = change(*random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 6, 8))
    with pytest.raises(ValueError, match=message):
        attention_with_lse(q, k, v, **options)


def test_the_reference_is_not_chosen_in_silence(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_why_missing", "not built", raising=False)
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 2, 2, 9, 8, dtype=torch.float16)
    with pytest.warns(UserWarning, match="takes float16 with sliding_window on cpu; the reference stores"):
        attention_with_lse(q, k, v, sliding_window=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_with_lse(q, k, v)
        attention_with_lse(q, k, v, sliding_window=3, backend="reference")
