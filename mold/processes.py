"""Several processes: what `torchrun` or `accelerate launch` started must know of each other."""

from __future__ import annotations

import os

from accelerate import PartialState


def require_one_process(name: str) -> None:
    """Of what every process would do for itself, into the same files.

    Args:
        name: of the command or argument that asks for it.

    Raises:
        ValueError: several processes were started.
    """
    if (started := _started()) > 1:
        raise ValueError(f"{name}: is asked for in {started} processes, must be in one")


def check_processes() -> PartialState:
    """This process among all that were started.

    Raises:
        ValueError: several were started and each takes itself for the only one (CPUs without use_cpu).
    """
    state, started = PartialState(), _started()
    if state.num_processes != started:
        raise ValueError(
            f"use_cpu: is not set, must be True: {started} processes were started without accelerators and each would "
            "work for itself"
        )
    return state


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
