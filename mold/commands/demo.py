"""mold demo: the whole path on generated problems."""

from __future__ import annotations

from collections.abc import Sequence

from mold.commands.extract import extract_and_say
from mold.commands.inputs import load_split, load_teacher
from mold.commands.parsing import parse
from mold.commands.train import show_report, show_summary, train

DEFAULTS = {
    "dataset": "generated",
    "teacher_model_name_or_path": "smollm2-135m-instruct",
    "student_layers": [0, 1, 20, 21, 22, 23, 24, 29],
    "output_dir": "runs/demo",
    "num_train": 240,
    "num_eval": 24,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "cross_entropy": "chunked",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "save_steps": 25,
    "save_total_limit": 1,
    "max_new_tokens": 128,
    "generate_batch_size": 32,
}


def main(arguments: Sequence[str]) -> None:
    """Extract, train, evaluate, report."""
    options = parse("demo", arguments, DEFAULTS)
    train_examples, held_out = load_split(options.data)
    teacher = load_teacher(options)
    seconds = extract_and_say(options, train_examples + held_out, teacher)
    show_summary(train(options, teacher, {"extract": seconds}))
    show_report(options.folder)
