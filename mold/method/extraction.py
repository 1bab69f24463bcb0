"""Extracting a teacher's signals into a cache on disk, resumable and split over processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.encoding import Collator, EncodedExample, check_tokenizer, encode_example
from mold.data.examples import Example, text_hash
from mold.files import write_atomically
from mold.method.attention_interface import observe_attention, use_mold_attention
from mold.method.signals import FORMAT_VERSION, SignalCache, SignalSettings, read_manifests
from mold.processes import check_processes


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
    manifests = read_manifests(folder)
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
            tensors: dict[str, torch.Tensor] = {}
            # Examples of like length share a batch: less padding.
            by_length = sorted(shard, key=lambda pair: len(pair[1].input_ids))
            for first in range(0, len(by_length), batch_size):
                batch = [pair[1] for pair in by_length[first : first + batch_size]]
                tensors |= _signals(model, collate, batch, settings.row_reduction)
                bar.update(len(batch))
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


def _signals(
    model: PreTrainedModel, collate: Collator, encoded: Sequence[EncodedExample], row_reduction: str
) -> dict[str, torch.Tensor]:
    """The signal of each example that has key words, by id."""
    encoded = [example for example in encoded if example.key_spans]
    if not encoded:
        return {}
    batch = collate([{"example": example} for example in encoded])
    attention = observe_attention(model, batch, row_reduction).float().cpu()
    if not attention.isfinite().all():
        wrong = [e.id for i, e in enumerate(encoded) if not attention[:, i].isfinite().all()]
        raise ValueError(
            f"example {wrong[0]}: the teacher's attention is not finite; is its dtype {model.dtype} wide enough?"
        )
    return {
        example.id: attention[:, index, : len(example.row_spans), : len(example.key_spans)].contiguous()
        for index, example in enumerate(encoded)
    }
