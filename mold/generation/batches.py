"""Batched generation, and a journal of finished batches that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.files import append_jsonl, cut_torn_line, json_lines


class Completion(NamedTuple):
    """text: what was generated, without special tokens. truncated: whether it ended for want of tokens alone."""

    text: str
    truncated: bool


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | None = None,
    static_cache: bool = False,
) -> list[Completion]:
    """Completions of one batch of prompts.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids, padded here on the left.
        max_new_tokens: most tokens of a completion.
        temperature: 0 is greedy.
        top_p: of sampling, 1 samples from all tokens.
        seed: of sampling. A batch is the same for the same seed, whatever ran before; the global generators are left
            as they were.
        stop: a text that ends a completion; it and what follows is cut off.
        static_cache: keys and values in tensors of fixed size, which transformers compiles the decoding for on GPUs.

    Returns:
        One completion a prompt.
    """
    length = max(map(len, prompts))
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = torch.tensor([[pad_token_id] * (length - len(ids)) + [*ids] for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    ends = _end_tokens(model, tokenizer)
    # Whatever the model's own generation defaults are: no penalties, no truncation of the distribution but top_p.
    options: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    options |= {"do_sample": False, "repetition_penalty": 1.0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0, "do_sample": True}
    if stop is not None:
        options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    if static_cache:
        options["cache_implementation"] = "static"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            eos_token_id=ends,
            **options,
        )[:, length:]
    completions = []
    for tokens in output.tolist():
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        whole = len(tokens) < max_new_tokens or tokens[-1] in (*ends, pad_token_id)
        if stop is not None and stop in text:
            text, whole = text.partition(stop)[0], True
        completions.append(Completion(text, not whole))
    return completions


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stage: str,
    *,
    batch_size: int,
    seed: int = 0,
    journal: Journal | None = None,
    title: str = "Generating",
    progress: bool = True,
    **options,
) -> list[Completion]:
    """Completions of any number of prompts, in batches of like lengths; the journal's batches are not generated again.

    Args:
        model: a causal language model; put into evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids.
        stage: of the journal, by which batches are named; a batch is also known by its prompts.
        batch_size: prompts a batch.
        seed: of sampling; each batch has one of its own, made from it.
        journal: finished batches are noted there; None keeps no journal.
        title: of the progress bar.
        progress: whether to show it.
        **options: of `generate_batch`.

    Returns:
        One completion a prompt, in their order.
    """
    model.eval()
    completions: list = [None] * len(prompts)
    for place, chosen in enumerate(tqdm(batches_by_length(prompts, batch_size), title, disable=not progress)):
        batch = [[*prompts[index]] for index in chosen]
        name = f"{stage}-{place}"
        known = f"{name}-{hashlib.sha256(json.dumps(batch).encode()).hexdigest()[:16]}"
        if journal is not None and known in journal.batches:
            found = [Completion(**row) for row in journal.batches[known]]
        else:
            found = generate_batch(model, tokenizer, batch, seed=batch_seed(seed, name), **options)
            if journal is not None:
                journal.append(known, [completion._asdict() for completion in found])
        for index, completion in zip(chosen, found, strict=True):
            completions[index] = completion
    return completions


def batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of prompts of like length that share a batch: less padding."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, name: str) -> int:
    """A seed of its own for every named batch, so that a batch does not depend on those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6])


class Journal:
    """Finished batches of a stage, a JSON line each behind one with the stage's settings.

    What a killed run left of a line is cut off. Batches are named by what they are, so a run that goes on asks for the
    same ones and finds those that are done.

    Args:
        path: of the file, made if missing.
        settings: everything that decides what a batch holds.

    Raises:
        ValueError: the file was written with other settings (names the first), or is none of a journal.
    """

    def __init__(self, path: str | os.PathLike, settings: dict):
        self.path = Path(path)
        self.batches: dict[str, list[dict]] = {}
        settings = json.loads(json.dumps(settings))
        cut_torn_line(self.path)
        try:
            rows = [row for _, row in json_lines(self.path)]
            theirs = rows[0]["settings"] if rows else None
            self.batches = {row["batch"]: row["rows"] for row in rows[1:]}
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path}: is no journal of mold ({error}); delete it to start anew") from error
        if theirs is None:
            append_jsonl(self.path, {"settings": settings})
            return
        for key in sorted(theirs.keys() | settings.keys()):
            if theirs.get(key) != settings.get(key):
                raise ValueError(
                    f"{self.path}: was written with {key}={theirs.get(key)!r}, this run has {settings.get(key)!r}; "
                    "choose another output_dir, or delete the file to start anew"
                )

    def append(self, batch: str, rows: list[dict]) -> None:
        """Note a finished batch."""
        append_jsonl(self.path, {"batch": batch, "rows": rows})
        self.batches[batch] = rows


def _end_tokens(model, tokenizer) -> list[int]:
    """Chat models end a turn with a token that need not be the tokenizer's end of sequence."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [known] if isinstance(known, int) else known or []
    return sorted({tokenizer.eos_token_id, *known})
