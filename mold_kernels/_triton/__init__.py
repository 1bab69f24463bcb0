"""The Triton kernels: one family a file, with their launchers. Importing this package needs no Triton.

No length or number of spans is specialised (`do_not_specialize`): a kernel is compiled once for a head dimension, a
dtype and a set of options, not again for a batch of another size.
"""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in its interpreter, on CPU tensors too: Triton's own switch, read at its import."""

_INSTALLED = importlib.util.find_spec("triton") is not None

DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 256
"""The largest that the attention kernels are written for."""


def why_missing() -> str | None:
    """None where the kernels can run, otherwise the reason."""
    if not _INSTALLED:
        return "the package triton is not installed"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch finds no CUDA device"
