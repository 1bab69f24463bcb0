"""Tests of Triton kernels without a GPU, in a process of their own: the interpreter's switch is read at Triton's import
and is for all kernels."""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(file: Path, *options: str) -> None:
    """Run a file of tests in Triton's interpreter, with options for pytest; fails with their output."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
