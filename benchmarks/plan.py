"""Is `mold plan` right? Predicted against measured peak memory and time of real training steps on this machine.

    python -m benchmarks.plan             # every case; exits with 1 if a peak is off by more than 15 %
    python -m benchmarks.plan --cases 0 3

Each case trains some steps of MoldTrainer in fresh processes (the optimizer's state is there from the second on), on a
model of random weights and one text of exactly T tokens. One process of two steps is for its highest resident memory:
it gives every block back at once (keep_freed_memory=False, MALLOC_MMAP_THRESHOLD_), for otherwise it holds more than
the live tensors. Another one is for the time: the median of its third to last step, for the first ones touch memory
that they never had. With eager attention there is no MoldTrainer: the loop there pools the T x T maps itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from mold.data.encoding import EncodedExample
from mold.data.examples import RATIONALE
from mold.plan import GIB, Setup, plan_step, this_machine
from mold.training.config import MoldConfig
from mold.training.host_memory import freed_memory_kept
from mold.training.trainer import MoldTrainer

_TEACHER_LAYERS = 4
TOLERANCE = 0.15
_LLAMA = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 65536}
SHAPES = {
    "smollm2-135m": _LLAMA
    | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"tie_word_embeddings": True},
    "llama-8-layers": _LLAMA
    | {"vocab_size": 32000, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8},
    "qwen3-6-layers": {"model_type": "qwen3", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536}
    | {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "gpt2-6-layers": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 6, "n_head": 12}
    | {"n_positions": 4096, "attn_pdrop": 0.0},
}
_LONG = Setup(4096, activation_checkpointing=True, cross_entropy="chunked")
_LONGER = dataclasses.replace(_LONG, length=16384, num_steps=102, num_key_words=16)
_LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
CASES = [
    ("llama-8-layers", Setup(512)),
    ("llama-8-layers", Setup(2048)),
    ("llama-8-layers", Setup(2048, activation_checkpointing=True)),
    ("llama-8-layers", Setup(2048, cross_entropy="chunked")),
    ("llama-8-layers", _LONG),
    ("llama-8-layers", dataclasses.replace(_LONG, num_steps=1024, num_key_words=2048)),
    ("llama-8-layers", dataclasses.replace(_LONGER, length=8192)),
    ("llama-8-layers", _LONGER),
    ("llama-8-layers", dataclasses.replace(_LONGER, mlp_chunk_size=1024)),
    ("llama-8-layers", Setup(2048, bf16=True)),
    ("llama-8-layers", Setup(2048, dtype="bfloat16")),
    ("llama-8-layers", Setup(2048, peft_config=_LORA, cross_entropy="chunked")),
    ("llama-8-layers", Setup(512, per_device_train_batch_size=4)),
    ("llama-8-layers", Setup(1024, gradient_accumulation_steps=2)),
    ("llama-8-layers", Setup(1024, optim="sgd")),
    ("llama-8-layers", Setup(2048, attention="eager")),
    ("qwen3-6-layers", Setup(1536)),
    ("gpt2-6-layers", Setup(1024, activation_checkpointing=True)),
    ("smollm2-135m", Setup(1024)),
    ("smollm2-135m", Setup(2048, activation_checkpointing=True, cross_entropy="chunked")),
]


def with_spans(setup: Setup) -> Setup:
    """The setup with the steps and key words of the texts that are trained here."""
    rows, keys = _spans(setup)
    return dataclasses.replace(setup, num_steps=len(rows), num_key_words=len(keys), teacher_layers=_TEACHER_LAYERS)


def config_of(shape: str):
    options = dict(SHAPES[shape])
    return AutoConfig.for_model(options.pop("model_type"), **options)


def measure(shape: str, setup: Setup, steps: int, keep: bool) -> None:
    """Train, and print the median of the seconds of all steps but the first two, and this process's peak memory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(shape), dtype=getattr(torch, setup.dtype))
    with freed_memory_kept() if keep else nullcontext():
        seconds = (_train_eager if setup.attention == "eager" else _train)(model, setup, steps)
    seconds = statistics.median(seconds[2:] or seconds)
    # Not getrusage: its maximum is inherited from the process that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def _spans(setup: Setup) -> tuple[list, list]:
    """Steps of 20 tokens and a key word of one token every 16, or as many as the setup says."""
    length = setup.length
    step, key = (length // n if n else usual for n, usual in ((setup.num_steps, 20), (setup.num_key_words, 16)))
    return [(i, min(i + step, length)) for i in range(0, length, step)], [
        (i, i + 1) for i in range(key - 1, length, key)
    ]


def _train(model, setup: Setup, steps: int) -> list[float]:
    rows, keys = _spans(setup)
    ids = torch.randint(3, 1000, (setup.length,)).tolist()
    example = EncodedExample("long", ids, [RATIONALE] * setup.length, rows, keys, [], [])
    item = {"example": example, "signal": torch.rand(_TEACHER_LAYERS, len(rows), len(keys))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")), eos_token="</s>"
    )
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] = time.perf_counter() - times[-1]

    with tempfile.TemporaryDirectory() as folder:
        args = MoldConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=setup.per_device_train_batch_size,
            gradient_accumulation_steps=setup.gradient_accumulation_steps,
            bf16=setup.bf16,
            gradient_checkpointing=setup.activation_checkpointing,
            cross_entropy=setup.cross_entropy,
            mlp_chunk_size=setup.mlp_chunk_size,
            padding_free=setup.padding_free,
            optim=setup.optim,
            save_strategy="no",
            keep_freed_memory=False,  # `measure` decides
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = _TrainerOfItems(
            model, args, processing_class=tokenizer, items=[item] * steps, peft_config=setup.peft_config
        )
        trainer.add_callback(Clock())
        trainer.train()
    return times


class _Teacher:
    """Stands where a cache of signals does; the items have theirs."""

    settings = SimpleNamespace(signal_layers="all")

    def require(self, **settings):
        pass

    def require_template(self, template):
        pass


class _TrainerOfItems(MoldTrainer):
    def __init__(self, *args, items, **kwargs):
        super().__init__(*args, signals=_Teacher(), **kwargs)
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.train_dataset = items * batch


def _train_eager(model, setup: Setup, steps: int) -> list[float]:
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(3, 1000, (setup.per_device_train_batch_size, setup.length))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=False, output_attentions=True)
        pooled = sum(maps.mean(1)[:, :, 3::16].sum() for maps in out.attentions)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + 1e-3 * pooled).backward()
        del out, loss, pooled
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="places in the table, from 0")
    parser.add_argument("--steps", type=int, default=6, help="of the process that is timed, at least 3")
    parser.add_argument("--measure", type=int, nargs=2, help="train this case here for so many steps")
    parser.add_argument("--keep", action="store_true", help="with --measure: keep freed memory")
    parser.add_argument("--output", type=Path, help="also write the rows and the versions as JSON")
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error(f"--steps: is {arguments.steps}, must be at least 3")
    if arguments.measure is not None:
        case, steps = arguments.measure
        measure(*CASES[case], steps, arguments.keep)
        return 0
    machine, rows = this_machine(), []
    print(f"{torch.get_num_threads()} threads, {machine.flops['float32'] / 1e9:.0f} GFLOP/s, torch {torch.__version__}")
    print(
        f"{'case':>4} {'peak GiB':>9} {'predicted':>9} {'ratio':>6} {'step s':>7} {'predicted':>9} {'ratio':>6}  what"
    )
    for number in arguments.cases:
        shape, setup = CASES[number]
        plan = plan_step(config_of(shape), with_spans(setup))
        command = [sys.executable, "-m", "benchmarks.plan", "--measure", str(number)]
        found = {}
        give_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        for key, steps, env in (("peak", ["2"], give_back), ("seconds", [str(arguments.steps), "--keep"], None)):
            done = subprocess.run([*command, *steps], capture_output=True, text=True, check=True, env=env)
            found[key] = json.loads(done.stdout.splitlines()[-1])[key]
        peak, seconds = plan.peak(machine), plan.seconds(machine)
        changed = {f.name: getattr(setup, f.name) for f in dataclasses.fields(setup)}
        changed = {k: v for k, v in changed.items() if v != getattr(Setup(setup.length), k) or k == "length"}
        if setup.peft_config is not None:
            changed["peft_config"] = f"LoRA of rank {setup.peft_config.r}"
        row = {"shape": shape, "setup": changed, "peak": found["peak"], "predicted_peak": peak}
        row |= {"seconds": found["seconds"], "predicted_seconds": seconds}
        rows.append(row)
        print(
            f"{number:4} {found['peak'] / GIB:9.2f} {peak / GIB:9.2f} {peak / found['peak']:6.2f} "
            f"{found['seconds']:7.1f} {seconds:9.1f} {seconds / found['seconds']:6.2f}  {shape} {changed}",
            flush=True,
        )
    if arguments.output:
        about = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": machine.name}
        arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    return int(any(abs(row["predicted_peak"] / row["peak"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
