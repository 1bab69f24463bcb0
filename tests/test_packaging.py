"""What pyproject.toml says of versions is what is tested; a package without compiled modules works."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from mold_kernels import native

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "tests/lowest.txt").read_text().splitlines()
    installed = [*project["dependencies"]]
    for extra in ("report", "gguf", "data", "peft"):
        installed += project["optional-dependencies"][extra]
    allowed = [line.split(">=") for line in installed if not line.startswith("torch>=")]
    assert allowed == [line.split("==") for line in lines if not line.startswith("#")]


def test_native_is_built_where_the_tests_run():
    """Only a wheel may do without: whoever develops learns that the kernels do not compile."""
    assert native.why_missing() is None
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["overrides"]
    assert overrides == [{"if": {"failed": True, "state": "wheel"}, "wheel": {"cmake": False}}]


WITHOUT_COMPILED_MODULES = """
import sys
sys.modules["mold_kernels._native"] = sys.modules["mold_kernels._cuda"] = None

import torch
from mold_kernels import attention_with_lse
from mold.commands import info

q = torch.randn(1, 2, 5, 8, requires_grad=True)
attention_with_lse(q, q, q)[0].sum().backward()
assert q.grad.abs().sum() > 0
info.main([])
"""


def test_without_compiled_modules():
    command = [sys.executable, "-W", "error", "-c", WITHOUT_COMPILED_MODULES]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if "backend native" in line)
    assert "C++17 compiler" in line
