"""These tests run the Triton kernels in Triton's interpreter, which must be switched on before Triton is imported:

python -m tests.interpreter pytest tests/mold_kernels/triton

`tests/mold_kernels/test_triton.py` does so in processes of their own; a plain run leaves the folder out.
"""

import pytest

from mold_kernels import _triton

if not _triton.INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=[(16, 16), (32, 16), (16, 32)], ids=["16x16", "32x16", "16x32"])
def tile(request, monkeypatch):
    """Small tiles, of which small tensors have whole ones, cut ones and ones on the diagonal."""
    from mold_kernels._triton import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tile(*request.param))
