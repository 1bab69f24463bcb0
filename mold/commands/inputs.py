"""What commands read: examples, teachers, students and the teacher's signals, as their options say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from mold.commands.options import DataOptions, Options, StudentOptions
from mold.commands.progress import say
from mold.data.examples import Example, split_examples
from mold.data.problems import generate_problems
from mold.data.readers import read_mixture
from mold.extras import missing_extra
from mold.method.signals import SignalCache
from mold.models import (
    check_model_init_kwargs,
    config_of_layers,
    load_config,
    load_model,
    load_tokenizer,
    spread_layers,
    start_from_scratch,
    take_layers,
    weights_fingerprint,
)

logger = logging.get_logger(__name__)

_OURS = {"dtype": "model_dtype", "revision": "model_revision", "quantization_config": "load_in_4bit"}
GENERATED, NUM_GENERATED, MOST_HELD_OUT = "generated", 240, 200


def read_data(options: DataOptions, require_rationale: bool = True, rationales: str | None = None) -> list[Example]:
    """All examples of the data sets. Rows that are left out are counted in a warning, a data set each.

    Raises:
        ValueError: as of `mold.data.readers.read_mixture`; "generated" stands beside others.
    """
    paths = options.dataset or []
    if paths == [GENERATED]:
        number = options.num_train or NUM_GENERATED
        return generate_problems(
            number + _number_held_out(options, number),
            options.split_seed,
            max_value=options.max_value,
            rationale_form=options.rationale_form,
        )
    if options.max_value is not None:
        raise ValueError(f"max_value: is {options.max_value}, must not be given with dataset={' '.join(paths)!r}")
    if GENERATED in paths:
        raise ValueError(f"dataset: is {' '.join(paths)}, must not have generated problems beside others")
    examples, reports = read_mixture(
        paths,
        options.dataset_format,
        split=options.dataset_split,
        rationales=rationales,
        rationale_form=options.rationale_form,
        require_rationale=require_rationale,
    )
    for path, report in reports.items():
        if report.left_out:
            logger.warning(f"{path}: {report}")
        elif len(paths) > 1:
            say(f"{path}: {report}")
    return examples


def _number_held_out(options: DataOptions, number: int) -> int:
    """How many examples are held out: of so many, or beside so many that are generated to train on."""
    return options.num_eval or min(MOST_HELD_OUT, max(1, number // 10))


def load_split(options: DataOptions) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; a question is never in both.

    Raises:
        ValueError: num_train or num_eval is more than there is.
    """
    examples = read_data(options, rationales=options.rationales)
    generated, named = options.dataset == [GENERATED], ", ".join(options.dataset or ())
    number = options.num_train or NUM_GENERATED if generated else len(examples)
    num_eval = _number_held_out(options, number)
    if num_eval >= len(examples):
        raise ValueError(
            f"num_eval: is {num_eval}, must be less than the {len(examples)} examples of {named}: some must "
            "be left to train on"
        )
    train, held_out = split_examples(examples, num_eval, options.split_seed)
    if repeated := len(examples) - len(train) - len(held_out):
        logger.warning(f"{named}: {repeated} examples ask a held-out question again and are left out")
    if options.num_train is not None and options.num_train > len(train):
        raise ValueError(f"num_train: is {options.num_train}, but only {len(train)} examples are left to train on")
    return train[: options.num_train], held_out


def load_teacher(options: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher and its tokenizer, on the device."""
    name = options.teacher.teacher_model_name_or_path
    if name is None:
        raise ValueError("teacher_model_name_or_path: is not given, must name the teacher")
    model, tokenizer = load_model(
        name, revision=options.teacher.teacher_model_revision, dtype=options.teacher.teacher_dtype
    )
    return model.to(options.training.device), tokenizer


def student_config(options: Options, load: Callable[..., PretrainedConfig] = load_config) -> PretrainedConfig:
    """The student's configuration, with the layers it keeps; no weights are loaded.

    Args:
        options: of the student, and of the teacher that it may be made from.
        load: makes a configuration from a model's name and revision.

    Raises:
        ValueError: no model is named, its configuration is not there, or it has not these layers.
    """
    student = options.student
    name, revision = student.model_name_or_path, student.model_revision
    if name is None:
        name, revision = options.teacher.teacher_model_name_or_path, options.teacher.teacher_model_revision
        if name is None or (student.student_num_layers is None and student.student_layers is None):
            raise ValueError(
                "model_name_or_path: is not given, must name the student (or set student_num_layers or student_layers "
                "to make one from the teacher's layers)"
            )
    config = load(name, revision=revision)
    given: Any = options.training.model_init_kwargs or {}
    if given and student.model_name_or_path is None:
        raise ValueError(
            "model_init_kwargs: is given, must not be for a student that is made from the teacher's layers"
        )
    for taken, ours in _OURS.items():
        if taken in given:
            raise ValueError(f"model_init_kwargs: has {taken!r}, must not: {ours} says it")
    check_model_init_kwargs(config, given)
    if student.from_scratch:
        _check_from_scratch(options, config)
        config = type(config).from_dict(config.to_dict() | given, name_or_path=name)
    layers = _layers(student, config)
    return config if layers is None else config_of_layers(config, layers)


def make_student(options: Options, teacher=None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student: a model of its own, or the teacher with fewer layers.

    Args:
        options: as of `student_config`.
        teacher: (model, tokenizer) if it is loaded already.
    """
    student = options.student
    if student.from_scratch:
        config = student_config(options)
        set_seed(options.training.seed)
        model = start_from_scratch(config, student.model_dtype)
        return model, load_tokenizer(str(student.model_name_or_path), revision=student.model_revision)
    if student.model_name_or_path is not None:
        given: Any = options.training.model_init_kwargs or {}
        init = dict(given)
        if student.load_in_4bit:
            init["quantization_config"] = four_bits(options)
        model, tokenizer = load_model(
            student.model_name_or_path, revision=student.model_revision, dtype=student.model_dtype, **init
        )
    else:
        model, tokenizer = teacher or load_teacher(options)
    layers = _layers(student, model.config)
    if layers is not None:
        model = take_layers(model, layers)
    return model if student.load_in_4bit else model.to(getattr(torch, student.model_dtype)), tokenizer


def _check_from_scratch(options: Options, config: PretrainedConfig) -> None:
    """Raise a ValueError if something is asked of the student that needs weights which it does not have yet."""
    student = options.student
    for name in ("use_peft", "load_in_4bit", "student_num_layers", "student_layers"):
        if value := getattr(student, name):
            raise ValueError(f"{name}: is {value!r}, must not be given with from_scratch: there are no weights yet")
    for name in options.training.model_init_kwargs or ():
        if not hasattr(config, name):
            raise ValueError(
                f"model_init_kwargs: has {name!r}, must have fields of {type(config).__name__} alone with from_scratch"
            )


def _layers(student: StudentOptions, config: PretrainedConfig) -> Sequence[int] | None:
    if student.student_num_layers is None:
        return student.student_layers
    return spread_layers(config.num_hidden_layers, student.student_num_layers)


def four_bits(options: Options) -> BitsAndBytesConfig:
    """How the student's weights are quantized."""
    compute_dtype = torch.bfloat16 if options.training.bf16 else getattr(torch, options.student.model_dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def lora_config(options: StudentOptions):
    """peft's LoraConfig of the options, None without `use_peft`.

    Raises:
        ImportError: peft is not installed.
        ValueError: load_in_4bit without use_peft.
    """
    if not options.use_peft:
        if options.load_in_4bit:
            raise ValueError("load_in_4bit: is True, must be False without use_peft: 4-bit weights cannot be trained")
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing_extra("use_peft", "peft", "peft") from error
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def load_models(options: Options) -> Iterator[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]]:
    """Label, model and tokenizer of each model to compare."""
    names = options.evaluation.models or [options.student.model_name_or_path]
    if None in names:
        raise ValueError("models: is not given, must name the models to compare (or model_name_or_path one)")
    revision = None if options.evaluation.models else options.student.model_revision
    for name, label in zip(names, labels(names), strict=True):
        model, tokenizer = load_model(name, revision=revision, dtype=options.student.model_dtype)
        yield label, model.to(options.training.device), tokenizer


def labels(names: Sequence[str]) -> list[str]:
    """Short, distinct names of models: the last parts of their paths."""
    for parts in range(1, 10):
        found = ["-".join(Path(name).parts[-parts:]) for name in names]
        if len(set(found)) == len(found):
            return found
    raise ValueError(f"models: is {', '.join(names)}, must name different ones")


def load_signals(options: Options, teacher=None) -> SignalCache:
    """The cache that `mold extract` made, if it is of the teacher and settings of these options.

    A teacher that is called otherwise than by `mold extract` is loaded: its weights say whether it is the same.

    Args:
        options: say where the cache is, and what it must have been made with.
        teacher: (model, tokenizer) if it is loaded already: its weights are compared too.

    Raises:
        ValueError: a setting or the teacher is another.
    """
    signals = SignalCache(options.signals_folder)
    training = options.training
    signals.require(**training.signal_settings(signals.settings.signal_layers))
    if options.training.template is not None and options.training.trains_attention:
        signals.require_template(options.training.template)
    name, revision = options.teacher.teacher_model_name_or_path, options.teacher.teacher_model_revision
    loaded = None
    if teacher is not None and str(teacher[0].dtype) == signals.settings.dtype:
        loaded = teacher[0]
    elif name is not None and name != signals.settings.teacher:
        loaded = load_model(name, revision=revision, dtype=signals.settings.dtype.removeprefix("torch."))[0]
    if loaded is not None and weights_fingerprint(loaded) != signals.settings.weights:
        signals.require(teacher=name)
        raise ValueError(
            f"teacher_model_name_or_path: {name} has other weights than the teacher of {signals.folder} had; extract "
            "into another folder, or name that teacher"
        )
    return signals


def teaching(options: Options, teacher, needed: bool) -> dict:
    """What teaches attention, as arguments of MoldTrainer: the teacher itself, or its cached signals.

    Args:
        options: say which, and where the cache is.
        teacher: (model, tokenizer) if it is loaded; needed with teacher_online.
        needed: whether a missing cache is an error.
    """
    if options.teacher.teacher_online:
        return {"teacher_model": teacher[0], "teacher_processing_class": teacher[1]}
    return {"signals": load_signals(options, teacher) if needed or options.signals_folder.exists() else None}
