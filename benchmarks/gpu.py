"""Are the Triton kernels right and fast on this GPU? Checks every one, then measures; ends within 8 minutes.

    python -m benchmarks.gpu                    # one table; writes results/gpu.json
    python -m benchmarks.gpu --tiles            # first says which tiles would be better than the table's
    TRITON_INTERPRET=1 python -m benchmarks.gpu --smoke     # no GPU: tiny shapes on the CPU, times mean nothing

First every op against the float64 reference on fresh random inputs: a failure ends the run. Then, with medians over
many runs: each op against its floor (`benchmarks.roofline`), the flash forward and backward against torch's SDPA and
FlexAttention, a training step of Llama-1B's shape in bfloat16 with activation checkpointing with and without the
attention loss, the eager form until it runs out of memory, and the longest T that fits.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
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
from mold.method.loss import MoldLoss
from mold_kernels import (
    _triton,
    attention_lse,
    attention_with_lse,
    layer_mixture_kl,
    reference,
    span_attention,
    value_pool,
)
from mold_kernels._triton import tiles
from mold_kernels.spans import span_membership
from mold_kernels.testing import assert_as_accurate_as, random_mask, random_spans

OUTPUT = Path(__file__).parent / "results" / "gpu.json"
TOKENS_A_STEP, TOKENS_A_KEY_WORD = roofline.TOKENS_A_STEP, roofline.TOKENS_A_KEY_WORD
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
        """(median, 20 % and 80 % quantile) in milliseconds, the first runs left out."""
        times = []
        function()
        end = time.monotonic() + seconds
        while len(times) < 5 or (time.monotonic() < end and len(times) < 100):
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

    def measure(self, section: str, what: str, length: int, function: Callable[[], object], **more) -> Row:
        """A row with the time and peak memory of `function`; "OOM" and "no time left" are rows too."""
        row = Row(section, what, length)
        if time.monotonic() > self.end:
            row.note = "not measured: no time left"
        else:
            gc.collect()
            before = 0
            if self.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                row.median, row.low, row.high = self.time(function)
            except torch.OutOfMemoryError:
                row.note = "OOM"
            else:
                if self.device == "cuda":
                    absolute = more.pop("absolute", False)
                    row.peak = (torch.cuda.max_memory_allocated() - (0 if absolute else before)) / 2**30
                for name, value in more.items():
                    setattr(row, name, value(row) if callable(value) else value)
        self.rows.append(row)
        print(row, flush=True)
        return row


def check_all(bench: Bench, length: int) -> None:
    """Every op on fresh inputs against the reference in float64; raises where one is too far off."""

    def compare(name, fast, slow, tensors, wide=()):
        """Values and gradients; `wide` tensors stay float32 whatever the others are."""

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
                a.masked_fill(lost, 0), b.masked_fill(lost, 0), c.masked_fill(lost, 0), f"{name}, tensor {index}"
            )
        bench.rows.append(Row("check", f"{name} {str(dtype).removeprefix('torch.')}", length, note="right"))
        print(bench.rows[-1], flush=True)

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
                f"attention_with_lse {name}",
                lambda *t, each=each: attention_with_lse(*t, **each, backend="triton"),
                lambda *t, each=each: reference.attention_with_lse(*t, **each),
                (q, k, v),
            )
        compare(
            f"attention_lse D {dim}",
            lambda *t, options=options: attention_lse(*t, **options, backend="triton"),
            lambda *t, options=options: reference.attention_lse(*t, **options),
            (q, k),
        )
        generator = torch.Generator().manual_seed(dim)
        spans = [random_spans(generator, batch, count, length).to(bench.device) for count in (7, 12)]
        lse = reference.attention_lse(q.double(), k.double(), **options).float()
        compare(
            f"span_attention D {dim} {' '.join(options)}",
            lambda *t, spans=spans, options=options: span_attention(*t, *spans, **options, backend="triton"),
            lambda *t, spans=spans, options=options: reference.span_attention(*t, *spans, **options),
            (q, k),
            wide=(lse,),
        )
        compare(
            f"value_pool D {dim}",
            lambda v, mask=mask: value_pool(v, mask, 1e-6, backend="triton"),
            lambda v, mask=mask: reference.value_pool(v, mask, 1e-6),
            (v,),
        )
    maps = bench.random(6, 3, 20, 33).abs()
    counts = [torch.tensor(values, device=bench.device) for values in ([20, 3, 0], [33, 1, 5])]
    for row_norm in ("softmax", "l1"):
        compare(
            f"layer_mixture_kl {row_norm}",
            lambda s, w, norm=row_norm: layer_mixture_kl(maps, s, w, *counts, row_norm=norm, backend="triton"),
            lambda s, w, norm=row_norm: reference.layer_mixture_kl(maps.to(s), s, w, *counts, row_norm=norm),
            (maps[:4].clone(), bench.random(3, 4).softmax(-1)),
        )


def text_spans(length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and key words as long and as many as in `benchmarks.roofline`; int32 [1, S, 2] and [1, M, 2]."""
    steps, keys = max(2, length // TOKENS_A_STEP), max(2, length // TOKENS_A_KEY_WORD)
    borders = torch.linspace(0, length, steps + 1).int()
    starts = torch.linspace(0, length - 3, keys).int()
    words = torch.stack([starts, starts + 1 + torch.arange(keys) % 2], -1)
    return torch.stack([borders[:-1], borders[1:]], -1)[None].to(device), words[None].int().to(device)


def measure_ops(bench: Bench, length: int, shape: roofline.Shape) -> None:
    """Each op against its floor, the flash kernels against torch's."""
    dtype = torch.bfloat16
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (bench.heads(count, length, shape.head_dim, dtype).requires_grad_() for count in heads)
    rows, keys = text_spans(length, bench.device)
    floors = {work.name: 1e3 * work.floor for work in roofline.attention(shape) + roofline.span_attention(shape)}
    floors["attention_backward"] = floors["attention_forward"] * 2.5
    floors["span_attention_backward"] = floors["span_attention_backward_dq"] + floors["span_attention_backward_dk"]

    def against_floor(name):
        return {"ratio": lambda row: floors[name] / row.median, "note": "of the floor"}

    def compare(name, forward):
        with torch.no_grad():
            first = bench.measure("flash", f"{name} forward", length, lambda: forward(q, k, v))
        out = forward(q, k, v)
        out = out[0] if isinstance(out, tuple) else out
        upstream = torch.randn_like(out)
        second = bench.measure(
            "flash",
            f"{name} backward",
            length,
            lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
        )
        return first, second

    ours = compare("triton", lambda q, k, v: attention_with_lse(q, k, v, backend="triton"))
    for row, name in zip(ours, ("attention_forward", "attention_backward"), strict=True):
        row.ratio, row.note = floors[name] / row.median if row.median else None, "of the floor"
    others = {
        "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "flex": lambda q, k, v: attention_with_lse(q, k, v, backend="flex"),
    }
    if bench.device == "cpu":
        del others["flex"]  # has no gradient there
    for name, forward in others.items():
        for mine, row in zip(ours, compare(name, forward), strict=True):
            if mine.median and row.median:
                row.ratio, row.note = row.median / mine.median, f"of {name}'s speed has the Triton kernel"

    with torch.no_grad():
        lse = attention_with_lse(q, k, v, backend="triton")[1]
        bench.measure("op", "attention_lse forward", length, lambda: attention_lse(q, k, backend="triton"))
        bench.measure(
            "op", "span_attention forward", length,
            lambda: span_attention(q, k, lse, rows, keys, backend="triton"), **against_floor("span_attention_forward"),
        )  # fmt: skip
        mask = torch.ones(1, length, dtype=torch.bool, device=bench.device)
        bench.measure("op", "value_pool forward", length, lambda: value_pool(v, mask, 1e-6, backend="triton"))
    lse = lse.detach().requires_grad_()
    pooled = span_attention(q, k, lse, rows, keys, backend="triton")
    upstream = torch.randn_like(pooled)
    bench.measure(
        "op", "span_attention backward", length,
        lambda: torch.autograd.grad(pooled, (q, k, lse), upstream, retain_graph=True),
        **against_floor("span_attention_backward"),
    )  # fmt: skip
    student = bench.random(shape.layers, 1, rows.shape[1], keys.shape[1]).abs().requires_grad_()
    teacher = student.detach().repeat(2, 1, 1, 1)
    weights = torch.full((1, shape.layers), 1 / shape.layers, device=bench.device, requires_grad=True)
    counts = [torch.tensor([count], device=bench.device) for count in pooled.shape[1:]]
    loss = layer_mixture_kl(teacher, student, weights, *counts, backend="triton")
    with torch.no_grad():
        bench.measure(
            "op", "layer_mixture_kl forward", length,
            lambda: layer_mixture_kl(teacher, student, weights, *counts, backend="triton"),
        )  # fmt: skip
    bench.measure(
        "op", "layer_mixture_kl backward", length,
        lambda: torch.autograd.grad(loss.sum(), (student, weights), retain_graph=True),
    )  # fmt: skip


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

    def run(self, contender: str, length: int) -> None:
        self.model.set_attn_implementation({"none": "sdpa", "ours": "mold", "eager": "eager"}[contender])
        ids = torch.arange(length, device=self.device)[None] % self.model.config.vocab_size
        rows, keys = text_spans(length, self.device)
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
    rows, keys = text_spans(length, bench.device)

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
        bench.rows.append(Row("tiles", kernel, length, times[best], ratio=times[best] / times[table], note=note))
        print(bench.rows[-1], flush=True)


def measure_steps(bench: Bench, config: dict, lengths: list[int], longest: list[int]) -> None:
    """Steps with and without the loss, the eager form until OOM, and the longest T of `longest` that fits."""
    step = TrainingStep(config, max(lengths + longest), bench.device)
    eager_fits = True
    for length in lengths:
        base = bench.measure("step", "no attention loss", length, lambda n=length: step.run("none", n), absolute=True)
        for contender in ("ours", "eager") if eager_fits else ("ours",):
            row = bench.measure("step", contender, length, lambda n=length, c=contender: step.run(c, n), absolute=True)
            if row.median and base.median:
                row.ratio, row.note = row.median / base.median, "of the time without the loss"
                if row.peak and base.peak:
                    row.note += f", memory {row.peak / base.peak:.3f}"
            if contender == "eager" and row.note == "OOM":
                eager_fits = False
    for length in longest:
        if bench.measure("longest", "ours", length, lambda n=length: step.run("ours", n), absolute=True).note == "OOM":
            break


def about(device: str, seed: int) -> dict:
    """Device, driver and versions."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        versions |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver[:1]}
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
            measure_ops(bench, 30, roofline.Shape(30, 2, 1, 16, 2))
            measure_steps(bench, TINY, [32], [48])
        else:
            for length in (4096, 32768):
                measure_ops(bench, length, roofline.Shape(length))
            measure_steps(bench, LLAMA_1B, [4096, 8192, 16384, 32768], [65536, 98304, 131072, 196608])
    finally:
        arguments.output.write_text(json.dumps({"about": facts, "rows": [asdict(row) for row in bench.rows]}, indent=1))
    print(f"\n{'':10} {'':34} {'T':>7} {'median ms':>9} {'20 %':>9} {'80 %':>9} {'GiB':>7} {'ratio':>7}")
    print("\n".join(map(str, bench.rows)))


if __name__ == "__main__":
    main()
