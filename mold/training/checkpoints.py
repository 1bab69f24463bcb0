"""Checkpoints that are known to be whole: the last file of one lists the size and hash of every other."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerState
from transformers.utils import logging

from mold.files import file_digest, write_atomically

logger = logging.get_logger(__name__)

COMPLETE_FILE = "mold_complete.json"
"""Written last into a checkpoint; one without it was cut short."""
STATE_FILE = "trainer_state.json"
_TO_GO_ON = ("optimizer.pt", "scheduler.pt")
# transformers' enable_jit_checkpoint holds it there while it saves, and takes it away behind us.
_SENTINEL = "checkpoint-is-incomplete.txt"


def seal(checkpoint: Path, **note) -> None:
    """Write COMPLETE_FILE: the note, and what every file of the checkpoint is."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    listed = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
        if path.name not in (COMPLETE_FILE, COMPLETE_FILE + ".tmp", _SENTINEL)
    }
    write_atomically(checkpoint / COMPLETE_FILE, json.dumps(note | {"files": listed}, indent=1).encode())


def read_seal(checkpoint: str | Path) -> dict:
    """What `seal` noted of a checkpoint of which every file is as it was written.

    Raises:
        ValueError: one is not, or there is no seal; begins with the checkpoint's path.
    """
    checkpoint = Path(checkpoint)
    path = checkpoint / COMPLETE_FILE
    try:
        found = json.loads(path.read_bytes())
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in found["files"].items()}
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} was cut short ({COMPLETE_FILE} is missing)") from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{checkpoint} is damaged ({COMPLETE_FILE} is not as it was written: {reason})") from error
    for name in (STATE_FILE, *(name for name in listed if name != STATE_FILE)):
        file = checkpoint / name
        try:
            if not file.is_file():
                raise ValueError(f"{checkpoint} is damaged ({name} is missing)")
            # The size first: it is there at once.
            if name not in listed or (file.stat().st_size, file_digest(file)) != listed[name]:
                raise ValueError(f"{checkpoint} is damaged ({name} is not as it was written)")
        except OSError as error:
            raise ValueError(f"{checkpoint} is damaged ({name} cannot be read: {error})") from error
    return found


def check_can_go_on(checkpoint: str | Path) -> None:
    """Raise a ValueError unless a training can go on from a whole checkpoint exactly as if it had never stopped."""
    for name in _TO_GO_ON:
        if not (Path(checkpoint) / name).is_file():
            raise ValueError(f"{checkpoint} holds no {name} (save_only_model), so a training cannot go on from it")


def checkpoints_of(folder: str | Path) -> list[Path]:
    """A run folder's checkpoints, the one with the highest step first, whole or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    """The step that a checkpoint is named by."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def last_complete_checkpoint(folder: str | Path, with_best: bool = False) -> str | None:
    """The checkpoint with the highest step in a run folder that is whole, None without one.

    Those that are passed over are said in warnings.

    Args:
        folder: of the run.
        with_best: the one that was the best by then must be whole too.
    """
    for checkpoint in checkpoints_of(folder):
        try:
            read_seal(checkpoint)
            best = TrainerState.load_from_json(str(checkpoint / STATE_FILE)).best_global_step
            if with_best and best:
                read_seal(checkpoint.with_name(f"checkpoint-{best}"))
        except ValueError as error:
            logger.warning(f"{error}: {checkpoint.name} is passed over")
        else:
            return str(checkpoint)
    return None
