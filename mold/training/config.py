"""Options of training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mold.data.examples import check_template
from mold.data.segmentation import KEY_SCOPES, STEP_UNITS, SegmentOptions
from mold.method.loss import check_rows
from mold.training.training_options import REFUSED, check_followed

METHODS = {
    "mixture": "stepwise attention of a mixture of layers (MoLSAKI)",
    "single_layer": "stepwise attention of one teacher layer taught to one student layer",
    "step_by_step": "distilling step-by-step: one task explains, one predicts, no attention",
    "rationales": "plain fine-tuning on rationale and answer",
    "answers": "plain fine-tuning on answers alone",
}
"""What `MoldConfig.method` may be: the method of the paper and the baselines of its tables."""


def check_choices(options: Any) -> None:
    """Raise a ValueError that names the option unless all of a dataclass that have ``choices`` hold one of them."""
    for option in fields(options):
        choices = option.metadata.get("choices")
        if option.name in TrainingArguments.__dataclass_fields__ or choices is None:
            continue  # transformers checks its own
        value = getattr(options, option.name)
        if value not in choices and not (value is None and option.default is None):
            raise ValueError(f"{option.name}: is {value!r}, must be one of {', '.join(choices)}")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "beta": 1.0,
        "tau_1": 0.1,
        "tau_2": 0.5,
        "tau_row": 1.0,
        "row_reduction": "sum",
        "row_norm": "softmax",
        "row_keys": "all",
        "key_scope": "all",
    },
}
"""What `MoldConfig.preset` may be, and the values that it gives to options that are not given."""


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
    preset: str = field(
        default="paper",
        metadata={"help": "Of the loss's options that are not given.", "choices": PRESETS},
    )
    beta: None | str | float = field(  # noqa: RUF036 - HfArgumentParser reads this order alone
        default=None,
        metadata={"help": 'Weight of the attention; "auto": attention_share.'},
    )
    attention_share: float = field(
        default=0.1,
        metadata={"help": "beta=auto: of the gradient's norm."},
    )
    beta_warmup: float = field(default=0.0, metadata={"help": "Share of the steps in which beta rises."})
    beta_decay: float = field(default=0.0, metadata={"help": "Share of the steps in which beta falls."})
    tau_1: float | None = field(default=None, metadata={"help": "Temperature of the teacher's layers."})
    tau_2: float | None = field(default=None, metadata={"help": "Temperature of the student's router."})
    tau_row: float | None = field(default=None, metadata={"help": "Temperature of a step's softmax."})
    row_reduction: str | None = field(
        default=None,
        metadata={"help": 'Over a step\'s rows: "sum" (paper) or "mean".', "choices": ["sum", "mean"]},
    )
    row_norm: str | None = field(
        default=None,
        metadata={
            "help": 'A step\'s: "softmax" (paper) or "l1".',
            "choices": ["softmax", "l1"],
        },
    )
    row_keys: str | None = field(
        default=None,
        metadata={
            "help": 'A step\'s: "all" (paper) or "visible" to it.',
            "choices": ["all", "visible"],
        },
    )
    key_scope: str | None = field(
        default=None,
        metadata={
            "help": '"all" (paper), or those of the "question".',
            "choices": list(KEY_SCOPES),
        },
    )
    step_unit: str = field(
        default="sentence",
        metadata={"help": "A step: sentence, line or paragraph.", "choices": list(STEP_UNITS)},
    )
    max_reasoning_steps: int | None = field(default=None, metadata={"help": "Most steps; neighbours are joined."})
    max_key_words: int | None = field(default=None, metadata={"help": "Most key words; distinct first."})
    mol_teacher_layers_left_out: list[int] | None = field(
        default=None, metadata={"help": "mixture: not these of the teacher."}
    )
    mol_student_layers_left_out: list[int] | None = field(
        default=None, metadata={"help": "mixture: not these of the student."}
    )
    mol_two_tasks: bool = field(
        default=False,
        metadata={"help": "The two texts of step_by_step an example."},
    )
    mol_teacher_layer: int = field(default=-1, metadata={"help": "single_layer: the teacher's."})
    mol_student_layer: int = field(default=-1, metadata={"help": "single_layer: the student's."})
    template: str | None = field(
        default=None,
        metadata={"help": "Of the texts (docs/guides/data.md); by the data."},
    )
    max_length: int | None = field(default=1024, metadata={"help": "Most tokens of an example, else refused."})
    cross_entropy: str = field(
        default="full",
        metadata={
            "help": '"full"; few logits: "chunked", "liger".',
            "choices": ["full", "chunked", "liger"],
        },
    )
    mlp_chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens that an MLP takes at a time: less memory, some more time."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "A batch is one row; no text sees another."},
    )
    teacher_chunk_size: int | None = field(
        default=None, metadata={"help": "Online teacher: tokens that it, or an MLP of it, takes at a time."}
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
    def trains_attention(self) -> bool:
        """Whether the attention loss has a weight."""
        return self.beta == "auto" or float(self.beta) > 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """The texts an example is trained as (`mold.data.examples.render`); evaluation completes the last one."""
        if self.method == "step_by_step" or self.mol_two_tasks:
            return ("explain", "predict")
        return ("answer",) if self.method == "answers" else ("joint",)

    @property
    def segments(self) -> SegmentOptions:
        """How texts are split into steps and key words."""
        return SegmentOptions(**{name: getattr(self, name) for name in SegmentOptions.__dataclass_fields__})

    def signal_settings(self, layers: str) -> dict[str, Any]:
        """What a cache must have been made with to train on it.

        Args:
            layers: the cache's signal_layers.
        """
        settings = {"row_reduction": self.row_reduction, **dataclasses.asdict(self.segments)}
        if layers == "mixture":
            settings["signal_layers"] = "all" if self.method == "single_layer" else layers
            settings |= {"tau_1": self.tau_1, "teacher_layers_left_out": self.mol_teacher_layers_left_out or []}
        return settings

    @property
    def checkpointing_option(self) -> str:
        """The name of transformers' option, which 5.19 renamed; the older one is the only one before."""
        return "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"

    def __post_init__(self):
        check_choices(self)
        self._take_preset()
        if self.trains_attention and not self.with_attention:
            raise ValueError(
                f"beta: is {self.beta!r}, must be 0 with method={self.method!r}, which has no attention loss"
            )
        if self.mol_two_tasks and self.method in ("rationales", "answers"):
            raise ValueError(f"mol_two_tasks: is True, must be False with method={self.method!r}, which has one task")
        for name, high in (("alpha", 1), ("beta", float("inf")), ("beta_warmup", 1), ("beta_decay", 1)):
            value = getattr(self, name)
            if not (name == "beta" and value == "auto") and not 0 <= value <= high:
                raise ValueError(f"{name}: is {value}, must be in [0, {high}]")
        if not 0 < self.attention_share < 1:
            raise ValueError(f"attention_share: is {self.attention_share}, must be between 0 and 1")
        if self.beta_warmup + self.beta_decay > 1:
            raise ValueError(
                f"beta_decay: is {self.beta_decay}, must leave no more than 1 with beta_warmup={self.beta_warmup}"
            )
        for name in ("mol_teacher_layers_left_out", "mol_student_layers_left_out"):
            if getattr(self, name) and self.method != "mixture":
                raise ValueError(
                    f"{name}: is {getattr(self, name)}, must not be given with method={self.method!r}, which has no "
                    "mixture"
                )
        for name in ("tau_1", "tau_2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be greater than 0")
        check_rows(self.row_norm, self.tau_row, self.row_keys)
        _ = self.segments  # refuses limits that are too low
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: is {value}, must be at least {least}")
        if self.padding_free and (self.padding_side, self.pad_to_multiple_of) != ("right", 1):
            raise ValueError("padding_free: is True, must be False with padding_side or pad_to_multiple_of")
        check_followed(self, REFUSED)
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError("fp16: is True, must be False on a CPU, which trains in float32 or with bf16")
        if self.template is not None:
            check_template(self.template)
        self.model_init_kwargs = _json_object("model_init_kwargs", self.model_init_kwargs)
        for name in self._VALID_DICT_FIELDS:
            _json_object(name, getattr(self, name))
        # On by default, and a warning a data loader where there is nothing to copy to.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        super().__post_init__()
        if missing := set(self.report_to) & _REPORTERS - set(get_available_reporting_integrations()):
            raise ValueError(
                f"report_to: is {', '.join(self.report_to)}, must be without {', '.join(sorted(missing))}, which is "
                "not installed here"
            )
        if set(self.report_to) - INTEGRATION_TO_CALLBACK.keys():
            raise ValueError(
                f"report_to: is {', '.join(self.report_to)}, must be of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        self._refuse_reentrant_checkpointing()

    def _take_preset(self):
        """Give the options that are not given the preset's values, and beta its type."""
        values = PRESETS[self.preset] if self.with_attention else PRESETS[self.preset] | {"beta": 0.0}
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.beta != "auto":
            try:
                self.beta = float(self.beta)
            except ValueError as error:
                raise ValueError(f'beta: is {self.beta!r}, must be a number or "auto"') from error

    def _refuse_reentrant_checkpointing(self):
        if not getattr(self, self.checkpointing_option):
            return
        name = f"{self.checkpointing_option}_kwargs"
        kwargs = dict(getattr(self, name) or {})
        if kwargs.setdefault("use_reentrant", False):
            raise ValueError(
                f"{name}: has use_reentrant=True, must be False: reentrant checkpointing cuts the attention's gradient"
            )
        if kwargs.get("offload") and self.device.type == "cpu":
            raise ValueError(
                f"{name}: has offload=True, must not on a CPU, where activations are in its memory already"
            )
        setattr(self, name, kwargs)


_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "pad_to_multiple_of": 1,
    "max_length": 2,
    "mlp_chunk_size": 1,
    "teacher_chunk_size": 1,
}
# transformers cannot say whether these two are there.
_REPORTERS = INTEGRATION_TO_CALLBACK.keys() - {"flyte", "kubeflow"}
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
