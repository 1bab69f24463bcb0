"""Extracting a teacher's signals into a cache on disk, resumable and split over processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mold.data.encoding import Collator, EncodedExample, check_tokenizer, encode_example, shortened
from mold.data.examples import Example, text_hash
from mold.files import write_atomically
from mold.method.attention_interface import observe_attention, use_mold_attention
from mold.method.signals import FORMAT_VERSION, SignalCache, SignalSettings, read_manifests
from mold.processes import check_processes

logger = logging.get_logger(__name__)


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
        examples: of which those with one text share a signal.
        folder: of the cache; made if missing.
        settings: what the cache is made with, `SignalSettings.of(model, ...)`.
        batch_size: examples a forward.
        shard_size: examples a file.
        max_length: most tokens an example may have.
        progress: whether to show a progress bar.

    Returns:
        The verified cache.

    Raises:
        ValueError: the folder holds a cache of other settings (what the teacher is called is none), or of other tokens
            of an example; the examples, the tokenizer or the model cannot be used (see `encode_example`,
            `use_mold_attention`); the processes do not know of each other; or the teacher's attention is not finite.
    """
    folder = Path(folder)
    check_tokenizer(tokenizer)
    use_mold_attention(model).eval()
    state = check_processes()
    mine = "" if state.is_main_process else f"-{state.process_index}"
    folder.mkdir(parents=True, exist_ok=True)
    manifests = read_manifests(folder)
    if manifests:
        SignalCache(folder).require_same(settings)
    manifest = manifests.get(f"manifest{mine}.json") or {"shards": {}, "examples": {}}
    shards, done_here = manifest["shards"], manifest["examples"]
    noted = dataclasses.asdict(manifest.get("settings", settings))
    extracted = {key: value for found in manifests.values() for key, value in found["examples"].items()}
    remaining: dict[str, EncodedExample] = {}
    seen: list[EncodedExample] = []
    for example in examples:
        content = text_hash(example, settings.template)
        known = extracted.get(content)
        encoded = encode_example(
            *(example, tokenizer, settings.template),
            append_eos=False,
            max_length=max_length,
            segments=settings.segments,
        )
        seen.append(encoded)
        if known is None:
            remaining.setdefault(content, encoded)
        elif known["tokens"] != _tokens_hash(encoded):
            raise ValueError(
                f"example {example.id}: its tokens are not those that {folder} was extracted from: the teacher's "
                "tokenizer or chat template is another; extract into another folder"
            )
    if state.is_main_process and (said := shortened(seen)):
        logger.warning(f"examples: {said}")
    # Nobody writes before everybody has seen the same examples remain.
    state.wait_for_everyone()
    done = len(examples) - len(remaining)
    my_own = list(remaining.items())[state.process_index :: state.num_processes]
    collate = Collator(pad_token_id=tokenizer.eos_token_id)
    with tqdm(total=done + len(my_own), desc="Teacher signals", disable=not progress or bool(mine)) as bar:
        bar.update(done)
        for start in range(0, len(my_own), shard_size):
            shard = my_own[start : start + shard_size]
            tensors: dict[str, torch.Tensor] = {}
            # Examples of like length share a batch: less padding.
            by_length = sorted(shard, key=lambda pair: len(pair[1].input_ids))
            for first in range(0, len(by_length), batch_size):
                batch = dict(by_length[first : first + batch_size])
                tensors |= _signals(model, collate, batch, settings.row_reduction)
                bar.update(len(batch))
            name = f"shard{mine}-{len(shards):05d}.safetensors"
            data = save(tensors)
            write_atomically(folder / name, data)
            shards[name] = hashlib.sha256(data).hexdigest()
            for content, encoded in shard:
                done_here[content] = {
                    "tokens": _tokens_hash(encoded),
                    "steps": len(encoded.row_spans),
                    "key_words": len(encoded.key_spans),
                }
            found = {"format": FORMAT_VERSION, "settings": noted, "shards": shards, "examples": done_here}
            write_atomically(folder / f"manifest{mine}.json", json.dumps(found, indent=1).encode())
    state.wait_for_everyone()
    return SignalCache(folder)


def _tokens_hash(encoded: EncodedExample) -> str:
    values = [encoded.input_ids, encoded.row_spans, encoded.key_spans]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _signals(
    model: PreTrainedModel, collate: Collator, encoded: Mapping[str, EncodedExample], row_reduction: str
) -> dict[str, torch.Tensor]:
    """The signal of each example that has key words, by the hash of its content."""
    encoded = {content: example for content, example in encoded.items() if example.key_spans}
    if not encoded:
        return {}
    batch = collate([{"example": example} for example in encoded.values()])
    attention = observe_attention(model, batch, row_reduction).float().cpu()
    signals = {}
    for index, (content, example) in enumerate(encoded.items()):
        signal = attention[:, index, : len(example.row_spans), : len(example.key_spans)].contiguous()
        if not attention[:, index].isfinite().all():
            raise ValueError(
                f"example {example.id}: the teacher's attention is not finite; is its dtype {model.dtype} wide enough?"
            )
        signals[content] = signal
    return signals
