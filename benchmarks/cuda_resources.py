"""What do the CUDA kernels take of a GPU? Registers, spills and shared memory of every kernel, read from the module.

    python -m benchmarks.cuda_resources        # prints the table and writes it to benchmarks/results/cuda_resources.md

Nothing runs, so this needs no GPU, only the built module and NVIDIA's `cuobjdump` and `nvdisasm` (in the extra "test").
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mold_kernels import cuda

RESULTS = Path(__file__).parent / "results" / "cuda_resources.md"
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}
"""Shared memory of a multiprocessor, of which each block also takes 1 KiB for the system."""


@dataclass(frozen=True)
class Kernel:
    """`stack` bytes hold what registers could not; `local` counts the instructions that move such spills."""

    architecture: str
    name: str  # file.kernel<element, tiles of 8 that D may have>
    registers: int
    stack: int
    shared: int  # dynamic, at the largest D of the instance
    tensor: int  # tensor-core instructions
    local: int

    @property
    def threads(self) -> int:
        sizes = {"layer_mixture_kl": 512, "touching": 32, "column_grad": 64}
        return next((threads for part, threads in sizes.items() if part in self.name), 128)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once: registers come in units of 8 a thread, warps are 64 at most."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = SHARED_KIB[self.architecture] * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared, 2048 // self.threads, 32)


def module_path() -> Path | None:
    """The built module's file, or None without one."""
    return Path(cuda._cuda.__file__) if cuda._cuda else None


def find_cuobjdump() -> str | None:
    """On the PATH, or where NVIDIA's Python packages put it."""
    packages = [
        path.parent for folder in site.getsitepackages() for path in Path(folder).glob("nvidia/*/bin/cuobjdump")
    ]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, packages)]))


def read_kernels(cuobjdump: str, module: Path) -> list[Kernel]:
    """Every kernel of every architecture in the module."""
    instructions = {
        key: (len(re.findall(r"\bHMMA\b", text)), len(re.findall(r"\b(?:LDL|STL)\b", text)))
        for key, text in _sections(cuobjdump, "-sass", module)
    }
    kernels = []
    for (architecture, mangled), text in _sections(cuobjdump, "--dump-resource-usage", module):
        name = _readable(mangled)
        registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
        kernels.append(
            Kernel(architecture, name, registers, stack, _shared(name), *instructions[architecture, mangled])
        )
    return sorted(kernels, key=lambda kernel: (int(kernel.architecture[3:]), kernel.name))


def ptx_architectures(cuobjdump: str, module: Path) -> set[str]:
    """Architectures of the PTX in the module, from which a driver makes code for devices newer than all of them."""
    return set(re.findall(r"sm_\d+", _run(cuobjdump, "-lptx", module)))


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table."""
    rows = [
        "| | kernel | registers | stack bytes | shared KiB | blocks a multiprocessor | HMMA | LDL + STL |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kernel in kernels:
        cells = (
            kernel.registers,
            kernel.stack,
            f"{kernel.shared / 1024:.1f}",
            kernel.blocks,
            kernel.tensor,
            kernel.local,
        )
        rows.append(f"| {kernel.architecture} | {kernel.name} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _run(cuobjdump: str, option: str, module: Path) -> str:
    # nvdisasm, which lies beside cuobjdump, must be on its PATH.
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ["PATH"]])
    return subprocess.run(
        [cuobjdump, option, module], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    ).stdout


def _sections(cuobjdump: str, option: str, module: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """((architecture, mangled name of a kernel), what the dump says of it)."""
    for binary in re.split(r"^arch = ", _run(cuobjdump, option, module), flags=re.MULTILINE)[1:]:
        architecture = binary.split(maxsplit=1)[0]
        for section in re.split(r"^\s*Function (?:: )?", binary, flags=re.MULTILINE)[1:]:
            name, text = re.match(r"(\w+)(.*)", section, flags=re.DOTALL).groups()
            yield (architecture, name), text


def _readable(mangled: str) -> str:
    file, kernel, arguments = re.search(r"_\d+_([a-z_]+)_cu_[0-9a-f]{8}\d+([a-z_]+)_kernel(.*)", mangled).groups()
    if not (template := re.match(r"I(f|N\w*?(b?float16)E)(?:Li(\d+)E)?E", arguments)):
        return f"{file}.{kernel}"
    element, tiles = template[2] or "float32", f", {template[3]}" if template[3] else ""
    return f"{file}.{kernel}<{element}{tiles}>"


def _shared(name: str) -> int:
    """Dynamic shared memory that the launchers ask for, at D = 256 in the forward; float32 stages weights too."""
    if name.startswith("layer_mixture_kl"):
        return 128
    if not (template := re.search(r"(forward|rows|columns)<(\w+)(?:, (\d+))?>", name)):
        return 0
    size = 4 if template[2] == "float32" else 2
    tiles = 2 * 64 * (8 * int(template[3] or 32) * size + 16)
    staging = 64 * 68 * 4 if size == 4 else 0
    return tiles + {"forward": 64 * 7 * 4, "rows": staging, "columns": staging + 64 * 4}[template[1]]


def main() -> None:
    if (module := module_path()) is None:
        raise SystemExit(cuda.why_missing())
    if (cuobjdump := find_cuobjdump()) is None:
        raise SystemExit('cuobjdump was not found; nvidia-cuda-cuobjdump, in the extra "test", brings it')
    text = table(read_kernels(cuobjdump, module))
    print(text)
    build = cuda.build_info()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        f"Resources of the CUDA kernels: nvcc of CUDA {build['CUDA']}, read from the built module by "
        "`python -m benchmarks.cuda_resources`.\nNothing of this was run on a GPU. Shared memory is at the largest "
        "D of an instance (8 x its tiles; 256 in the forward).\n\n"
        f"{text}\n"
    )


if __name__ == "__main__":
    main()
