"""What does the attention loss add to a training step? SmolLM2-135M's shape on the CPU.

none: torch's SDPA, no attention loss; plain: the "mold" attention, no attention loss; ours: with it; eager: T x T maps.

    python -m benchmarks.training_step                  # the table: T = 512, 1024, 2048
    python -m benchmarks.training_step --lengths 256    # quicker
    python -m benchmarks.training_step --bf16 --contenders none ours          # bfloat16 autocast
    python -m benchmarks.training_step --bf16 --contenders none ours --shape gemma3-270m --lengths 2048 4096
    python -m benchmarks.training_step --checkpointing --lengths 16384 --peak-of ours    # a long rationale
    python -m benchmarks.training_step --checkpointing --lengths 16384 --contenders none ours --paragraphs \
        --shape smollm2-8-layers --bf16 --rounds 2

A step is forward and backward of cross-entropy (with the attention loss where there is one), batch 1, float32 weights
drawn at random; no optimizer, which would only make the ratios smaller. The contenders take turns in one process and
their medians are compared; peak memory is that of a fresh process that runs two steps of one contender.
--checkpointing makes activations again in the backward pass and takes cross-entropy a chunk of tokens at a time.
--paragraphs has steps and key words as of step_unit "paragraph" and key_scope "question".
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from benchmarks.machine import about_this_machine
from mold.data.examples import RATIONALE
from mold.method.loss import MoldLoss, region_cross_entropy
from mold.training.chunked_cross_entropy import chunked_cross_entropy
from mold_kernels import reference
from mold_kernels.spans import span_membership

CONTENDERS = {"none": "sdpa", "plain": "mold", "ours": "mold", "eager": "eager"}
SHAPES = {
    "smollm2-135m": {
        "config": LlamaConfig,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "smollm2-8-layers": {
        "config": LlamaConfig,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "gemma3-270m": {  # a window of 512 tokens in five layers of six
        "config": Gemma3TextConfig,
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "tiny": {
        "config": LlamaConfig,
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TEACHER_LAYERS = 30
# Sentences and numbers of GSM8K's human rationales: 4.6 steps, 16 numbers in about 210 tokens. Paragraphs are assumed.
TOKENS_A_STEP, TOKENS_A_KEY_WORD, TOKENS_OF_A_QUESTION = {"sentence": 45, "paragraph": 160}, 13, 256


class TrainingStep:
    """Forward and backward of one example of T tokens."""

    def __init__(self, shape: str, length: int, checkpointing: bool, bf16: bool, paragraphs: bool):
        torch.manual_seed(0)
        options = {"max_position_embeddings": length, **SHAPES[shape]}
        self.model = AutoModelForCausalLM.from_config(options.pop("config")(**options)).train()
        self.bf16 = bf16
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.loss = MoldLoss.for_config(self.model.config)
        self.ids = torch.randint(self.model.config.vocab_size, (1, length))
        self.regions = torch.full((1, length), RATIONALE)
        unit, scope = ("paragraph", min(length, TOKENS_OF_A_QUESTION)) if paragraphs else ("sentence", length)
        steps, keys = max(2, length // TOKENS_A_STEP[unit]), max(2, scope // TOKENS_A_KEY_WORD)
        borders = torch.linspace(0, length, steps + 1).int()
        self.rows = torch.stack([borders[:-1], borders[1:]], -1)[None]
        starts = torch.linspace(1, scope - 3, keys).int()
        self.keys = torch.stack([starts, starts + 1 + torch.arange(keys) % 2], -1)[None].int()
        self.counts = torch.tensor([steps]), torch.tensor([keys])
        self.teacher = torch.rand(1, TEACHER_LAYERS, steps, keys)

    def run(self, contender: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self._forward(contender)
        loss.backward()
        self.model.zero_grad()
        self.loss.zero_grad()

    def _forward(self, contender: str) -> torch.Tensor:
        self.model.set_attn_implementation(CONTENDERS[contender])
        inputs = {"input_ids": self.ids, "use_cache": False}
        model = self.model.model if self.checkpointing else self.model  # without or with the head
        if contender == "ours":
            spans = {"row_spans": self.rows, "key_spans": self.keys, "value_features": True}
            out = model(**inputs, **spans, output_attentions=True)
            attention = self.loss(out.attentions, self.teacher, *self.counts).loss
        elif contender == "eager":
            values = []
            hooks = [
                layer.self_attn.v_proj.register_forward_hook(lambda m, a, output: values.append(output))
                for layer in self.model.model.layers
            ]
            out = self.model(**inputs, output_attentions=True)
            for hook in hooks:
                hook.remove()
            rows, keys = (span_membership(spans, len(self.ids[0])).float() for spans in (self.rows, self.keys))
            pooled = torch.stack([rows @ layer.mean(1) @ keys.mT for layer in out.attentions])
            normalised = [v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6) for v in values]
            weights = self.loss.router([v.sum(1) for v in normalised])
            attention = reference.layer_mixture_kl(self.teacher.transpose(0, 1), pooled, weights, *self.counts)
        else:
            out = model(**inputs)
        if self.checkpointing:
            hidden, targets = out.last_hidden_state[0, :-1], self.ids[0, 1:]
            loss = chunked_cross_entropy(hidden, self.model.lm_head.weight, targets).mean()
        else:
            loss = region_cross_entropy(out.logits, self.ids, self.regions)[0] / (len(self.ids[0]) - 1)
        if contender in ("ours", "eager"):
            loss = loss + attention.mean()
        return loss


def peak_memory(shape: str, length: int, contender: str, flags: dict[str, bool]) -> float | None:
    """Peak resident GiB of a fresh process that runs two steps; None if it ran out of memory."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--shape", shape, "--lengths", str(length)]
    command += [f"--{name}" for name, given in flags.items() if given]
    done = subprocess.run([*command, "--peak-of", contender], capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def measured_times(step: TrainingStep, contenders: list[str], rounds: int) -> dict[str, list[float]]:
    times = {contender: [] for contender in contenders}
    for round_number in range(rounds + 1):
        for contender in contenders:
            gc.collect()
            start = time.perf_counter()
            step.run(contender)
            if round_number:  # the first round warms up
                times[contender].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="none is needed")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--steps", type=int, default=2, help="of --peak-of")
    parser.add_argument("--checkpointing", action="store_true", help="not eager")
    parser.add_argument("--paragraphs", action="store_true", help="as steps, and key words of the question alone")
    parser.add_argument("--peak-of", choices=CONTENDERS, help="run steps, print seconds of each and peak memory in GiB")
    parser.add_argument("--output", type=Path, help="also write the rows and the versions as JSON")
    arguments = parser.parse_args()
    if arguments.checkpointing and "eager" in ([arguments.peak_of] if arguments.peak_of else arguments.contenders):
        parser.error("--checkpointing: is given, must not be with eager, whose forward is another")
    flags = {name: getattr(arguments, name) for name in ("checkpointing", "bf16", "paragraphs")}
    if arguments.peak_of:
        step = TrainingStep(arguments.shape, arguments.lengths[0], **flags)
        for _ in range(arguments.steps):
            start = time.perf_counter()
            step.run(arguments.peak_of)
            print(f"{time.perf_counter() - start:.2f} s", flush=True)
        # Not getrusage: its maximum is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20)
        return
    rows = []
    dtype = "bfloat16 autocast" if arguments.bf16 else "float32"
    print(f"{arguments.shape}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'T':>6} {'':6} {'median s':>9} {'min..max s':>14} {'time ratio':>11} {'peak GiB':>9} {'memory ratio':>13}")
    for length in arguments.lengths:
        step = TrainingStep(arguments.shape, length, **flags)
        times = measured_times(step, arguments.contenders, arguments.rounds)
        del step
        peaks = {name: peak_memory(arguments.shape, length, name, flags) for name in times}
        for contender in times:
            median, peak = statistics.median(times[contender]), peaks[contender]
            row = {
                "length": length,
                "contender": contender,
                "seconds": times[contender],
                "time_ratio": median / statistics.median(times["none"]),
                "peak_gib": peak,
                "memory_ratio": peak / peaks["none"] if peak and peaks["none"] else None,
            }
            rows.append(row)
            spread = f"{min(times[contender]):.2f}..{max(times[contender]):.2f}"
            memory = f"{peak:9.2f} {row['memory_ratio']:13.3f}" if peak else f"{'OOM':>9} {'':13}"
            print(f"{length:6} {contender:6} {median:9.3f} {spread:>14} {row['time_ratio']:11.3f} {memory}", flush=True)
    if arguments.output:
        about = {**about_this_machine(), "transformers": transformers.__version__}
        result = {"about": about, "shape": arguments.shape, "dtype": dtype, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
