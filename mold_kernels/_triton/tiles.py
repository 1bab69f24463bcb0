"""Tile sizes of all kernels, by architecture, element width and head dimension.

The table's tiles are chosen so that no kernel spills, unless a line says why, and all fit shared memory (`python -m
benchmarks.triton_resources` shows what each takes). Those of sm_80 serve every other GPU too and therefore fit the
99 KiB of the consumer ones.
"""

from __future__ import annotations

import dataclasses
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


MARK_BLOCK, SCAN_BLOCK = 128, 1024
"""Spans that a program of `span_pieces` marks, tokens that one walks at once."""
POOL_BLOCK = 32
"""Spans, pieces and columns a side of a tile of `pool_spans`."""
SPAN_PROGRAMS = 512
"""Of span attention, enough to fill a GPU of 132 to 148 multiprocessors: work is split until there are as many."""
GATHERED_TOKENS = 32
"""Tokens whose dk a program of span attention adds up."""
MAXIMA_WARPS = 8
"""Of the kernels of span attention where they seek the largest row or spread its gradient, which takes registers."""
MAXIMA_WORDS = 16
"""Key words whose gradients are spread over a tile at once."""
VALUE_POOL_ELEMENTS = 8192
"""Values that a program of value_pool holds: 16 tokens at most, since short sums round less."""
MIXTURE_ELEMENTS = 2048
"""Cells of the maps that a program of layer_mixture_kl holds."""
MIXTURE_CELLS = 1024
"""Cells that a program of its backward walks at once."""

INTERPRETED = Tile(16, 32)
"""On CPU tensors, in Triton's interpreter: small, so that small tensors have tiles of every kind."""

ARCHITECTURES = (80, 90, 100)

_ACCUMULATORS = "dk and dv of a tile fill the registers; smaller tiles spill as much"


def _exact(m: int, n: int, warps: int, stages: int = 2) -> Tile:
    """A tile for float32: exact products use no matrix units and hold their factors in registers, which may not do."""
    return Tile(m, n, warps, stages, "exact float32 products hold their factors in registers")


# One line a kernel and architecture: for 2-byte elements with head dimensions up to 64, 128 and 256, and for float32,
# which has no matrix units at full precision, likewise.
TABLE = {
    ("attention_forward", 80): (
        (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
        (_exact(64, 32, 8), _exact(32, 32, 8, 1), _exact(16, 32, 8, 1)),
    ),
    ("attention_forward", 90): (
        (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (_exact(64, 32, 8), _exact(32, 32, 8, 1), _exact(16, 32, 8, 1)),
    ),
    ("attention_forward", 100): (
        (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        (_exact(64, 32, 8), _exact(32, 32, 8, 1), _exact(16, 32, 8, 1)),
    ),
    ("attention_backward_dq", 80): (
        (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
        (_exact(32, 32, 8), _exact(16, 32, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("attention_backward_dq", 90): (
        (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 1)),
        (_exact(32, 32, 8), _exact(16, 32, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("attention_backward_dq", 100): (
        (Tile(128, 64, 8, 3), Tile(128, 64, 8, 1), Tile(64, 32, 8, 1)),
        (_exact(32, 32, 8), _exact(16, 32, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("attention_backward_dk", 80): (
        (Tile(32, 128, 8, 2, "8 bytes, and only without values"), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1)),
        (_exact(32, 32, 8), _exact(16, 16, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("attention_backward_dk", 90): (
        (Tile(32, 128, 8, 3), Tile(32, 128, 8, 2, _ACCUMULATORS), Tile(32, 32, 4, 1, _ACCUMULATORS)),
        (_exact(32, 32, 8), _exact(16, 16, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("attention_backward_dk", 100): (
        (Tile(32, 128, 8, 2), Tile(32, 64, 8, 1), Tile(16, 32, 8, 1)),
        (_exact(32, 32, 8), _exact(16, 16, 8, 1), _exact(16, 16, 8, 1)),
    ),
    # n columns and half the key pieces of a block, m pairs of a row and a head.
    ("span_attention_forward", 80): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
        (_exact(32, 32, 8), _exact(32, 32, 8, 1), _exact(16, 32, 8, 1)),
    ),
    ("span_attention_forward", 90): (
        (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (_exact(32, 32, 8), _exact(32, 32, 8, 1), _exact(16, 32, 8, 1)),
    ),
    ("span_attention_forward", 100): (
        (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (_exact(32, 32, 8), _exact(32, 32, 8, 1), _exact(16, 32, 8, 1)),
    ),
    ("span_attention_backward_dq", 80): (
        (Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
        (_exact(32, 32, 8), _exact(16, 32, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("span_attention_backward_dq", 90): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
        (_exact(32, 32, 8), _exact(16, 32, 8, 1), _exact(16, 16, 8, 1)),
    ),
    ("span_attention_backward_dq", 100): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
        (_exact(32, 32, 8), _exact(16, 32, 8, 1), _exact(16, 16, 8, 1)),
    ),
    # n columns, m the most rows of a row piece.
    ("span_attention_backward_dk", 80): (
        (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 8, 1)),
        (_exact(64, 32, 8), _exact(64, 16, 8, 1), _exact(32, 16, 8, 1)),
    ),
    ("span_attention_backward_dk", 90): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (_exact(64, 32, 8), _exact(64, 16, 8, 1), _exact(32, 16, 8, 1)),
    ),
    ("span_attention_backward_dk", 100): (
        (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (_exact(64, 32, 8), _exact(64, 16, 8, 1), _exact(32, 16, 8, 1)),
    ),
}


def choose_tile(kernel: str, q: torch.Tensor) -> Tile:
    """The tile of `kernel` for tensors like q (device, element width, last dimension)."""
    if q.device.type == "cpu":
        return INTERPRETED
    return table_tile(kernel, architecture(q.device), q.element_size(), q.shape[-1])


def table_tile(kernel: str, arch: int, element_size: int, head_dim: int) -> Tile:
    """The table's tile for an architecture of `ARCHITECTURES`."""
    return TABLE[kernel, arch][element_size == 4][_column(head_dim)]


def architecture(device: torch.device) -> int:
    """The line of the table that serves a device."""
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles one step away: `benchmarks.gpu --tiles` measures them, and whoever reads it edits the table."""
    changes = [{name: size} for name in ("m", "n") for size in (getattr(tile, name) // 2, getattr(tile, name) * 2)]
    changes += [{"warps": 12 - tile.warps}, {"stages": tile.stages + 1}, {"stages": tile.stages - 1}]
    tiles = [dataclasses.replace(tile, **change) for change in changes]
    return [tile for tile in tiles if min(tile.m, tile.n) >= 16 and tile.stages >= 1]


def _column(head_dim: int) -> int:
    return (head_dim > 64) + (head_dim > 128)
