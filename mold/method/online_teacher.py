"""A teacher that runs beside the student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.encoding import Collator, EncodedExample, check_tokenizer, encode_example
from mold.data.examples import Example
from mold.data.segmentation import PAPER_SEGMENTS, SegmentOptions
from mold.method.attention_interface import observe_attention, use_mold_attention
from mold.method.chunked_mlp import chunk_mlps
from mold.method.signals import check_agreement


class OnlineTeacher:
    """A teacher that runs beside the student, in place of a SignalCache: nothing on disk, a forward every step.

    Args:
        model: frozen, put into evaluation mode and switched to the "mold" attention here.
        tokenizer: the teacher's, a fast one.
        template, row_reduction: as of the student's training.
        max_length: most tokens an example may have.
        segments: as of the student's training.
        chunk_size: most tokens that the teacher takes at a time: as many texts of a batch, or one; and an MLP of it as
            many of its tokens. None: all.

    Raises:
        ValueError: the model's attention cannot be replaced, its MLPs cannot take tokens in chunks, or the tokenizer
            cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        row_reduction: str,
        max_length: int | None = None,
        segments: SegmentOptions = PAPER_SEGMENTS,
        chunk_size: int | None = None,
    ):
        check_tokenizer(tokenizer)
        self.model = use_mold_attention(model).eval().requires_grad_(False)
        self._tokenizer, self._template = tokenizer, template
        self._row_reduction, self._max_length, self._segments = row_reduction, max_length, segments
        self._chunk_size = chunk_size
        if chunk_size is not None:
            chunk_mlps(model, "teacher_chunk_size", chunk_size)

    @property
    def collator(self) -> Collator:
        """What pads the teacher's tokens."""
        return Collator(self._tokenizer.eos_token_id)

    def encode(self, example: Example, encoded: EncodedExample) -> EncodedExample | None:
        """The example in the teacher's tokens; None if it has no key words.

        Raises:
            ValueError: its steps and key words are not the student's (`encoded`); names the example.
        """
        mine = encode_example(
            *(example, self._tokenizer, self._template),
            append_eos=False,
            max_length=self._max_length,
            segments=self._segments,
        )
        check_agreement(example, encoded, len(mine.row_spans), len(mine.key_spans))
        return mine if mine.key_spans else None

    def attention(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Stepwise attention float32 [B, L1, S, M] of a batch that `collator` made, on the batch's device."""
        rows, length = batch["input_ids"].shape
        some = rows if self._chunk_size is None else max(1, self._chunk_size // length)
        parts = [
            observe_attention(self.model, _rows(batch, slice(start, start + some)), self._row_reduction)
            for start in range(0, rows, some)
        ]
        attention = torch.cat(parts, 1).float()
        return attention.transpose(0, 1).to(batch["input_ids"].device)


def _rows(batch: Mapping[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    # Which rows are padded is told of the whole batch.
    return {name: tensor if name == "padded_rows" else tensor[rows] for name, tensor in batch.items()}
