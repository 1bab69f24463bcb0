"""What a teacher's signals are made with."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

from transformers import PreTrainedModel

from mold.data.segmentation import PAPER_SEGMENTS, SEGMENTATION_VERSION, SegmentOptions
from mold.models import weights_fingerprint

SIGNAL_DTYPES = ("float32", "bfloat16", "float16")
SIGNAL_LAYERS = ("all", "mixture")


@dataclasses.dataclass(frozen=True)
class SignalSettings:
    """Everything beside an example's text that decides its signal.

    teacher, revision: what the teacher was called; which one it is, its weights' fingerprint says.
    step_unit, max_reasoning_steps, max_key_words, key_scope: `SegmentOptions`.
    signal_dtype: how attention is stored. Rounding changes it by at most a relative 2^-11 in float16 (and 2^-25 below
        6e-5) and 2^-8 in bfloat16.
    signal_layers: "all" of the teacher's layers; or their "mixture" alone, [1, S, M] in place of [L1, S, M], which is
        all that the loss needs once tau_1, the teacher's layers left out and the key words are settled.
    tau_1, teacher_layers_left_out: of the mixture; None where all layers are stored.

    Raises:
        ValueError: a value is of another type, or `segmentation` is not this version's.
    """

    teacher: str
    revision: str | None
    weights: str
    dtype: str
    template: str
    row_reduction: str
    segmentation: int = SEGMENTATION_VERSION
    step_unit: str = SegmentOptions.step_unit
    max_reasoning_steps: int | None = None
    max_key_words: int | None = None
    key_scope: str = SegmentOptions.key_scope
    signal_dtype: str = "float32"
    signal_layers: str = "all"
    tau_1: float | None = None
    teacher_layers_left_out: list[int] | None = None

    @property
    def segments(self) -> SegmentOptions:
        """How the texts were split."""
        return SegmentOptions(**{name: getattr(self, name) for name in SegmentOptions.__dataclass_fields__})

    def __post_init__(self):
        _ = self.segments  # checks them
        for name, known in (("signal_dtype", SIGNAL_DTYPES), ("signal_layers", SIGNAL_LAYERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: is {reprlib.repr(getattr(self, name))}, must be one of {', '.join(known)}")
        mixed = self.signal_layers == "mixture"
        expected: dict[str, Any] = dict.fromkeys(("teacher", "weights", "dtype", "template", "row_reduction"), str)
        expected |= {"revision": str | None, "segmentation": int}
        expected |= {"tau_1": float if mixed else None, "teacher_layers_left_out": list if mixed else None}
        for name, kind in expected.items():
            value = getattr(self, name)
            if not (value is None if kind is None else isinstance(value, kind) and not isinstance(value, bool)):
                raise ValueError(f"{name}: is {reprlib.repr(value)}, must be of type {getattr(kind, '__name__', kind)}")
        if self.segmentation != SEGMENTATION_VERSION:
            raise ValueError(
                f"segmentation: is version {self.segmentation}, must be {SEGMENTATION_VERSION}: steps and key words "
                "are found in another way by now"
            )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        name: str,
        template: str,
        row_reduction: str = "sum",
        revision: str | None = None,
        segments: SegmentOptions = PAPER_SEGMENTS,
        **stored: Any,
    ) -> SignalSettings:
        """The settings of a loaded teacher; `stored`: signal_dtype, signal_layers, tau_1, teacher_layers_left_out."""
        revision = revision or getattr(model.config, "_commit_hash", None)
        return cls(
            *(name, revision, weights_fingerprint(model), str(model.dtype), template, row_reduction),
            **dataclasses.asdict(segments) | stored,
        )


def different(one: SignalSettings, other: SignalSettings) -> str | None:
    """The first setting that decides a signal and is not the same."""
    names = [option.name for option in dataclasses.fields(one) if option.name not in ("teacher", "revision")]
    return next((name for name in names if getattr(one, name) != getattr(other, name)), None)
