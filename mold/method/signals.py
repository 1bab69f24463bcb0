"""Teacher signals: the teacher's stepwise attention, in a cache on disk (`mold.method.signal_files`)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mold.data.encoding import EncodedExample, encode_example
from mold.data.examples import ASSISTANT, Example, text_hash
from mold.method.signal_files import MANIFEST, Entry, read_cells, read_header, read_manifests, unpacked
from mold.method.signal_settings import SignalSettings, different


class SignalCache:
    """A cache of teacher signals. Opening it reads what the shards say of their examples; a signal is read, and its
    hash checked, when it is used.

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
        self.settings = next(iter(manifests.values()))["settings"]
        self._headers: dict[str, str] = {}
        for name, manifest in manifests.items():
            if other := different(manifest["settings"], self.settings):
                raise ValueError(
                    f"signals: {self.folder / name} has {other}={getattr(manifest['settings'], other)!r}, another "
                    f"manifest beside it {getattr(self.settings, other)!r}"
                )
            self._headers |= manifest["shards"]
        self._places = {content: name for name in self._headers for content in self._read_entries(name)}
        self._entries = functools.lru_cache(256)(self._read_entries)  # of shards as they are used

    def __reduce__(self):
        """A data loader's worker that was spawned opens the folder again."""
        return type(self), (self.folder,)

    def _read_entries(self, shard: str) -> dict[str, Entry]:
        return read_header(self.folder / shard, self._headers[shard])

    def __contains__(self, content: str) -> bool:
        return content in self._places

    def __len__(self) -> int:
        return len(self._places)

    def about(self) -> dict[str, str | int | None]:
        """What a model card says of the signals: their settings, their number and a hash of all of them."""
        digest = hashlib.sha256("".join(sorted(self._headers.values())).encode()).hexdigest()
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
        if other := different(self.settings, settings):
            self.require(**{other: getattr(settings, other)})

    def entry(self, content: str) -> Entry:
        """What the cache holds of an example that is in it, by the hash of its text."""
        return self._entries(self._places[content])[content]

    def read(self, content: str) -> torch.Tensor:
        """The signal [L1, S, M] of an example, by the hash of its text; float32, L1 = 1 for a mixture.

        Raises:
            ValueError: it was altered since it was written; names the file.
        """
        path, entry = self.folder / self._places[content], self.entry(content)
        cells = read_cells(path, content, entry, getattr(torch, self.settings.signal_dtype))
        return unpacked(cells, entry.visible, entry.key_words)

    def reader(self, example: Example, encoded: EncodedExample) -> Callable[[], torch.Tensor] | None:
        """What reads an example's signal when it is called; None if it has no key words.

        Raises:
            ValueError: the cache has no signal of an example with this text, or one whose steps and key words are not
                the student's; names the example.
        """
        content = text_hash(example, self.settings.template)
        if content not in self:
            raise ValueError(
                f"example {example.id}: has no teacher signal in {self.folder}, none of whose {len(self)} texts is "
                "this example's; run `mold extract` on it"
            )
        entry = self.entry(content)
        check_agreement(example, encoded, entry.steps, entry.key_words)
        return functools.partial(self.read, content) if entry.key_words else None

    def signal(self, example: Example, encoded: EncodedExample) -> torch.Tensor | None:
        """The teacher's stepwise attention of an example, float32 [L1, S, M]; None if it has no key words.

        Raises:
            ValueError: as of `reader` and `read`.
        """
        reader = self.reader(example, encoded)
        return None if reader is None else reader()

    def items(self, examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """What `mold.Collator` makes batches of: every example in the student's tokens, with what reads its signal.

        Raises:
            ValueError: as of `reader`, and of `mold.encode_example`; names the example.
        """
        template, segments = self.settings.template, self.settings.segments
        pairs = ((example, encode_example(example, tokenizer, template, segments=segments)) for example in examples)
        return [{"example": encoded, "signal": self.reader(example, encoded)} for example, encoded in pairs]


def check_agreement(example: Example, encoded: EncodedExample, steps: int, key_words: int) -> None:
    """Raise a ValueError that names the example unless the student's text has the teacher's steps and key words."""
    if (expected := (len(encoded.row_spans), len(encoded.key_spans))) != (steps, key_words):
        raise ValueError(
            f"example {example.id}: the teacher has {steps} steps and {key_words} key words, the student's text "
            f"{expected[0]} and {expected[1]}"
        )
