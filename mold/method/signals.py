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
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.encoding import EncodedExample, encode_example
from mold.data.examples import ASSISTANT, Example, text_hash
from mold.data.segmentation import PAPER_SEGMENTS, SEGMENTATION_VERSION, SegmentOptions
from mold.files import json_object, read_json
from mold.models import weights_fingerprint

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
_SHARD = re.compile(r"shard(-\d+)?-\d+\.safetensors")
_ENTRY = {"tokens": str, "steps": int, "key_words": int}


@dataclasses.dataclass(frozen=True)
class SignalSettings:
    """Everything beside an example's text that decides its signal.

    teacher, revision: what the teacher was called; which one it is, its weights' fingerprint says.
    step_unit, max_reasoning_steps, max_key_words: `SegmentOptions`.

    Raises:
        ValueError: a value is of another type, or `segmentation` is not this version's.
    """

    teacher: str
    revision: str | None
    weights: str
    dtype: str
    template: str
    row_reduction: str
    segmentation: int = SEGMENTATION_VERSION
    step_unit: str = SegmentOptions.step_unit
    max_reasoning_steps: int | None = None
    max_key_words: int | None = None

    @property
    def segments(self) -> SegmentOptions:
        """How the texts were split."""
        return SegmentOptions(self.step_unit, self.max_reasoning_steps, self.max_key_words)

    def __post_init__(self):
        _ = self.segments  # checks them
        for option in dataclasses.fields(self):
            if option.name in SegmentOptions.__dataclass_fields__:
                continue
            value = getattr(self, option.name)
            expected = int if option.name == "segmentation" else str
            if type(value) is not expected and not (option.name == "revision" and value is None):
                raise ValueError(f"{option.name}: is {reprlib.repr(value)}, must be of type {expected.__name__}")
        if self.segmentation != SEGMENTATION_VERSION:
            raise ValueError(
                f"segmentation: is version {self.segmentation}, must be {SEGMENTATION_VERSION}: steps and key words "
                "are found in another way by now"
            )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        name: str,
        template: str,
        row_reduction: str = "sum",
        revision: str | None = None,
        segments: SegmentOptions = PAPER_SEGMENTS,
    ) -> SignalSettings:
        """The settings of a loaded teacher."""
        revision = revision or getattr(model.config, "_commit_hash", None)
        return cls(
            *(name, revision, weights_fingerprint(model), str(model.dtype), template, row_reduction),
            **dataclasses.asdict(segments),
        )


class SignalCache:
    """A verified cache of teacher signals.

    Args:
        folder: written by `extract_signals`.

    Raises:
        ValueError: no cache there, or one of another format or version of segmentation, or a manifest or shard that is
            missing or altered; names the file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        manifests = read_manifests(self.folder)
        if not manifests:
            raise ValueError(f"signals: {self.folder} holds no {MANIFEST}; run `mold extract` first")
        self._examples: dict[str, dict[str, Any]] = {}
        self._signals: dict[str, torch.Tensor] = {}
        self._shards: dict[str, str] = {}
        self.settings = next(iter(manifests.values()))["settings"]
        for name, manifest in manifests.items():
            if different := _different(manifest["settings"], self.settings):
                raise ValueError(
                    f"signals: {self.folder / name} has {different}={getattr(manifest['settings'], different)!r}, "
                    f"another manifest beside it {getattr(self.settings, different)!r}"
                )
            self._examples |= manifest["examples"]
            self._shards |= manifest["shards"]
        for name, digest in self._shards.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"signals: {path} is missing; delete the folder and extract again")
            data = path.read_bytes()
            try:
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ValueError("its hash is another")
                self._signals.update(load(data))
            except (ValueError, SafetensorError) as error:
                raise ValueError(
                    f"signals: {path} was altered since it was written ({error}); delete the folder, extract again"
                ) from error
        for content, entry in self._examples.items():
            shape = entry["steps"], entry["key_words"]
            found = self._signals.get(content)
            if (shape[1] > 0) != (found is not None) or (found is not None and tuple(found.shape[1:]) != shape):
                raise ValueError(
                    f"signals: {self.folder}: a manifest lists {content} with {shape[0]} steps and {shape[1]} key "
                    "words, which is not what the shards hold; delete the folder and extract again"
                )

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

    def require_template(self, template: str) -> None:
        """Raise a ValueError that says what to pass unless the signals' texts are of this template."""
        if (found := self.settings.template) != template:
            fitting = template if ASSISTANT in found and ASSISTANT not in template else found
            raise ValueError(
                f"signals: {self.folder} was extracted with template={found!r}, must be {template!r} as the student's "
                f"texts are; give teacher and student one template, for instance {fitting!r}"
            )

    def require_same(self, settings: SignalSettings) -> None:
        """Raise a ValueError that names the first setting that is another; what the teacher is called is none."""
        if different := _different(self.settings, settings):
            self.require(**{different: getattr(settings, different)})

    def signal(self, example: Example, encoded: EncodedExample) -> torch.Tensor | None:
        """The teacher's stepwise attention of an example, float32 [L1, S, M]; None if it has no key words.

        Raises:
            ValueError: the cache has no signal of an example with this text, or one whose steps and key words are not
                the student's; names the example.
        """
        content = text_hash(example, self.settings.template)
        entry = self._examples.get(content)
        if entry is None:
            raise ValueError(
                f"example {example.id}: has no teacher signal in {self.folder}, none of whose {len(self)} texts is "
                "this example's; run `mold extract` on it"
            )
        check_agreement(example, encoded, entry["steps"], entry["key_words"])
        return self._signals.get(content)

    def items(self, examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """What `mold.Collator` makes batches of: every example in the student's tokens, with its signal.

        Raises:
            ValueError: as of `signal`, and of `mold.encode_example`; names the example.
        """
        template, segments = self.settings.template, self.settings.segments
        pairs = ((example, encode_example(example, tokenizer, template, segments=segments)) for example in examples)
        return [{"example": encoded, "signal": self.signal(example, encoded)} for example, encoded in pairs]


def _different(one: SignalSettings, other: SignalSettings) -> str | None:
    """The first setting that decides a signal and is not the same."""
    names = [option.name for option in dataclasses.fields(one) if option.name not in ("teacher", "revision")]
    return next((name for name in names if getattr(one, name) != getattr(other, name)), None)


def check_agreement(example: Example, encoded: EncodedExample, steps: int, key_words: int) -> None:
    """Raise a ValueError that names the example unless the student's text has the teacher's steps and key words."""
    if (expected := (len(encoded.row_spans), len(encoded.key_spans))) != (steps, key_words):
        raise ValueError(
            f"example {example.id}: the teacher has {steps} steps and {key_words} key words, the student's text "
            f"{expected[0]} and {expected[1]}"
        )


def read_manifests(folder: Path) -> dict[str, dict]:
    """The manifests of all processes that ever wrote into the folder, by file name, their settings as SignalSettings.

    Raises:
        ValueError: one is not as `extract_signals` of this version writes it; names the file.
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
    for name in ("settings", "shards", "examples"):
        if not isinstance(manifest.get(name), dict):
            raise ValueError(f"{name} is {reprlib.repr(manifest.get(name))}, must be an object")
    try:
        settings = SignalSettings(**manifest["settings"])
    except TypeError as error:
        raise ValueError(f"settings has the keys {', '.join(map(repr, manifest['settings']))} ({error})") from error
    for name, digest in manifest["shards"].items():
        if not _SHARD.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"shards holds {reprlib.repr(name)}: {reprlib.repr(digest)}, must hold a hash a shard")
    for content, entry in manifest["examples"].items():
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != _ENTRY:
            raise ValueError(
                f"examples holds {reprlib.repr(content)}: {reprlib.repr(entry)}, must hold {', '.join(_ENTRY)} each"
            )
    return manifest | {"settings": settings}
