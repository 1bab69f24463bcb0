"""The CUDA kernels against the float64 reference: emulated on the host everywhere, and the real module on a GPU.

The emulation is built here from the same source files with the host's compiler (csrc/cuda/emulation.hpp).
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cuda_resources
from mold_kernels import cuda, layer_mixture_kl, reference, span_attention
from mold_kernels.backends import RUNTIMES, Runtime
from mold_kernels.testing import assert_as_accurate_as, random_qkv, random_spans

ROOT = Path(__file__).parents[2]
COMPILER = sysconfig.get_config_var("CXX").split()


def build_emulation(folder, *options):
    """Compiles csrc/cuda for the host, two files at a time, without a warning."""
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *options]
    flags += ["-DMOLD_EMULATION", "-DMOLD_MODULE=_cuda_emulated"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    stems = ["span_attention_backward", "span_attention_forward", "layer_mixture_kl", "module"]
    for pair in (stems[:2], stems[2:]):
        compilers = [
            subprocess.Popen(
                [*COMPILER, *flags, "-c", "-xc++", next((ROOT / "csrc/cuda").glob(f"{stem}.c*")), "-o", folder / stem]
            )
            for stem in pair
        ]
        assert [compiler.wait() for compiler in compilers] == [0, 0]
    module = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*COMPILER, *options, "-shared", *(folder / stem for stem in stems), "-o", module], check=True)
    return module


def load_emulation(path):
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"the host's compiler {COMPILER[0]} was not found")
    return load_emulation(build_emulation(tmp_path_factory.mktemp("cuda_emulation")))


def emulate(monkeypatch, module, seed=0):
    """backend="cuda" takes CPU tensors, and `seed` decides in which order threads run."""
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "_stream", lambda device: contextlib.nullcontext(module.Stream(0, seed)))
    monkeypatch.setitem(RUNTIMES, "cuda", Runtime())


@pytest.fixture
def emulated(monkeypatch, emulation):
    emulate(monkeypatch, emulation)


@pytest.fixture(params=["emulated", "gpu"])
def device(request):
    """Where backend="cuda" runs."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return "cpu"
    if (reason := cuda.why_missing()) is not None:
        pytest.skip(reason)
    return "cuda"


def run_span_attention(function, q, k, lse, row_spans, key_spans, dtype, device="cpu", upstream=None, **options):
    """A, dq, dk, dlse on the CPU."""
    tensors = [tensor.detach().to(device, dtype).requires_grad_() for tensor in (q, k)]
    tensors.append(lse.detach().to(device, reference.accumulation_dtype(dtype)).requires_grad_())
    pooled = function(*tensors, row_spans.to(device), key_spans.to(device), scale=0.4, **options)
    if upstream is None:
        upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    results = [pooled, *torch.autograd.grad(pooled, tensors, upstream.to(pooled))]
    return [result.detach().cpu() for result in results]


def exact_lse(q, k):
    return reference.attention_lse(q.double(), k.double(), scale=0.4).float()


def assert_span_attention(device, q, k, row_spans, key_spans, row_reduction="sum"):
    arguments = q, k, exact_lse(q, k), row_spans, key_spans
    actual = run_span_attention(
        span_attention, *arguments, q.dtype, device, row_reduction=row_reduction, backend="cuda"
    )
    low, exact = (
        run_span_attention(reference.span_attention, *arguments, dtype, row_reduction=row_reduction)
        for dtype in (q.dtype, torch.float64)
    )
    for name, a, b, c in zip(["A", "dq", "dk", "dlse"], actual, low, exact, strict=True):
        assert_as_accurate_as(a, b, c, name)
    return actual


@pytest.mark.parametrize(
    ("dtype", "batch", "heads", "kv_heads", "length", "head_dim", "steps", "keys", "row_reduction"),
    [
        pytest.param(torch.float32, 1, 1, 1, 1, 16, 1, 1, "sum", id="one-token"),
        pytest.param(torch.float32, 2, 4, 2, 150, 40, 5, 7, "mean", id="float32-three-tiles"),
        pytest.param(torch.float32, 1, 2, 1, 70, 256, 3, 4, "sum", id="float32-head-dim-256"),
        pytest.param(torch.bfloat16, 1, 9, 3, 131, 64, 4, 9, "sum", id="smollm2-heads"),
        pytest.param(torch.float16, 2, 2, 2, 65, 80, 4, 3, "mean", id="float16-head-dim-80"),
        pytest.param(torch.bfloat16, 1, 3, 1, 66, 96, 3, 5, "mean", id="head-dim-96"),
        pytest.param(torch.float16, 1, 2, 1, 70, 128, 3, 4, "sum", id="float16-head-dim-128"),
        pytest.param(torch.bfloat16, 1, 2, 1, 70, 256, 3, 4, "sum", id="head-dim-256"),
        pytest.param(torch.bfloat16, 1, 2, 2, 37, 9, 3, 5, "sum", id="head-dim-9-in-no-chunks"),
    ],
)
def test_span_attention(device, dtype, batch, heads, kv_heads, length, head_dim, steps, keys, row_reduction):
    generator = torch.Generator().manual_seed(length)
    q, k, _ = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)
    row_spans, key_spans = (random_spans(generator, batch, count, length) for count in (steps, keys))
    assert_span_attention(device, q, k, row_spans, key_spans, row_reduction)


def test_work_that_need_not_be_split(device, monkeypatch):
    monkeypatch.setattr(cuda, "_BLOCKS", 1)
    test_span_attention(device, torch.bfloat16, 2, 4, 2, 140, 32, 4, 5, "sum")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_span_attention_at_the_size_of_a_rationale(dtype):
    if (reason := cuda.why_missing()) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    q, k, _ = random_qkv(generator, 2, 8, 2, 2050, 128, dtype=dtype)
    edges = torch.arange(0, 2050, 41, dtype=torch.int32)
    row_spans = torch.stack([edges[:-1], edges[1:]], -1).expand(2, -1, -1)
    key_spans = torch.stack([edges, edges + 3], -1).expand(2, -1, -1).clamp(max=2050)
    assert_span_attention("cuda", q, k, row_spans, key_spans, "mean")


def some_spans(count):
    span = st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted)
    return st.lists(span, min_size=count, max_size=count)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.lists(some_spans(3), min_size=2, max_size=2), st.lists(some_spans(4), min_size=2, max_size=2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_spans(emulation, dtype, row_spans, key_spans):
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 70, 16, dtype=dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        emulate(monkeypatch, emulation)
        assert_span_attention("cpu", q, k, torch.tensor(row_spans), torch.tensor(key_spans))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(device, dtype):
    """Neighbours in D apart, rows that are not aligned, one key head for all, lse turned around."""
    generator = torch.Generator().manual_seed(0)
    row_spans, key_spans = random_spans(generator, 2, 3, 40), random_spans(generator, 2, 4, 40)
    q, k, _ = random_qkv(generator, 2, 4, 2, 40, 16, dtype=dtype, strided=False)
    expected = run_span_attention(
        span_attention, q, k, exact_lse(q, k), row_spans, key_spans, dtype, device, backend="cuda"
    )
    spread = torch.stack([q, q], -1).flatten(-2)[..., ::2]
    shifted = torch.nn.functional.pad(k, (1, 2))[..., 1:-2]
    turned = exact_lse(q, k).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    actual = run_span_attention(
        span_attention, spread, shifted, turned, row_spans, key_spans, dtype, device, backend="cuda"
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    one = k[:, :1].expand(-1, 2, -1, -1)
    assert_span_attention(device, q, one, row_spans, key_spans)


def test_offsets_beyond_32_bits(emulated):
    length, stride = 40, 1 << 26
    memory = np.empty(length * stride, dtype=np.float16)  # pages that nobody touches take no memory
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 1, 2, 1, length, 16, dtype=torch.float16)
    far = torch.from_numpy(memory).as_strided((1, 2, length, 16), (0, 16, stride, 1)).copy_(q)
    everything = torch.tensor([[[0, length]]])
    lse = exact_lse(q, k)
    results = [
        span_attention(queries, k, lse, everything, everything, scale=0.4, backend="cuda") for queries in (q, far)
    ]
    torch.testing.assert_close(results[0], torch.full((1, 1, 1), float(length)), rtol=1e-3, atol=0)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_that_hold_nothing_give_exact_zeros(device, dtype):
    q, k, _ = random_qkv(torch.Generator().manual_seed(0), 2, 4, 2, 130, 16, dtype=dtype)
    none = torch.zeros(2, 3, 2, dtype=torch.int32)
    some = torch.tensor([[[0, 4], [5, 5], [4, 9]]], dtype=torch.int32).expand(2, -1, -1)
    unseen = torch.tensor([[[100, 110]]], dtype=torch.int32).expand(2, -1, -1)
    for row_spans, key_spans in ((none, none), (none, some), (some, none), (some, unseen), (some[:, :0], some)):
        for tensor in assert_span_attention(device, q, k, row_spans, key_spans):
            assert not tensor.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_as_exact_for_large_and_small_losses(device, dtype):
    """Weights go through products of 16 bits: without a common factor they would overflow or vanish in float16."""
    generator = torch.Generator().manual_seed(3)
    q, k, _ = random_qkv(generator, 1, 2, 1, 100, 16, dtype=dtype)
    row_spans, key_spans = random_spans(generator, 1, 4, 100), random_spans(generator, 1, 5, 100)
    upstream = torch.randn(1, 4, 5, generator=generator)

    def gradients(factor):
        arguments = q, k, exact_lse(q, k), row_spans, key_spans, dtype, device, upstream * factor
        return [
            gradient.double() / factor
            for gradient in run_span_attention(span_attention, *arguments, backend="cuda")[1:]
        ]

    for large, one in zip(gradients(2.0**11), gradients(1.0), strict=True):
        normal = one.abs() > 1e-4  # float16 rounds smaller ones on another grid
        assert large.isfinite().all()
        assert torch.equal(large[normal], one[normal])


def test_the_order_of_threads_does_not_matter(monkeypatch, emulation):
    """A result that depends on it would show a missing barrier."""
    generator = torch.Generator().manual_seed(0)
    row_spans, key_spans = random_spans(generator, 2, 4, 140), random_spans(generator, 2, 5, 140)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, _ = random_qkv(generator, 2, 4, 2, 140, 32, dtype=dtype)
        lse, results = exact_lse(q, k), []
        for seed in range(4):
            emulate(monkeypatch, emulation, seed)
            results.append(run_span_attention(span_attention, q, k, lse, row_spans, key_spans, dtype, backend="cuda"))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    case, results = mixture_case(), []
    for seed in range(4):
        emulate(monkeypatch, emulation, seed)
        results.append(run_layer_mixture(layer_mixture_kl, case, torch.float32, backend="cuda"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def mixture_case(layers=(5, 3), steps=19, keys=45, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.rand(count, 4, steps, keys, generator=generator) for count in layers)
    weights = torch.randn(4, layers[1], generator=generator).softmax(-1)
    num_steps, num_keys = torch.tensor([steps, 1, steps - 1, 2]), torch.tensor([keys, 3, 1, keys - 1])
    padding = (torch.arange(steps) >= num_steps[:, None])[:, :, None] | (torch.arange(keys) >= num_keys[:, None])[
        :, None
    ]
    return teacher.masked_fill(padding, 7), student.masked_fill(padding, 5), weights, num_steps, num_keys


def run_layer_mixture(function, case, dtype, device="cpu", **options):
    teacher, student, weights = (tensor.detach().to(device, dtype) for tensor in case[:3])
    tensors = [student.requires_grad_(), weights.requires_grad_()]
    loss = function(teacher, *tensors, *(count.to(device) for count in case[3:]), **options)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0]).to(loss)
    return [result.detach().cpu() for result in (loss, *torch.autograd.grad(loss, tensors, upstream))]


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
@pytest.mark.parametrize(
    ("layers", "steps", "keys"),
    [
        pytest.param((5, 3), 19, 45, id="odd"),
        pytest.param((1, 2), 2, 4, id="one-teacher-layer"),
        pytest.param((40, 33), 3, 100, id="more-layers-than-lanes"),
    ],
)
def test_layer_mixture_kl(device, layers, steps, keys, row_norm):
    case = mixture_case(layers, steps, keys)
    actual = run_layer_mixture(layer_mixture_kl, case, torch.float32, device, row_norm=row_norm, backend="cuda")
    low, exact = (
        run_layer_mixture(reference.layer_mixture_kl, case, dtype, row_norm=row_norm)
        for dtype in (torch.float32, torch.float64)
    )
    for name, a, b, c in zip(["loss", "dA", "dp"], actual, low, exact, strict=True):
        assert_as_accurate_as(a, b, c, name)


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
def test_padding_and_examples_without_steps_or_key_words(device, row_norm):
    teacher, student, weights, num_steps, num_keys = mixture_case()
    num_steps[0], num_keys[1] = 0, 0
    case = teacher, student, weights, num_steps, num_keys
    expected = run_layer_mixture(layer_mixture_kl, case, torch.float32, device, row_norm=row_norm, backend="cuda")
    assert not expected[0][:2].any()
    assert (expected[0][2:] >= 0).all()
    assert expected[0][3] > 0
    for gradient in (expected[1].transpose(0, 1), expected[2]):
        assert gradient.isfinite().all()
        assert not gradient[:2].any()
        assert gradient[3].any()
    padding = torch.arange(45) >= num_keys[:, None]
    broken = [attention.masked_fill(padding[:, None], torch.nan) for attention in (teacher, student)]
    actual = run_layer_mixture(
        layer_mixture_kl, (*broken, *case[2:]), torch.float32, device, row_norm=row_norm, backend="cuda"
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_layer_mixture_strides(device):
    teacher, student, weights, num_steps, num_keys = mixture_case()
    turned = [attention.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for attention in (teacher, student)]
    results = [
        run_layer_mixture(layer_mixture_kl, case, torch.float32, device, backend="cuda")
        for case in (
            (teacher, student, weights, num_steps, num_keys),
            (*turned, weights.mT.contiguous().mT, num_steps.int(), num_keys.int()),
        )
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def sanitized_cases(path):
    """What test_sanitizers runs in a process of its own."""
    monkeypatch = pytest.MonkeyPatch()
    emulate(monkeypatch, load_emulation(path), seed=1)
    generator = torch.Generator().manual_seed(0)
    for dtype, head_dim in ((torch.float32, 20), (torch.bfloat16, 64), (torch.float16, 9), (torch.bfloat16, 136)):
        q, k, _ = random_qkv(generator, 2, 4, 2, 67, head_dim, dtype=dtype)
        row_spans, key_spans = random_spans(generator, 2, 3, 67), random_spans(generator, 2, 4, 67)
        assert_span_attention("cpu", q, k, row_spans, key_spans)
    for row_norm in ("softmax", "l1"):
        run_layer_mixture(layer_mixture_kl, mixture_case(), torch.float32, row_norm=row_norm, backend="cuda")


@pytest.mark.slow
def test_sanitizers(tmp_path):
    """No step outside a tensor or shared memory, none misaligned, no undefined behaviour."""
    runtime = subprocess.run([*COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).exists():
        pytest.skip("the compiler has no address sanitizer")
    module = build_emulation(tmp_path, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    program = f"from tests.mold_kernels.test_cuda import sanitized_cases; sanitized_cases({str(module)!r})"
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_is_refused_where_it_cannot_run(monkeypatch):
    span, count, q = torch.zeros(1, 1, 2).int(), torch.ones(2).int(), torch.zeros(1, 2, 3, 1)
    with pytest.raises(ValueError, match="cuda runs on cuda"):
        span_attention(q, q, q[..., 0], span, span, backend="cuda")
    with pytest.raises(ValueError, match="cuda runs on cuda"):
        layer_mixture_kl(q, q, q[0, :, :1, 0], count, count, backend="cuda")
    monkeypatch.setitem(RUNTIMES, "cuda", Runtime())
    for wrong, reason in (
        (q.double(), "takes float32, bfloat16 or float16"),
        (q.expand(-1, -1, -1, 300), "takes head dimensions up to 256"),
    ):
        with pytest.raises(ValueError, match=f"cuda {reason}"):
            span_attention(wrong, wrong, wrong[..., 0], span, span, backend="cuda")
    with pytest.raises(ValueError, match="cuda does not have softcap"):
        span_attention(q, q, q[..., 0], span, span, softcap=1.0, backend="cuda")
    with pytest.raises(ValueError, match="cuda takes float32"):
        layer_mixture_kl(q.double(), q.double(), q[0, :, :1, 0], count, count, backend="cuda")


def test_why_missing(monkeypatch):
    why_missing = cuda.why_missing.__wrapped__  # without the cache
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if cuda._cuda is not None:
        assert why_missing() == "torch finds no CUDA device"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert why_missing() == "the device has compute capability 7.5, must be 8.0 or newer"
    program = """
import sys
sys.modules["mold_kernels._cuda"] = None
from mold_kernels.backends import available_backends
print(available_backends()["cuda"])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("the compiled module mold_kernels._cuda cannot be imported")
    assert "nvcc" in run.stdout


@pytest.fixture(scope="module")
def built():
    """(cuobjdump, the built module)"""
    if (module := cuda_resources.module_path()) is None:
        pytest.skip(cuda.why_missing())
    if (cuobjdump := cuda_resources.find_cuobjdump()) is None:
        pytest.skip("cuobjdump was not found")
    return cuobjdump, module


def test_the_build_is_there_wherever_nvcc_is():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    assert cuda.build_info()["architectures"] == "80, 90, 100"


@pytest.mark.slow
def test_built_code(built):
    """Code for each architecture, on tensor cores for 16-bit types, and nothing spilled."""
    kernels = cuda_resources.read_kernels(*built)
    assert {kernel.architecture for kernel in kernels} == {"sm_80", "sm_90", "sm_100"}
    assert len({kernel.name for kernel in kernels}) * 3 == len(kernels)
    assert cuda_resources.ptx_architectures(*built) == {"sm_100"}
    products = [kernel for kernel in kernels if "float16" in kernel.name and "scatter" not in kernel.name]
    assert len(products) == 3 * 2 * (1 + 3 + 3)  # architectures; types; the forward, rows and columns of three widths
    assert all(kernel.tensor > 0 for kernel in products)
    spilled = [kernel for kernel in kernels if kernel.stack or kernel.local]
    assert not spilled, cuda_resources.table(spilled)
    assert all(kernel.blocks >= 1 for kernel in kernels)
