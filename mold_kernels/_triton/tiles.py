"""Tile sizes of all kernels, by architecture, element width and head dimension.

The table's tiles are chosen so that no kernel spills and all fit shared memory (`python -m benchmarks.triton_resources`
shows what each takes). Those of sm_80 serve every other GPU too and therefore fit the 99 KiB of the consumer ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """`m` rows and `n` keys a tile holds, the warps of a program, the stages of its loads; why it may spill."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2
    spills: str = ""


INTERPRETED = Tile(16, 32)
"""On CPU tensors, in Triton's interpreter: small, so that small tensors have tiles of every kind."""

ARCHITECTURES = (80, 90, 100)

# One line a kernel and architecture: for 2-byte elements with head dimensions up to 64, 128 and 256, and for float32,
# which has no matrix units at full precision, likewise.
TABLE = {
    ("attention_forward", 80): (
        (Tile(128, 64, 4, 3), Tile(128, 32, 4, 2), Tile(64, 32, 4, 1)),
        (Tile(64, 32), Tile(32, 32), Tile(16, 32, 4, 1)),
    ),
    ("attention_forward", 90): (
        (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        (Tile(64, 32), Tile(32, 32), Tile(16, 32, 4, 1)),
    ),
    ("attention_forward", 100): (
        (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        (Tile(64, 32), Tile(32, 32), Tile(16, 32, 4, 1)),
    ),
    ("attention_backward_dq", 80): (
        (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
        (Tile(32, 32), Tile(16, 32), Tile(16, 16, 4, 1)),
    ),
    ("attention_backward_dq", 90): (
        (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (Tile(32, 32), Tile(16, 32), Tile(16, 16, 4, 1)),
    ),
    ("attention_backward_dq", 100): (
        (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (Tile(32, 32), Tile(16, 32), Tile(16, 16, 4, 1)),
    ),
    ("attention_backward_dk", 80): (
        (Tile(32, 128, 8, 2), Tile(32, 64, 4, 2), Tile(16, 64, 8, 1)),
        (Tile(32, 32), Tile(16, 16), Tile(16, 16, 4, 1)),
    ),
    ("attention_backward_dk", 90): (
        (Tile(64, 128, 8, 3), Tile(64, 128, 8, 2), Tile(32, 64, 8, 1)),
        (Tile(32, 32), Tile(16, 16), Tile(16, 16, 4, 1)),
    ),
    ("attention_backward_dk", 100): (
        (Tile(64, 128, 8, 3), Tile(64, 128, 8, 2), Tile(32, 64, 8, 1)),
        (Tile(32, 32), Tile(16, 16), Tile(16, 16, 4, 1)),
    ),
    # n key pieces and columns, m pairs of a row and a head.
    ("span_attention_forward", 80): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
        (Tile(32, 32), Tile(32, 32), Tile(16, 32, 4, 1)),
    ),
    ("span_attention_forward", 90): (
        (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
        (Tile(32, 32), Tile(32, 32), Tile(16, 32, 4, 1)),
    ),
    ("span_attention_forward", 100): (
        (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
        (Tile(32, 32), Tile(32, 32), Tile(16, 32, 4, 1)),
    ),
    ("span_attention_backward_dq", 80): (
        (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
        (Tile(32, 32), Tile(16, 32), Tile(16, 16, 4, 1)),
    ),
    ("span_attention_backward_dq", 90): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (Tile(32, 32), Tile(16, 32), Tile(16, 16, 4, 1)),
    ),
    ("span_attention_backward_dq", 100): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (Tile(32, 32), Tile(16, 32), Tile(16, 16, 4, 1)),
    ),
    # n columns, m the most rows of a row piece.
    ("span_attention_backward_dk", 80): (
        (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 8, 1)),
        (Tile(64, 32), Tile(64, 16), Tile(64, 16, 4, 1)),
    ),
    ("span_attention_backward_dk", 90): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (Tile(64, 32), Tile(64, 16), Tile(64, 16, 4, 1)),
    ),
    ("span_attention_backward_dk", 100): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (Tile(64, 32), Tile(64, 16), Tile(64, 16, 4, 1)),
    ),
}


def choose_tile(kernel: str, q: torch.Tensor) -> Tile:
    """The tile of `kernel` for tensors like q (device, element width, last dimension)."""
    if q.device.type == "cpu":
        return INTERPRETED
    return table_tile(kernel, architecture(q.device), q.element_size(), q.shape[-1])


def table_tile(kernel: str, arch: int, element_size: int, head_dim: int) -> Tile:
    """The table's tile for an architecture of `ARCHITECTURES`."""
    widths = TABLE[kernel, arch]
    return widths[element_size == 4][(head_dim > 64) + (head_dim > 128)]


def architecture(device: torch.device) -> int:
    """The line of the table that serves a device."""
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)
