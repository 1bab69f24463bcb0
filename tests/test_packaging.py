"""What pyproject.toml says of versions is what is tested; a package without compiled modules works."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mold_kernels import native
from tools import torch_universal

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


def test_the_page_of_the_package_leads_to_no_file():
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    page = readme = (ROOT / "README.md").read_text()
    for change in hooks["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(change["pattern"], change["replacement"], page)
    assert {link.partition(":")[0] for link in re.findall(r"\]\(([^)]*)\)", page)} == {"https"}
    assert not re.search(r"training_step\.svg|training_step\.json|\[the benchmarks\]", page)
    for kept in (r"^#.*", r"^- \*\*.*", r"```python\n(?s:.*?)```"):
        assert re.findall(kept, page, re.MULTILINE) == re.findall(kept, readme, re.MULTILINE) != []


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


LOADED_AS_BY_KERNELS = """
import importlib.util, json, sys
from pathlib import Path

import torch

variant = Path(sys.argv[1])
name = json.loads((variant / "metadata.json").read_text())["id"]
sys.modules["mold_kernels"] = None  # what still imports it fails
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernels = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

q = torch.randn(1, 2, 7, 16, requires_grad=True)
row_spans, key_spans = torch.tensor([[[4, 7]]]), torch.tensor([[[0, 1], [2, 4]]])
results = []
for backend in ("triton", "reference"):
    out, lse = kernels.attention_with_lse(q, q, q, backend=backend)
    pooled = kernels.span_attention(q, q, lse, row_spans, key_spans, backend=backend)
    results.append((pooled, *torch.autograd.grad((out.sum() + pooled.sum()), q)))
for ours, truth in zip(*results, strict=True):
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)

del sys.modules["mold_kernels"]
import mold_kernels  # its operators stand beside the copy's

assert set(dir(kernels)) >= set(mold_kernels.__all__)
"""


def test_the_build_for_hugging_face_kernels(tmp_path):
    pytest.importorskip("triton")
    variant = torch_universal.build(tmp_path)
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    files = metadata["digest"]["files"]
    assert {path.relative_to(variant).as_posix() for path in variant.rglob("*.py")} == files.keys()
    command = [sys.executable, "-c", LOADED_AS_BY_KERNELS, variant]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr

    again = torch_universal.build(tmp_path)
    assert json.loads((again / "metadata.json").read_text()) == metadata


def test_imports_that_cannot_be_made_relative():
    made = torch_universal.with_relative_imports("from mold_kernels import native\nfrom mold_kernels.a.b import c\n", 1)
    assert made == "from .. import native\nfrom ..a.b import c\n"
    with pytest.raises(ValueError, match=r"'import mold_kernels\.spans': must be"):
        torch_universal.with_relative_imports("if True:\n    import mold_kernels.spans\n", 0)
