"""Two processes (DDP over gloo) train, evaluate and extract as one process with twice the batch does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mold.signals import SignalCache
from tests.mold.process_run import RUNS
from tests.tiny_runs import BARE, EXAMPLES, make_trainer, metrics

pytestmark = pytest.mark.slow


def start(folder, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    result = subprocess.run(
        [*command, "-m", "tests.mold.process_run", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        start(folder / str(processes), processes)
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
    shares = [json.loads((two.folder / name).read_text())["examples"] for name in ("manifest.json", "manifest-1.json")]
    assert not shares[0].keys() & shares[1].keys()
    assert sorted(map(len, shares)) == [6, 7]
    assert one._signals.keys() == two._signals.keys()
    for name, signal in one._signals.items():
        torch.testing.assert_close(two._signals[name], signal, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_two_processes_is_whole(folders, tmp_path):
    """One process goes on from it, on signals that two extracted."""
    checkpoint = folders[1] / "plain/checkpoint-2"
    assert {"mold_complete.json", "mold_router.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in checkpoint.iterdir()
    }
    trainer = make_trainer(tmp_path, SignalCache(folders[1] / "signals"), examples=[*EXAMPLES, BARE])
    assert trainer.evaluate()["eval_loss_attention"] > 0
