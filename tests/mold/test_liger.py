"""liger-kernel's cross-entropy."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mold.chunked_cross_entropy import ChunkedHead
from tests.tiny_models import make_model


@pytest.mark.slow
def test_in_the_interpreter():
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).parent / "triton" / "test_liger.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="cross_entropy: is 'liger', must be 'chunked' or 'full' on cpu"):
        ChunkedHead(make_model("llama"), "liger")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"cross_entropy: 'liger' needs liger-kernel: pip install 'mold\[liger\]'"):
        ChunkedHead(make_model("llama"), "liger")
