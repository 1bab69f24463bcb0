import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mold_kernels import attention_lse, native, prefer_backend
from mold_kernels.attention import ATTENTION_LSE
from mold_kernels.backends import RUNTIMES, Backend, Op, Runtime, available_backends, listed


def twice(x, backend="twice"):
    return x * 2


def make_op(name, *lines, options=()):
    return Op(name, "Tensor x", "Tensor y", lines, fake=lambda x, _: torch.empty_like(x), options=options)


@pytest.fixture(scope="module")
def op():
    """Lines of every kind, fastest first."""
    return make_op(
        "test_op",
        Backend("fast", twice, twice, dtypes=(torch.float32,), options=("window",)),
        Backend("absent", twice, twice),
        Backend("small", twice, twice, head_dim=4),
        Backend("named", twice, gradient=("meta",)),
        Backend("slow", twice, twice, options=("window", "softcap")),
        Backend("reference", twice),
        options=("window", "softcap", "mask"),
    )


@pytest.fixture(autouse=True)
def runtimes(monkeypatch):
    for name, runtime in {
        "fast": Runtime(("cpu",)),
        "absent": Runtime(why_missing=lambda: "nobody built it"),
        "small": Runtime(auto=("meta",)),
        "named": Runtime(auto=()),
        "slow": Runtime(),
    }.items():
        monkeypatch.setitem(RUNTIMES, name, runtime)


X = torch.zeros(2, 8)


def test_a_preferred_backend_is_taken_where_it_can(op):
    op.prefer("named")
    try:
        assert op.choose("auto", X).name == "named"
        assert op.choose("auto", X, needs_gradient=True).name == "fast"
        assert op.choose("slow", X).name == "slow"
        for name, message in (
            ("absent", "must be one that can run here: nobody built it"),
            ("new", "must be 'fast', .* for test_op"),
        ):
            with pytest.raises(ValueError, match=f"backend: is '{name}', {message}"):
                op.prefer(name)
    finally:
        op.prefer(None)
    assert op.choose("auto", X).name == "fast"


def test_prefer_backend_is_of_a_public_op():
    q = torch.zeros(1, 2, 3, 4)
    prefer_backend("attention_lse", "torch")
    try:
        assert ATTENTION_LSE.choose("auto", q).name == "torch"
        assert attention_lse(q, q).isfinite().all()
    finally:
        prefer_backend("attention_lse", None)
    with pytest.raises(ValueError, match="op: is 'attention', must be 'attention_with_lse', "):
        prefer_backend("attention", "torch")


@pytest.mark.parametrize(
    ("requested", "tensor", "given", "chosen"),
    [
        ("auto", X, {}, "fast"),
        ("auto", X, {"window": 3, "softcap": None}, "fast"),
        ("auto", X, {"softcap": 2.0}, "slow"),
        ("auto", X.double(), {}, "slow"),
        ("auto", X.to("meta"), {}, "slow"),
        ("auto", X[:, :4].to("meta"), {}, "small"),
        ("auto", X[:, :4].double(), {}, "slow"),
        ("slow", X, {}, "slow"),
        ("named", X, {}, "named"),
        ("small", X[:, :4], {"mask": X}, "small"),
    ],
)
def test_choice(op, requested, tensor, given, chosen):
    assert op.choose(requested, tensor, given).name == chosen


@pytest.mark.parametrize(
    ("requested", "tensor", "given", "reason"),
    [
        ("fast", X.to("meta"), {}, "'slow' or 'reference' for test_op of float32 on meta: fast runs on cpu"),
        ("fast", X.half(), {}, "for test_op of float16 on cpu: fast takes float32"),
        ("fast", X, {"softcap": 1, "mask": 1}, "with softcap and mask on cpu: fast does not have mask or softcap"),
        ("absent", X, {}, "absent: nobody built it"),
        ("small", X, {}, "small takes head dimensions up to 4"),
        ("named", X, {}, "named has a gradient on meta only"),
        ("quick", X, {}, "test_op has no backend of that name"),
    ],
)
def test_a_named_backend_is_used_or_refused(op, requested, tensor, given, reason):
    with pytest.raises(ValueError, match=f"^backend: is '{requested}', must be 'auto'") as error:
        op.choose(requested, tensor, given, needs_gradient=True)
    assert reason in str(error.value)


def test_nothing_that_can():
    op = make_op("test_no_op", Backend("fast", twice, dtypes=(torch.float32,)), Backend("absent", twice))
    with pytest.raises(ValueError, match=r"is 'auto', must be nothing for test_no_op .*: fast takes .*; absent: nobo"):
        op.choose("auto", X.double())


def test_the_reference_is_not_chosen_in_silence(op):
    with pytest.warns(UserWarning, match="no fast backend here takes float32 with mask on cpu"):
        assert op.choose("auto", X, {"mask": X}).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.choose("reference", X, {"mask": X})
        op.choose("auto", X)


def test_a_new_backend_is_one_line(op):
    assert torch.equal(op.operator(X + 1, "slow"), (X + 1) * 2)
    op.backends["new"] = Backend("slow", lambda x: x * 3, twice)
    assert torch.equal(op.operator(X + 1, "new"), (X + 1) * 3)
    del op.backends["new"]


def test_listed():
    assert [listed([]), listed("a"), listed("ab"), listed("abc")] == ["", "a", "a or b", "a, b or c"]


def test_available_backends():
    reasons = available_backends()
    assert reasons["torch"] is None
    assert reasons["reference"] is None
    assert reasons["native"] == native.why_missing()


def test_the_build_has_the_native_backend():
    assert native.is_available(), native.why_missing()
    assert native.build_info()["standard"] == "C++17"


def test_import_without_the_compiled_module():
    program = """
import sys
sys.modules["mold_kernels._native"] = None
import torch
from mold_kernels import reference, span_attention, value_pool
from mold_kernels.backends import available_backends
print(available_backends()["native"])
arguments = torch.ones(1, 1, 2, 4), torch.ones(1, 2, dtype=torch.bool), 1e-6
print(value_pool(*arguments).shape)
q, span = torch.ones(1, 1, 5, 4), torch.tensor([[[0, 5]]])
print(span_attention(q, q, reference.attention_lse(q, q), span, span).round().item())
try:
    value_pool(*arguments, backend="native")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reason, shape, pooled, error = run.stdout.splitlines()
    assert reason.startswith("the compiled module mold_kernels._native cannot be imported")
    assert shape == "torch.Size([1, 4])"
    assert pooled == "5.0"
    assert reason in error


def test_an_operator_is_called_where_somebody_sees_it():
    """A call that nobody differentiates or records goes to the backend at once; with the same result."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with torch.no_grad():
        expected = attention_lse(q, k)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(attention_lse(q, k), expected)
    assert "mold_kernels::attention_lse" in {event.name for event in profile.events()}
    with FakeTensorMode() as mode:
        fake = attention_lse(mode.from_tensor(q), mode.from_tensor(k))
    assert isinstance(fake, FakeTensor)
    assert fake.shape == expected.shape
