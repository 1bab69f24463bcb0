"""The only file that touches the compiled module: torch tensors on one side, addresses and strides on the other.

Importing it never fails; `why_missing` says why the module is not there. Arguments were checked by the public function.
"""

import torch

try:
    from mold_kernels import _native
except ImportError as error:  # not built, built for another Python, or a library that it needs is not there
    _native = None
    _why_missing = f"the compiled module mold_kernels._native cannot be imported: {error}"

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})


def is_available() -> bool:
    """Whether the compiled module is here."""
    return _native is not None


def why_missing() -> str | None:
    """None where the compiled module is here, otherwise the reason."""
    return None if is_available() else _why_missing


def build_info() -> dict[str, str] | None:
    """Version, compiler, C++ standard and instruction sets of the compiled module, or None without one."""
    return _native.build_info() if is_available() else None


def value_pool_forward(v: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    batch, heads, _, width = v.shape
    pooled = v.new_empty(batch, heads * width, dtype=torch.promote_types(v.dtype, torch.float32))
    _native.value_pool_forward(_view(v), _view(mask), eps, _view(pooled))
    return pooled


def value_pool_backward(u: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    dv = torch.empty_like(v)
    _native.value_pool_backward(_view(u.contiguous()), _view(v), _view(mask), eps, _view(dv))
    return dv


def _view(tensor: torch.Tensor):
    # The view does not own the memory: the caller holds the tensor until the kernel returns.
    return _native.View(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.stride())
