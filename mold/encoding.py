"""From examples to token ids, regions and spans, and to padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mold.data import Example, render, split_template
from mold.loss import ANSWER, PROMPT, RATIONALE
from mold.text import Segments, Span, segment, token_spans


@dataclass(frozen=True)
class EncodedExample:
    """One example in a model's tokens.

    input_ids, regions: one entry a token (regions: PROMPT, RATIONALE or ANSWER).
    row_spans, key_spans: half-open token ranges of the steps and key words; key_spans is empty without key words, both
        under a template without rationale.
    step_texts, key_word_texts: what they say, for pictures and messages.
    """

    id: str
    input_ids: list[int]
    regions: list[int]
    row_spans: list[Span]
    key_spans: list[Span]
    step_texts: list[str]
    key_word_texts: list[str]


def encode_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    append_eos: bool = True,
    max_length: int | None = None,
) -> EncodedExample:
    """Render, segment and tokenize one example.

    Args:
        example: question, rationale and answer.
        tokenizer: a fast tokenizer (its offsets map characters to tokens).
        template: see `mold.data.render`.
        append_eos: whether the answer ends with the tokenizer's end-of-sequence token (training wants it).
        max_length: most tokens an example may have; nothing is ever cut. None: no limit.

    Raises:
        ValueError: the tokenizer is slow, the example is longer than max_length, or a step or key word has no token;
            names the example.
    """
    check_tokenizer(tokenizer)
    rendered = render(example, template)
    try:
        if split_template(template).reasoning is None:
            segments = Segments((), ())
        else:
            segments = segment(rendered.text, rendered.question, rendered.rationale, example.keywords)
        encoding = tokenizer(rendered.text, return_offsets_mapping=True, truncation=False, verbose=False)
        input_ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        row_spans = token_spans(segments.steps, offsets, rendered.text)
        key_spans = token_spans(segments.key_words, offsets, rendered.text)
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error
    # The space before the first word of the rationale may be a token of its own, and generation has to produce it.
    regions = [
        PROMPT if start == end or start < len(rendered.prompt) else ANSWER if start >= rendered.answer[0] else RATIONALE
        for start, end in offsets
    ]
    if append_eos and input_ids[-1] != tokenizer.eos_token_id:
        input_ids.append(tokenizer.eos_token_id)
        regions.append(ANSWER)
    if max_length is not None and len(input_ids) > max_length:
        raise ValueError(
            f"example {example.id}: has {len(input_ids)} tokens, more than max_length={max_length}, which would cut a "
            "step; raise max_length or leave the example out"
        )
    return EncodedExample(
        example.id,
        input_ids,
        regions,
        row_spans,
        key_spans,
        [rendered.text[slice(*span)] for span in segments.steps],
        [rendered.text[slice(*span)] for span in segments.key_words],
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError unless the tokenizer can map characters to tokens and end a sequence."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} is a slow tokenizer without character offsets, must be a fast one "
            "(backed by the tokenizers library)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end-of-sequence token (eos_token), which ends every answer")


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples, with their teacher signals where they have one, to a batch of tensors.

    input_ids, attention_mask, regions: int64 [B, T]; row_spans [B, S, 2], key_spans [B, M, 2]: int32, empty spans as
    padding; num_steps, num_keys: int64 [B], both 0 for an example without a signal; teacher_attention: float32
    [B, L1, S, M], absent if no example has a signal.

    Args:
        pad_token_id: what to pad input_ids with.
        padding_side: "right" or "left".
        pad_to_multiple_of: T becomes a multiple of it.
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int = 1

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """A batch from items {"example": EncodedExample, "signal": float32 [L1, S, M] or None}."""
        examples = [item["example"] for item in items]
        signals = [item.get("signal") for item in items]
        longest = max(len(example.input_ids) for example in examples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shifts = [length - len(e.input_ids) if self.padding_side == "left" else 0 for e in examples]
        batch = {
            "input_ids": torch.full((len(items), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(items), length, dtype=torch.int64),
            "regions": torch.full((len(items), length), PROMPT),
            "row_spans": _pad_spans([e.row_spans for e in examples], shifts),
            "key_spans": _pad_spans([e.key_spans for e in examples], shifts),
            "num_steps": torch.tensor([0 if s is None else s.shape[1] for s in signals]),
            "num_keys": torch.tensor([0 if s is None else s.shape[2] for s in signals]),
        }
        for index, (example, shift) in enumerate(zip(examples, shifts, strict=True)):
            tokens = slice(shift, shift + len(example.input_ids))
            batch["input_ids"][index, tokens] = torch.tensor(example.input_ids)
            batch["attention_mask"][index, tokens] = 1
            batch["regions"][index, tokens] = torch.tensor(example.regions)
        layers = {signal.shape[0] for signal in signals if signal is not None}
        if layers:
            (num_layers,) = layers
            steps, keys = batch["row_spans"].shape[1], batch["key_spans"].shape[1]
            batch["teacher_attention"] = torch.zeros(len(items), num_layers, steps, keys)
            for index, signal in enumerate(signals):
                if signal is not None:
                    batch["teacher_attention"][index, :, : signal.shape[1], : signal.shape[2]] = signal
        return batch


def _pad_spans(spans: Sequence[Sequence[Span]], shifts: Sequence[int]) -> torch.Tensor:
    padded = torch.zeros(len(spans), max(map(len, spans)), 2, dtype=torch.int32)
    for index, (example_spans, shift) in enumerate(zip(spans, shifts, strict=True)):
        if example_spans:
            padded[index, : len(example_spans)] = torch.tensor(example_spans, dtype=torch.int32) + shift
    return padded
