"""Whatever moment a run is killed at, started again it ends where an undisturbed run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mold.data.problems import generate_problems
from mold.report.page import merged_metrics
from tests.mold.command_line import flags
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

RESULTS = ("model.safetensors", "mold_router.safetensors", "predictions_after.jsonl", "attention_maps.json")
MOLD = [sys.executable, "-m", "mold.commands.cli"]
ROUNDS = int(os.environ.get("MOLD_KILL_ROUNDS", "1"))
"""Of six kills each: one for every day, more before a release."""


@pytest.fixture
def options(tmp_path):
    tokenizer = make_tokenizer("smollm")
    for name, family, layers in (("teacher", "qwen3", 5), ("student", "llama", 3)):
        model = make_model(family, layers=layers, vocab=len(tokenizer), initializer_range=0.05, attention="eager")
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = "".join(json.dumps(vars(example)) + "\n" for example in generate_problems(36, seed=6))
    (tmp_path / "problems.jsonl").write_text(rows)
    both = {
        "dataset": tmp_path / "problems.jsonl",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "disable_tqdm": True,
    }
    extract = {"extract_shard_size": 2, "extract_batch_size": 2}
    train = {
        "model_name_or_path": tmp_path / "student",
        "num_eval": 4,
        "max_new_tokens": 4,
        "max_steps": 24,
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 2,
    }
    return {"extract": [*map(str, flags(both | extract))], "train": [*map(str, flags(both | train))]}


def run(command, options, folder, kill_after=None):
    """Whether the command ended by itself; killed without warning after some seconds where a number is given."""
    process = subprocess.Popen(
        [*MOLD, command, *options[command], "--output_dir", str(folder)],
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
    assert process.returncode == 0, err
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_at_random_moments(options, tmp_path, seed):
    seconds = {}
    for command in ("extract", "train"):
        start = time.perf_counter()
        assert run(command, options, tmp_path / "undisturbed")
        seconds[command] = time.perf_counter() - start
    rng = random.Random(seed)
    kills = 0
    for command in ("extract", "train"):
        for _ in range(3):  # the first part of a run's time is spent importing
            kills += not run(command, options, tmp_path / "killed", rng.uniform(0.4, 1.0) * seconds[command])
        assert run(command, options, tmp_path / "killed")
    print(f"{kills} kills")
    assert kills >= 1
    for name in RESULTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("undisturbed", "killed")]
    assert summaries[0]["rows"] == summaries[1]["rows"]
    metrics = [merged_metrics(tmp_path / name / "metrics.jsonl", []) for name in ("undisturbed", "killed")]
    assert metrics[0] == metrics[1]
    assert not list((tmp_path / "killed").rglob("*.tmp"))
