"""What do the Triton kernels take of a GPU? Registers, spills, shared memory and stages of each; no GPU is needed.

    python -m benchmarks.triton_resources                        # every kernel, writes results/triton_resources.md
    python -m benchmarks.triton_resources --arch 90 --quick      # bfloat16, D = 64, without options

The launchers run on tensors without memory, so that what is compiled is what they launch: real tile sizes, real
specialisation of strides. Compiled kernels stay in Triton's own cache: a second run is quick.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mold_kernels._triton import attention, layer_mixture_kl, span_attention, span_pieces, tiles, value_pool
from mold_kernels.span_pieces import SPAN_PIECES, Pieces

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have. The tiles of sm_80 serve GPUs with less, see CONSUMER."""
CONSUMER_SHARED_MEMORY = 99 * 1024
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TILE_OF = {"span_attention_maxima": "span_attention_backward_dk"}
"""Kernels that take another's tile."""
OUTPUT = Path(__file__).parent / "results" / "triton_resources.md"


@dataclass(frozen=True)
class Case:
    """Which of the variants of a kernel: element type, head dimension, with every option or with none."""

    dtype: torch.dtype
    head_dim: int
    options: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, D = {self.head_dim}" + (", all options" if self.options else "")


QUICK = (Case(torch.bfloat16, 64),)
CASES = (
    *(Case(torch.bfloat16, head_dim) for head_dim in (32, 64, 80, 128, 256)),
    Case(torch.bfloat16, 128, options=True),
    Case(torch.float16, 64),
    *(Case(torch.float32, head_dim) for head_dim in (64, 128, 256)),
)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `spilled` bytes a thread, `unit` the matrix instruction found in its PTX."""

    name: str
    arch: int
    case: Case
    tile: tiles.Tile | None
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    unit: str
    has_product: bool


class _Target:
    """What Triton asks its driver for when it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def ahead_of_time(arch: int) -> Iterator[list]:
    """Launches compile for `arch` and are listed as (name, compiled kernel) instead of running."""
    compiled = []
    run, active, architecture = JITFunction.run, driver._active, tiles.architecture

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__.strip("_").removesuffix("_kernel"), kernel))

    JITFunction.run = compile_only
    driver.set_active(_Target(arch))
    tiles.architecture = lambda device: arch
    try:
        yield compiled
    finally:
        JITFunction.run, tiles.architecture = run, architecture
        driver.set_active(active)


def launch_all(case: Case, length: int = 4096, steps: int = 90, keys: int = 300) -> None:
    """Every launcher once, on tensors without memory."""

    def tensor(*shape, dtype=case.dtype):
        return torch.empty(*shape, device="meta", dtype=dtype)

    batch, heads, kv_heads, layers = 2, 8, 2, 30
    q = tensor(batch, length, heads, case.head_dim).transpose(1, 2)
    k = v = tensor(batch, length, kv_heads, case.head_dim).transpose(1, 2)
    lse = tensor(batch, heads, length, dtype=torch.float32)
    mask = tensor(batch, length, dtype=torch.bool)
    valid, first, ranges, softcap = None, None, None, None
    if case.options:
        valid, ranges, softcap = mask, tensor(2, length, dtype=torch.int32), 30.0
        first = tensor(batch, dtype=torch.int32)
    for causal, padded in ((True, valid), (False, valid)) if case.options else ((True, None), (True, mask)):
        tail = padded, first if causal else None, ranges, 0.1, softcap, causal
        out, _ = attention.attention_with_lse_forward(q, k, v, *tail)
        attention.attention_with_lse_backward(out, lse, q, k, v, out, lse, *tail)
        attention.attention_lse_forward(q, k, *tail)
        attention.attention_lse_backward(lse, q, k, lse, *tail)
    spans = tensor(batch, steps, 2, dtype=torch.int32), tensor(batch, keys, 2, dtype=torch.int32)
    rows = tiles.choose_tile("span_attention_backward_dk", q).m
    pieces = Pieces(*SPAN_PIECES.fake(*spans, length, length, rows))
    span_pieces.span_pieces(*spans, rows, pieces)
    each_key = Pieces(*SPAN_PIECES.fake(spans[0], tensor(batch, length, 2, dtype=torch.int32), length, length, rows))
    for causal, groups in ((True, heads), (False, kv_heads)) if case.options else ((True, 1),):
        seen = valid, first if causal else None, ranges
        for reduction in ("mean" if case.options else "sum", "max"):
            tail = 0.1, softcap, causal, groups, reduction
            for given in ((*spans, *seen, pieces), (spans[0], None, *seen, each_key)):
                pooled = span_attention.span_attention_forward(q, k, lse, *given, *tail)
                span_attention.span_attention_backward(pooled, q, k, lse, *given, *tail)
    for borders in (None, tensor(4, dtype=torch.int32)) if case.options else (None,):
        upstream = value_pool.value_pool_forward(v, mask, borders, 1e-6)
        value_pool.value_pool_backward(upstream, v, mask, borders, 1e-6)
    maps = tensor(layers, batch, steps, keys, dtype=torch.float32)
    weights, counts = tensor(batch, layers, dtype=torch.float32), tensor(batch, dtype=torch.int64)
    loss, mixture_grad = layer_mixture_kl.layer_mixture_kl_forward(
        maps, maps, weights, counts, counts, 0.1, "l1" if case.options else "softmax", 1e-6
    )
    layer_mixture_kl.layer_mixture_kl_backward(loss, mixture_grad, maps, weights)


def compile_kernels(arch: int, case: Case) -> list[Kernel]:
    """Every kernel of the library for an architecture: each distinct variant that the launchers ask for."""
    with ahead_of_time(arch) as compiled:
        launch_all(case)
        kernels = []
        for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled}.values():
            tile = None
            of_tile = TILE_OF.get(name, name)
            if (of_tile, arch) in tiles.TABLE:
                tile = tiles.table_tile(of_tile, arch, case.dtype.itemsize, case.head_dim)
            registers, spilled = _read_cubin(kernel.asm["cubin"])
            metadata, ptx = kernel.metadata, kernel.asm["ptx"]
            unit = next((unit for unit in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if unit in ptx), "")
            kernels.append(
                Kernel(
                    name,
                    arch,
                    case,
                    tile,
                    metadata.num_warps,
                    metadata.num_stages,
                    registers,
                    spilled,
                    metadata.shared,
                    unit,
                    "tt.dot" in kernel.asm["ttir"],
                )
            )
    return kernels


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"REG:(\d+)", dump.stdout)[1]), int(re.search(r"STACK:(\d+)", dump.stdout)[1])


def table(kernels: list[Kernel]) -> str:
    """A Markdown table of the kernels, one section an architecture."""
    lines = []
    for arch in sorted({kernel.arch for kernel in kernels}):
        lines += [f"\n## sm_{arch}\n", "| kernel | of | tile m x n | warps | stages | registers | spilled | shared | |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for kernel in (kernel for kernel in kernels if kernel.arch == arch):
            tile = f"{kernel.tile.m} x {kernel.tile.n}" if kernel.tile else ""
            spilled = f"{kernel.spilled} B" if kernel.spilled else "0"
            reason = f"; {kernel.tile.spills}" if kernel.spilled and kernel.tile else ""
            lines.append(
                f"| {kernel.name} | {kernel.case} | {tile} | {kernel.warps} | {kernel.stages} | {kernel.registers} "
                f"| {spilled}{reason} | {kernel.shared / 1024:.1f} KiB | {kernel.unit} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=tiles.ARCHITECTURES, default=tiles.ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="bfloat16, D = 64 only; prints, writes nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    kernels = []
    for arch in arguments.arch:
        for case in QUICK if arguments.quick else CASES:
            kernels += compile_kernels(arch, case)
    text = table(kernels)
    print(text)
    if not arguments.quick:
        header = (
            "# What the Triton kernels take\n\n"
            f"Written by `python -m benchmarks.triton_resources` with Triton {triton.__version__}; compiled, not run. "
            "A kernel with several lines of one kind has variants (with and without values, padding, key spans or "
            "maxima; spread or gathered).\n"
        )
        arguments.output.write_text(header + text)


if __name__ == "__main__":
    main()
