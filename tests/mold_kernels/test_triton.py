"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled ahead of time for three architectures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mold_kernels import _triton, attention_with_lse
from mold_kernels.backends import available_backends

pytest.importorskip("triton")

INTERPRETED_TESTS = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
ARCHITECTURES = (80, 90, 100)


@pytest.mark.slow
@pytest.mark.parametrize("file", INTERPRETED_TESTS, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    """A process of its own: the interpreter's switch is read when Triton is imported, and is for all kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def check(kernels):
    from benchmarks.triton_resources import CONSUMER_SHARED_MEMORY, MATRIX_UNITS, SHARED_MEMORY

    # float32 products are exact, which no matrix unit is; sums over pieces are float32 whatever the tensors are.
    missing = [
        kernel
        for kernel in kernels
        if kernel.has_product
        and kernel.case.dtype.itemsize == 2
        and kernel.name != "pool_spans"
        and kernel.unit != MATRIX_UNITS[kernel.arch]
    ]
    assert not missing, f"no matrix units in {missing}"
    limit = {**SHARED_MEMORY, 80: CONSUMER_SHARED_MEMORY}
    assert not [kernel for kernel in kernels if kernel.shared > limit[kernel.arch]]
    unexplained = [kernel for kernel in kernels if kernel.spilled and not (kernel.tile and kernel.tile.spills)]
    assert not unexplained, f"spills without a reason in {unexplained}"
    assert len({kernel.name for kernel in kernels}) == 14


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ahead_of_time(arch):
    from benchmarks.triton_resources import QUICK, compile_kernels

    for case in QUICK:
        check(compile_kernels(arch, case))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ahead_of_time_every_variant(arch):
    from benchmarks.triton_resources import CASES, compile_kernels

    for case in CASES:
        check(compile_kernels(arch, case))


def test_a_spill_without_a_reason_fails_the_check():
    from benchmarks.triton_resources import QUICK, Kernel

    kernel = Kernel("attention_forward", 90, QUICK[0], None, 4, 2, 255, 8, 0, "wgmma.mma_async", True)
    with pytest.raises(AssertionError, match="spills without a reason"):
        check([kernel])
    with pytest.raises(AssertionError, match="no matrix units"):
        check([Kernel("attention_forward", 90, QUICK[0], None, 4, 2, 255, 0, 0, "mma.sync", True)])


@pytest.mark.skipif(_triton.INTERPRETED or torch.cuda.is_available(), reason="here the kernels can run")
def test_why_the_kernels_cannot_run_here():
    assert available_backends()["triton"] == "torch finds no CUDA device"
    with pytest.raises(ValueError, match="triton runs on cuda"):
        attention_with_lse(*torch.rand(3, 1, 1, 4, 16), engine="triton")


def test_import_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
import mold_kernels
from mold_kernels.backends import available_backends
print(available_backends()["triton"])
print(mold_kernels.attention_with_lse(*torch.rand(3, 1, 1, 4, 16))[0].shape)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["the package triton is not installed", "torch.Size([1, 1, 4, 16])"]
