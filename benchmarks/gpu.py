"""Are the Triton kernels right and fast on this GPU? Checks every one, then measures; ends within 8 minutes.

    python -m benchmarks.gpu                    # one table; writes results/gpu.json
    python -m benchmarks.gpu --tiles            # first says which tiles would be better than the table's
    TRITON_INTERPRET=1 python -m benchmarks.gpu --smoke     # no GPU: tiny shapes on the CPU, times mean nothing

First every op's Triton kernels against the float64 reference on fresh random inputs: a failure ends the run. Then, with
medians over many runs: the cases of `pytest benchmarks` on a layer of Llama-1B in bfloat16, every backend that is here
beside SDPA or plain PyTorch, the Triton kernels against their floor too (`benchmarks.roofline`); which attention engine
"auto" should take on this card, of those that are right (FlexAttention, and flash-attn-4 where it is installed);
flash-colreduce where it is; a training step of Llama-1B's shape with activation checkpointing with and without the
attention loss, the eager form until it runs out of memory, and the longest T that fits.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import roofline
from benchmarks.cases import DIRECTIONS, make_case, one_direction
from benchmarks.cpu_attention import make_spans
from mold.method.loss import MoldLoss
from mold_kernels import (
    _triton,
    attention_lse,
    attention_with_lse,
    layer_mixture_kl,
    reference,
    span_attention,
    tables,
    value_pool,
)
from mold_kernels._triton import tiles
from mold_kernels.attention import ATTENTION_WITH_LSE
from mold_kernels.backends import RUNTIMES
from mold_kernels.spans import span_membership
from mold_kernels.testing import assert_as_accurate_as, random_mask, random_spans

OUTPUT = Path(__file__).parent / "results" / "gpu.json"
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LOGITS_CHUNK = 2048


@dataclass
class Row:
    """One line of the table; milliseconds, GiB. `note` says what the ratio is to, or why there is no number."""

    section: str
    what: str
    length: int
    median: float | None = None
    low: float | None = None
    high: float | None = None
    peak: float | None = None
    ratio: float | None = None
    note: str = ""

    def __str__(self) -> str:
        def number(value, width, digits):
            return f"{value:{width}.{digits}f}" if value is not None else " " * width

        return (
            f"{self.section:10} {self.what:34} {self.length:7} {number(self.median, 9, 3)} "
            f"{number(self.low, 9, 3)} {number(self.high, 9, 3)} {number(self.peak, 7, 2)} "
            f"{number(self.ratio, 7, 3)}  {self.note}"
        )


class Bench:
    """Where things run, what was measured, and how much time is left."""

    def __init__(self, device: str, seconds: float, seed: int):
        self.device, self.end, self.rows = device, time.monotonic() + seconds, []
        self.generator = torch.Generator(device).manual_seed(seed)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def heads(self, count: int, length: int, dim: int, dtype: torch.dtype, batch: int = 1) -> torch.Tensor:
        """[batch, count, length, dim] as a projection leaves it."""
        return self.random(batch, length, count, dim, dtype=dtype).transpose(1, 2)

    def time(self, function: Callable[[], object], seconds: float = 0.3) -> tuple[float, float, float]:
        """(median, 20 % and 80 % quantile) in milliseconds, the first run left out.

        Of what takes much longer than all may, as Triton's interpreter does, the first is enough.
        """
        first, times = self._once(function), []
        if self.device == "cpu" and first > 3e3 * seconds:
            return (first,) * 3
        end, fewest = time.monotonic() + seconds, 5 if self.device == "cuda" else 1
        while len(times) < fewest or (time.monotonic() < end and len(times) < 100):
            times.append(self._once(function))
        times.sort()
        return statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5]

    def _once(self, function):
        if self.device == "cpu":
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row, flush=True)

    def measure(self, section: str, what: str, length: int, prepare: Callable, *arguments, absolute=False) -> Row:
        """A row with the time and peak memory of the function that `prepare(*arguments)` returns.

        Peak is beyond what was there before it ran, or all of it where `absolute`. "OOM" and "no time left" are rows
        too.
        """
        row = Row(section, what, length)
        if time.monotonic() > self.end:
            row.note = "not measured: no time left"
        else:
            gc.collect()
            before = 0
            try:
                function = prepare(*arguments)
                if self.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = 0 if absolute else torch.cuda.memory_allocated()
                row.median, row.low, row.high = self.time(function)
            except torch.OutOfMemoryError:
                row.note = "OOM"
            else:
                if self.device == "cuda":
                    row.peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        self.add(row)
        return row


def compare(bench: Bench, name: str, fast: Callable, slow: Callable, tensors, wide=()) -> None:
    """Values and gradients against the float64 reference; `wide` tensors stay float32 whatever the others are.

    Raises:
        AssertionError: one is too far off.
    """

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        leaves += [t.detach().to(reference.accumulation_dtype(dtype)).requires_grad_() for t in wide]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(
            (o.masked_fill(o.isinf(), 0) * torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape)).sum()
            for o in outputs
        )
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    dtype = tensors[0].dtype
    results = run(fast, dtype), run(slow, dtype), run(slow, torch.float64)
    for index, (a, b, c) in enumerate(zip(*results, strict=True)):
        lost = c.isinf()
        assert_as_accurate_as(
            a.masked_fill(lost, 0),
            b.masked_fill(lost, 0),
            c.masked_fill(lost, 0),
            f"{name}, tensor {index}",
            factor=3,  # of fresh inputs a few large entries may decide
        )
    bench.add(Row("check", f"{name} {str(dtype).removeprefix('torch.')}", tensors[0].shape[-2], note="right"))


def check_all(bench: Bench, length: int) -> None:
    """Every op on fresh inputs against the reference in float64; raises where one is too far off."""
    packed = torch.tensor([0, length // 3, length // 2, length], dtype=torch.int32, device=bench.device)
    cases = [
        (torch.bfloat16, 2, 4, 2, 64, {}),
        (torch.float16, 1, 8, 2, 128, {}),
        (torch.float32, 1, 2, 1, 80, {}),
        (torch.bfloat16, 1, 2, 1, 256, {"softcap": 20.0}),
        (torch.bfloat16, 1, 4, 1, 96, {"sliding_window": length // 4}),
        (torch.float32, 1, 4, 2, 32, {"cu_seqlens": packed, "softcap": 5.0}),
    ]
    for dtype, batch, heads, kv_heads, dim, options in cases:
        q = bench.heads(heads, length, dim, dtype, batch)
        k, v = (bench.heads(kv_heads, length, dim, dtype, batch) for _ in range(2))
        mask = random_mask(torch.Generator().manual_seed(dim), batch, length, "left").to(bench.device)
        for padding in {} if "cu_seqlens" in options else {"key_padding_mask": mask}, {}:
            each = options | padding
            name = " ".join(["D", str(dim), *each])
            compare(
                bench,
                f"attention_with_lse {name}",
                lambda *t, each=each: attention_with_lse(*t, **each, backend="triton"),
                lambda *t, each=each: reference.attention_with_lse(*t, **each),
                (q, k, v),
            )
        compare(
            bench,
            f"attention_lse D {dim}",
            lambda *t, options=options: attention_lse(*t, **options, backend="triton"),
            lambda *t, options=options: reference.attention_lse(*t, **options),
            (q, k),
        )
        generator = torch.Generator().manual_seed(dim)
        spans = [random_spans(generator, batch, count, length).to(bench.device) for count in (7, 12)]
        # Rows are about equally large by few bits, by a span with all their attention, or by a sharp softmax.
        short = torch.cat([spans[1][..., :1], (spans[1][..., :1] + 1).clamp(max=length)], -1)
        reductions = [("sum", spans[1], None), ("max", short, 0.02)][: 1 + (dtype == torch.float32)]
        for padding in {} if "cu_seqlens" in options else {"key_padding_mask": mask}, {}:
            for reduction, keys, scale in reductions:
                seen = options | padding | {"scale": scale}
                lse = reference.attention_lse(q.double(), k.double(), **seen).float()
                each, pair = seen | {"row_reduction": reduction}, (spans[0], keys)
                compare(
                    bench,
                    f"span_attention D {dim} {' '.join([reduction, *options, *padding])}",
                    lambda *t, pair=pair, each=each: span_attention(*t, *pair, **each, backend="triton"),
                    lambda *t, pair=pair, each=each: reference.span_attention(*t, *pair, **each),
                    (q, k),
                    wide=(lse,),
                )
        compare(
            bench,
            f"value_pool D {dim}",
            lambda v, mask=mask: value_pool(v, mask, 1e-6, backend="triton"),
            lambda v, mask=mask: reference.value_pool(v, mask, 1e-6),
            (v,),
        )
    maps = bench.random(6, 3, 20, 33).abs()
    counts = [torch.tensor(values, device=bench.device) for values in ([20, 3, 0], [33, 1, 5])]
    for row_norm in ("softmax", "l1"):
        compare(
            bench,
            f"layer_mixture_kl {row_norm}",
            lambda s, w, norm=row_norm: layer_mixture_kl(maps, s, w, *counts, row_norm=norm, backend="triton"),
            lambda s, w, norm=row_norm: reference.layer_mixture_kl(maps.to(s), s, w, *counts, row_norm=norm),
            (maps[:4].clone(), bench.random(3, 4).softmax(-1)),
        )


def check_engines(bench: Bench, length: int) -> set[str]:
    """The backends of attention_with_lse that are wrong here, or cannot run after all: others' code ends no run."""
    q = bench.heads(4, length, 64, torch.bfloat16)
    k, v = (bench.heads(2, length, 64, torch.bfloat16) for _ in range(2))
    wrong = set()
    for name, line in ATTENTION_WITH_LSE.backends.items():
        if name == "reference" or line.refusal(q, (), needs_gradient=True):
            continue
        try:
            compare(
                bench,
                f"engine {name}",
                lambda *t, name=name: attention_with_lse(*t, backend=name),
                reference.attention_with_lse,
                (q, k, v),
            )
        except Exception as error:  # whatever a package of others raises
            reason = (str(error).splitlines() or [""])[0]
            bench.add(Row("check", f"engine {name}", length, note=f"WRONG: {type(error).__name__}: {reason}"))
            wrong.add(name)
    return wrong


def measure_ops(bench: Bench, shape: roofline.Shape, wrong: set[str]) -> dict[str, float]:
    """Every backend of every op in both directions, without wrong engines, beside the same case in plain PyTorch.

    Returns:
        Milliseconds of forward and backward together, of each backend of attention_with_lse.
    """
    works = roofline.attention(shape) + roofline.span_attention(shape)
    floors = {work.name: 1e3 * work.floor for work in works}
    floors["attention_with_lse_forward"] = floors["attention_forward"]
    floors["attention_with_lse_backward"] = floors["attention_forward"] * 2.5
    floors["span_attention_backward"] = floors["span_attention_backward_dq"] + floors["span_attention_backward_dk"]
    engines: dict[str, list[float | None]] = {}
    for op in tables.OPS:
        case = make_case(op, shape, torch.bfloat16, bench.device)
        for direction in DIRECTIONS:

            def measure(name, run, op=op, case=case, direction=direction):
                what = f"{op.name} {name} {direction}"
                return bench.measure("op", what, shape.length, one_direction, run, case.leaves, direction)

            base = measure("SDPA" if op is ATTENTION_WITH_LSE else "torch", case.baseline)
            # The reference stores T x T, and "torch" is the baseline.
            for name in op.backends:
                if name in ("reference", "torch") or (op is ATTENTION_WITH_LSE and name in wrong):
                    continue
                if (reason := case.refusal(name, direction)) is not None:
                    if bench.device in (RUNTIMES[name].devices or (bench.device,)):
                        note = f"not here: {reason}"
                        bench.add(Row("op", f"{op.name} {name} {direction}", shape.length, note=note))
                    continue
                row = measure(name, lambda case=case, name=name: case.ours(name))
                if row.median and base.median:
                    row.ratio, row.note = row.median / base.median, "of the baseline's time"
                if row.median and name == "triton" and (floor := floors.get(f"{op.name}_{direction}")):
                    row.note += f"; {floor / row.median:.2f} of the floor's speed"
                if op is ATTENTION_WITH_LSE:
                    engines.setdefault(name, []).append(row.median)
    return {name: sum(times) for name, times in engines.items() if len(times) == 2 and all(times)}


def say_engine(bench: Bench, length: int, times: dict[str, float], auto: str) -> None:
    """Which engine "auto" should take on this card, where it takes the one that is named.

    Args:
        bench: what is said becomes a row of it.
        length: of the text that was measured.
        times: milliseconds of each engine that is right here.
        auto: what "auto" takes now.
    """
    if auto not in times:
        bench.add(Row("engine", auto, length, note="auto takes it, and it is not right or was not measured"))
        return
    best = min(times, key=times.__getitem__)
    ratio = times[best] / times[auto]
    if ratio > 0.98:  # nothing that another run would not say otherwise
        best, ratio = auto, 1.0
    should = "auto takes it, rightly" if best == auto else f"auto should take it on this card; it takes {auto}"
    bench.add(Row("engine", best, length, times[best], ratio=ratio, note=should))


def measure_columns(bench: Bench, shape: roofline.Shape) -> None:
    """What every key gets from all rows, head by head: flash-colreduce, and the same by ours."""
    what = "column sums flash-colreduce"
    if importlib.util.find_spec("flash_colreduce") is None:
        note = "not here: the package flash-colreduce is not installed"
        bench.add(Row("columns", what, shape.length, note=note))
        return
    from flash_colreduce import flash_colreduce

    q = bench.heads(shape.heads, shape.length, shape.head_dim, torch.bfloat16)
    k = bench.heads(shape.kv_heads, shape.length, shape.head_dim, torch.bfloat16)
    each_head = k.repeat_interleave(shape.group, 1)  # it has no groups of query heads
    rows = torch.tensor([[[0, shape.length]]], dtype=torch.int32, device=bench.device)
    starts = torch.arange(shape.length, dtype=torch.int32, device=bench.device)
    keys = torch.stack([starts, starts + 1], -1)[None]

    def ours():
        return span_attention(q, k, attention_lse(q, k), rows, keys, heads="all")[:, :, 0]

    def theirs():
        return flash_colreduce(q, each_head, "sum", is_causal=True)

    try:
        expected, found = ours().float(), theirs().float()
    except Exception as error:  # whatever it raises where it cannot run
        bench.add(Row("columns", what, shape.length, note=f"not here: {str(error).splitlines()[0]}"))
        return
    off = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
    mine = bench.measure("columns", "column sums ours, with the lse", shape.length, lambda: ours)
    row = bench.measure("columns", what, shape.length, lambda: theirs)
    row.note = f"{off:.1e} from ours"
    if row.median and mine.median:
        row.ratio, row.note = row.median / mine.median, f"of our time; {row.note}"


def compare_engines(bench: Bench, shapes: list[roofline.Shape]) -> None:
    """All ops at every shape, and which engine is the one to take."""
    wrong = check_engines(bench, 19 if bench.device == "cpu" else 517)
    for shape in shapes:
        times = measure_ops(bench, shape, wrong)
        q = bench.heads(shape.heads, shape.length, shape.head_dim, torch.bfloat16)
        auto = ATTENTION_WITH_LSE.choose("auto", q, needs_gradient=True).name
        say_engine(bench, shape.length, times, auto)
        measure_columns(bench, shape)


class TrainingStep:
    """Forward and backward of one example, cross-entropy in chunks, with or without the attention loss."""

    def __init__(self, config: dict, most: int, device: str):
        torch.manual_seed(0)
        self.device = device
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=most, **config))
        self.model = model.to(torch.bfloat16).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.loss = MoldLoss.for_config(self.model.config).to(device)

    def at(self, contender: str, length: int) -> Callable[[], None]:
        return lambda: self.run(contender, length)

    def run(self, contender: str, length: int) -> None:
        self.model.set_attn_implementation({"none": "sdpa", "ours": "mold", "eager": "eager"}[contender])
        ids = torch.arange(length, device=self.device)[None] % self.model.config.vocab_size
        rows, keys = (spans.to(self.device) for spans in make_spans(length))
        inputs = {"input_ids": ids, "use_cache": False}
        if contender == "ours":
            inputs |= {"row_spans": rows, "key_spans": keys, "value_features": True, "output_attentions": True}
        elif contender == "eager":
            inputs |= {"output_attentions": True}
        out = self.model.model(**inputs)
        loss = 0
        for start in range(0, length - 1, LOGITS_CHUNK):
            target = ids[0, start + 1 : start + 1 + LOGITS_CHUNK]
            states = out.last_hidden_state[0, start : start + len(target)]
            loss = loss + checkpoint(self._cross_entropy, states, target, use_reentrant=False) / (length - 1)
        steps, words = rows.shape[1], keys.shape[1]
        teacher = torch.full((1, self.model.config.num_hidden_layers, steps, words), 0.1, device=self.device)
        counts = [torch.tensor([count], device=self.device) for count in (steps, words)]
        if contender == "ours":
            loss = loss + self.loss(out.attentions, teacher, *counts).loss.mean()
        elif contender == "eager":
            steps_of, words_of = (span_membership(spans, length).to(torch.bfloat16) for spans in (rows, keys))
            pooled = torch.stack([steps_of @ layer.mean(1) @ words_of.mT for layer in out.attentions]).float()
            weights = pooled.new_full((1, len(pooled)), 1 / len(pooled))
            loss = loss + layer_mixture_kl(teacher.transpose(0, 1).contiguous(), pooled, weights, *counts).mean()
        loss.backward()
        self.model.zero_grad()
        self.loss.zero_grad()

    def _cross_entropy(self, states, target):
        return F.cross_entropy(self.model.lm_head(states).float(), target, reduction="sum")


def compare_tiles(bench: Bench, length: int, shape: roofline.Shape) -> None:
    """Which of the table's tile and its neighbours is the fastest, for every attention kernel in bfloat16."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (bench.heads(count, length, shape.head_dim, torch.bfloat16).requires_grad_() for count in heads)
    rows, keys = (spans.to(bench.device) for spans in make_spans(length))

    def flash():
        out, lse = attention_with_lse(q, k, v, backend="triton")
        torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))

    lse = attention_with_lse(q, k, v, backend="triton")[1].detach().requires_grad_()

    def span():
        torch.autograd.grad(span_attention(q, k, lse, rows, keys, backend="triton").sum(), (q, k, lse))

    choose = tiles.table_tile
    for kernel in sorted({name for name, _ in tiles.TABLE}):
        table, times = tiles.choose_tile(kernel, q), {}
        for tile in (table, *tiles.neighbours(table)):
            tiles.table_tile = lambda name, *where, new={kernel: tile}: new.get(name) or choose(name, *where)
            with contextlib.suppress(RuntimeError):  # a tile that does not fit the device
                times[tile] = bench.time(span if kernel.startswith("span") else flash, 0.2)[0]
        tiles.table_tile = choose
        best = min(times, key=times.get)
        note = "the table's" if best == table else f"{best} instead of the table's {table}"
        bench.add(Row("tiles", kernel, length, times[best], ratio=times[best] / times[table], note=note))


def measure_steps(bench: Bench, config: dict, lengths: list[int], longest: list[int]) -> None:
    """Steps with and without the loss, the eager form until OOM, and the longest T of `longest` that fits."""
    step = TrainingStep(config, max(lengths + longest), bench.device)
    eager_fits = True
    for length in lengths:
        base = bench.measure("step", "no attention loss", length, step.at, "none", length, absolute=True)
        for contender in ("ours", "eager") if eager_fits else ("ours",):
            row = bench.measure("step", contender, length, step.at, contender, length, absolute=True)
            if row.median and base.median:
                row.ratio, row.note = row.median / base.median, "of the time without the loss"
                if row.peak and base.peak:
                    row.note += f", memory {row.peak / base.peak:.3f}"
            if contender == "eager" and row.note == "OOM":
                eager_fits = False
    for length in longest:
        if bench.measure("longest", "ours", length, step.at, "ours", length, absolute=True).note == "OOM":
            break


def about(device: str, seed: int) -> dict:
    """Device, driver and versions."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        versions |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver[:1]}
        versions["capability"] = torch.cuda.get_device_capability()
    import triton

    return versions | {"triton": triton.__version__, "seed": seed, "device_type": device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="no measurement begins after so many")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the random inputs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--tiles", action="store_true", help="first look for tiles that are better than the table's")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    device = "cpu" if arguments.smoke else "cuda"
    if (reason := _triton.why_missing()) is not None:
        sys.exit(f"benchmarks.gpu: the Triton kernels cannot run here: {reason}")
    if arguments.smoke and not _triton.INTERPRETED:
        sys.exit("benchmarks.gpu: --smoke needs TRITON_INTERPRET=1")
    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no CUDA device; --smoke runs tiny shapes in Triton's interpreter")
    torch.backends.cuda.matmul.allow_tf32 = False  # the float32 reference is to be float32
    bench = Bench(device, arguments.seconds, arguments.seed)
    facts = about(device, arguments.seed)
    print(json.dumps(facts))
    try:
        check_all(bench, 19 if arguments.smoke else 517)
        if arguments.tiles:
            compare_tiles(bench, 8192, roofline.Shape(8192))
        if arguments.smoke:
            compare_engines(bench, [roofline.Shape(30, 2, 1, 16, 2, 3)])
            measure_steps(bench, TINY, [32], [48])
        else:
            compare_engines(bench, [roofline.Shape(length) for length in (4096, 32768)])
            measure_steps(bench, LLAMA_1B, [4096, 8192, 16384, 32768], [65536, 98304, 131072, 196608])
    finally:
        arguments.output.write_text(json.dumps({"about": facts, "rows": [asdict(row) for row in bench.rows]}, indent=1))
    print(f"\n{'':10} {'':34} {'T':>7} {'median ms':>9} {'20 %':>9} {'80 %':>9} {'GiB':>7} {'ratio':>7}")
    print("\n".join(map(str, bench.rows)))


if __name__ == "__main__":
    main()
