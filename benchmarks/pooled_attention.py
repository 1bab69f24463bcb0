"""What does the attention of a few rows to every key cost on this CPU, beside torch's matrix products?

    python -m benchmarks.pooled_attention                                   # 1, 64 and 512 rows over 2k to 32k keys
    python -m benchmarks.pooled_attention --keys 4096 --rows 64 --output rows.json

The rows are a cache's last, the keys lie as a cache has them. torch: one product q k^T for the heads that share a key
head, then the mask where rows are keys, softmax and the mean over heads. "torch, given lse" exponentiates in place with
a log-sum-exp that a model's own attention has, and so does ours, `span_attention` without key spans; "with its lse" it
makes that too. "torch's product" is q k^T alone: it reads the keys once and makes the scores, without which nothing can
be pooled; "bounds" says in how many times what the machine's rates allow for that, whichever takes longer: to read the
keys, or the FLOPs of the scores at the rate of a large product. "words": 32 key words of two tokens in place of every
key, which read those keys alone; torch gathers them, and is what ours is compared with. Extra memory is the peak of
resident memory above what was there before, the result included, asked of the system in a process of its own.
Contenders take turns; medians are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import statistics
from pathlib import Path

import torch

from benchmarks.cpu_attention import seconds
from benchmarks.machine import about_this_machine
from mold_kernels import SpanPlan, attention_lse, span_attention

HEADS, KV_HEADS, WIDTH = 9, 3, 64
WORDS = 32
CONTENDERS = "torch", "torch, given lse", "torch's product", "ours", "ours with its lse", "torch, words", "ours, words"


def make_contenders(rows: int, keys: int, heads: str) -> dict:
    """Functions that return the pooled attention [1, rows, keys], or [1, Hq, rows, keys] with heads "all".

    Those named "words" have `WORDS` columns in place of the keys.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, rows, HEADS, WIDTH, generator=generator).transpose(1, 2)
    k = torch.randn(1, KV_HEADS, keys, WIDTH, generator=generator)
    spans = torch.stack([torch.arange(rows), torch.arange(rows) + 1], 1)[None].int()
    lse = attention_lse(q, k)
    plan, hidden = SpanPlan(spans, None, rows, keys), torch.ones(rows, rows, dtype=torch.bool).triu(1)
    # Before every row, so that all of them see every word.
    starts = torch.linspace(0, keys - rows - 2, WORDS).int()
    words = torch.stack([starts, starts + 2], 1)[None]
    word_plan, tokens = SpanPlan(spans, words, rows, keys), torch.stack([starts, starts + 1], 1).flatten()

    def product(k=k):
        return ((q * WIDTH**-0.5).reshape(1, KV_HEADS, -1, WIDTH) @ k.mT).view(1, HEADS, rows, -1)

    def words_by_torch():
        maps = product(k[:, :, tokens]).sub_(lse[..., None]).exp_().unflatten(-1, (-1, 2)).sum(-1)
        return maps.mean(1) if heads == "mean" else maps

    def by_torch(given_lse):
        scores = product()
        scores[..., -rows:].masked_fill_(hidden, -torch.inf)
        maps = scores.sub_(lse[..., None]).exp_() if given_lse else scores.softmax(-1)
        return maps.mean(1) if heads == "mean" else maps

    contenders = (
        lambda: by_torch(False),
        lambda: by_torch(True),
        product,
        lambda: span_attention(q, k, lse, spans, None, heads=heads, plan=plan),
        lambda: span_attention(q, k, attention_lse(q, k), spans, None, heads=heads, plan=plan),
        words_by_torch,
        lambda: span_attention(q, k, lse, spans, words, heads=heads, plan=word_plan),
    )
    return dict(zip(CONTENDERS, contenders, strict=True))


def bound(rows: int, keys: int) -> float:
    """Seconds that it takes at least to read the keys, or to make the scores."""
    k, square = torch.randn(KV_HEADS * keys * WIDTH), torch.randn(1024, 1024)
    read, product = (min(seconds(function) for _ in range(5)) for function in (k.sum, lambda: square @ square))
    return max(read, product * HEADS * rows * keys * WIDTH / 1024**3)


def extra_memory(rows: int, keys: int, heads: str, name: str) -> int:
    """Bytes of the contender's first call at its peak, above what was resident before."""
    function = make_contenders(rows, keys, heads)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def measure(contenders: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            times[name].append(seconds(function))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[2048, 4096, 8192, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = about_this_machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'keys':>6} {'rows':>5} {'heads':6} {'':18} {'ms':>9} {'faster':>7} {'bounds':>7}", end=" ")
    print(f"{'extra MiB':>10} {'result MiB':>10}")
    table, processes = [], multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "mold_kernels"])  # imports take seconds
    for keys, rows, heads in itertools.product(arguments.keys, arguments.rows, ("mean", "all")):
        times = measure(make_contenders(rows, keys, heads), arguments.rounds)
        least, best_of_torch = bound(rows, keys), min(times["torch"], times["torch, given lse"])
        for name in CONTENDERS:
            with processes.Pool(1) as pool:
                extra = pool.apply(extra_memory, (rows, keys, heads, name))
            words = name.endswith("words")
            result = rows * (WORDS if words else keys) * 4 * (HEADS if heads == "all" else 1)
            row = {"keys": keys, "rows": rows, "heads": heads, "contender": name, "ms": times[name] * 1e3}
            of_torch = times["torch, words"] if words else best_of_torch
            row |= {"faster": of_torch / times[name], "bounds": times[name] / least}
            row |= {"extra_bytes": extra, "result_bytes": result}
            table.append(row)
            print(
                f"{keys:6} {rows:5} {heads:6} {name:18} {row['ms']:9.2f} {row['faster']:6.1f}x {row['bounds']:7.2f} "
                f"{extra / 2**20:10.1f} {result / 2**20:10.1f}",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps({"about": about, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
