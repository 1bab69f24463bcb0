"""The CUDA kernels against the float64 reference: emulated on the host everywhere, and the real module on a GPU.

The emulated twin is built from the same source files with the host's compiler (csrc/cuda/emulation.hpp).
"""

import contextlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mold_kernels import cuda, layer_mixture_kl, reference, span_attention
from mold_kernels.backends import BACKENDS, Backend
from mold_kernels.testing import assert_as_accurate_as, random_qkv, random_spans

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulation")
    build_emulation(folder)
    sys.path.insert(0, str(folder))
    try:
        import _cuda_emulated
    finally:
        sys.path.remove(str(folder))
    return _cuda_emulated


def build_emulation(folder: Path, *options: str) -> None:
    compiler = sysconfig.get_config_var("CXX").split()
    flags = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *options]
    definitions = ["-DMOLD_EMULATION", "-DMOLD_MODULE=_cuda_emulated"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    files = ["module.cpp", "-xc++", "layer_mixture.cu", "span_attention_backward.cu", "span_attention_forward.cu"]
    objects = [
        (folder / f"{Path(file).stem}.o", subprocess.Popen(
            [*compiler, *flags, *definitions, *includes, "-c", *(["-xc++"] if file.endswith(".cu") else []), file,
             "-o", str(folder / f"{Path(file).stem}.o")], cwd=SOURCES))
        for file in files if not file.startswith("-")
    ]
    assert not any([process.wait() for _, process in objects])
    target = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*compiler, *flags, "-shared", *(str(path) for path, _ in objects), "-o", str(target)], check=True)


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Where backend="cuda" runs."""
    if request.param == "gpu":
        if (reason := cuda.why_missing()) is not None:
            pytest.skip(reason)
        return torch.device("cuda")
    module = request.getfixturevalue("emulated_module")
    emulate(monkeypatch, module, seed=0)
    return torch.device("cpu")


def emulate(monkeypatch, module, seed):
    """backend="cuda" takes CPU tensors; threads are resumed in the order of `seed`."""
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "_stream", lambda device: contextlib.nullcontext(module.Stream(0, seed)))
    monkeypatch.setitem(BACKENDS, "cuda", Backend(lambda: None))


def span_results(device, q, k, row_spans, key_spans, row_reduction="sum", backend="cuda", scale=0.4, lse=None):
    """A, dq, dk, dlse of the kernels, of the reference in the same dtype and of the reference in float64."""
    lse = reference.attention_lse(q.double(), k.double(), scale=scale).float() if lse is None else lse
    upstream = torch.randn(
        q.shape[0], row_spans.shape[1], key_spans.shape[1], generator=torch.Generator().manual_seed(1)
    )

    def run(function, dtype, device, **options):
        tensors = [tensor.detach().to(device, dtype).requires_grad_() for tensor in (q, k)]
        tensors.append(lse.detach().to(device, reference.accumulation_dtype(dtype)).requires_grad_())
        pooled = function(
            *tensors, row_spans.to(device), key_spans.to(device), scale=scale, row_reduction=row_reduction, **options
        )
        results = [pooled, *torch.autograd.grad(pooled, tensors, upstream.to(pooled))]
        return [result.detach().cpu() for result in results]

    return (
        run(span_attention, q.dtype, device, backend=backend),
        run(reference.span_attention, q.dtype, "cpu"),
        run(reference.span_attention, torch.float64, "cpu"),
    )


def assert_span_attention(*arguments, **options):
    for name, a, b, c in zip(["A", "dq", "dk", "dlse"], *span_results(*arguments, **options), strict=True):
        assert_as_accurate_as(a, b, c, name)


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
        pytest.param(torch.bfloat16, 1, 2, 2, 37, 9, 3, 5, "sum", id="head-dim-9"),
    ],
)
def test_span_attention(device, dtype, batch, heads, kv_heads, length, head_dim, steps, keys, row_reduction):
    generator = torch.Generator().manual_seed(length)
    q, k, _ = random_qkv(generator, batch, heads, kv_heads, length, head_dim, dtype=dtype)
    row_spans, key_spans = (random_spans(generator, batch, count, length) for count in (steps, keys))
    assert_span_attention(device, q, k, row_spans, key_spans, row_reduction)
