"""From examples to token ids, regions and spans, and to padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from mold.data.chat import render_for
from mold.data.examples import ANSWER, PROMPT, RATIONALE, Example
from mold.data.segmentation import PAPER_SEGMENTS, SegmentOptions, Segments, Span, segment, token_spans
from mold.data.tokens import tokenize


@dataclass(frozen=True)
class EncodedExample:
    """One example in a model's tokens.

    input_ids, regions: one entry a token (regions: PROMPT, RATIONALE or ANSWER).
    row_spans, key_spans: half-open token ranges of the steps and key words; key_spans is empty without key words, both
        are in a task without rationale.
    step_texts, key_word_texts: what they say, for pictures and messages.
    steps_joined, key_words_left_out: how many fewer there are than the text has (`SegmentOptions`).
    """

    id: str
    input_ids: list[int]
    regions: list[int]
    row_spans: list[Span]
    key_spans: list[Span]
    step_texts: list[str]
    key_word_texts: list[str]
    steps_joined: int = 0
    key_words_left_out: int = 0


def encode_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    task: str = "joint",
    append_eos: bool = True,
    max_length: int | None = None,
    segments: SegmentOptions = PAPER_SEGMENTS,
) -> EncodedExample:
    """Render, segment and tokenize one example.

    Args:
        example: question, rationale and answer.
        tokenizer: a fast tokenizer (its offsets map characters to tokens).
        template, task: see `mold.data.chat.render_for`.
        append_eos: whether the text ends with the tokenizer's end-of-sequence token (training wants it).
        max_length: most tokens an example may have; nothing is ever cut. None: no limit.
        segments: what a step is, and how many steps and key words there may be.

    Raises:
        ValueError: the tokenizer is slow, the example is longer than max_length, holds the spelling of a special token,
            or a step or key word has no token; names the example.
    """
    check_tokenizer(tokenizer)
    try:
        rendered = render_for(example, template, tokenizer, task)
        found = Segments((), ())
        if task in ("joint", "explain"):
            found = segment(rendered.text, rendered.question, rendered.rationale, example.keywords, segments)
        input_ids, offsets = tokenize(tokenizer, rendered.text, rendered.special_tokens)
        row_spans = token_spans(found.steps, offsets, rendered.text)
        key_spans = token_spans(found.key_words, offsets, rendered.text)
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error
    # The space before the first word of the rationale may be a token of its own, and generation has to produce it. A
    # token that stands for no character stands where the one before it does.
    regions = [
        PROMPT if start < len(rendered.prompt) else ANSWER if start >= rendered.answer[0] else RATIONALE
        for start in accumulate((start for start, _ in offsets), max)
    ]
    if append_eos and input_ids[-1] != tokenizer.eos_token_id:
        input_ids.append(tokenizer.eos_token_id)
        regions.append(RATIONALE if task == "explain" else ANSWER)
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
        [rendered.text[slice(*span)] for span in found.steps],
        [rendered.text[slice(*span)] for span in found.key_words],
        found.steps_joined,
        found.key_words_left_out,
    )


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str, *, task: str = "joint"
) -> list[int]:
    """Token ids that generation starts from: those of a training text before what is learned.

    Args:
        example: its rationale and answer are not shown.
        tokenizer, template, task: see `encode_example`.

    Raises:
        ValueError: the text cannot be rendered or holds the spelling of a special token; names the example.
    """
    try:
        rendered = render_for(example, template, tokenizer, task)
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error
    return tokenize(tokenizer, rendered.prompt, rendered.special_tokens)[0]


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
    [B, L1, S, M], absent if no example has a signal. With a `teacher`, its input_ids, attention_mask, row_spans and
    key_spans of the same examples under "teacher_" + name instead of teacher_attention.

    What would else be read back from a GPU, int64: learned_tokens [2, N], rows and positions of the tokens whose next
    one is of a rationale or answer; learned_positions [K], those positions, ascending; padded_rows [R].

    With padding_side="left" also position_ids [B, T], which count from a text's first token as generation does.

    With `padding_free`, input_ids, attention_mask and regions are [1, tokens of all examples], position_ids [1, tokens]
    start again and cu_seqlens int32 [B + 1] says where each example begins; spans count from there.

    Args:
        pad_token_id: what to pad input_ids with.
        padding_side: "right" or "left".
        pad_to_multiple_of: T becomes a multiple of it.
        padding_free: whether examples stand one behind another in one row.
        teacher: of a teacher that runs beside the student.
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int = 1
    padding_free: bool = False
    teacher: Collator | None = None

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """A batch from items with "example" (EncodedExample) and any of "signal" (float32 [L1, S, M], a function that
        reads it, or None), "teacher" (EncodedExample in the teacher's tokens, or None) and "predict" (EncodedExample of
        the second task, which becomes an example of its own without a signal)."""
        items = [row for item in items for row in (item, {"example": item.get("predict")}) if row["example"]]
        examples = [item["example"] for item in items]
        signals = [signal() if callable(signal) else signal for signal in (item.get("signal") for item in items)]
        longest = max(len(example.input_ids) for example in examples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shifts = [length - len(e.input_ids) if self.padding_side == "left" else 0 for e in examples]
        batch = {
            "input_ids": torch.full((len(items), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(items), length, dtype=torch.int64),
            "regions": torch.full((len(items), length), PROMPT),
            "row_spans": _pad_spans([e.row_spans for e in examples], shifts),
            "key_spans": _pad_spans([e.key_spans for e in examples], shifts),
        }
        taught = [has_signal(item) for item in items]
        for name, spans in (("num_steps", "row_spans"), ("num_keys", "key_spans")):
            batch[name] = torch.tensor([len(getattr(e, spans)) * t for e, t in zip(examples, taught, strict=True)])
        for index, (example, shift) in enumerate(zip(examples, shifts, strict=True)):
            tokens = slice(shift, shift + len(example.input_ids))
            batch["input_ids"][index, tokens] = torch.tensor(example.input_ids)
            batch["attention_mask"][index, tokens] = 1
            batch["regions"][index, tokens] = torch.tensor(example.regions)
        if self.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if self.padding_free:
            _remove_padding(batch)
        batch |= learned_places(batch["regions"])
        batch["padded_rows"] = (batch["attention_mask"] == 0).any(1).nonzero()[:, 0]
        layers = {signal.shape[0] for signal in signals if signal is not None}
        if layers:
            (num_layers,) = layers
            steps, keys = batch["row_spans"].shape[1], batch["key_spans"].shape[1]
            batch["teacher_attention"] = torch.zeros(len(items), num_layers, steps, keys)
            for index, signal in enumerate(signals):
                if signal is not None:
                    batch["teacher_attention"][index, :, : signal.shape[1], : signal.shape[2]] = signal
        if self.teacher is not None and any(taught):
            # An example without signal keeps its place, as a text of one token.
            placeholder = EncodedExample("", [self.teacher.pad_token_id], [PROMPT], [], [], [], [])
            encoded = self.teacher([{"example": item.get("teacher") or placeholder} for item in items])
            names = ("input_ids", "attention_mask", "position_ids", "row_spans", "key_spans", "padded_rows")
            batch |= {f"teacher_{name}": encoded[name] for name in names if name in encoded}
        return batch


def _remove_padding(batch: dict[str, torch.Tensor]) -> None:
    lengths = batch["attention_mask"].sum(1)
    real = batch["attention_mask"].bool()
    positions = torch.arange(real.shape[1]).expand(real.shape)
    for name, values in [
        *((n, batch[n]) for n in ("input_ids", "attention_mask", "regions")),
        ("position_ids", positions),
    ]:
        batch[name] = values[real][None]
    batch["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def learned_places(regions: torch.Tensor) -> dict[str, torch.Tensor]:
    """learned_tokens and learned_positions, as of `Collator`, of regions [B, T]."""
    learned = regions[:, 1:] > PROMPT
    return {"learned_tokens": learned.nonzero().T, "learned_positions": learned.any(0).nonzero()[:, 0]}


def shortened(examples: Iterable[EncodedExample]) -> str | None:
    """What was joined or left out of the examples, in words; None where nothing was."""
    counts = [(example.steps_joined, example.key_words_left_out) for example in examples]
    steps, key_words = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if not (steps or key_words):
        return None
    changed = sum(map(any, counts))
    return (
        f"{changed} of {len(counts)} examples are over max_reasoning_steps or max_key_words: {steps} steps joined to a "
        f"neighbour, {key_words} key words left out"
    )


def has_signal(item: Mapping) -> bool:
    """Whether a collator's item has something to learn attention from."""
    return item.get("signal") is not None or item.get("teacher") is not None


def _pad_spans(spans: Sequence[Sequence[Span]], shifts: Sequence[int]) -> torch.Tensor:
    padded = torch.zeros(len(spans), max(map(len, spans)), 2, dtype=torch.int32)
    for index, (example_spans, shift) in enumerate(zip(spans, shifts, strict=True)):
        if example_spans:
            padded[index, : len(example_spans)] = torch.tensor(example_spans, dtype=torch.int32) + shift
    return padded
