"""What does attention with pooled attention cost on this CPU, beside torch's own attention alone?

    python -m benchmarks.cpu_attention                      # three tables: T = 512 to 8192, two shapes
    python -m benchmarks.cpu_attention --tables visibility  # windows, soft-capping and packed texts alone
    python -m benchmarks.cpu_attention --lengths 512        # quicker

First table, forward and backward of a layer's attention, batch 1: torch's scaled_dot_product_attention, ours, ours with
the pooled attention A, and aten's flash attention with A. Second table, the pooled attention alone:
vectorised torch, native, and the native kernel without the call around it (checks, operator, autograd: a few hundred
microseconds of Python, with whatever the last contender left in the caches). As shares of the forward what it cannot do
without: its products at the rate of torch's matrix product followed by its exponentials at the rate of torch's exp; its
bytes at the rate of a copy. Third table, forward and backward with A where rows see less than all before them, or score
otherwise: ours, and torch's SDPA with a mask that hides the same.
Contenders take turns in one process; medians are compared. On one thread the clock is that of the process, which other
programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.machine import about_this_machine
from mold_kernels import SpanPlan, attention_with_lse, native, span_attention

TABLES = ["attention", "span_attention", "visibility"]
SHAPES = {"Hq 9, Hkv 3, D 64": (9, 3, 64), "Hq 32, Hkv 8, D 128": (32, 8, 128)}
TOKENS_A_STEP, TOKENS_A_KEY_WORD = 45, 13  # of GSM8K's human rationales: 4.6 steps, 16 numbers in about 210 tokens


def make_spans(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row spans [1, S, 2] that cover everything and key spans [1, M, 2] of one or two tokens."""
    steps, keys = max(2, length // TOKENS_A_STEP), max(2, length // TOKENS_A_KEY_WORD)
    borders = torch.linspace(0, length, steps + 1).int()
    starts = torch.linspace(1, length - 3, keys).int()
    rows = torch.stack([borders[:-1], borders[1:]], -1)[None]
    return rows, torch.stack([starts, starts + 1 + torch.arange(keys) % 2], -1)[None].int()


def seconds(function) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def best(function, rounds: int = 7) -> float:
    return min(seconds(function) for _ in range(rounds))


def measure_limits() -> dict[str, float]:
    """FLOP/s of torch's float32 matrix product, exponentials/s in cache, bytes/s of a copy that no cache holds."""
    a, b = torch.randn(2, 1024, 1024)
    small = torch.randn(1 << 17)
    exponentials = torch.empty_like(small)
    source = torch.randn(1 << 26)
    target = torch.empty_like(source)
    return {
        "flops": 2 * 1024**3 / best(lambda: a @ b),
        "exponentials": len(small) / best(lambda: torch.exp(small, out=exponentials), 30),
        "bandwidth": 2 * source.numel() * 4 / best(lambda: target.copy_(source)),
    }


def alternate(contenders: dict, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of forward and backward of each; a contender returns its outputs and a function that goes backward."""
    times = {name: ([], []) for name in contenders}
    for round_number in range(rounds + 1):
        for name, contender in contenders.items():
            result = []
            forward = seconds(lambda contender=contender, result=result: result.append(contender()))
            backward = seconds(result[0])
            if round_number:  # the first round warms up
                times[name][0].append(forward)
                times[name][1].append(backward)
    return times


def attention_contenders(shape: tuple[int, int, int], length: int, dtype: torch.dtype, table: str) -> dict:
    """Of the table "attention" or "visibility"."""
    heads, kv_heads, width = shape
    q, k, v, grad = (
        torch.randn(1, length, count, width).to(dtype).transpose(1, 2) for count in (heads, kv_heads, kv_heads, heads)
    )
    rows, keys = make_spans(length)

    def contender(function):
        tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

        def forward():
            outputs = function(*tensors)
            return lambda: torch.autograd.grad(outputs, tensors, [grad, *map(torch.ones_like, outputs[1:])])

        return forward

    def sdpa(q, k, v, mask=None):
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True),)

    def with_pooled(attention, pooling, **options):
        pooled = {name: option for name, option in options.items() if name != "key_padding_mask"}  # lse has that

        def function(q, k, v):
            out, lse = attention_with_lse(q, k, v, backend=attention, **options)
            return out, span_attention(q, k, lse, rows, keys, backend=pooling, **pooled)

        return function

    if table == "visibility":
        token, text = torch.arange(length), max(1, length // 8)
        borders = torch.arange(0, length + text, text).clamp(max=length).int()
        distance, window = token[:, None] - token, min(512, length)
        alike = token[:, None] // text == token // text
        return {
            "torch SDPA": contender(sdpa),
            "ours, window 512": contender(with_pooled("native", "native", sliding_window=512)),
            "SDPA, window 512": contender(lambda q, k, v: sdpa(q, k, v, (distance >= 0) & (distance < window))),
            "ours, 8 texts": contender(with_pooled("native", "native", cu_seqlens=borders)),
            "SDPA, 8 texts": contender(lambda q, k, v: sdpa(q, k, v, (distance >= 0) & alike)),
            "ours, half padded": contender(with_pooled("native", "native", key_padding_mask=token[None] < length // 2)),
            "ours, soft-capped": contender(with_pooled("native", "native", softcap=50.0)),
        }
    return {
        "torch SDPA": contender(sdpa),
        "ours": contender(lambda q, k, v: attention_with_lse(q, k, v, backend="native")[:1]),
        "ours with A": contender(with_pooled("native", "native")),
        "aten with A": contender(with_pooled("aten", "torch")),
    }


def span_contenders(shape: tuple[int, int, int], length: int, dtype: torch.dtype) -> dict:
    heads, kv_heads, width = shape
    q, k = (torch.randn(1, length, count, width).to(dtype).transpose(1, 2) for count in (heads, kv_heads))
    _, lse = attention_with_lse(q, k, k, backend="native")
    rows, keys = make_spans(length)

    def contender(backend):
        tensors = [tensor.detach().requires_grad_() for tensor in (q, k, lse)]

        def forward():
            pooled = span_attention(*tensors, rows, keys, backend=backend)
            return lambda: torch.autograd.grad(pooled, tensors, torch.ones_like(pooled))

        return forward

    plan = SpanPlan(rows, keys, length)
    spans, pieces = (plan.row_spans, plan.key_spans), list(plan.pieces(192 * kv_heads // heads))
    inputs = *spans, None, None, None, pieces, width**-0.5, None, True, 1, "sum"

    def kernel():
        pooled = native.span_attention_forward(q, k, lse, *inputs)
        return lambda: native.span_attention_backward(torch.ones_like(pooled), q, k, lse, *inputs)

    return {"torch": contender("torch"), "native": contender("native"), "its kernel": kernel}


def visible_products(length: int) -> int:
    """Pairs of a row and a key column that it sees."""
    _, keys = make_spans(length)
    return sum(length - column for start, end in keys[0].tolist() for column in range(start, end))


def table_row(name: str, length: int, contender: str, times, baseline: str) -> dict:
    forward, backward = (statistics.median(values) for values in times[contender])
    totals = {key: [a + b for a, b in zip(*values, strict=True)] for key, values in times.items()}
    return {
        "shape": name,
        "length": length,
        "contender": contender,
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "least_ms": min(totals[contender]) * 1e3,
        "most_ms": max(totals[contender]) * 1e3,
        "ratio": statistics.median(totals[contender]) / statistics.median(totals[baseline]),
        "forward_ratio": forward / statistics.median(times[baseline][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--output", type=Path, help="also write the rows, the limits and the versions as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    limits = measure_limits()
    about = {**about_this_machine(), "load": os.getloadavg()[0], "dtype": arguments.dtype, **limits}
    print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in about.items()))

    rows = {table: [] for table in arguments.tables}
    for table in [table for table in arguments.tables if table != "span_attention"]:
        print(f"\n{table.capitalize()}: attention, forward and backward; ratio to torch's causal SDPA without A")
        print(f"{'':20} {'T':>6} {'':17} {'fwd ms':>9} {'bwd ms':>9} {'min..max ms':>17} {'ratio':>7}")
        for length in arguments.lengths:
            for name, shape in SHAPES.items():
                times = alternate(attention_contenders(shape, length, dtype, table), arguments.rounds)
                for contender in times:
                    row = table_row(name, length, contender, times, "torch SDPA")
                    rows[table].append(row)
                    spread = f"{row['least_ms']:.1f}..{row['most_ms']:.1f}"
                    print(
                        f"{name:20} {length:6} {contender:17} {row['forward_ms']:9.2f} {row['backward_ms']:9.2f} "
                        f"{spread:>17} {row['ratio']:7.3f}",
                        flush=True,
                    )

    # Once more: whatever else ran on the machine must not make the limits too low.
    limits = {name: max(value, limits[name]) for name, value in measure_limits().items()}
    about |= limits
    if "span_attention" in arguments.tables:
        rows["span_attention"] = print_span_attention(arguments, dtype, limits)
    if arguments.output:
        arguments.output.write_text(json.dumps({"about": about, **rows}, indent=1))


def print_span_attention(arguments, dtype: torch.dtype, limits: dict[str, float]) -> list[dict]:
    """The rows of the second table."""
    rows = []
    print("\nPooled attention alone; shares of its forward: visible pairs, q and lse once")
    print(f"{'':20} {'T':>6} {'':10} {'fwd ms':>9} {'faster':>7} {'bwd ms':>9}  compute  bytes    sum")
    for length in arguments.lengths:
        for name, shape in SHAPES.items():
            heads, _, width = shape
            pairs = heads * visible_products(length)
            computing = pairs * (2 * width / limits["flops"] + 1 / limits["exponentials"])
            moving = heads * length * (width * dtype.itemsize + 4) / limits["bandwidth"]
            times = alternate(span_contenders(shape, length, dtype), 3 * arguments.rounds)
            for contender in times:
                row = table_row(name, length, contender, times, "torch")
                shares = [seconds / row["forward_ms"] * 1e3 for seconds in (computing, moving, computing + moving)]
                row |= dict(zip(("compute_share", "bytes_share", "sum_share"), shares, strict=True))
                rows.append(row)
                print(
                    f"{name:20} {length:6} {contender:10} {row['forward_ms']:9.2f} {1 / row['forward_ratio']:6.1f}x "
                    f"{row['backward_ms']:9.2f} {shares[0]:8.0%} {shares[1]:6.0%} {shares[2]:6.0%}",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    main()
