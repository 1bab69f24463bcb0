import pytest
import torch

from mold_kernels import native
from mold_kernels.reference import value_pool as reference_value_pool
from mold_kernels.testing import assert_as_accurate_as, random_mask, random_qkv
from mold_kernels.value_pool import value_pool

EPS = 1e-6
needs_native = pytest.mark.skipif(not native.is_available(), reason=str(native.why_missing()))


def make_case(generator, batch=2, heads=3, length=37, width=16, dtype=torch.float32, padding="right"):
    _, _, v = random_qkv(generator, batch, heads, heads, length, width, dtype)
    return v, random_mask(generator, batch, length, padding)


def value_and_gradient(function, v, mask, upstream, **options):
    v = v.detach().requires_grad_()
    pooled = function(v, mask, EPS, **options)
    return {"pooled": pooled, "dv": torch.autograd.grad(pooled, v, upstream.to(pooled.dtype))[0]}


def check_against_reference(generator, backend, v, mask, cu_seqlens=None):
    sequences = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    upstream = torch.randn(sequences, v.shape[1] * v.shape[3], generator=generator)
    packed = {"cu_seqlens": cu_seqlens}
    actual = value_and_gradient(value_pool, v, mask, upstream, backend=backend, **packed)
    low = value_and_gradient(reference_value_pool, v, mask, upstream, **packed)
    truth = value_and_gradient(reference_value_pool, v.double(), mask, upstream, **packed)
    for name in actual:
        assert_as_accurate_as(actual[name], low[name], truth[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "width", "padding"),
    [(1, 16, "no"), (37, 80, "left"), (130, 64, "right"), (130, 5, "no"), (2049, 16, "no")],
)
def test_values_and_gradients(generator, backend, dtype, length, width, padding):
    check_against_reference(generator, backend, *make_case(generator, 2, 3, length, width, dtype, padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_does_not_hang_on_the_seed(generator, backend, dtype):
    for seed in range(20):
        check_against_reference(generator.manual_seed(seed), backend, *make_case(generator, 2, 3, 130, 5, dtype, "no"))


def test_float64(generator, backend):
    v, mask = make_case(generator, dtype=torch.float64)
    upstream = torch.randn(2, 48, generator=generator)
    actual = value_and_gradient(value_pool, v, mask, upstream, backend=backend)
    truth = value_and_gradient(reference_value_pool, v, mask, upstream)
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def test_float16_runs_on_torch(generator):
    check_against_reference(generator, "auto", *make_case(generator, dtype=torch.float16))


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v.contiguous(),
        lambda v: v.repeat(1, 2, 2, 1)[:, ::2, 3:40],
        lambda v: v.repeat(1, 1, 1, 2)[..., ::2],
        lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
        lambda v: v[:1].expand(2, -1, -1, -1),
    ],
    ids=["contiguous", "sliced", "every second column", "tokens innermost", "expanded"],
)
def test_layouts(generator, backend, view):
    v, mask = make_case(generator)
    check_against_reference(generator, backend, view(v), mask.T.contiguous().T)


def test_padding_is_ignored_even_if_it_is_nan(generator, backend):
    v, mask = make_case(generator, batch=3)
    mask[1] = False
    v.masked_fill_(~mask[:, None, :, None], float("nan"))
    result = value_and_gradient(value_pool, v, mask, torch.ones(3, 48), backend=backend)
    assert (result["pooled"][1] == 0).all()
    assert (result["dv"].transpose(1, 2)[~mask] == 0).all()
    assert all(tensor.isfinite().all() for tensor in result.values())


BORDERS = [[0, 37], [0, 1, 37], [0, 0, 20, 20, 36, 37], [0, 37, 37]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("borders", BORDERS, ids=str)
def test_packed_sequences(generator, backend, dtype, borders):
    case = make_case(generator, 1, 3, 37, 16, dtype)
    check_against_reference(generator, backend, *case, torch.tensor(borders, dtype=torch.int32))


def test_a_packed_sequence_is_an_example(generator):
    v, mask = make_case(generator, 1, dtype=torch.float64, padding="no")
    upstream = torch.randn(3, 48, generator=generator)
    packed = value_and_gradient(
        reference_value_pool, v, mask, upstream, cu_seqlens=torch.tensor([0, 5, 30, 37], dtype=torch.int32)
    )
    for index, (part, valid) in enumerate(zip(v.split([5, 25, 7], 2), mask.split([5, 25, 7], 1), strict=True)):
        alone = value_and_gradient(reference_value_pool, part, valid, upstream[index : index + 1])
        torch.testing.assert_close(packed["pooled"][index : index + 1], alone["pooled"])
        torch.testing.assert_close(packed["dv"].split([5, 25, 7], 2)[index], alone["dv"])


def test_nothing_but_v_is_kept(generator, backend):
    v, mask = make_case(generator)
    v.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        value_pool(v, mask, EPS, backend=backend)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= v.numel()] == [v.data_ptr()]


def test_gradcheck_of_the_reference(generator):
    v, mask = make_case(generator, length=7, width=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: reference_value_pool(v, mask, EPS), v.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"v": torch.zeros(2, 37, 48)},
            r"v: is torch.float32 \[2, 37, 48\], must be floating point",
        ),
        ({"v": torch.zeros(2, 3, 37, 16, dtype=torch.int32)}, "v: is torch.int32"),
        ({"mask": torch.ones(2, 37)}, r"mask: is torch.float32 \[2, 37\], must be torch.bool \[2, 37\]"),
        ({"mask": torch.ones(2, 36, dtype=torch.bool)}, r"mask: is torch.bool \[2, 36\]"),
        ({"mask": torch.ones(2, 37, dtype=torch.bool, device="meta")}, "mask: is on meta, must be on cpu as v"),
        ({"eps": 0.0}, "eps: is 0.0, must be finite and greater than 0"),
        ({"cu_seqlens": torch.tensor([0, 37]).int()}, "cu_seqlens: given with a batch of 2, must be 1"),
        ({"cu_seqlens": torch.tensor([0, 37])}, r"cu_seqlens: is torch.int64 \[2\] on cpu, must be torch.int32"),
        ({"backend": "fast"}, "backend: is 'fast', must be 'auto', .*value_pool has no backend of that name"),
    ],
)
def test_wrong_input(generator, change, message):
    v, mask = make_case(generator)
    arguments = {"v": v, "mask": mask, "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        value_pool(**arguments)


@needs_native
def test_native_names_what_it_lacks(generator):
    v, mask = make_case(generator, dtype=torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"is 'native', must be .*: native takes float64, float32, bfloat16 or float16"
    ):
        value_pool(v, mask, EPS, backend="native")
