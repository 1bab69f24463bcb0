"""liger-kernel in Triton's interpreter: run by `tests/mold/test_liger.py` in a process of its own."""

from mold_kernels import _triton

if not _triton.INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
