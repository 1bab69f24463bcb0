"""The native kernels for machines that this one is not: compiled, and not run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ziglang", reason="the cross compiler is the package ziglang")

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
KERNELS = ("attention", "layer_mixture_kl", "level_kernels", "span_attention", "value_pool")


def assemble(name: str, target: str, folder: Path) -> bytes:
    """The assembly of csrc/cpu/NAME.cpp at the portable level."""
    path = folder / f"{name}.s"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-S", SOURCES / f"{name}.cpp", "-o", path]
    command += ["-std=c++17", "-O2", "-g0", "-fopenmp-simd", "-DMOLD_LEVEL=portable", "-DMOLD_VECTOR_BYTES=16"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-command-line-argument"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_for_arm(name, tmp_path):
    """Products are NEON's: vectors of four float32 or two float64."""
    assembly = assemble(name, "aarch64-linux-gnu", tmp_path)
    if name in ("attention", "span_attention"):
        assert re.search(rb"\bfmla(\.4s|\s+v\d+\.4s)", assembly)
        assert re.search(rb"\bfmla(\.2d|\s+v\d+\.2d)", assembly)


@pytest.mark.slow
def test_for_macos(tmp_path):
    assert b"attention_with_lse_backward" in assemble("attention", "aarch64-macos", tmp_path)
