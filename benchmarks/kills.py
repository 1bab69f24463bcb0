"""Does a training that is killed at random moments end byte for byte where an undisturbed one ends?

    python -m benchmarks.kills [--kills 20] [--seed 0] [--folder DIR]

Trains a tiny student by `mold train`, once undisturbed and once killed (SIGKILL) so often, with max_steps and with
epochs, and compares weights, router, predictions, maps and the rows of the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mold.data.problems import generate_problems
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

RESULTS = ("model.safetensors", "mold_router.safetensors", "predictions_after.jsonl", "attention_maps.json")
LENGTHS = {"max_steps": ["--max_steps=40"], "epochs": ["--num_train_epochs=3", "--per_device_train_batch_size=3"]}


def prepare(folder: Path) -> list[str]:
    """A teacher, a student and data in the folder; the options of both trainings."""
    tokenizer = make_tokenizer("smollm")
    for name, family, layers in (("teacher", "qwen3", 5), ("student", "llama", 3)):
        model = make_model(family, layers=layers, vocab=len(tokenizer), initializer_range=0.05, attention="eager")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = "".join(json.dumps(vars(example)) + "\n" for example in generate_problems(40, seed=6))
    (folder / "problems.jsonl").write_text(rows)
    common = {"dataset": folder / "problems.jsonl", "teacher_model_name_or_path": folder / "teacher"}
    options = [f"--{name}={value}" for name, value in common.items()] + ["--disable_tqdm=true"]
    signals = folder / "signals"
    command = [sys.executable, "-m", "mold.commands.cli", "extract", *options, f"--output_dir={signals}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    more = {"model_name_or_path": folder / "student", "signals_dir": signals / "signals", "num_eval": 4}
    more |= {"max_new_tokens": 4, "save_steps": 2, "save_total_limit": 2, "logging_steps": 2}
    return options + [f"--{name}={value}" for name, value in more.items()]


def train(options: list[str], folder: Path, kill_after: float | None = None) -> bool:
    """Whether a training ended by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mold.commands.cli", "train", *options, f"--output_dir={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        _, err = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"mold train failed:\n{err}")
    return True


def compare(one: Path, other: Path) -> list[str]:
    """What differs."""
    different = [name for name in RESULTS if (one / name).read_bytes() != (other / name).read_bytes()]
    rows = [json.loads((folder / "summary.json").read_text())["rows"] for folder in (one, other)]
    return different + (["summary.json"] if rows[0] != rows[1] else [])


def main() -> None:
    """Print a line a length; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the runs; a temporary one if not given")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(chosen.folder or made)
        options, rng, wrong = prepare(folder), random.Random(chosen.seed), 0
        for name, length in LENGTHS.items():
            start = time.perf_counter()
            train([*options, *length], folder / f"{name}-undisturbed")
            seconds, kills, ends = time.perf_counter() - start, 0, 0
            while kills < chosen.kills:
                killed = folder / f"{name}-killed-{ends}"
                # Most of a start's time is imports.
                if train([*options, *length], killed, rng.uniform(0.3, 1.0) * seconds):
                    ends += 1
                    continue
                kills += 1
            train([*options, *length], folder / f"{name}-killed-{ends}")
            for end in range(ends + 1):
                different = compare(folder / f"{name}-undisturbed", folder / f"{name}-killed-{end}")
                wrong += bool(different)
                print(f"{name}: {', '.join(different) or 'equal'}", flush=True)
            print(f"{name}: {kills} kills over {ends + 1} trainings", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
