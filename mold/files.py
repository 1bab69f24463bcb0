"""Files that are never found half-written, and JSON lines of which a killed run may have left a part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
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
    write_atomically(Path(path), b"".join(map(_line, rows)))


def append_jsonl(path: Path, row: dict) -> None:
    """Append a JSON object to a file, on disk when this returns, in place of a torn last line."""
    cut_torn_line(path)
    with open(path, "ab") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Cut off what a killed run left of its last line: whatever has no line end. Makes a missing file, empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        whole = file.seek(0, os.SEEK_END)
        while whole and (file.seek(whole - 1), file.read(1))[1] != b"\n":
            whole -= 1
        file.truncate(whole)


def json_lines(
    path: Path, name: str = "dataset", on_torn: Callable[[], object] | None = None
) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON-lines file with their places, "file:line".

    Args:
        path: of the file.
        name: of the argument that names the file, for messages.
        on_torn: called where a killed run left a part of the last line (it has no line end), which is left out; None: a
            last line needs no line end.

    Raises:
        ValueError: the file is missing, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{name}: {path} does not exist")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if on_torn is not None and not line.endswith(b"\n"):
                on_torn()
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: is a {type(row).__name__}, must be an object")
            yield place, row


def _line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
