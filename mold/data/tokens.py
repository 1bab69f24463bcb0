"""Text becomes tokens: whole offsets, nothing added behind the text, no control tokens out of data."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from mold.data.segmentation import Span


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = True
) -> tuple[list[int], list[Span]]:
    """Token ids of a text that may go on, and the characters that each stands for.

    Args:
        tokenizer: a fast tokenizer.
        text: of any length; nothing is cut.
        special_tokens: whether the tokenizer puts its special tokens before the text. What it would put behind the
            text is left out: the text may be a prompt, and who trains on it ends it.

    Returns:
        (ids, offsets): the offsets of blanks are those of the blanks, also where the tokenizer trims them to nothing
        (``trim_offsets``, as GPT-NeoX and RoBERTa have it).
    """
    with _whole_offsets(tokenizer):
        encoding = tokenizer(
            text,
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
    added = encoding["special_tokens_mask"]
    end = max((index + 1 for index, is_added in enumerate(added) if not is_added), default=0)
    return list(encoding["input_ids"][:end]), [tuple(span) for span in encoding["offset_mapping"][:end]]


def token_spans(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    phrases: Sequence[str],
    *,
    which: str = "first",
    special_tokens: bool = True,
) -> torch.Tensor:
    """The tokens of phrases in a text, as `mold.watch` and `mold_kernels.span_attention` take them.

    A token counts if it has a character of the phrase, so one that has the blank before it does too.

    Args:
        tokenizer: a fast tokenizer.
        text: what the model reads, for example ``tokenizer.apply_chat_template(messages, tokenize=False)``.
        phrases: what is looked for, letter by letter.
        which: "first" or "last" occurrence of each phrase, in the phrases' order; or "all" of them, phrase by phrase.
        special_tokens: whether the tokenizer puts its special tokens before the text. False for the text of a chat
            template, which holds them.

    Returns:
        int32 [spans, 2], half-open, counted from the text's first token: tokens of padding before it are to be added.

    Raises:
        ValueError: the tokenizer has no offsets, or the text has no such phrase, or none of its characters has a token.
    """
    if which not in ("first", "last", "all"):
        raise ValueError(f'which: is {which!r}, must be "first", "last" or "all"')
    if isinstance(phrases, str) or not phrases or not all(isinstance(phrase, str) and phrase for phrase in phrases):
        raise ValueError(f"phrases: is {phrases!r}, must be a list of phrases, none of them empty")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: is {type(tokenizer).__name__}, must be a fast one: slow ones have no offsets")
    _, offsets = tokenize(tokenizer, text, special_tokens)
    spans = []
    for phrase in phrases:
        places = [match.start() for match in re.finditer(f"(?={re.escape(phrase)})", text)]
        if not places:
            raise ValueError(f"phrases: holds {phrase!r}, which the text does not have")
        for start in {"first": places[:1], "last": places[-1:], "all": places}[which]:
            end = start + len(phrase)
            held = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
            if not held:
                raise ValueError(f"phrases: {phrase!r} at character {start} has no token of {type(tokenizer).__name__}")
            spans.append((held[0], held[-1] + 1))
    return torch.tensor(spans, dtype=torch.int32)


def check_no_special_tokens(tokenizer: PreTrainedTokenizerBase, parts: Iterable[tuple[str, str]]) -> None:
    """Raise a ValueError if one of the (name, text) holds the spelling of a special token.

    It would become that token: a text could end a turn, or open one of another role.
    """
    pattern = _special_spelling(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))
    for name, text in parts:
        if found := pattern.search(text):
            raise ValueError(
                f"{name}: holds {found[0]!r}, which {type(tokenizer).__name__} makes a special token of; must be "
                "without it"
            )


@functools.lru_cache(maxsize=8)
def _special_spelling(tokenizer, size, known) -> re.Pattern:
    # size and known are there for the cache: tokens may be added to a tokenizer.
    marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    # Blanks that are special tokens stand in every text.
    spellings = sorted({token for token in (*known, *marked) if token.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spellings)) or "(?!)")


@contextmanager
def _whole_offsets(tokenizer) -> Iterator[None]:
    """The tokenizer with offsets that are not trimmed."""
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    if before is None or b'"trim_offsets":true' not in (state := before.__getstate__()):
        yield
        return
    whole = processors.ByteLevel()
    # Any processor's state may be set: the Python class is a name of it alone.
    whole.__setstate__(json.dumps(_without_trimming(json.loads(state))).encode())
    backend.post_processor = whole
    try:
        yield
    finally:
        backend.post_processor = before


def _without_trimming(state):
    if isinstance(state, list):
        return [_without_trimming(part) for part in state]
    if isinstance(state, dict):
        return {key: False if key == "trim_offsets" else _without_trimming(part) for key, part in state.items()}
    return state
