"""Files that are never found half-written, JSON lines of which a killed run may have left a part, and folders that one
process works in."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either there, whole and on disk, or not there at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a killed run, or a link that must not be followed
    try:
        with _named(path), open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file: a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


LOCK = ".lock"
"""Empty, in a folder that a process has held."""
_held: set[Path] = set()


@contextmanager
def sole_use(folder: Path, name: str) -> Iterator[None]:
    """Hold a folder, made if missing, against other processes; one that is killed holds nothing.

    Args:
        folder: which a process that holds it may hold again.
        name: of the argument that names the folder, for messages.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (place := folder.resolve()) in _held:
        yield
        return
    lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{name}: {folder} is in use by another process; wait for its end, or choose another"
            ) from error
        _held.add(place)
        try:
            yield
        finally:
            _held.remove(place)
    finally:
        os.close(lock)


def check_writable(folder: Path, name: str) -> None:
    """Whether a folder, which need not be there, can be written into: before the work whose results it is for.

    Args:
        folder: to be made, or there.
        name: of the argument that names the folder, for messages.

    Raises:
        ValueError: it cannot.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{name}: is {str(folder)!r}, must be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: is {str(folder)!r}, must be one that can be written: {there} cannot")


def write_jsonl(path: str | Path, rows: Sequence[dict]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_atomically(Path(path), b"".join(map(_line, rows)))


def digest(*values) -> str:
    """A hash of values that JSON can hold, or that have a text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_jsonl(path: Path, row: dict) -> None:
    """Append a JSON object to a file, on disk when this returns, in place of a torn last line."""
    cut_torn_line(path)
    with _named(path), open(path, "ab") as file:
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
    for number, line in enumerate(text_lines(path) if on_torn is None else _whole_lines(path, on_torn), 1):
        if line.strip():
            place = f"{path}:{number}"
            with json_errors(path, number):
                row = json.loads(line.rstrip())  # without its end, behind which column 1 would be
            yield place, json_object(place, row)


def json_object(place: str, row: object) -> dict:
    """The row, which must be an object."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is a {type(row).__name__}, must be an object")
    return row


def read_json(path: Path):
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON that can be read; names file and line.
    """
    text = "".join(text_lines(path))
    with json_errors(path, 1, whole=True):
        return json.loads(text)


def text_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text in UTF-8, or in what its byte-order mark says."""
    with open(path, "rb") as file:
        head = file.read(4)
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if head.startswith(mark)), "utf-8-sig")
    try:
        with open(path, encoding=encoding, newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise ValueError(f"{path}: begins as {encoding} and is none ({error.reason})") from error
        with open(path, "rb") as file:
            number, wrong = next((n, e) for n, line in enumerate(file, 1) if (e := _decode_error(line)))
        raise _not_utf8(path, number, wrong) from error


def _decode_error(line: bytes) -> UnicodeDecodeError | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def _not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{path}:{number}: holds the byte 0x{error.object[error.start]:02x}, must be UTF-8 (Latin-1 or another "
        "encoding: save it as UTF-8)"
    )


@contextmanager
def json_errors(path: Path, line: int, whole: bool = False) -> Iterator[None]:
    """Errors of JSON that begins at a line; `whole`: they count lines from the head of the file."""
    try:
        yield
    except json.JSONDecodeError as error:
        number = error.lineno if whole else line
        raise ValueError(f"{path}:{number}: is no JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{path}:{line}: is nested too deep to be read as JSON") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path}:{line}: cannot be read as JSON ({error})") from error


def _whole_lines(path: Path, on_torn: Callable[[], object]) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                on_torn()
                return
            if wrong := _decode_error(line):
                raise _not_utf8(path, number, wrong)
            yield line.decode()


def _line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
