"""mold info: versions, devices and backends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from rich import box, get_console
from rich.table import Column, Table

from mold.commands.train import versions
from mold_kernels import cuda, native
from mold_kernels.backends import available_backends
from mold_kernels.tables import HEADER, backend_rows


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
    for op, rows in itertools.groupby(backend_rows(), key=lambda row: row[0]):
        columns = [Column(name, overflow="fold") for name in (HEADER[1], "here", *HEADER[2:])]
        table = Table(*columns, title=op, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.columns[HEADER.index("options")].min_width = len("key_padding_mask,")
        for _, name, *cells in rows:
            table.add_row(name, "missing" if reasons[name] else "yes", *cells)
        console.print(table)
