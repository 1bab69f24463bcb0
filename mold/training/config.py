"""Options of training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from mold.data.examples import DEFAULT_TEMPLATE, check_template

METHODS = {
    "mixture": "stepwise attention of a mixture of layers (MoLSAKI)",
    "single_layer": "stepwise attention of one teacher layer taught to one student layer",
    "step_by_step": "distilling step-by-step: one task explains, one predicts, no attention",
    "rationales": "plain fine-tuning on rationale and answer",
    "answers": "plain fine-tuning on answers alone",
}
"""What `MoldConfig.method` may be: the method of the paper and the baselines of its tables."""


@dataclass
class MoldConfig(TrainingArguments):
    """transformers' TrainingArguments, with the options of the method.

    loss = alpha * answer cross-entropy + (1 - alpha) * rationale cross-entropy + beta * stepwise attention KL

    Every term is averaged over all answer tokens, rationale tokens and examples with a signal of an optimizer step,
    however many gradient accumulation steps and processes it has. Plain fine-tuning (method "rationales" or "answers")
    takes the mean over all learned tokens instead of weighing answer and rationale.
    """

    method: str = field(
        default="mixture",
        metadata={"help": f"{', '.join(METHODS)} (docs/training.md).", "choices": list(METHODS)},
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of the answer, from 0 to 1."})
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the attention; 1, or 0 without any."},
    )
    tau_1: float = field(default=0.1, metadata={"help": "Temperature of the teacher's layers."})
    tau_2: float = field(default=0.5, metadata={"help": "Temperature of the student's router."})
    row_reduction: str = field(
        default="sum",
        metadata={"help": 'Over a step\'s rows: "sum" (paper) or "mean".', "choices": ["sum", "mean"]},
    )
    row_norm: str = field(
        default="softmax",
        metadata={
            "help": 'A step\'s: "softmax" (paper) or "l1".',
            "choices": ["softmax", "l1"],
        },
    )
    mol_two_tasks: bool = field(
        default=False,
        metadata={"help": "The two texts of step_by_step an example."},
    )
    mol_teacher_layer: int = field(default=-1, metadata={"help": "single_layer: the teacher's."})
    mol_student_layer: int = field(default=-1, metadata={"help": "single_layer: the student's."})
    template: str = field(default=DEFAULT_TEMPLATE, metadata={"help": "With {question}, {rationale} and {answer}."})
    max_length: int | None = field(default=1024, metadata={"help": "Most tokens of an example, or it is refused."})
    cross_entropy: str = field(
        default="full",
        metadata={
            "help": '"full"; "chunked": without all logits at once; "liger": likewise, by liger-kernel (GPUs).',
            "choices": ["full", "chunked", "liger"],
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "A batch is one row; no text sees another."},
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={"help": "CPU: keep what a step frees: faster, takes up to a sixth more memory."},
    )
    pad_to_multiple_of: int = field(default=1, metadata={"help": "Pad to a multiple of this."})
    padding_side: str = field(default="right", metadata={"help": "Side of the padding.", "choices": ["right", "left"]})
    mol_router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the student's router; learning_rate where not given."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: keyword arguments of from_pretrained."}
    )

    output_dir: str | None = field(default=None, metadata={"help": "Folder of all that is written."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between loggings, or a share below 1."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the spans and signals are no arguments of a model's forward."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is not finite ends the training with a message."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser reads this order alone
        default="none", metadata={"help": "Where to report besides the run folder's metrics.jsonl."}
    )

    @property
    def with_attention(self) -> bool:
        """Whether the method has the attention loss."""
        return self.method in ("mixture", "single_layer")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The texts an example is trained as (`mold.data.examples.render`); evaluation completes the last one."""
        if self.method == "step_by_step" or self.mol_two_tasks:
            return ("explain", "predict")
        return ("answer",) if self.method == "answers" else ("joint",)

    def __post_init__(self):
        check_choices(self)
        if self.beta is None:
            self.beta = 1.0 if self.with_attention else 0.0
        if self.beta > 0 and not self.with_attention:
            raise ValueError(
                f"beta: is {self.beta}, must be 0 with method={self.method!r}, which has no attention loss"
            )
        if self.mol_two_tasks and self.method in ("rationales", "answers"):
            raise ValueError(f"mol_two_tasks: is True, must be False with method={self.method!r}, which has one task")
        for name, low, high in (("alpha", 0, 1), ("beta", 0, float("inf"))):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be in [{low}, {high}]")
        for name in ("tau_1", "tau_2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be greater than 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be at least 1")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: is {self.pad_to_multiple_of}, must be at least 1")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: is {self.max_length}, must be at least 2")
        if self.padding_free and (self.padding_side, self.pad_to_multiple_of) != ("right", 1):
            raise ValueError("padding_free: is True, must be False with padding_side or pad_to_multiple_of")
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel: is True, must be False: untested with the attention here; liger-kernel's loss alone "
                'is cross_entropy="liger"'
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: is True, must be False")
        check_template(self.template)
        self.model_init_kwargs = _json_object("model_init_kwargs", self.model_init_kwargs)
        for name in self._VALID_DICT_FIELDS:
            _json_object(name, getattr(self, name))
        # On by default, and a warning a data loader where there is nothing to copy to.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()
        self._refuse_reentrant_checkpointing()

    def _refuse_reentrant_checkpointing(self):
        # transformers 5.19 renamed the options; the older names are the only ones before.
        prefix = "activation" if hasattr(self, "activation_checkpointing") else "gradient"
        if not getattr(self, f"{prefix}_checkpointing"):
            return
        name = f"{prefix}_checkpointing_kwargs"
        kwargs = dict(getattr(self, name) or {})
        if kwargs.setdefault("use_reentrant", False):
            raise ValueError(
                f"{name}: has use_reentrant=True, must be False: reentrant checkpointing cuts the attention's gradient"
            )
        setattr(self, name, kwargs)


def check_choices(options) -> None:
    """Raise a ValueError unless every option of a dataclass is one of the "choices" of its metadata, where it has some.

    transformers checks its own.
    """
    for option in fields(options):
        value, choices = getattr(options, option.name), option.metadata.get("choices")
        if choices and value not in choices and option.name not in _THEIRS:
            raise ValueError(f"{option.name}: is {value!r}, must be one of {', '.join(choices)}")


_THEIRS = frozenset(option.name for option in fields(TrainingArguments))
# A path is taken for these too.
_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def _json_object(name: str, value):
    """The value, read from JSON where it is the text of a command line."""
    if not isinstance(value, str) or (name in _FILES and not value.startswith("{")):
        return value
    try:
        loaded = json.loads(value)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        said = value if len(value) < 80 else f"{value[:76]} ..."
        raise ValueError(f"{name}: is {said!r}, must be a JSON object such as '{{\"key\": 1}}'")
    return loaded
