"""What does `mold.watch` cost in a generation on this CPU, beside the same without and beside eager maps?

    python -m benchmarks.watch                                    # 128 tokens behind 2048, SmolLM2-135M's shape
    python -m benchmarks.watch --prompt 512 --tokens 32 --output rows.json
    python -m benchmarks.watch --threads 1                        # where other programs run beside it

A greedy generation through torch's SDPA, float32, random weights. "watch": of every layer the last 64 rows of the
prompt and each generated token, over every key, head by head. "watch mean": the mean of the heads. "watch spans": two
passages of the prompt, heads averaged. "watch two": layers 14 and -1 alone. "eager": `output_attentions=True`, which
needs eager attention and keeps the prompt's T x T maps. Contenders take turns, each first as often as the others;
medians are compared, with the middle half of each one's ratios to the plain generation of its turn, of the time that
passed and of the processor's time, which other programs stretch less. A thread that waits for another counts as busy
there: one thread is exact. "extra ms" is the median of the processor's milliseconds above the plain generation's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mold
from benchmarks.machine import about_this_machine

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
WATCHED = {
    "watch": {},
    "watch mean": {"heads": "mean"},
    "watch spans": {"heads": "mean", "keys": [(2, 6), (10, 30)]},
    "watch two": {"layers": [14, -1]},
}


def make_model(layers: int, positions: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=49152, max_position_embeddings=positions, **SHAPE, **special
    )
    return LlamaForCausalLM(config).eval()


def seconds(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, name: str) -> tuple[float, float]:
    """(passed, of the processor) in a whole generation, the tensors of the watched layers included."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    if name == "eager":
        options |= {"output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation("eager" if name == "eager" else "sdpa")
    begin, used = time.perf_counter(), time.process_time()
    with mold.watch(model, **WATCHED[name]) if name in WATCHED else nullcontext() as seen:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    if seen is not None:
        _ = seen.attention
    return time.perf_counter() - begin, time.process_time() - used


def compared(mine: list[float], plain: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(mine, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(mine)
    extra = statistics.median(one - other for one, other in zip(mine, plain, strict=True))
    ratio = median / statistics.median(plain)
    return {"seconds": mine, "median": median, "ratio": ratio, "low": low, "high": high, "extra": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=[*WATCHED, "eager"], default=[*WATCHED, "eager"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = about_this_machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    model = make_model(arguments.layers, arguments.prompt + arguments.tokens)
    prompt = torch.randint(1, 49152, (1, arguments.prompt))
    names = ["plain", *arguments.contenders]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        seconds(model, prompt[:, :64], 2, name)
    for turn in range(arguments.rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            times[name].append(seconds(model, prompt, arguments.tokens, name))
    print(f"{arguments.tokens} tokens behind {arguments.prompt}, {arguments.layers} layers, {arguments.rounds} rounds")
    heading = f"{'/ plain':>8} {'middle half':>15}"
    print(f"{'':12} {'seconds':>8} {heading} {'processor':>11} {heading} {'extra ms':>9}")
    table = []
    for name in names:
        row: dict[str, Any] = {"contender": name}
        for place, clock in enumerate(("passed", "processor")):
            row[clock] = compared(*([both[place] for both in times[which]] for which in (name, "plain")))
        table.append(row)
        cells = "{median:.2f} {ratio:8.3f} {low:7.3f} {high:7.3f}"
        passed, processor = cells.format(**row["passed"]), cells.format(**row["processor"])
        print(f"{name:12} {passed:>33} {processor:>36} {1000 * row['processor']['extra']:9.0f}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"about": about, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
