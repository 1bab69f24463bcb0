"""Files that are never found half-written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either there, whole and on disk, or not there at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_jsonl(path: str | Path, rows: Sequence[dict]) -> None:
    """Write one JSON object a line, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(Path(path), text.encode())


def digest(*values) -> str:
    """A hash of values that JSON can hold, or that have a text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
