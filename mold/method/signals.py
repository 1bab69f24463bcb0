"""Teacher signals: the teacher's stepwise attention of every layer, in a cache on disk.

A cache is a folder of safetensors shards and a manifest.json. A shard is written whole, then the manifest that names
it, each by an atomic rename: whatever moment a run is killed, the manifest names only whole shards and the next run
goes on behind them. The manifest holds what decides a signal (teacher, weights, template, segmentation, ...), a hash of
every example's text and of every shard's bytes; all are checked before a signal is used. A hash of the teacher's tokens
and spans keeps an extraction from going on with another tokenizer or chat template. Of several processes that extract
together each writes shards and a manifest of its own (manifest-1.json, ...).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from transformers import PreTrainedModel

from mold.data.encoding import EncodedExample
from mold.data.examples import Example, text_hash
from mold.data.segmentation import SEGMENTATION_VERSION
from mold.models import weights_fingerprint

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class SignalSettings:
    """Everything beside an example's text that decides its signal. Two caches with equal settings are the same."""

    teacher: str
    revision: str | None
    weights: str
    dtype: str
    template: str
    row_reduction: str
    segmentation: int = SEGMENTATION_VERSION

    @classmethod
    def of(
        cls, model: PreTrainedModel, name: str, template: str, row_reduction: str, revision: str | None = None
    ) -> SignalSettings:
        """The settings of a loaded teacher."""
        revision = revision or getattr(model.config, "_commit_hash", None)
        return cls(name, revision, weights_fingerprint(model), str(model.dtype), template, row_reduction)


class SignalCache:
    """A verified cache of teacher signals.

    Args:
        folder: written by `extract_signals`.

    Raises:
        ValueError: no cache there, or one of another format, or a shard that is missing or altered; names the file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        manifests = read_manifests(self.folder)
        if not manifests:
            raise ValueError(f"signals: {self.folder} holds no {MANIFEST}; run `mold extract` first")
        self._examples: dict[str, dict[str, Any]] = {}
        self._signals: dict[str, torch.Tensor] = {}
        shards: dict[str, str] = {}
        for name, manifest in manifests.items():
            self.settings = SignalSettings(**manifest["settings"])
            if manifest["settings"] != next(iter(manifests.values()))["settings"]:
                raise ValueError(f"signals: {self.folder / name} has other settings than the manifests beside it")
            self._examples |= manifest["examples"]
            shards |= manifest["shards"]
        self._shards = shards
        for name, digest in shards.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"signals: {path} is missing; delete the folder and extract again")
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"signals: {path} was altered since it was written; delete the folder, extract again")
            self._signals.update(load(data))

    def __len__(self) -> int:
        return len(self._examples)

    def about(self) -> dict[str, str | int | None]:
        """What a model card says of the signals: their settings, their number and a hash of all of them."""
        digest = hashlib.sha256("".join(sorted(self._shards.values())).encode()).hexdigest()
        return dataclasses.asdict(self.settings) | {"examples": len(self), "fingerprint": digest}

    def require(self, **settings) -> None:
        """Raise a ValueError that names the first setting (see SignalSettings) that is not as given."""
        for name, value in settings.items():
            if (found := getattr(self.settings, name)) != value:
                raise ValueError(
                    f"signals: {self.folder} was extracted with {name}={found!r}, must be {value!r}; "
                    "change the option or extract into another folder"
                )

    def signal(self, example: Example, encoded: EncodedExample) -> torch.Tensor | None:
        """The teacher's stepwise attention of an example, float32 [L1, S, M]; None if it has no key words.

        Raises:
            ValueError: the cache has no signal of this example, or one of another text, or one whose steps and key
                words are not the student's; names the example.
        """
        entry = self._examples.get(example.id)
        if entry is None:
            raise ValueError(f"example {example.id}: has no teacher signal in {self.folder}; run `mold extract` on it")
        if entry["text"] != text_hash(example, self.settings.template):
            raise ValueError(f"example {example.id}: its text is not the one that {self.folder} was extracted from")
        check_agreement(example, encoded, entry["steps"], entry["key_words"])
        return self._signals[example.id] if entry["key_words"] else None


def check_agreement(example: Example, encoded: EncodedExample, steps: int, key_words: int) -> None:
    """Raise a ValueError that names the example unless the student's text has the teacher's steps and key words."""
    if (expected := (len(encoded.row_spans), len(encoded.key_spans))) != (steps, key_words):
        raise ValueError(
            f"example {example.id}: the teacher has {steps} steps and {key_words} key words, the student's text "
            f"{expected[0]} and {expected[1]}"
        )


def read_manifests(folder: Path) -> dict[str, dict]:
    """The manifests of all processes that ever wrote into the folder, by file name."""
    manifests = {}
    for path in sorted(folder.glob("manifest*.json")):
        try:
            manifest = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"signals: {path} is no JSON ({error}); delete the folder and extract again") from error
        if manifest.get("format") != FORMAT_VERSION:
            raise ValueError(f"signals: {path} has format {manifest.get('format')}, must be {FORMAT_VERSION}")
        manifests[path.name] = manifest
    return manifests
