"""The files of a signal cache: safetensors shards, and a manifest that names them.

A shard is written whole, then the manifest that names it, each by an atomic rename: whatever moment a run is killed,
the manifest names only whole shards and the next run goes on behind them. Of several processes that extract together
each writes shards and a manifest of its own (manifest-1.json, ...).

A manifest holds the settings of the signals and a hash of every shard's header. A header holds an `Entry` of every
example of the shard by the hash of its text, and in it the hash of its signal. So a cache opens by its headers alone,
and every byte is checked when it is used.

Steps and key words stand in the order of the text, so a step sees the first so many of them, and attention to the
others is 0: a shard holds those cells alone, [layers, cells], step by step.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from mold.files import json_object, read_json, write_atomically
from mold.method.signal_settings import SignalSettings

MANIFEST = "manifest.json"
FORMAT_VERSION = 4
_SHARD = re.compile(r"shard(-\d+)?-\d+\.safetensors")


class Entry(NamedTuple):
    """What a shard knows of an example.

    tokens: hash of the teacher's tokens and spans, which keeps an extraction from going on with another tokenizer.
    visible: of every step, how many key words begin before its end.
    key_words: how many there are.
    signal: hash of the stored bytes; empty without key words.
    start, end: where in the shard they are.
    """

    tokens: str
    visible: list[int]
    key_words: int
    signal: str = ""
    start: int = 0
    end: int = 0

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.visible)


def packed(signal: torch.Tensor, visible: list[int]) -> torch.Tensor:
    """The cells [L, C] of a signal [L, S, M] that steps can see."""
    return signal[:, _cells(visible, signal.shape[2])]


def unpacked(cells: torch.Tensor, visible: list[int], key_words: int) -> torch.Tensor:
    """The signal [L, S, M] of its cells, float32."""
    signal = torch.zeros(len(cells), len(visible), key_words)
    signal[:, _cells(visible, key_words)] = cells.float()
    return signal


def _cells(visible: list[int], key_words: int) -> torch.Tensor:
    return torch.arange(key_words) < torch.tensor(visible)[:, None]


def bytes_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def write_shard(path: Path, entries: Mapping[str, Entry], tensors: dict[str, torch.Tensor]) -> str:
    """Write the signals of some examples, whole or not at all.

    Args:
        path: of the shard.
        entries: of its examples, by the hash of their text.
        tensors: their cells, for those that have any.

    Returns:
        The header's hash.
    """
    header = {content: entry[:4] for content, entry in entries.items()}
    data = save(tensors, {"examples": json.dumps(header, separators=(",", ":"))})
    write_atomically(path, data)
    return hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()


def read_header(path: Path, digest: str) -> dict[str, Entry]:
    """The entries of a shard.

    Raises:
        ValueError: the shard is missing, or its header or its size is another than what was written.
    """
    if not path.is_file():
        raise ValueError(f"signals: {path} is missing; delete the folder and extract again")
    with open(path, "rb") as file:
        size = file.read(8)
        text = file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
        if hashlib.sha256(size + text).hexdigest() != digest:
            raise altered(path, "its header is another")
    header, start = json.loads(text), len(size) + len(text)
    noted, nowhere = json.loads(header.pop("__metadata__")["examples"]), {"data_offsets": (0, 0)}
    found = {}
    for content, (tokens, visible, key_words, signal) in noted.items():
        first, last = header.get(content, nowhere)["data_offsets"]
        found[content] = Entry(tokens, visible, key_words, signal, start + first, start + last)
    if path.stat().st_size != (whole := max([start, *(entry.end for entry in found.values())])):
        raise altered(path, f"it has {path.stat().st_size} bytes, not {whole}")
    return found


def read_cells(path: Path, content: str, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """The stored cells [L, C] of an example: these bytes of the shard alone are read.

    Args:
        path: of the shard.
        content: the hash of the example's text, for messages.
        entry: of the example, which has key words.
        dtype: of the cells.

    Raises:
        ValueError: their bytes are not those that were written.
    """
    with open(path, "rb") as file:
        file.seek(entry.start)
        data = bytearray(file.read(entry.end - entry.start))
    if hashlib.sha256(data).hexdigest() != entry.signal:
        raise altered(path, f"the signal of {content} is another")
    return torch.frombuffer(data, dtype=dtype).view(-1, sum(entry.visible))


def altered(path: Path, reason: str) -> ValueError:
    """What says that a shard is not as it was written."""
    return ValueError(
        f"signals: {path} was altered since it was written ({reason}); delete the folder and extract again"
    )


def write_manifest(path: Path, settings: Mapping, shards: Mapping[str, str]) -> None:
    """Write a manifest of the settings and the hashes of all shards' headers, whole or not at all."""
    write_atomically(
        path, json.dumps({"format": FORMAT_VERSION, "settings": settings, "shards": shards}, indent=1).encode()
    )


def read_manifests(folder: Path) -> dict[str, dict]:
    """The manifests of all processes that ever wrote into the folder, by file name, settings as SignalSettings.

    Raises:
        ValueError: one is not as `write_manifest` of this version writes it; names the file.
    """
    manifests = {}
    for path in sorted(folder.glob("manifest*.json")):
        try:
            manifests[path.name] = _checked_manifest(json_object("it", read_json(path)))
        except (ValueError, OSError) as error:
            raise ValueError(f"signals: {path}: {error}; delete the folder and extract again") from error
    return manifests


def _checked_manifest(manifest: dict) -> dict:
    if (found := manifest.get("format")) != FORMAT_VERSION:
        raise ValueError(f"format is {reprlib.repr(found)}, must be {FORMAT_VERSION}")
    for name in ("settings", "shards"):
        if not isinstance(manifest.get(name), dict):
            raise ValueError(f"{name} is {reprlib.repr(manifest.get(name))}, must be an object")
    try:
        settings = SignalSettings(**manifest["settings"])
    except TypeError as error:
        raise ValueError(f"settings has the keys {', '.join(map(repr, manifest['settings']))} ({error})") from error
    for name, digest in manifest["shards"].items():
        if not _SHARD.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"shards holds {reprlib.repr(name)}: {reprlib.repr(digest)}, must hold a hash a shard")
    return manifest | {"settings": settings}
