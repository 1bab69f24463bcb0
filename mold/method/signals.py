"""Teacher signals: the teacher's stepwise attention of every layer, extracted once and cached on disk, or online.

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
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.encoding import Collator, EncodedExample, check_tokenizer, encode_example
from mold.data.examples import Example, text_hash
from mold.data.segmentation import SEGMENTATION_VERSION
from mold.files import write_atomically
from mold.method.attention_interface import stack_attention, use_mold_attention
from mold.processes import check_processes

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


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the names, shapes and up to 64 evenly spaced values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


class SignalCache:
    """A verified cache of teacher signals.

    Args:
        folder: written by `extract_signals`.

    Raises:
        ValueError: no cache there, or one of another format, or a shard that is missing or altered; names the file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        manifests = _read_manifests(self.folder)
        if not manifests:
            raise ValueError(f"signals: {self.folder} holds no {MANIFEST}; run `mold extract` first")
        self._examples, self._signals, shards = {}, {}, {}
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
        found, expected = (entry["steps"], entry["key_words"]), (len(encoded.row_spans), len(encoded.key_spans))
        if found != expected:
            raise ValueError(
                f"example {example.id}: the teacher's signal has {found[0]} steps and {found[1]} key words, the "
                f"student's text {expected[0]} and {expected[1]}"
            )
        return self._signals[example.id] if entry["key_words"] else None


def extract_signals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    folder: str | os.PathLike,
    settings: SignalSettings,
    *,
    batch_size: int = 8,
    shard_size: int = 64,
    max_length: int | None = None,
    progress: bool = True,
) -> SignalCache:
    """Extract the stepwise attention of every example, or of those a killed run has left; split over processes.

    Args:
        model: the teacher; its attention is switched to "mold".
        tokenizer: the teacher's, a fast one.
        examples: with distinct ids.
        folder: of the cache; made if missing.
        settings: what the cache is made with, `SignalSettings.of(model, ...)`.
        batch_size: examples a forward.
        shard_size: examples a file.
        max_length: most tokens an example may have.
        progress: whether to show a progress bar.

    Returns:
        The verified cache.

    Raises:
        ValueError: the folder holds a cache of other settings or another text of an example; the examples, the
            tokenizer or the model cannot be used (see `encode_example`, `use_mold_attention`); the processes do not
            know of each other; or the teacher's attention is not finite.
    """
    folder = Path(folder)
    check_tokenizer(tokenizer)
    repeated = [name for name, count in Counter(example.id for example in examples).items() if count > 1]
    if repeated:
        raise ValueError(f"example {repeated[0]}: stands twice in the data set, ids must be distinct")
    use_mold_attention(model).eval()
    state = check_processes()
    mine = "" if state.is_main_process else f"-{state.process_index}"
    folder.mkdir(parents=True, exist_ok=True)
    manifests = _read_manifests(folder)
    if manifests:
        SignalCache(folder).require(**dataclasses.asdict(settings))
    manifest = manifests.get(f"manifest{mine}.json") or {
        "format": FORMAT_VERSION,
        "settings": dataclasses.asdict(settings),
        "shards": {},
        "examples": {},
    }
    extracted = {key: value for found in manifests.values() for key, value in found["examples"].items()}
    remaining = []
    for example in examples:
        known = extracted.get(example.id)
        if known is not None and known["text"] != text_hash(example, settings.template):
            raise ValueError(f"example {example.id}: its text is not the one that {folder} was extracted from")
        encoded = encode_example(example, tokenizer, settings.template, append_eos=False, max_length=max_length)
        if known is None:
            remaining.append((example, encoded))
        elif known["tokens"] != _tokens_hash(encoded):
            raise ValueError(
                f"example {example.id}: its tokens are not those that {folder} was extracted from: the teacher's "
                "tokenizer or chat template is another; extract into another folder"
            )
    # Nobody writes before everybody has seen the same examples remain.
    state.wait_for_everyone()
    done = len(examples) - len(remaining)
    remaining = remaining[state.process_index :: state.num_processes]
    collate = Collator(pad_token_id=tokenizer.eos_token_id)
    with tqdm(total=done + len(remaining), desc="Teacher signals", disable=not progress or bool(mine)) as bar:
        bar.update(done)
        for start in range(0, len(remaining), shard_size):
            shard = remaining[start : start + shard_size]
            tensors = {}
            # Examples of like length share a batch: less padding.
            by_length = sorted(shard, key=lambda pair: len(pair[1].input_ids))
            for first in range(0, len(by_length), batch_size):
                encoded = [pair[1] for pair in by_length[first : first + batch_size]]
                tensors |= _signals(model, collate, encoded, settings.row_reduction)
                bar.update(len(encoded))
            name = f"shard{mine}-{len(manifest['shards']):05d}.safetensors"
            data = save(tensors)
            write_atomically(folder / name, data)
            manifest["shards"][name] = hashlib.sha256(data).hexdigest()
            for example, encoded in shard:
                manifest["examples"][example.id] = {
                    "text": text_hash(example, settings.template),
                    "tokens": _tokens_hash(encoded),
                    "steps": len(encoded.row_spans),
                    "key_words": len(encoded.key_spans),
                }
            write_atomically(
                folder / f"manifest{mine}.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode()
            )
    state.wait_for_everyone()
    return SignalCache(folder)


def _tokens_hash(encoded: EncodedExample) -> str:
    values = [encoded.input_ids, encoded.row_spans, encoded.key_spans]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class OnlineTeacher:
    """A teacher that runs beside the student, in place of a SignalCache: nothing on disk, a forward every step.

    Args:
        model: frozen, put into evaluation mode and switched to the "mold" attention here.
        tokenizer: the teacher's, a fast one.
        template, row_reduction: as of the student's training.
        max_length: most tokens an example may have.

    Raises:
        ValueError: the model's attention cannot be replaced, or the tokenizer cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        row_reduction: str,
        max_length: int | None = None,
    ):
        check_tokenizer(tokenizer)
        self.model = use_mold_attention(model).eval().requires_grad_(False)
        self._tokenizer, self._template = tokenizer, template
        self._row_reduction, self._max_length = row_reduction, max_length

    @property
    def collator(self) -> Collator:
        """What pads the teacher's tokens."""
        return Collator(self._tokenizer.eos_token_id)

    def encode(self, example: Example, encoded: EncodedExample) -> EncodedExample | None:
        """The example in the teacher's tokens; None if it has no key words.

        Raises:
            ValueError: its steps and key words are not the student's (`encoded`); names the example.
        """
        mine = encode_example(example, self._tokenizer, self._template, append_eos=False, max_length=self._max_length)
        found, expected = [(len(e.row_spans), len(e.key_spans)) for e in (mine, encoded)]
        if found != expected:
            raise ValueError(
                f"example {example.id}: the teacher's text has {found[0]} steps and {found[1]} key words, "
                f"the student's {expected[0]} and {expected[1]}"
            )
        return mine if mine.key_spans else None

    def attention(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Stepwise attention float32 [B, L1, S, M] of a batch that `collator` made, on the batch's device."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        attention = _stepwise_attention(self.model, inputs, self._row_reduction)
        return attention.transpose(0, 1).to(batch["input_ids"].device)


@torch.no_grad()
def _stepwise_attention(model, batch, row_reduction) -> torch.Tensor:
    """float32 [L1, B, S, M]."""
    # The backbone alone: the teacher's logits are not needed.
    out = model.base_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        row_spans=batch["row_spans"],
        key_spans=batch["key_spans"],
        row_reduction=row_reduction,
        output_attentions=True,
        use_cache=False,
    )
    return stack_attention(out.attentions).float()


def _signals(model, collate, encoded, row_reduction) -> dict[str, torch.Tensor]:
    """The signal of each example that has key words, by id."""
    encoded = [example for example in encoded if example.key_spans]
    if not encoded:
        return {}
    batch = {k: v.to(model.device) for k, v in collate([{"example": example} for example in encoded]).items()}
    attention = _stepwise_attention(model, batch, row_reduction).cpu()
    if not attention.isfinite().all():
        wrong = [e.id for i, e in enumerate(encoded) if not attention[:, i].isfinite().all()]
        raise ValueError(
            f"example {wrong[0]}: the teacher's attention is not finite; is its dtype {model.dtype} wide enough?"
        )
    return {
        example.id: attention[:, index, : len(example.row_spans), : len(example.key_spans)].contiguous()
        for index, example in enumerate(encoded)
    }


def _read_manifests(folder: Path) -> dict[str, dict]:
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
