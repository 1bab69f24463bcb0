"""Extracting a teacher's signals into a cache on disk, resumable and split over processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mold.data.encoding import Collator, EncodedExample, check_tokenizer, encode_example, shortened
from mold.data.examples import Example, text_hash
from mold.method.attention_interface import observe_attention, use_mold_attention
from mold.method.router import kept_layers
from mold.method.signal_files import Entry, bytes_hash, packed, read_manifests, write_manifest, write_shard
from mold.method.signal_settings import SignalSettings
from mold.method.signals import SignalCache
from mold.processes import check_processes
from mold_kernels import teacher_layer_weights

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
    manifests, extracted = read_manifests(folder), None
    if manifests:
        extracted = SignalCache(folder)
        extracted.require_same(settings)
    manifest = manifests.get(f"manifest{mine}.json") or {"shards": {}, "settings": settings}
    shards, noted = manifest["shards"], dataclasses.asdict(manifest["settings"])
    remaining: dict[str, EncodedExample] = {}
    seen: list[EncodedExample] = []
    for example in examples:
        content = text_hash(example, settings.template)
        encoded = encode_example(
            *(example, tokenizer, settings.template),
            append_eos=False,
            max_length=max_length,
            segments=settings.segments,
        )
        seen.append(encoded)
        if extracted is None or content not in extracted:
            remaining.setdefault(content, encoded)
        elif extracted.entry(content).tokens != _tokens_hash(encoded):
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
            signals: dict[str, torch.Tensor] = {}
            # Examples of like length share a batch: less padding.
            by_length = sorted(shard, key=lambda pair: len(pair[1].input_ids))
            for first in range(0, len(by_length), batch_size):
                batch = dict(by_length[first : first + batch_size])
                signals |= _signals(model, collate, batch, settings)
                bar.update(len(batch))
            name = f"shard{mine}-{len(shards):05d}.safetensors"
            entries = {content: _entry(encoded, signals.get(content)) for content, encoded in shard}
            shards[name] = write_shard(folder / name, entries, signals)
            write_manifest(folder / f"manifest{mine}.json", noted, shards)
    state.wait_for_everyone()
    return SignalCache(folder)


def _tokens_hash(encoded: EncodedExample) -> str:
    values = [encoded.input_ids, encoded.row_spans, encoded.key_spans]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _entry(encoded: EncodedExample, cells: torch.Tensor | None) -> Entry:
    visible, keys = visible_counts(encoded), len(encoded.key_spans)
    return Entry(_tokens_hash(encoded), visible, keys, "" if cells is None else bytes_hash(cells))


def visible_counts(encoded: EncodedExample) -> list[int]:
    """How many key words begin before the end of each step: those that it can see, as both are in order."""
    starts = [start for start, _ in encoded.key_spans]
    return [bisect_left(starts, end) for _, end in encoded.row_spans]


def _signals(
    model: PreTrainedModel, collate: Collator, encoded: Mapping[str, EncodedExample], settings: SignalSettings
) -> dict[str, torch.Tensor]:
    """The stored cells of each example that has key words, by the hash of its content."""
    encoded = {content: example for content, example in encoded.items() if example.key_spans}
    if not encoded:
        return {}
    batch = collate([{"example": example} for example in encoded.values()])
    layers = None
    if settings.signal_layers == "mixture":
        left_out: Any = settings.teacher_layers_left_out
        layers = kept_layers("teacher_layers_left_out", left_out, model.config.get_text_config().num_hidden_layers)
    attention = observe_attention(model, batch, settings.row_reduction, layers).float()
    if settings.tau_1 is not None:
        attention = _mixture(attention, encoded.values(), settings.tau_1)
    attention, cells = attention.cpu(), {}
    for index, (content, example) in enumerate(encoded.items()):
        signal = attention[:, index, : len(example.row_spans), : len(example.key_spans)]
        stored = packed(signal, visible_counts(example)).to(getattr(torch, settings.signal_dtype))
        if not stored.isfinite().all():
            raise ValueError(
                f"example {example.id}: the teacher's attention is not finite; are its dtype {model.dtype} and "
                f"signal_dtype={settings.signal_dtype} wide enough?"
            )
        cells[content] = stored
    return cells


def _mixture(attention: torch.Tensor, examples: Iterable[EncodedExample], tau: float) -> torch.Tensor:
    """[1, B, S, M] of [L, B, S, M]."""
    counts = torch.tensor([(len(e.row_spans), len(e.key_spans)) for e in examples], device=attention.device)
    weights = teacher_layer_weights(attention, counts[:, 0], counts[:, 1], tau)
    return torch.einsum("bl,lbsm->bsm", weights, attention)[None]
