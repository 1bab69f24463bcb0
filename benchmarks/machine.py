"""What a benchmark's numbers were measured on."""

import platform
import re
from pathlib import Path

import torch

from mold_kernels import native


def about_this_machine() -> dict[str, str | int]:
    """CPU, threads and versions, for the JSON of a result."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native": (native.build_info() or {}).get("instruction set used", "not built"),
    }
