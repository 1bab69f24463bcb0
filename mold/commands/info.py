"""mold info: versions, devices and backends."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
import transformers
from rich import get_console
from rich.table import Column, Table

import mold
from mold_kernels import cuda, native
from mold_kernels.backends import RUNTIMES, available_backends
from mold_kernels.tables import OPS


def help_text() -> str:
    return "It has no options."


def main(arguments: Sequence[str]) -> None:
    """Show what is here, and why something is missing."""
    if arguments:
        raise ValueError(f"{arguments[0]}: is no option of mold info, which has none")
    table = Table("what", Column("here", overflow="fold"))
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("threads", str(torch.get_num_threads()))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none")
    for backend, module in (("native", native), ("cuda", cuda)):
        for name, value in (module.build_info() or {}).items():
            table.add_row(f"{backend}: {name}", value)
    reasons = available_backends()
    for name, reason in reasons.items():
        table.add_row(f"backend {name}", "available" if reason is None else f"missing: {reason}")
    console = get_console()
    console.print(table)
    table = Table("op", "backends here, in the order of auto", "and by name only")
    for op in OPS:
        here = [name for name in op.backends if reasons[name] is None]
        by_name = [name for name in here if RUNTIMES[name].auto == ()]
        table.add_row(op.name, ", ".join(name for name in here if name not in by_name), ", ".join(by_name))
    console.print(table)
    console.print("What each takes: python -m mold_kernels.tables", soft_wrap=True, highlight=False)


def versions() -> dict[str, str]:
    """Versions that matter to a result."""
    return {
        "mold": mold.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
