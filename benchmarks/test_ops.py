"""How fast is every backend of every op, beside plain PyTorch, and what memory does it take?

    python -m pytest benchmarks                                         # measures all that can run here
    python -m pytest benchmarks -k "span_attention and native"
    python -m pytest benchmarks --benchmark-autosave                    # then: pytest-benchmark compare
    python -m pytest benchmarks --benchmark-disable                     # tiny shapes, once each: do they run?

Ops and backends are those of `mold_kernels.tables`. The baseline runs before every round, so that both meet the same
machine: torch's SDPA for `attention_with_lse`, the backend "torch" for the other ops. In `extra_info`: `ratio`, the
median time over the baseline's, and the most memory in bytes that one more run takes: resident memory on a CPU, so that
kernels' own buffers count, allocated memory on a GPU. Backward is the backward pass alone.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mold_kernels
from benchmarks.cpu_attention import make_spans
from mold_kernels import SpanPlan, _triton, tables
from mold_kernels.testing import random_qkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 9, 3, 64, 30  # SmolLM2-135M's
LENGTH = 4096 if DEVICE == "cuda" else 1024
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """An op on tensors that need gradients: `ours` takes the backend's name, `baseline` nothing."""

    leaves: tuple[torch.Tensor, ...]
    ours: Callable[[str], torch.Tensor]
    baseline: Callable[[], torch.Tensor]


def attention_with_lse_case(length: int) -> Case:
    q, k, v = leaves = make_qkv(length)
    return Case(
        leaves,
        lambda backend: mold_kernels.attention_with_lse(q, k, v, backend=backend)[0],
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )


def attention_lse_case(length: int) -> Case:
    q, k, _ = make_qkv(length)
    return against_torch((q, k), lambda backend: mold_kernels.attention_lse(q, k, backend=backend))


def span_attention_case(length: int) -> Case:
    q, k, _ = make_qkv(length)
    with torch.no_grad():
        lse = mold_kernels.attention_lse(q, k)
    rows, keys = (spans.to(DEVICE) for spans in make_spans(length))
    plan = SpanPlan(rows, keys, length)  # a training step makes one for all layers
    leaves = q, k, lse.requires_grad_()
    return against_torch(
        leaves, lambda backend: mold_kernels.span_attention(*leaves, rows, keys, plan=plan, backend=backend)
    )


def value_pool_case(length: int) -> Case:
    _, _, v = make_qkv(length)
    mask = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
    return against_torch((v,), lambda backend: mold_kernels.value_pool(v, mask, 1e-6, backend=backend))


def layer_mixture_kl_case(length: int) -> Case:
    steps, keys = (spans.shape[1] for spans in make_spans(length))
    teacher, student = torch.rand(2, LAYERS, 1, steps, keys, device=DEVICE)
    weights = torch.full((1, LAYERS), 1 / LAYERS, device=DEVICE)
    counts = (torch.tensor([count], device=DEVICE) for count in (steps, keys))
    inputs = teacher, student.requires_grad_(), weights.requires_grad_(), *counts
    return against_torch(inputs[1:3], lambda backend: mold_kernels.layer_mixture_kl(*inputs, backend=backend))


def against_torch(leaves: tuple[torch.Tensor, ...], ours: Callable[[str], torch.Tensor]) -> Case:
    return Case(leaves, ours, lambda: ours("torch"))


def make_qkv(length: int) -> list[torch.Tensor]:
    tensors = random_qkv(torch.Generator().manual_seed(0), 1, HEADS, KV_HEADS, length, HEAD_DIM, DTYPE)
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in tables.OPS for name in op.backends]
)
def test_op(benchmark, op, backend, direction):
    measures = not benchmark.disabled
    case = globals()[f"{op.name}_case"](LENGTH if measures else 64)
    reason = op.backends[backend].refusal(case.leaves[0], (), needs_gradient=direction == "backward")
    if measures and backend == "triton" and _triton.INTERPRETED:
        reason = "triton: times in the interpreter mean nothing"
    if reason is not None:
        pytest.skip(reason)

    contenders = [one_direction(run, case.leaves, direction) for run in (lambda: case.ours(backend), case.baseline)]
    ours, baseline = contenders
    for output in ours():
        assert output.isfinite().all()
    times = []

    def timed_baseline():
        start = time.perf_counter()
        baseline()
        times.append(time.perf_counter() - start)

    benchmark.group = f"{op.name} {direction}"
    benchmark.pedantic(ours, setup=timed_baseline, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if measures:
        benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "baseline": statistics.median(times[1:]),  # the first warms up
            "ratio": benchmark.stats.stats.median / statistics.median(times[1:]),
            "peak_bytes": peak_bytes(ours),
            "baseline_peak_bytes": peak_bytes(baseline),
        }


def one_direction(run: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], direction: str) -> Callable:
    """A function that runs one direction to its end and returns a tuple of what it made."""

    def forward():
        with torch.no_grad():
            return (run(),)

    def backward():
        return torch.autograd.grad(output, leaves, upstream, retain_graph=True)

    if direction == "backward":
        output = run()
        upstream = torch.ones_like(output)
    function = forward if direction == "forward" else backward

    def to_its_end():
        outputs = function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return outputs

    return to_its_end


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory beyond what is there that `function` takes."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts anew
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
