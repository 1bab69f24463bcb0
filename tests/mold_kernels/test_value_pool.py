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
    return v, torch.randn(heads * width, generator=generator), random_mask(generator, batch, length, padding)


def value_and_gradients(function, v, weight, mask, dh, **options):
    v, weight = v.detach().requires_grad_(), weight.detach().requires_grad_()
    h = function(v, weight, mask, EPS, **options)
    return {"h": h, **dict(zip(("dv", "dweight"), torch.autograd.grad(h, (v, weight), dh.to(h.dtype)), strict=True))}


def check_against_reference(generator, backend, v, weight, mask):
    dh = torch.randn(v.shape[0], weight.shape[0], generator=generator)
    actual = value_and_gradients(value_pool, v, weight, mask, dh, backend=backend)
    low = value_and_gradients(reference_value_pool, v, weight, mask, dh)
    truth = value_and_gradients(reference_value_pool, v.double(), weight.double(), mask, dh)
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
    v, weight, mask = make_case(generator, dtype=torch.float64)
    dh = torch.randn(2, 48, generator=generator)
    actual = value_and_gradients(value_pool, v, weight.double(), mask, dh, backend=backend)
    truth = value_and_gradients(reference_value_pool, v, weight.double(), mask, dh)
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
    v, weight, mask = make_case(generator)
    check_against_reference(generator, backend, view(v), weight, mask.T.contiguous().T)


def test_padding_is_ignored_even_if_it_is_nan(generator, backend):
    v, weight, mask = make_case(generator, batch=3)
    mask[1] = False
    v.masked_fill_(~mask[:, None, :, None], float("nan"))
    result = value_and_gradients(value_pool, v, weight, mask, torch.ones(3, 48), backend=backend)
    assert (result["h"][1] == 0).all()
    assert (result["dv"].transpose(1, 2)[~mask] == 0).all()
    assert all(tensor.isfinite().all() for tensor in result.values())


@pytest.mark.parametrize("frozen", ["v", "weight"])
def test_only_what_needs_a_gradient_is_kept(generator, backend, frozen):
    v, weight, mask = make_case(generator)
    (weight if frozen == "v" else v).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        h = value_pool(v, weight, mask, EPS, backend=backend)
    large = [tensor.data_ptr() for tensor in kept if tensor.numel() >= v.numel()]
    assert large == ([] if frozen == "v" else [v.data_ptr()])
    h.sum().backward()
    assert (v.grad is None, weight.grad is None) == (frozen == "v", frozen == "weight")


def test_gradcheck_of_the_reference(generator):
    v, weight, mask = make_case(generator, length=7, width=4, dtype=torch.float64)
    inputs = (v.requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda v, weight: reference_value_pool(v, weight, mask, EPS), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"v": torch.zeros(2, 37, 48)},
            r"v was torch.float32 of shape \(2, 37, 48\), must be floating",
        ),
        ({"v": torch.zeros(2, 3, 37, 16, dtype=torch.int32)}, "v was torch.int32"),
        ({"weight": torch.zeros(16)}, r"weight was .* of shape \(16,\), must be floating \[Hkv \* D\] = \[48\]"),
        ({"mask": torch.ones(2, 37)}, r"mask was torch.float32 .*, must be torch.bool \[B, T\] = \[2, 37\]"),
        ({"mask": torch.ones(2, 36, dtype=torch.bool)}, r"mask was .* of shape \(2, 36\)"),
        ({"mask": torch.ones(2, 37, dtype=torch.bool, device="meta")}, "mask was on meta, must be on cpu as v is"),
        ({"eps": 0.0}, "eps was 0.0, must be positive"),
        ({"backend": "fast"}, "backend was 'fast', on cpu it may be 'auto', .*there is no backend of that name"),
    ],
)
def test_wrong_input(generator, change, message):
    v, weight, mask = make_case(generator)
    arguments = {"v": v, "weight": weight, "mask": mask, "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        value_pool(**arguments)


@needs_native
def test_native_names_what_it_lacks(generator):
    v, weight, mask = make_case(generator, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"backend was 'native'.*does not implement value_pool for these tensors"):
        value_pool(v, weight, mask, EPS, backend="native")
