"""Two processes (DDP over gloo) train, evaluate and extract as one process with twice the batch does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mold.data.examples import text_hash
from mold.method.signal_files import read_header, read_manifests
from mold.method.signals import SignalCache
from tests import tiny_runs
from tests.mold.command_line import flags
from tests.mold.process_run import RUNS
from tests.tiny_runs import BARE, EXAMPLES, make_student, make_teacher, make_trainer, metrics

pytestmark = pytest.mark.slow


def start(processes, module, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    result = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        start(processes, "tests.mold.process_run", folder / str(processes))
    return folder / "1", folder / "2"


@pytest.mark.parametrize("run", RUNS)
def test_training_is_that_of_one_process(folders, run):
    one, two = (folder / run for folder in folders)
    expected = load_file(one / "weights-0.safetensors")
    assert any(name.startswith("router") for name in expected)
    for process in (0, 1):
        actual = load_file(two / f"weights-{process}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=name)
    for mine, theirs in zip(metrics(two), metrics(one), strict=True):
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-5), key
    assert json.loads((two / "evaluated.json").read_text()) == pytest.approx(
        json.loads((one / "evaluated.json").read_text()), rel=1e-6
    )


def test_extraction_is_split(folders):
    one, two = (SignalCache(folder / "signals") for folder in folders)
    assert sorted(p.name for p in two.folder.glob("manifest*")) == ["manifest-1.json", "manifest.json"]
    shares = [
        {content for name, digest in manifest["shards"].items() for content in read_header(two.folder / name, digest)}
        for manifest in read_manifests(two.folder).values()
    ]
    assert not shares[0] & shares[1]
    assert sorted(map(len, shares)) == [6, 7]
    assert len(one) == len(two) == 13
    for example in EXAMPLES:
        content = text_hash(example, one.settings.template)
        torch.testing.assert_close(two.read(content), one.read(content), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_two_processes_is_whole(folders, tmp_path):
    """One process goes on from it, on signals that two extracted."""
    checkpoint = folders[1] / "plain/checkpoint-2"
    assert {"mold_complete.json", "mold_router.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in checkpoint.iterdir()
    }
    trainer = make_trainer(tmp_path, SignalCache(folders[1] / "signals"), examples=[*EXAMPLES, BARE])
    assert trainer.evaluate()["eval_loss_attention"] > 0


def test_the_command_line_in_two_processes(tmp_path):
    """Files are written once and whole, and evaluation knows what one process would."""
    for name, model, tokenizer in (
        ("teacher", make_teacher(), tiny_runs.TEACHER_TOKENIZER),
        ("student", make_student(layers=2), tiny_runs.STUDENT_TOKENIZER),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    both = {
        "dataset": "generated",
        "num_train": 12,
        "num_eval": 5,
        "teacher_model_name_or_path": tmp_path / "teacher",
        "output_dir": tmp_path / "run",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    training = {
        "model_name_or_path": tmp_path / "student",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "max_new_tokens": 3,
    }
    assert start(2, "mold.commands.cli", "extract", *flags(both)).count("17 teacher signals in") == 1
    start(2, "mold.commands.cli", "train", *flags(both | training))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert sum("eval_loss" in row for row in rows) == 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_eval"] == 5
    predictions = (tmp_path / "run/predictions_after.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in predictions}) == len(predictions) == 5
    assert not list((tmp_path / "run").rglob("*.tmp"))
