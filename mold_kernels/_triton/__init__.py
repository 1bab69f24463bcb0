"""The Triton kernels: one family a file, with their launchers. Importing this package needs no Triton."""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in its interpreter, on CPU tensors too (Triton's own switch, read when it is imported)."""

DEVICES = frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"})
DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})


def why_missing() -> str | None:
    """None where the kernels can run, otherwise the reason."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch finds no CUDA device"


def takes(q: torch.Tensor) -> bool:
    """Whether the attention kernels are written for the dtype and head dimension of q."""
    return q.dtype in DTYPES and q.shape[-1] <= 256
