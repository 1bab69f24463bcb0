"""What is available here, what is not and why, how one is chosen.

A backend is one line of `BACKENDS`. An op names the backends that implement it, fastest first.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mold_kernels import _triton, cuda, native


@dataclass(frozen=True)
class Backend:
    """`why_missing()` is None where the backend can run; `devices` are torch device types, None means every one."""

    why_missing: Callable[[], str | None]
    devices: frozenset[str] | None = None


def _why_no_fa4() -> str | None:
    missing = importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None
    return "the package flash-attn-4 is not installed" if missing else None


BACKENDS = {
    "cpu": Backend(lambda: None, frozenset({"cpu"})),  # aten's flash attention, an engine of attention_with_lse
    "native": Backend(native.why_missing, frozenset({"cpu"})),
    "cuda": Backend(cuda.why_missing, frozenset({"cuda"})),
    "triton": Backend(_triton.why_missing, _triton.DEVICES),
    "fa4": Backend(_why_no_fa4, frozenset({"cuda"})),  # flash-attn-4 and FlexAttention: engines of attention_with_lse
    "flex": Backend(lambda: None),
    "torch": Backend(lambda: None),
    "reference": Backend(lambda: None),
}


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None where it is available, otherwise with the reason why it is not."""
    return {name: backend.why_missing() for name, backend in BACKENDS.items()}


def choose_backend(
    op: str, requested: str, candidates: Sequence[str], device: torch.device, argument: str = "backend"
) -> str:
    """The backend that runs `op` on `device`.

    Args:
        op: name of the public function, for the message.
        requested: a backend's name, which never falls back to another, or "auto": the first candidate that can run.
        candidates: backends that implement `op` for the given tensors, fastest first.
        device: where the tensors are.
        argument: what the public function calls the choice, for the message.

    Raises:
        ValueError: `requested` cannot run here; says why, and what can.
    """
    refusals = {name: _why_not(name, device) for name in candidates}
    usable = [name for name, refusal in refusals.items() if refusal is None]
    if requested in usable:
        return requested
    if requested == "auto" and usable:
        return usable[0]

    if requested == "auto":
        reason = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    elif requested in BACKENDS:
        reason = refusals.get(requested, f"{requested} does not implement {op} for these tensors")
    else:
        reason = "there is no backend of that name"
    choices = ", ".join(repr(name) for name in ["auto", *usable] if usable) or "nothing"
    raise ValueError(f"{op}: {argument} was {requested!r}, on {device.type} it may be {choices} ({reason})")


def _why_not(name: str, device: torch.device) -> str | None:
    backend = BACKENDS[name]
    if backend.devices is not None and device.type not in backend.devices:
        return f"{name} runs on {', '.join(sorted(backend.devices))}"
    return backend.why_missing()
