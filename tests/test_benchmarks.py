"""Every benchmark runs, on a small case; what it measures is its own business."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mold_kernels import tables

ROOT = Path(__file__).parents[1]


def run(name, *arguments, module="benchmarks.", environment=None):
    command = [sys.executable, "-m", module + name, *map(str, arguments)]
    # Not in the name of a worker, for which pytest-benchmark measures nothing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": "", **(environment or {})}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def output_of(*arguments, **options):
    """What a benchmark prints, in a process of its own, which must end well."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_benchmark_has_a_test_here():
    helpers = {"__init__", "conftest", "machine"}
    names = {file.stem.removeprefix("test_") for file in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert sorted(name for name in names if f"test_{name}" not in globals()) == []


def test_ops():
    """Every backend of every op, once, in both directions: benchmarks as smoke tests."""
    printed = output_of("pytest", "benchmarks", "--benchmark-disable", "-rA", "-p", "no:cacheprovider", module="")
    for op in tables.OPS:
        assert f"PASSED benchmarks/test_ops.py::test_op[{op.name}-reference-backward]" in printed
        for line in op.backends:
            assert f"test_op[{op.name}-{line}-forward]" in printed or f"{line} " in printed.partition("SKIPPED")[2]


def test_the_ops_are_measured(tmp_path):
    output = tmp_path / "ops.json"
    chosen = "value_pool and torch and forward"
    output_of("pytest", "benchmarks", "-k", chosen, "--benchmark-json", output, "-p", "no:cacheprovider", module="")
    (row,) = json.loads(output.read_text())["benchmarks"]
    assert row["group"] == "value_pool forward"
    assert row["stats"]["rounds"] == 9
    # The backend is its own baseline here: whatever else runs meets both.
    assert 0.1 < row["extra_info"]["ratio"] < 10
    assert row["extra_info"]["peak_bytes"] > 0


def test_training_step(tmp_path):
    output = tmp_path / "rows.json"
    printed = output_of("training_step", "--shape", "tiny", "--lengths", 64, "--rounds", 1, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["none", "plain", "ours", "eager"]
    for row in rows:
        assert row["peak_gib"] > 0
        assert row["time_ratio"] > 0
    assert "memory ratio" in printed
    few = ("--bf16", "--checkpointing", "--paragraphs", "--contenders", "none", "ours")
    printed = output_of("training_step", "--shape", "tiny", "--lengths", 64, "--rounds", 1, *few)
    assert "bfloat16 autocast" in printed
    assert "eager" not in printed


def test_picture(tmp_path):
    """The README's is drawn from the results that are here."""
    pytest.importorskip("matplotlib")
    output_of("picture", "--output", tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "training_step.json").read_text())["rows"]
    for row in results:
        if row["contender"] in ("ours", "eager"):
            assert f"<!-- {row['time_ratio']:.2f} -->" in drawn
            assert f"<!-- {row['memory_ratio']:.2f} -->" in drawn
    committed = (ROOT / "docs" / "training_step.svg").read_text()
    assert re.findall("<!-- (.*?) -->", committed) == re.findall("<!-- (.*?) -->", drawn)


def test_cpu_attention(tmp_path):
    output = tmp_path / "rows.json"
    output_of("cpu_attention", "--lengths", 64, "--rounds", 1, "--output", output)
    result = json.loads(output.read_text())
    assert {row["contender"] for row in result["attention"]} == {"torch SDPA", "ours", "ours with A", "aten with A"}
    assert {row["contender"] for row in result["span_attention"]} == {"torch", "native", "its kernel"}
    assert len(result["visibility"]) == 7 * 2
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in result["attention"])


def test_pooled_attention(tmp_path):
    output = tmp_path / "rows.json"
    output_of("pooled_attention", "--keys", 100, "--rows", 1, 7, "--rounds", 1, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert {(row["rows"], row["heads"]) for row in rows} == {(1, "mean"), (1, "all"), (7, "mean"), (7, "all")}
    torch_alone = {"torch", "torch, given lse", "torch's product"}
    assert {row["contender"] for row in rows} == torch_alone | {"ours", "ours with its lse"}
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_plan(tmp_path):
    output = tmp_path / "rows.json"
    run("plan", "--cases", 0, "--output", output)  # its exit status says how good the prediction was
    (row,) = json.loads(output.read_text())["rows"]
    assert min(row["peak"], row["predicted_peak"], row["seconds"], row["predicted_seconds"]) > 0


def test_random_kills():
    printed = output_of("random_kills", "--kinds", "extract", "--kills", 1)
    assert re.search(r"^extract: killed after +[0-9.]+ s, last written: ", printed, re.MULTILINE)
    assert re.search(r"^extract: 1 kills, \d+ starts, \d+ ended, 0 of them different$", printed, re.MULTILINE)


def test_text_speed():
    printed = output_of("text_speed", "--characters", 200, "--doublings", 1)
    assert "split_sentences, dots" in printed


def test_roofline(tmp_path):
    pytest.importorskip("triton")
    from benchmarks.roofline import Shape, attention, span_attention

    for work in attention(Shape(4096)) + span_attention(Shape(4096)):
        assert work.does_flops >= work.must_flops, work
        assert work.predicted > work.floor, work
    printed = output_of("roofline", "--lengths", 512, "--output", tmp_path / "roofline.md")
    assert "attention_backward_dk" in printed
    assert printed.strip() in (tmp_path / "roofline.md").read_text()


def test_triton_resources():
    pytest.importorskip("triton")
    printed = output_of("triton_resources", "--quick", "--arch", 80)
    assert printed.count("| attention_forward |") == 2  # with and without values


def test_cuda_resources(tmp_path, monkeypatch, capsys):
    from benchmarks import cuda_resources

    if cuda_resources.module_path() is None or cuda_resources.find_cuobjdump() is None:
        pytest.skip("needs the built CUDA module and cuobjdump")
    monkeypatch.setattr(cuda_resources, "RESULTS", tmp_path / "cuda_resources.md")
    cuda_resources.main()
    assert capsys.readouterr().out.strip() in (tmp_path / "cuda_resources.md").read_text()


@pytest.mark.slow
def test_gpu(tmp_path):
    pytest.importorskip("triton")
    output_of("gpu", "--smoke", "--output", tmp_path / "gpu.json", environment={"TRITON_INTERPRET": "1"})
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"check", "flash", "op", "step", "longest"}
    assert all(row["median"] for row in rows if row["section"] != "check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_gpu_says_why_it_cannot_run():
    pytest.importorskip("triton")
    done = run("gpu", environment={"TRITON_INTERPRET": "0"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "benchmarks.gpu: the Triton kernels cannot run here: torch finds no CUDA device"
    )
