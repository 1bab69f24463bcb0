"""Several processes: what `torchrun` or `accelerate launch` started must know of each other."""

from __future__ import annotations

import os

from accelerate import PartialState


def check_processes() -> PartialState:
    """This process among all that were started.

    Raises:
        ValueError: several were started and each takes itself for the only one (CPUs without use_cpu).
    """
    state, started = PartialState(), int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != started:
        raise ValueError(
            f"use_cpu: is not set, must be True: {started} processes were started without accelerators and each would "
            "work for itself"
        )
    return state
