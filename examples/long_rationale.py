"""Distil a rationale of thousands of tokens on one CPU, and see what 64k would take on one GPU.

    python examples/long_rationale.py                         # T = 8192 with SmolLM2-135M's shape, two steps
    python examples/long_rationale.py --length 4096 --steps 3

Three things make it fit: pooled attention instead of T x T maps, activation checkpointing, and chunked cross-entropy
instead of T x vocabulary logits. The student has random weights, the text is a chain of generated problems and its
teacher's signals are random: memory and time are those of a real run, the loss is only there to go down.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from mold import MoldConfig, MoldTrainer, SignalSettings, extract_signals
from mold.data.encoding import encode_example
from mold.data.examples import DEFAULT_TEMPLATE, Example
from mold.data.problems import generate_problems
from mold.models import load_tokenizer
from mold.plan import GIB, GPUS, Setup, largest_length, plan_step

SAVERS = {"activation_checkpointing": True, "cross_entropy": "chunked"}


def student_config(vocabulary: int) -> LlamaConfig:
    """SmolLM2-135M's."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )


def long_example(tokenizer, length: int) -> Example:
    """Problems and their solutions one behind another, at most `length` tokens in all."""
    problems = generate_problems(length // 40, seed=1)
    first = problems[0]

    def joined(count: int) -> Example:
        chain = "\n".join(f"{p.question} {p.rationale} So it is {p.answer}." for p in problems[1:count])
        return Example("long", first.question, f"{first.rationale}\n{chain}", problems[count - 1].answer)

    low, high = 2, len(problems)
    while high - low > 1:
        middle = (low + high) // 2
        if len(encode_example(joined(middle), tokenizer, DEFAULT_TEMPLATE).input_ids) <= length:
            low = middle
        else:
            high = middle
    return joined(low)


class Report(TrainerCallback):
    """Prints each step's loss, time and the process's highest resident memory."""

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds = time.perf_counter() - self._start

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss_attention" in logs:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(status["VmHWM"].split()[0]) * 1024 / GIB
            print(
                f"step {state.global_step}: rationale loss {logs['loss_rationale']:.3f}, attention loss "
                f"{logs['loss_attention']:.5f}, {self._seconds:.0f} s, peak {peak:.2f} GiB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the text")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30, help="layers of the student")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    example = long_example(tokenizer, arguments.length)
    config = student_config(len(tokenizer))
    config.num_hidden_layers = arguments.layers
    with tempfile.TemporaryDirectory() as folder:
        # A teacher of one layer: its signals cost one forward.
        config_of_teacher = student_config(len(tokenizer))
        config_of_teacher.num_hidden_layers = 1
        teacher = LlamaForCausalLM(config_of_teacher)
        settings = SignalSettings.of(teacher, "a random layer", DEFAULT_TEMPLATE, "sum")
        signals = extract_signals(teacher, tokenizer, [example], Path(folder) / "signals", settings, progress=False)
        args = MoldConfig(
            output_dir=folder,
            max_steps=arguments.steps,
            max_length=arguments.length,
            per_device_train_batch_size=1,
            gradient_checkpointing=True,
            cross_entropy="chunked",
            row_norm="l1",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = MoldTrainer(
            LlamaForCausalLM(config), args, [example], processing_class=tokenizer, signals=signals, callbacks=[Report()]
        )
        encoded = trainer.train_dataset[0]["example"]
        print(
            f"{len(encoded.input_ids)} tokens, {len(encoded.row_spans)} steps, {len(encoded.key_spans)} key words, "
            f"{arguments.layers} layers",
            flush=True,
        )
        trainer.train()
    gpu = GPUS["h100-80gb"]
    planned = plan_step(config, Setup(65536, dtype="bfloat16", **SAVERS))
    longest = largest_length(config, planned.setup, gpu, gpu.memory)
    print(
        f"65536 tokens on one {gpu.name} (bfloat16): {planned.peak(gpu) / GIB:.1f} of {gpu.memory / GIB:.0f} GiB, "
        f"{planned.seconds(gpu):.1f} s a step; the longest that fits is {longest}"
    )


if __name__ == "__main__":
    main()
