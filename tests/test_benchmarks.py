"""Every benchmark runs, on a small case; what it measures is its own business."""

import importlib
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import mold_kernels
from mold_kernels import tables

ROOT = Path(__file__).parents[1]


def output_of(name, *arguments, module="benchmarks."):
    """What a benchmark prints, in a process of its own, which must end well."""
    command = [sys.executable, "-m", module + name, *map(str, arguments)]
    # Not in the name of a worker, for which pytest-benchmark measures nothing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs a benchmark in this process, which it leaves as it was but for the number of threads."""
    threads = torch.get_num_threads()

    def main(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    yield main
    torch.set_num_threads(threads)


def test_every_benchmark_has_a_test_here():
    helpers = {"__init__", "cases", "conftest", "machine"}
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
    later = shutil.copy(output, tmp_path / "later.json")
    compared = output_of("pytest_benchmark", "compare", output, later, module="")
    assert compared.count("test_op[value_pool-torch-forward]") == 2


@pytest.mark.slow
def test_training_step(tmp_path):
    output, tiny = tmp_path / "rows.json", ("--shape", "tiny", "--lengths", 64)
    contenders = ["none", "ours", "eager"]
    printed = output_of("training_step", *tiny, "--rounds", 1, "--contenders", *contenders, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [row["contender"] for row in rows] == contenders
    for row in rows:
        assert row["peak_gib"] > 0
        assert row["time_ratio"] > 0
    assert "memory ratio" in printed
    printed = output_of("training_step", *tiny, "--bf16", "--checkpointing", "--paragraphs", "--peak-of", "plain")
    assert float(printed.split()[-1]) > 0


def test_picture(printed, tmp_path):
    """The README's is drawn from the results that are here."""
    pytest.importorskip("matplotlib")
    printed("picture", "--output", tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "training_step.json").read_text())["rows"]
    for row in results:
        if row["contender"] in ("ours", "eager"):
            assert f"<!-- {row['time_ratio']:.2f} -->" in drawn
            assert f"<!-- {row['memory_ratio']:.2f} -->" in drawn
    committed = (ROOT / "docs" / "training_step.svg").read_text()
    assert re.findall("<!-- (.*?) -->", committed) == re.findall("<!-- (.*?) -->", drawn)


def test_cpu_attention(printed, tmp_path):
    output = tmp_path / "rows.json"
    printed("cpu_attention", "--lengths", 64, "--rounds", 1, "--output", output)
    result = json.loads(output.read_text())
    assert {row["contender"] for row in result["attention"]} == {"torch SDPA", "ours", "ours with A", "aten with A"}
    assert {row["contender"] for row in result["span_attention"]} == {"torch", "native", "its kernel"}
    assert len(result["visibility"]) == 7 * 2
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in result["attention"])


def test_pooled_attention(printed, tmp_path):
    output = tmp_path / "rows.json"
    printed("pooled_attention", "--keys", 100, "--rows", 1, 7, "--rounds", 1, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert {(row["rows"], row["heads"]) for row in rows} == {(1, "mean"), (1, "all"), (7, "mean"), (7, "all")}
    by_torch = {"torch", "torch, given lse", "torch's product", "torch, words"}
    assert {row["contender"] for row in rows} == by_torch | {"ours", "ours with its lse", "ours, words"}
    assert all(row["ms"] > 0 and row["bounds"] > 0 for row in rows)


@pytest.mark.slow
def test_plan(tmp_path):
    """Of its smallest case; its exit status says that the predicted peak is the measured one."""
    output = tmp_path / "rows.json"
    output_of("plan", "--cases", 0, "--steps", 3, "--output", output)
    (row,) = json.loads(output.read_text())["rows"]
    assert min(row["peak"], row["predicted_peak"], row["seconds"], row["predicted_seconds"]) > 0


@pytest.mark.slow
def test_random_kills():
    """Its exit status says that whatever moment a run was killed at, it ended where an undisturbed one ends."""
    printed = output_of("random_kills", "--kinds", "extract", "max_steps", "--kills", 2)
    for kind in ("extract", "max_steps"):
        assert re.search(rf"^{kind}: killed after +[0-9.]+ s, last written: ", printed, re.MULTILINE)
        assert re.search(rf"^{kind}: 2 kills, \d+ starts, \d+ ended, 0 of them different$", printed, re.MULTILINE)


def test_text_speed(printed):
    assert "split_sentences, dots" in printed("text_speed", "--characters", 200, "--doublings", 1)


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
    assert printed.count("| attention_forward |") == 4  # with and without values, with and without padding


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
    options = ["--smoke", "--seconds", 3600, "--output", tmp_path / "gpu.json"]
    output_of("tests.interpreter", "benchmarks.gpu", *options, module="")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"check", "op", "engine", "columns", "step", "longest"}
    assert all(row["median"] or "not here: " in row["note"] for row in rows if row["section"] != "check")
    measured = {row["what"] for row in rows if row["section"] == "op" and row["median"]}
    for op in tables.OPS:
        for name in {"native", "triton"} & op.backends.keys():
            assert {f"{op.name} {name} {direction}" for direction in ("forward", "backward")} <= measured
    (engine,) = (row for row in rows if row["section"] == "engine")
    assert engine["what"] in tables.OPS[0].backends  # the fastest, which is a matter of time
    assert engine["note"].startswith(("auto takes it, rightly", "auto should take it"))


@pytest.fixture
def gpu_bench():
    pytest.importorskip("triton")
    from benchmarks.gpu import Bench

    return Bench("cpu", 60, seed=0)


@pytest.mark.parametrize(
    ("times", "auto", "what", "ratio", "note"),
    [
        ({"triton": 3.0, "flex": 4.0}, "triton", "triton", 1, "auto takes it, rightly"),
        ({"triton": 3.0, "fa4": 1.5}, "triton", "fa4", 0.5, "auto should take it on this card; it takes triton"),
        ({"triton": 3.0, "fa4": 2.97}, "triton", "triton", 1, "auto takes it, rightly"),  # within the spread
        ({"triton": 3.0}, "fa4", "fa4", None, "auto takes it, and it is not right or was not measured"),
    ],
)
def test_gpu_says_which_engine_to_take(gpu_bench, times, auto, what, ratio, note):
    from benchmarks.gpu import say_engine

    say_engine(gpu_bench, 4096, times, auto)
    (row,) = gpu_bench.rows
    assert (row.section, row.what, row.ratio, row.note) == ("engine", what, ratio, note)


def test_gpu_recommends_no_engine_that_is_wrong(gpu_bench, monkeypatch):
    from benchmarks import gpu

    def broken(q, k, v, *, backend):
        if backend == "aten":
            raise TypeError("no such argument\nwhatever it was")
        out, lse = mold_kernels.attention_with_lse(q, k, v, backend=backend)
        return out, lse.detach() + 0 * q.sum()  # no gradient of lse, as most flash attentions

    monkeypatch.setattr(gpu, "attention_with_lse", broken)
    assert gpu.check_engines(gpu_bench, 19) >= {"aten", "native"}
    notes = {row.what: row.note for row in gpu_bench.rows}
    assert notes["engine aten"] == "WRONG: TypeError: no such argument"
    assert notes["engine native"].startswith("WRONG: AssertionError: engine native, tensor 2: relative RMS error")


@pytest.mark.parametrize("off", [0, 0.5])
def test_gpu_compares_column_sums(gpu_bench, monkeypatch, off):
    from benchmarks import gpu
    from benchmarks.roofline import Shape

    def flash_colreduce(query, key, reduction, is_causal):
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        scores = query.float() @ key.float().mT * query.shape[3] ** -0.5
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(2) * (1 + off)

    module = types.ModuleType("flash_colreduce")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_colreduce", None)
    module.flash_colreduce = flash_colreduce
    monkeypatch.setitem(sys.modules, "flash_colreduce", module)
    gpu.measure_columns(gpu_bench, Shape(33, 4, 2, 16))
    ours, theirs = gpu_bench.rows
    assert ours.median > 0
    assert theirs.ratio == pytest.approx(theirs.median / ours.median)
    measured = float(re.fullmatch(r"of our time; (.+) from ours", theirs.note)[1])
    assert measured == pytest.approx(off, abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_gpu_says_why_it_cannot_run(printed):
    pytest.importorskip("triton")
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: .* cannot run here: torch finds no CUDA device$"):
        printed("gpu")


def test_watch(printed, tmp_path):
    output = tmp_path / "rows.json"
    small = ["--prompt", 32, "--tokens", 4, "--layers", 15, "--rounds", 1, "--threads", 1]
    assert "4 tokens behind 32" in printed("watch", *small, "--output", output)
    rows = {row["contender"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["plain", "watch", "watch mean", "watch spans", "watch two", "eager"]
    for clock in ("passed", "processor"):
        assert rows["plain"][clock]["ratio"] == 1
        assert rows["plain"][clock]["extra"] == 0
        assert all(row[clock]["median"] > 0 for row in rows.values())
