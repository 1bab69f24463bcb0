"""What else attention is pooled over than causal self-attention's mean: heads, a cache, every key, maxima, sequences.

The reference is checked against eager attention by hand, the backends against the reference.
"""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mold_kernels import SpanPlan, attention_lse, attention_with_lse, reference, span_attention
from mold_kernels.attention import ATTENTION_WITH_LSE
from mold_kernels.span_attention import SPAN_ATTENTION
from mold_kernels.testing import assert_as_accurate_as, random_qkv, random_spans
from tests.conftest import LEVELS, use_backend
from tests.covering import covering
from tests.mold_kernels.test_attention import assert_matches_reference as assert_attention_matches
from tests.mold_kernels.test_span_attention import assert_matches_reference

BACKENDS = ["torch", *LEVELS[-1:]]


def takes_padding(name):
    """Whether the backend's span_attention does."""
    options = SPAN_ATTENTION.backends[name.split()[0]].options
    return options is None or "key_padding_mask" in options


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def best_level():
    yield
    if LEVELS:
        use_backend(LEVELS[-1])


def make_qkv(rows, keys, heads, seed=0, dtype=torch.float64, batch=2, head_dim=16):
    """q of `rows` rows, k and v of `keys` keys."""
    generator = torch.Generator().manual_seed(seed)
    q, _, _ = random_qkv(generator, batch, *heads, rows, head_dim, dtype=dtype)
    _, k, v = random_qkv(generator, batch, *heads, keys, head_dim, dtype=dtype)
    return q, k, v


def eager(q, k, positions, causal=True):
    """P [B, Hq, Tq, Tk] of rows at these positions [B, Tq]."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[2]) > positions[:, None, :, None]
    return (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1)


@pytest.mark.parametrize("heads", ["mean", "group", "all"])
@pytest.mark.parametrize("row_reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_the_reference_by_hand(rows, row_reduction, heads):
    q, k, v = make_qkv(rows, 12, (6, 2))
    spans = torch.tensor([[[0, rows], [0, 1], [0, 0]]] * 2), torch.tensor([[[0, 5], [2, 12], [3, 3], [11, 12]]] * 2)
    for start in (None, 0, torch.tensor([0, 12 - rows])):
        first = 12 - rows if start is None else start
        maps = eager(q, k, torch.arange(rows) + torch.as_tensor(first).expand(2)[:, None])
        out, lse = attention_with_lse(q, k, v, query_start=start, backend="reference")
        torch.testing.assert_close(out, maps @ v.repeat_interleave(3, 1))
        maps = maps.unflatten(1, ({"mean": 1, "group": 2, "all": 6}[heads], -1)).mean(2)
        reduce = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[row_reduction]
        for key_spans in (spans[1], None):
            columns = [maps[..., a:b].sum(-1) for a, b in spans[1][0].tolist()]
            words = maps if key_spans is None else torch.stack(columns, -1)
            expected = [reduce(words[:, :, a:b], 2) for a, b in spans[0][0, :2].tolist()]
            expected = torch.stack([*expected, torch.zeros_like(expected[0])], 2)
            options = {"heads": heads, "row_reduction": row_reduction, "query_start": start, "backend": "reference"}
            pooled = span_attention(q, k, lse, spans[0], key_spans, **options)
            torch.testing.assert_close(pooled, expected[:, 0] if heads == "mean" else expected)


def test_the_gradient_of_a_maximum_is_the_first_row_s():
    q, k, _ = make_qkv(4, 4, (1, 1), batch=1)
    q = q[:, :, :1].expand(1, 1, 4, -1).clone().requires_grad_()
    spans = torch.tensor([[[1, 4]]])
    for backend in ("reference", "torch", *(["native"] if LEVELS else [])):
        lse = reference.attention_lse(q, k, causal=False)
        pooled = span_attention(q, k, lse, spans, spans, row_reduction="max", causal=False, backend=backend)
        (grad,) = torch.autograd.grad(pooled.sum(), q)
        assert grad[0, 0].any(-1).tolist() == [False, True, False, False]


CASES = [
    pytest.param(1, 130, {}, id="decoding"),
    pytest.param(33, 130, {}, id="prefill-over-a-cache"),
    pytest.param(33, 130, {"sliding_window": 40}, id="window-over-a-cache"),
    pytest.param(33, 130, {"sliding_window": 3, "softcap": 5.0}, id="window-and-cap-over-a-cache"),
    pytest.param(70, 130, {"query_start": torch.tensor([0, 41])}, id="starts"),
    pytest.param(130, 130, {"causal": False}, id="both-sides"),
    pytest.param(33, 130, {"causal": False, "softcap": 5.0}, id="across"),
    pytest.param(130, 33, {"causal": False}, id="more-rows-than-keys"),
]
HEADS = [(7, 1), (6, 2), (3, 3)]


def check_attention(fast, slow, tensors, upstream, names, backend, options):
    fast, slow = partial(fast, backend=backend, **options), partial(slow, **options)
    assert_attention_matches(fast, slow, tensors, upstream, names)


@pytest.mark.parametrize(
    ("rows", "keys", "options", "masked", "dtype", "name"), covering(CASES, [False, True], DTYPES, BACKENDS, strength=3)
)
def test_attention(rows, keys, options, masked, dtype, name):
    name = use_backend(name)
    for heads in HEADS[:2]:
        q, k, v = make_qkv(rows, keys, heads, dtype=dtype)
        mask = torch.ones(2, keys, dtype=torch.bool)
        mask[0, : keys // 4], mask[1, keys - keys // 3 :] = False, False
        options = {**options, "key_padding_mask": mask if masked else None}
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (q.shape, q.shape[:3])]
        check_attention(attention_lse, reference.attention_lse, (q, k), grads[1:], ["lse", "dq", "dk"], name, options)
        if name in ATTENTION_WITH_LSE.backends:
            outputs = ["out", "lse", "dq", "dk", "dv"]
            check_attention(attention_with_lse, reference.attention_with_lse, (q, k, v), grads, outputs, name, options)


@pytest.mark.parametrize(
    ("rows", "keys", "options", "every_key", "heads", "row_reduction", "dtype", "name"),
    covering(
        [pytest.param(37, 37, {}, id="rows-are-keys"), *CASES],
        [False, True],
        ["mean", "group", "all"],
        ["sum", "max"],
        DTYPES,
        BACKENDS,
        strength=3,
    ),
)
def test_span_attention(rows, keys, options, every_key, heads, row_reduction, dtype, name):
    q, k, _ = make_qkv(rows, keys, HEADS[rows % 3], dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    words = 60 if row_reduction == "max" else 9
    row_spans, key_spans = random_spans(generator, 2, 6, rows), random_spans(generator, 2, words, keys)
    # Several rows that have all their attention in a span are equally large; of few short ones errors are few numbers.
    if row_reduction == "max":
        key_spans[..., 1] = key_spans[..., 1].minimum(key_spans[..., 0] + 1)
    options = {"heads": heads, **options}
    key_spans = None if every_key else key_spans
    assert_matches_reference(q, k, row_spans, key_spans, row_reduction, use_backend(name), **options)


def paddings(keys, seed=3):
    """bool [5, keys]: padding on the left, on the right, between, everywhere, nowhere."""
    mask = torch.ones(5, keys, dtype=torch.bool)
    mask[0, : keys // 3], mask[1, keys - keys // 4 :], mask[3] = False, False, False
    mask[2] = torch.rand(keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    return mask


def check_padding(rows, keys, options, row_reduction, heads, every_key, dtype, name, lse_of_padding=0.0):
    """With a log-sum-exp that tells nothing of padding, or with +inf, which padded rows have."""
    q, k, _ = make_qkv(rows, keys, HEADS[rows % 3], dtype=dtype, batch=5)
    if "query_start" in options:
        options = {**options, "query_start": torch.tensor([0, keys - rows, 5, 3, 1])}
    generator = torch.Generator().manual_seed(2)
    row_spans, key_spans = random_spans(generator, 5, 6, rows), random_spans(generator, 5, 20, keys)
    if row_reduction == "max":  # as above
        key_spans[..., 1] = key_spans[..., 1].minimum(key_spans[..., 0] + 1)
    options = {"heads": heads, "key_padding_mask": paddings(keys), **options}
    spans = row_spans, None if every_key else key_spans
    results = assert_matches_reference(q, k, *spans, row_reduction, name, lse_of_padding=lse_of_padding, **options)
    assert not any(tensor[3].any() for tensor in results)


@pytest.mark.parametrize("name", [name for name in BACKENDS if takes_padding(name)])
@pytest.mark.parametrize("row_reduction", ["mean", "max"])
@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize(("rows", "keys", "options"), [pytest.param(37, 37, {}, id="rows-are-keys"), *CASES])
def test_padding(rows, keys, options, every_key, row_reduction, name):
    if row_reduction == "max" and "sliding_window" in options:
        pytest.skip("rows that see one key alone are equally large")
    name = use_backend(name)
    for heads, lse_of_padding in (("mean", 0.0), ("group", 0.0), ("all", 0.0), ("all", torch.inf)):
        check_padding(rows, keys, options, row_reduction, heads, every_key, torch.float64, name, lse_of_padding)
    if row_reduction == "mean":
        for dtype in (torch.float32, torch.bfloat16):
            check_padding(rows, keys, options, row_reduction, "group", every_key, dtype, name)


@pytest.mark.parametrize("name", ["torch", *LEVELS])
@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 150), st.sampled_from(HEADS), st.integers(1, 40), st.integers(0, 99))
def test_any_rows_over_any_keys(name, data, keys, heads, head_dim, seed):
    name = use_backend(name)
    causal = data.draw(st.booleans())
    rows = data.draw(st.integers(1, keys if causal else 150))
    options = {"causal": causal, "heads": data.draw(st.sampled_from(["mean", "group", "all"]))}
    if causal:
        options["query_start"] = data.draw(st.none() | st.integers(0, keys - rows))
        options["sliding_window"] = data.draw(st.none() | st.integers(1, keys + 1))
    elif rows == keys or data.draw(st.booleans()):
        rows = keys
        cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, keys]).int()
    every_key = data.draw(st.booleans())
    q, k, v = make_qkv(rows, keys, heads, seed, batch=1, head_dim=head_dim)
    generator = torch.Generator().manual_seed(seed)
    row_spans, key_spans = random_spans(generator, 1, 4, rows), random_spans(generator, 1, 5, keys)
    row_reduction = data.draw(st.sampled_from(["mean", "max"]))
    if row_reduction == "max":  # as above
        key_spans[..., 1] = key_spans[..., 1].minimum(key_spans[..., 0] + 1)
    if takes_padding(name) and (causal or row_reduction == "mean"):
        real = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
        if row_reduction == "max" and options["sliding_window"]:  # between tokens, rows could see one key alone
            real.sort()
        options["key_padding_mask"] = torch.tensor([real])
    assert_matches_reference(q, k, row_spans, None if every_key else key_spans, row_reduction, name, seed, **options)
    options.pop("heads")
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (q.shape, q.shape[:3])]
    if name == "native":
        outputs = ["out", "lse", "dq", "dk", "dv"]
        slow = reference.attention_with_lse
        check_attention(attention_with_lse, slow, (q, k, v), grads, outputs, name, options)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "head_dim"), [(5, 8), (1024, 64), (2111, 80)])
def test_few_rows_over_many_keys(keys, head_dim, dtype, name):
    """Rows that take the keys as they lie: copied or not, in one share of them and in several, a mask with holes."""
    name = use_backend(name)
    generator = torch.Generator().manual_seed(keys)
    for rows, heads in ((1, (7, 1)), (3, (4, 2)), (4, (6, 2))):
        q, k, _ = make_qkv(rows, keys, heads, keys, dtype, head_dim=head_dim)
        mask = torch.rand(2, keys, generator=generator) < 0.9
        mask[1, : keys // 2] = False
        for options in ({}, {"key_padding_mask": mask, "softcap": 20.0}, {"sliding_window": keys // 3 + 1}):
            slow = partial(reference.attention_lse, q, k, **options)
            exact = reference.attention_lse(q.double(), k.double(), **options)
            assert_as_accurate_as(attention_lse(q, k, backend=name, **options), slow(), exact, "lse")
        row_spans, key_spans = random_spans(generator, 2, 3, rows), random_spans(generator, 2, 5, keys)
        lse = reference.attention_lse(q.double(), k.double()).to(reference.accumulation_dtype(dtype))
        for spans in (key_spans, None):
            options = {"row_reduction": "mean", "heads": "group"}
            pooled = span_attention(q, k, lse, row_spans, spans, backend=name, **options)
            low = reference.span_attention(q, k, lse, row_spans, spans, **options)
            exact = reference.span_attention(q.double(), k.double(), lse.double(), row_spans, spans, **options)
            assert_as_accurate_as(pooled, low, exact, "A")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_score_that_is_not_a_number_is_seen_in_its_maximum(name):
    q, k, _ = make_qkv(3, 20, (2, 1), batch=1)
    lse, spans = reference.attention_lse(q, k), torch.tensor([[[0, 3]]])
    q[0, 0, 1] = torch.nan
    for key_spans in (torch.tensor([[[2, 4]]]), None):
        options = {"row_reduction": "max", "causal": False}
        expected = span_attention(q, k, lse, spans, key_spans, backend="reference", **options).isnan()
        assert expected.any()
        pooled = span_attention(q, k, lse, spans, key_spans, backend=use_backend(name), **options)
        assert torch.equal(pooled.isnan(), expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize("heads", ["mean", "all"])
@pytest.mark.parametrize("borders", [[0, 5, 5, 20, 37], [0, 37], [0, 30, 37]])
def test_packed_sequences(borders, heads, every_key, name):
    check_packed_sequences(borders, heads, every_key, torch.float64, use_backend(name))


def check_packed_sequences(borders, heads, every_key, dtype, name, row_reduction="sum"):
    """Spans count from each sequence's start; a sequence's result is what it would be alone."""
    q, k, _ = make_qkv(37, 37, (6, 2), batch=1, dtype=dtype)
    cu_seqlens = torch.tensor(borders).int()
    generator = torch.Generator().manual_seed(0)
    sizes = cu_seqlens.diff().tolist()
    row_spans = torch.cat([random_spans(generator, 1, 3, size) if size else torch.zeros(1, 3, 2) for size in sizes])
    key_spans = torch.cat([random_spans(generator, 1, 4, size) if size else torch.zeros(1, 4, 2) for size in sizes])
    if row_reduction == "max":  # as above
        key_spans[..., 1] = key_spans[..., 1].minimum(key_spans[..., 0] + 1)
    row_spans, key_spans = row_spans.int(), None if every_key else key_spans.int()
    mask = paddings(37)[2:3] if takes_padding(name) else torch.ones(1, 37, dtype=torch.bool)
    lse = reference.attention_lse(q, k, cu_seqlens=cu_seqlens)
    options = {"cu_seqlens": cu_seqlens, "heads": heads, "row_reduction": row_reduction, "backend": name}
    options["key_padding_mask"] = mask if takes_padding(name) else None
    tensors = [tensor.detach().requires_grad_() for tensor in (q, k, lse)]
    packed = span_attention(*tensors, row_spans, key_spans, **options)
    upstream = torch.randn(packed.shape, generator=generator).to(packed.dtype)
    gradients = torch.autograd.grad((packed * upstream).sum(), tensors)
    alone = []
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        spans = row_spans[index, None], None if every_key else key_spans[index, None]
        text = [tensor[:, :, start:end] for tensor in tensors]
        of_one = {"heads": heads, "row_reduction": row_reduction, "key_padding_mask": mask[:, start:end]}
        one = span_attention(*text, *spans, backend="reference", **of_one)
        alone.append(torch.nn.functional.pad(one, (start, 37 - end)) if every_key else one)
    torch.testing.assert_close(packed, torch.cat(alone))
    expected = torch.autograd.grad((torch.cat(alone) * upstream).sum(), tensors)
    torch.testing.assert_close(gradients, expected)
    plan = SpanPlan(row_spans, key_spans, 37, 37, cu_seqlens if len(sizes) > 1 else None)
    again = span_attention(q, k, lse, row_spans, key_spans, plan=plan, **options)
    assert torch.equal(again, packed)


def test_a_span_ends_with_its_sequence():
    q, k, _ = make_qkv(9, 9, (2, 1), batch=1)
    lse, borders = reference.attention_lse(q, k), torch.tensor([0, 4, 9]).int()
    good, bad = torch.tensor([[[0, 4]], [[0, 5]]]), torch.tensor([[[0, 5]], [[0, 5]]])
    with pytest.raises(ValueError, match=r"key_spans: span 0 of example 0 is \[0, 5\], must be .* within \[0, 4\]"):
        span_attention(q, k, lse, good, bad, cu_seqlens=borders)
    with pytest.raises(
        ValueError, match=r"row_spans: shape is \[3, 1, 2\], must be \[1, .* or \[2, number of spans, 2\]"
    ):
        span_attention(q, k, lse, good[[0, 0, 0]], None, cu_seqlens=borders)
    with pytest.raises(ValueError, match="row_spans: are of 3 sequences, must be of the 2 of cu_seqlens"):
        SpanPlan(good[[0, 0, 0]], None, 9, 9, borders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_start": 3}, r"query_start: is 3, must be within \[0, 2\]"),
        ({"query_start": -1}, r"query_start: is -1, must be within"),
        ({"query_start": torch.tensor([0, 3])}, r"query_start: is tensor\(\[0, 3\]\), must be within"),
        ({"query_start": torch.tensor([0])}, r"query_start: is torch.int64 \[1\] on cpu, must be an int, or"),
        ({"query_start": torch.tensor([0.0, 1.0])}, r"query_start: is torch.float32 \[2\]"),
        ({"causal": False, "query_start": 0}, "query_start: is given with causal=False"),
        ({"causal": False, "sliding_window": 3}, "sliding_window: is given with causal=False"),
    ],
)
def test_wrong_visibility_names_the_argument(options, message):
    q, k, v = make_qkv(7, 9, (4, 2))
    spans = torch.tensor([[[0, 2]]] * 2)
    for call in (
        partial(attention_with_lse, q, k, v),
        partial(attention_lse, q, k),
        partial(span_attention, q, k, torch.zeros(2, 4, 7, dtype=torch.float64), spans, spans),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)


def test_shapes_that_do_not_fit():
    q, k, v = make_qkv(9, 7, (4, 2))
    with pytest.raises(ValueError, match=r"k: shape is \[2, 2, 7, 16\], must be \[2, a divisor of 4, at least 9, 16\]"):
        attention_with_lse(q, k, v)
    assert attention_with_lse(q, k, v, causal=False)[0].shape == q.shape
    with pytest.raises(ValueError, match=r"k: shape is \[2, 2, 0, 16\], must be \[2, a divisor of 4, at least 1, 16\]"):
        attention_with_lse(q, k[:, :, :0], v[:, :, :0], causal=False)
    borders = torch.tensor([0, 7]).int()
    with pytest.raises(ValueError, match="cu_seqlens: given with 9 rows over 7 keys and causal=False"):
        attention_lse(q[:1], k[:1], causal=False, cu_seqlens=borders)
    with pytest.raises(ValueError, match="heads: is 'some', must be 'mean', 'group' or 'all'"):
        span_attention(k, k, k[..., 0], torch.zeros(2, 1, 2).int(), None, heads="some")
