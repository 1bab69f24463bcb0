"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled ahead of time for three architectures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mold_kernels import _triton, attention_with_lse
from mold_kernels.backends import available_backends
from tests.interpreter import run_interpreted

pytest.importorskip("triton")

INTERPRETED_TESTS = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
ARCHITECTURES = (80, 90, 100)


@pytest.mark.slow
@pytest.mark.parametrize("file", INTERPRETED_TESTS, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    run_interpreted(file)


@pytest.mark.slow
def test_edges_in_the_interpreter():
    run_interpreted(Path(__file__).parent / "test_edges.py", "-k", "triton")


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
    assert len({kernel.name for kernel in kernels}) == 19


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ahead_of_time(arch):
    from benchmarks.triton_resources import QUICK, compile_kernels

    for case in QUICK:
        check(compile_kernels(arch, case))


def test_ahead_of_time_with_options():
    # The tiles of sm_80 have the least shared memory.
    from benchmarks.triton_resources import Case, compile_kernels

    check(compile_kernels(80, Case(torch.bfloat16, 128, options=True)))


def test_no_length_compiles_a_kernel_again():
    from benchmarks.triton_resources import QUICK, ahead_of_time, launch_all

    variants = []
    for length, steps, keys in ((4096, 90, 300), (4112, 96, 272), (3333, 65, 511)):
        with ahead_of_time(90) as compiled:
            launch_all(QUICK[0], length, steps, keys)
        variants.append({(name, kernel.hash) for name, kernel in compiled})
    assert variants[0] == variants[1] == variants[2]


def test_a_spill_without_a_reason_fails_the_check():
    from benchmarks.triton_resources import QUICK, Kernel

    kernel = Kernel("attention_forward", 90, QUICK[0], None, 4, 2, 255, 8, 0, "wgmma.mma_async", True)
    with pytest.raises(AssertionError, match="spills without a reason"):
        check([kernel])
    with pytest.raises(AssertionError, match="no matrix units"):
        check([Kernel("attention_forward", 90, QUICK[0], None, 4, 2, 255, 0, 0, "mma.sync", True)])


def test_tiles_come_from_the_table_alone(monkeypatch):
    from mold_kernels._triton import tiles

    q = torch.empty(1, 1, 1, 64, device="meta", dtype=torch.bfloat16)
    for arch in ARCHITECTURES:
        monkeypatch.setattr(tiles, "architecture", lambda device, arch=arch: arch)
        for kernel in {name for name, _ in tiles.TABLE}:
            tile = tiles.choose_tile(kernel, q)
            assert tile == tiles.TABLE[kernel, arch][0][0]
            near = tiles.neighbours(tile)
            assert len({tile, *near}) == len(near) + 1 > 5


@pytest.mark.skipif(_triton.INTERPRETED or torch.cuda.is_available(), reason="here the kernels can run")
def test_why_the_kernels_cannot_run_here():
    assert available_backends()["triton"] == "torch finds no CUDA device"
    with pytest.raises(ValueError, match="triton runs on cuda"):
        attention_with_lse(*torch.rand(3, 1, 1, 4, 16), backend="triton")


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
