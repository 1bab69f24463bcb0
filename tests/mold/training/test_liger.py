"""liger-kernel's cross-entropy."""

import importlib.util
from pathlib import Path

import pytest

from mold.training.heads import ChunkedHead
from tests.interpreter import run_interpreted
from tests.tiny_models import make_model


@pytest.mark.slow
def test_in_the_interpreter():
    pytest.importorskip("liger_kernel")
    run_interpreted(Path(__file__).parent / "triton" / "test_liger.py")


@pytest.mark.parametrize(
    ("installed", "error", "message"),
    [
        (object(), ValueError, "cross_entropy: is 'liger', must be 'chunked' or 'full' on cpu"),
        (None, ImportError, r"cross_entropy='liger': needs liger-kernel: pip install 'mold-distill\[liger\]'"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, installed, error, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    with pytest.raises(error, match=message):
        ChunkedHead(make_model("llama"), "liger")
