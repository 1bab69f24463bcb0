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
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import DIRECTIONS, make_case, one_direction
from benchmarks.roofline import Shape
from mold_kernels import _triton, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPE = Shape(4096 if DEVICE == "cuda" else 1024, 9, 3, 64, layers=30, teacher_layers=30)  # SmolLM2-135M's
ROUNDS = 9


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in tables.OPS for name in op.backends]
)
def test_op(benchmark, op, backend, direction):
    measures = not benchmark.disabled
    case = make_case(op, SHAPE if measures else replace(SHAPE, length=64), DTYPE, DEVICE)
    reason = case.refusal(backend, direction)
    if measures and backend == "triton" and _triton.INTERPRETED:
        reason = "triton: times in the interpreter mean nothing"
    if reason is not None:
        pytest.skip(reason)

    ours, baseline = (
        to_its_end(one_direction(run, case.leaves, direction)) for run in (lambda: case.ours(backend), case.baseline)
    )
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


def to_its_end(function: Callable[[], tuple]) -> Callable[[], tuple]:
    """The function, which waits for the device."""

    def until_it_is_done():
        outputs = function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return outputs

    return until_it_is_done


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
