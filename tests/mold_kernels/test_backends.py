import subprocess
import sys

import pytest
import torch

from mold_kernels import native
from mold_kernels.backends import BACKENDS, Backend, available_backends, choose_backend

CPU, META = torch.device("cpu"), torch.device("meta")
CANDIDATES = ["fast", "slow"]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setitem(BACKENDS, "fast", Backend(lambda: None, frozenset({"cpu"})))
    monkeypatch.setitem(BACKENDS, "slow", Backend(lambda: None))
    monkeypatch.setitem(BACKENDS, "absent", Backend(lambda: "nobody built it"))


@pytest.mark.parametrize(
    ("requested", "candidates", "device", "chosen"),
    [
        ("auto", ["fast", "slow"], CPU, "fast"),
        ("auto", ["fast", "slow"], META, "slow"),
        ("auto", ["absent", "slow"], CPU, "slow"),
        ("slow", ["fast", "slow"], CPU, "slow"),
    ],
)
def test_choice(table, requested, candidates, device, chosen):
    assert choose_backend("op", requested, candidates, device) == chosen


@pytest.mark.parametrize(
    ("requested", "candidates", "device", "message"),
    [
        ("fast", ["fast", "slow"], META, "backend was 'fast', on meta it may be 'auto', 'slow' (fast runs on cpu)"),
        ("absent", ["absent", "slow"], CPU, "backend was 'absent', on cpu it may be 'auto', 'slow' (nobody built it)"),
        ("slow", ["fast"], CPU, "it may be 'auto', 'fast' (slow does not implement op for these tensors)"),
        ("quick", ["fast"], CPU, "it may be 'auto', 'fast' (there is no backend of that name)"),
        ("auto", ["absent", "fast"], META, "it may be nothing (absent: nobody built it; fast: fast runs on cpu)"),
    ],
)
def test_a_named_backend_never_falls_back(table, requested, candidates, device, message):
    with pytest.raises(ValueError, match=r"^op: ") as error:
        choose_backend("op", requested, candidates, device)
    assert message in str(error.value)


def test_available_backends():
    reasons = available_backends()
    assert reasons["torch"] is None
    assert reasons["reference"] is None
    assert reasons["native"] == native.why_missing()


def test_the_build_has_the_native_backend():
    assert native.is_available(), native.why_missing()
    assert native.build_info()["standard"] == "C++17"


def test_import_without_the_compiled_module():
    program = """
import sys
sys.modules["mold_kernels._native"] = None
import torch
from mold_kernels.backends import available_backends
from mold_kernels.value_pool import value_pool
print(available_backends()["native"])
arguments = torch.ones(1, 1, 2, 4), torch.ones(4), torch.ones(1, 2, dtype=torch.bool), 1e-6
print(value_pool(*arguments).shape)
try:
    value_pool(*arguments, backend="native")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reason, shape, error = run.stdout.splitlines()
    assert reason.startswith("the compiled module mold_kernels._native cannot be imported")
    assert shape == "torch.Size([1, 4])"
    assert reason in error
