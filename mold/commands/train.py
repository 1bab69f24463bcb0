"""The stages of a run: read, extract, train, evaluate, report. Each goes on where a killed one stopped.

A run folder holds config.yaml, before.json, metrics.jsonl, checkpoints, the trained student with its router,
predictions, log-likelihoods, attention_maps.json, summary.json and report.html.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import mold
from mold.data.encoding import has_signal
from mold.data.examples import Example, split_examples
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from mold.evaluation.likelihoods import log_likelihoods
from mold.evaluation.predictions import accuracy, generate_predictions
from mold.files import write_atomically, write_jsonl
from mold.generation.batches import Journal
from mold.method.extraction import extract_signals
from mold.method.signals import SignalCache, SignalSettings
from mold.models import load_model, spread_layers, take_layers
from mold.training.adapters import lora_config
from mold.training.config import DataOptions, EvalOptions, MoldConfig, PromptOptions, StudentOptions, TeacherOptions
from mold.training.router_training import ROUTER_FILE
from mold.training.trainer import MoldTrainer

logger = logging.get_logger(__name__)


@dataclass
class Options:
    """All options, as the command line has them; `chosen` holds those of a training that are not at their default."""

    data: DataOptions
    teacher: TeacherOptions
    student: StudentOptions
    training: MoldConfig
    prompting: PromptOptions = field(default_factory=PromptOptions)
    evaluation: EvalOptions = field(default_factory=EvalOptions)

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def signals_folder(self) -> Path:
        return Path(self.teacher.signals_dir or self.folder / "signals")

    def __post_init__(self):
        # Here and not later, and on the same device: making TrainingArguments resets the state that says how many
        # processes there are.
        training = MoldConfig(use_cpu=self.training.use_cpu)
        default = _as_dict(DataOptions(), TeacherOptions(), StudentOptions(), training)
        mine = _as_dict(self.data, self.teacher, self.student, self.training)
        self.chosen = {key: value for key, value in mine.items() if value != default[key]}


def _as_dict(*groups) -> dict:
    values = [group.to_dict() if isinstance(group, MoldConfig) else asdict(group) for group in groups]
    return json.loads(json.dumps({k: v for group in values for k, v in group.items()}, default=str))


def read_data(options: DataOptions, require_rationale: bool = True, rationales: str | None = None) -> list[Example]:
    """All examples of the data set. Rows that are left out are counted in a warning."""
    if options.dataset == "generated":
        return generate_problems(
            (options.num_train or 240) + options.num_eval,
            options.split_seed,
            max_value=options.max_value,
            rationale_form=options.rationale_form,
        )
    if options.max_value is not None:
        raise ValueError(f"max_value: is {options.max_value}, must not be given with dataset={options.dataset!r}")
    examples, report = read_examples(
        options.dataset,
        options.dataset_format,
        split=options.dataset_split,
        rationales=rationales,
        rationale_form=options.rationale_form,
        require_rationale=require_rationale,
    )
    if report.left_out:
        logger.warning(f"{options.dataset}: {report}")
    return examples


def load_examples(options: DataOptions) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; a question is never in both."""
    examples = read_data(options, rationales=options.rationales)
    if not 0 < options.num_eval <= len(examples):
        raise ValueError(f"num_eval: is {options.num_eval}, must be from 1 to the {len(examples)} examples there are")
    train, held_out = split_examples(examples, options.num_eval, options.split_seed)
    if repeated := len(examples) - len(train) - len(held_out):
        logger.warning(f"{options.dataset}: {repeated} examples ask a held-out question again and are left out")
    if options.num_train is not None and options.num_train > len(train):
        raise ValueError(f"num_train: is {options.num_train}, but only {len(train)} examples are left to train on")
    return train[: options.num_train], held_out


def load_teacher(options: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The attention's teacher."""
    name = options.teacher.teacher_model_name_or_path
    if name is None:
        raise ValueError("teacher_model_name_or_path: is not given, must name the attention's teacher")
    return load_model(name, revision=options.teacher.teacher_model_revision, dtype=options.teacher.teacher_dtype)


def extract(options: Options, examples: list[Example], teacher=None) -> SignalCache:
    """The teacher's signals of all examples, extracted where the cache does not have them yet."""
    model, tokenizer = teacher or load_teacher(options)
    settings = SignalSettings.of(
        model,
        options.teacher.teacher_model_name_or_path,
        options.training.template,
        options.training.row_reduction,
        options.teacher.teacher_model_revision,
    )
    return extract_signals(
        model.to(options.training.device),
        tokenizer,
        examples,
        options.signals_folder,
        settings,
        batch_size=options.teacher.extract_batch_size,
        shard_size=options.teacher.extract_shard_size,
        max_length=options.training.max_length,
        progress=not options.training.disable_tqdm,
    )


def load_signals(options: Options) -> SignalCache:
    """The cache that `mold extract` made, if it is of the teacher and settings of these options."""
    signals = SignalCache(options.signals_folder)
    expected = {"template": options.training.template, "row_reduction": options.training.row_reduction}
    if options.teacher.teacher_model_name_or_path is not None:
        expected["teacher"] = options.teacher.teacher_model_name_or_path
    signals.require(**expected)
    return signals


def teaching(options: Options, teacher, needed: bool) -> dict:
    """What teaches attention, as arguments of MoldTrainer: the teacher itself, or its cached signals."""
    if options.teacher.teacher_online:
        return {"teacher_model": teacher[0], "teacher_processing_class": teacher[1]}
    return {"signals": load_signals(options) if needed or options.signals_folder.exists() else None}


def make_student(options: Options, teacher=None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student: a model of its own, or the teacher with fewer layers."""
    student = options.student
    if student.model_name_or_path is not None:
        init = dict(options.training.model_init_kwargs or {})
        if student.load_in_4bit:
            compute_dtype = torch.bfloat16 if options.training.bf16 else getattr(torch, student.model_dtype)
            init["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
            )
        model, tokenizer = load_model(
            student.model_name_or_path, revision=student.model_revision, dtype=student.model_dtype, **init
        )
    else:
        if student.student_num_layers is None and student.student_layers is None:
            raise ValueError(
                "model_name_or_path: is not given, must name the student (or set student_num_layers or student_layers "
                "to make one from the teacher's layers)"
            )
        model, tokenizer = teacher or load_teacher(options)
    if student.student_layers is not None:
        if student.student_num_layers is not None:
            raise ValueError("student_num_layers: is given together with student_layers, must be only one of them")
        model = take_layers(model, student.student_layers)
    elif student.student_num_layers is not None:
        model = take_layers(model, spread_layers(model.config.num_hidden_layers, student.student_num_layers))
    return model if student.load_in_4bit else model.to(getattr(torch, student.model_dtype)), tokenizer


def train(options: Options, teacher=None, seconds: dict | None = None) -> dict:
    """Train the student and evaluate it before and after; a second call goes on where a killed one stopped.

    Args:
        options: of the run.
        teacher: (model, tokenizer) if it is loaded already and the student is made from it.
        seconds: of earlier stages, for the summary.

    Returns:
        The summary, as written to summary.json.
    """
    folder, seconds = options.folder, dict(seconds or {})
    train_examples, held_out = load_examples(options.data)
    if options.teacher.teacher_online:
        teacher = teacher or load_teacher(options)
    peft_config = lora_config(options.student)
    student, tokenizer = make_student(options, teacher)
    trainer = MoldTrainer(
        student,
        options.training,
        train_examples,
        held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
        **teaching(options, teacher, needed=options.training.trains_attention),
    )
    _claim_folder(options)
    start = time.perf_counter()
    before_file = folder / "before.json"
    if before_file.is_file():
        before = json.loads(before_file.read_text())
    else:
        before = _evaluate(options, trainer, held_out, "before")
        before["gradient_norms"] = trainer.term_gradient_norms(
            trainer.train_dataset[: options.training.per_device_train_batch_size]
        )
        _write(before_file, json.dumps(before).encode())
    evaluated = time.perf_counter()
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    seconds["train"] = time.perf_counter() - evaluated
    after = _evaluate(options, trainer, held_out, "after")
    seconds["evaluate"] = time.perf_counter() - start - seconds["train"]
    _write_maps(folder, before["maps"], after["maps"], {e.id: e for e in held_out})
    summary = _summarise(options, trainer, before, after, seconds)
    _write(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def evaluate(options: Options) -> dict:
    """Evaluate a trained (or any) student on the held-out examples; writes eval.json and its predictions."""
    _, held_out = load_examples(options.data)
    teacher = load_teacher(options) if options.teacher.teacher_online else None
    taught_by = teaching(options, teacher, needed=False)
    student, tokenizer = make_student(options, teacher)
    if not any(taught_by.values()):
        options.training.beta = 0.0
    trainer = MoldTrainer(student, options.training, eval_dataset=held_out, processing_class=tokenizer, **taught_by)
    router = Path(options.student.model_name_or_path or "") / ROUTER_FILE
    if router.is_file():
        trainer.mold_loss.router.load_state_dict(load_file(router))
    elif options.training.trains_attention:
        logger.warning(f"{router} does not exist: the attention loss is that of an untrained router")
    result = _evaluate(options, trainer, held_out, "eval")
    metrics = result["metrics"] | {"accuracy": result["accuracy"], "num_eval": len(held_out)}
    _write(options.folder / "eval.json", json.dumps(metrics, indent=1).encode())
    return metrics


def _write(path: Path, data: bytes) -> None:
    """Of several processes, which all know the same, one writes."""
    if PartialState().is_main_process:
        write_atomically(path, data)


def _claim_folder(options: Options) -> None:
    """Write the chosen options to config.yaml, or refuse a folder that holds a run of other ones."""
    path, mine = options.folder / "config.yaml", options.chosen
    if path.is_file():
        theirs = yaml.safe_load(path.read_text())
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"output_dir: {options.folder} holds a run with {_said(theirs, key)}, this one has "
                    f"{_said(mine, key)}; choose another folder, or delete that one"
                )
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    _write(path, yaml.safe_dump(mine, allow_unicode=True).encode())


def _said(chosen: dict, key: str) -> str:
    return f"{key}={chosen[key]!r}" if key in chosen else f"the default {key}"


def _evaluate(options: Options, trainer: MoldTrainer, examples: list[Example], when: str) -> dict:
    """Losses, predictions and log-likelihoods (written) and maps of the held-out examples."""
    metrics = trainer.evaluate()
    predictions = predict(options, trainer.model, trainer.processing_class, examples)
    if PartialState().is_main_process:
        write_jsonl(options.folder / f"predictions_{when}.jsonl", predictions)
        if when != "before":
            found = likelihoods(options, trainer.model, trainer.processing_class, examples)
            write_jsonl(options.folder / f"likelihoods_{when}.jsonl", found)
    with_signal = [item for item in trainer.eval_dataset if has_signal(item)]
    maps = trainer.attention_maps(with_signal[: options.student.num_maps])
    return {"metrics": metrics, "accuracy": accuracy(predictions), "maps": maps}


def predict(options: Options, model, tokenizer, examples: list[Example], journal: Journal | None = None) -> list[dict]:
    """The model's answers, generated as the options say; see `mold.evaluation.predictions.generate_predictions`."""
    return generate_predictions(
        model,
        tokenizer,
        examples,
        options.training.template,
        task=options.training.tasks[-1],
        batch_size=options.student.generate_batch_size,
        max_new_tokens=options.student.max_new_tokens,
        static_cache=options.student.static_cache,
        journal=journal,
        progress=not options.training.disable_tqdm,
    )


def likelihoods(options: Options, model, tokenizer, examples: list[Example]) -> list[dict]:
    """Log-likelihoods of the examples as the model was trained on them; see `mold.evaluation.likelihoods`."""
    return log_likelihoods(
        model,
        tokenizer,
        examples,
        options.training.template,
        options.training.tasks,
        batch_size=options.training.per_device_eval_batch_size,
        max_length=options.training.max_length,
        progress=not options.training.disable_tqdm,
    )


def _write_maps(folder: Path, before: list[dict], after: list[dict], examples: dict[str, Example]) -> None:
    entries = []
    for old, new in zip(before, after, strict=True):
        example = examples[new["id"]]
        entry = {k: new[k] for k in ("id", "steps", "key_words", "teacher", "teacher_layer_weights")}
        entry |= {"question": example.question, "rationale": example.rationale}
        for when, values in (("before", old), ("after", new)):
            entry[f"student_{when}"] = values["student"]
            entry[f"student_layer_weights_{when}"] = values["student_layer_weights"]
            entry[f"kl_{when}"] = values["kl"]
        entries.append(entry)
    _write(folder / "attention_maps.json", json.dumps(entries).encode())


def _summarise(options: Options, trainer: MoldTrainer, before: dict, after: dict, seconds: dict) -> dict:
    names = {
        "eval_loss_attention": "attention KL",
        "eval_loss_rationale": "rationale loss",
        "eval_loss_answer": "answer loss",
        "eval_loss": "loss",
    }
    rows = [
        {"metric": name, "before": before["metrics"][key], "after": after["metrics"][key], "better": "lower"}
        for key, name in names.items()
        if key in after["metrics"]
    ]
    rows.append({"metric": "accuracy", "before": before["accuracy"], "after": after["accuracy"], "better": "higher"})
    layers = trainer.model.config.num_hidden_layers
    teacher = options.teacher.teacher_model_name_or_path
    return {
        "model": options.student.model_name_or_path or f"{teacher} with {layers} layers",
        "teacher": teacher or (trainer.signals.settings.teacher if trainer.signals else None),
        "rows": rows,
        "num_train": len(trainer.train_dataset),
        "num_eval": len(trainer.eval_dataset),
        "num_without_signal": sum(not has_signal(item) for item in trainer.train_dataset),
        "gradient_norms": before["gradient_norms"],
        "seconds": seconds,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions that matter to a result."""
    return {
        "mold": mold.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
