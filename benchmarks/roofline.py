"""What must each Triton kernel do, what does it do, and how long should that take on an H100? Arithmetic, no GPU.

    python -m benchmarks.roofline      # Llama-1B's attention, T = 4k to 32k; writes results/roofline.md
    python -m benchmarks.roofline --lengths 8192 --head-dim 128

"must" is the least any implementation could do: every product of visible pairs once, every input and output through
memory once. "does" is what our tiles do: masked halves of diagonal tiles, rows that fill a tile only in part, head
dimensions rounded up, scores computed again, and every byte a program loads (most from L2). The prediction is the
slowest of four: tensor cores at 60 % of their peak, memory at 90 % (for "must" bytes), L2 at 5.5 TB/s (for what the
kernel does), and one exponential a pair on the special function units.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mold_kernels._triton import tiles

PEAK_FLOPS, MEMORY_BANDWIDTH = 989e12, 3.35e12  # H100 SXM: dense bfloat16, HBM3
ATTAINABLE_FLOPS, ATTAINABLE_MEMORY, L2_BANDWIDTH = 0.6 * PEAK_FLOPS, 0.9 * MEMORY_BANDWIDTH, 5.5e12
EXPONENTIALS = 132 * 16 * 1.755e9  # 16 a clock and multiprocessor
LAUNCH = 3e-6
TOKENS_A_STEP, TOKENS_A_KEY_WORD = 45, 13  # as in benchmarks.training_step
ARCH, ELEMENT = 90, 2
OUTPUT = Path(__file__).parent / "results" / "roofline.md"


@dataclass(frozen=True)
class Shape:
    """One layer's attention; key words of one and two tokens in turn."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    layers: int = 16
    teacher_layers: int = 32

    @property
    def steps(self) -> int:
        return self.length // TOKENS_A_STEP

    @property
    def keys(self) -> int:
        return self.length // TOKENS_A_KEY_WORD

    @property
    def columns(self) -> int:
        return self.keys * 3 // 2

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def block_d(self) -> int:
        return max(16, 1 << (self.head_dim - 1).bit_length())

    def tile(self, kernel: str) -> tiles.Tile:
        return tiles.table_tile(kernel, ARCH, ELEMENT, self.head_dim)

    def rows(self, heads: int) -> int:
        """Bytes of [heads, T, D]."""
        return heads * self.length * self.head_dim * ELEMENT


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes and exponentials of one launch (or of a few that belong together)."""

    name: str
    must_flops: float
    must_bytes: float
    does_flops: float
    does_bytes: float
    exponentials: float = 0.0
    launches: int = 1

    @property
    def floor(self) -> float:
        """Seconds at the peaks, of what must be done."""
        return max(self.must_flops / PEAK_FLOPS, self.must_bytes / MEMORY_BANDWIDTH)

    @property
    def predicted(self) -> float:
        """Seconds that the kernel should take."""
        return self.launches * LAUNCH + max(
            self.does_flops / ATTAINABLE_FLOPS,
            self.must_bytes / ATTAINABLE_MEMORY,
            self.does_bytes / L2_BANDWIDTH,
            self.exponentials / EXPONENTIALS,
        )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def attention(shape: Shape) -> list[Work]:
    """Flash forward, dq, and dk with dv."""
    length, heads, dim = shape.length, shape.heads, shape.head_dim
    pairs = heads * length * (length + 1) / 2
    lse = 4 * heads * length
    q, k = shape.rows(heads), shape.rows(shape.kv_heads)

    def by_rows(name, products, tensors, must_bytes):
        tile = shape.tile(name)
        done = loaded = 0
        for first in range(0, length, tile.m):
            keys = _round_up(min(first + tile.m, length), tile.n)
            done += heads * tile.m * keys
            loaded += heads * (tensors * keys + products * tile.m) * dim * ELEMENT
        return Work(name, 2 * products * pairs * dim, must_bytes, 2 * products * done * shape.block_d, loaded, done)

    tile = shape.tile("attention_backward_dk")
    done = loaded = 0
    for first in range(0, length, tile.n):
        rows = _round_up(length - first // tile.m * tile.m, tile.m)
        done += heads * tile.n * rows
        loaded += 2 * heads * rows * dim * ELEMENT + 4 * shape.kv_heads * tile.n * dim * ELEMENT
    return [
        by_rows("attention_forward", 2, 2, 2 * q + 2 * k + lse),
        by_rows("attention_backward_dq", 3, 2, 4 * q + 2 * k + 3 * lse),
        Work("attention_backward_dk", 8 * pairs * dim, 2 * q + 4 * k + 2 * lse, 8 * done * shape.block_d, loaded, done),
    ]


def span_attention(shape: Shape) -> list[Work]:
    """Preparation, forward with its sums over pieces, spreading, dq, and dk."""
    length, heads, kv_heads, dim, columns = (
        shape.length, shape.heads, shape.kv_heads, shape.head_dim, shape.columns
    )  # fmt: skip
    density = columns / length
    pairs = heads * length * columns / 2
    lse = 4 * heads * length
    q, k = shape.rows(heads), shape.rows(kv_heads)
    gathered = kv_heads * columns * dim * ELEMENT
    pooled = 4 * shape.steps * shape.keys
    row_pieces = min(2 * shape.steps + length // shape.tile("span_attention_backward_dk").m + 1, length + 1)
    key_pieces = min(2 * shape.keys, length + 1)
    between = 4 * row_pieces * key_pieces

    forward, dq, dk = (shape.tile(f"span_attention_{name}") for name in ("forward", "backward_dq", "backward_dk"))
    done = loaded = 0
    columns_a_block = 2 * forward.n * density * TOKENS_A_KEY_WORD  # a key word is a piece
    for first in range(0, length, TOKENS_A_STEP):
        seen = (first + TOKENS_A_STEP) * density
        row_tiles = kv_heads * -(-TOKENS_A_STEP * shape.group // forward.m)
        column_tiles = -(-seen // columns_a_block) * -(-columns_a_block // forward.n)
        done += row_tiles * forward.m * column_tiles * forward.n
        loaded += row_tiles * column_tiles * (forward.m + forward.n) * dim * ELEMENT
    works = [
        Work("make_pieces", 0, 24 * length, 0, 40 * length, launches=3),
        Work(
            "span_attention_forward",
            2 * pairs * dim,
            q + lse + gathered + pooled,
            2 * done * shape.block_d,
            loaded,
            done,
        ),
        Work("pool_spans", 0, 2 * pooled, 0, 2 * between + 2 * pooled, launches=2),
        Work("pool_spans (spread)", 0, 2 * pooled, 0, 2 * between + 2 * pooled, launches=2),
    ]
    done = loaded = 0
    for first in range(0, length, TOKENS_A_STEP):
        seen = _round_up(int((first + TOKENS_A_STEP) * density) + 1, dq.n)
        row_tiles = kv_heads * -(-TOKENS_A_STEP * shape.group // dq.m)
        done += row_tiles * dq.m * seen
        loaded += row_tiles * (seen + 2 * dq.m) * dim * ELEMENT
    works.append(
        Work(
            "span_attention_backward_dq",
            4 * pairs * dim,
            2 * q + 2 * lse + gathered,
            4 * done * shape.block_d,
            loaded,
            done,
        )
    )
    done = loaded = 0
    for first in range(0, columns, dk.n):
        row_tiles = heads * (-(-(length - first / density) // TOKENS_A_STEP))
        done += row_tiles * dk.m * dk.n
        loaded += row_tiles * dk.m * dim * ELEMENT
    slots = 8 * kv_heads * columns * dim
    works.append(
        Work(
            "span_attention_backward_dk",
            4 * pairs * dim,
            q + lse + gathered + k,
            4 * done * shape.block_d,
            loaded + slots + k,
            done,
            launches=2,
        )
    )
    return works


def small(shape: Shape) -> list[Work]:
    """value_pool (a layer), layer_mixture_kl (a step)."""
    v = shape.rows(shape.kv_heads)
    elements = v / ELEMENT
    cells = shape.steps * shape.keys
    read = 4 * cells * (3 * shape.teacher_layers + shape.layers + 1)
    return [
        Work("value_pool_forward", 0, v, 0, v, launches=2),
        Work("value_pool_backward", 0, 2 * v, 7 * elements / 1000, 2 * v),
        Work(
            "layer_mixture_kl_forward",
            0,
            4 * cells * (shape.teacher_layers + shape.layers + 1),
            0,
            # A layer's statistic is one multiprocessor's work: its share of L2's bandwidth.
            max(read, 132 / shape.teacher_layers * 8 * cells * shape.teacher_layers),
            launches=3,
        ),
        Work("layer_mixture_kl_backward", 0, 4 * cells * (2 * shape.layers + 1), 0, 4 * cells * (2 * shape.layers + 1)),
    ]


def fused(shape: Shape) -> tuple[float, float]:
    """Seconds a layer that `span_flash_attention` would save over the composition, and that it would cost.

    It saves reading q again in the forward, and adding the two parts of dq and of dk (three passes over each, and one
    to write the part). The probabilities would have to be computed again in the forward, as now: the final log-sum-exp
    is known only when the flash loop is over. In the backward the sparse terms become g added to dP inside the dense
    tiles, without any product of their own; but g is gathered, one load a pair, for all pairs, since key words are in
    every tile: 32 loads a clock and multiprocessor, in both backward kernels, against the sparse products it replaces.
    """
    q, k = shape.rows(shape.heads), shape.rows(shape.kv_heads)
    saved = (q + 4 * q + 4 * k) / ATTAINABLE_MEMORY
    saved += sum(work.predicted for work in span_attention(shape) if work.name.startswith("span_attention_backward"))
    dense = attention(shape)[1:]
    return saved, sum(work.exponentials for work in dense) / (132 * 32 * 1.755e9)


def report(shape: Shape) -> str:
    works = attention(shape) + span_attention(shape) + small(shape)
    lines = [
        f"\n## T = {shape.length}, {shape.heads} query and {shape.kv_heads} key heads, D = {shape.head_dim}: "
        f"{shape.steps} steps, {shape.keys} key words, N = {shape.columns}\n",
        "| kernel | must GFLOP | must MB | does GFLOP | loads, stores MB | floor us | predicted us | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for work in works:
        bounds = {
            "tensor cores": work.does_flops / ATTAINABLE_FLOPS,
            "memory": work.must_bytes / ATTAINABLE_MEMORY,
            "L2": work.does_bytes / L2_BANDWIDTH,
            "exp": work.exponentials / EXPONENTIALS,
        }
        bound = max(bounds, key=bounds.get)
        lines.append(
            f"| {work.name} | {work.must_flops / 1e9:.1f} | {work.must_bytes / 1e6:.1f} | {work.does_flops / 1e9:.1f} "
            f"| {work.does_bytes / 1e6:.1f} | {work.floor * 1e6:.1f} | {work.predicted * 1e6:.1f} | {bound} |"
        )
    flash = sum(work.predicted for work in attention(shape))
    span = sum(work.predicted for work in span_attention(shape))
    saved, cost = fused(shape)
    lines += [
        "",
        f"A layer: attention {flash * 1e3:.2f} ms, span attention {span * 1e3:.2f} ms ({span / flash:.1%} of it). "
        f"span_flash_attention would save {saved * 1e3:.2f} ms and cost {cost * 1e3:.2f} ms in gathers.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    shapes = [Shape(n, arguments.heads, arguments.kv_heads, arguments.head_dim) for n in arguments.lengths]
    text = "".join(report(shape) for shape in shapes)
    print(text)
    header = "# Roofline of the Triton kernels on an H100\n\nWritten by `python -m benchmarks.roofline`; predicted, "
    arguments.output.write_text(f"{header}**not measured**.\n\n{__doc__.split(chr(10) * 2, 2)[2]}{text}")


if __name__ == "__main__":
    main()
