"""The stages around training: a teacher's rationales and key words, and models compared on data sets.

Each stage goes on where a killed one stopped (see `mold.generation.batches.Journal`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging

from mold.commands.train import Options, likelihoods, load_teacher, predict, read_data
from mold.data.examples import Example, question_key
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from mold.evaluation.analysis import key_word_mass
from mold.evaluation.harness import Tasks, evaluate_tasks
from mold.evaluation.predictions import score
from mold.files import write_atomically, write_jsonl
from mold.generation.batches import Journal
from mold.generation.keywords import name_keywords
from mold.generation.prompting import load_prompt, prompt_for, use_chat
from mold.generation.rationales import Sampling, read_given, write_rationales
from mold.models import load_model, weights_fingerprint
from mold.report import plots

logger = logging.get_logger(__name__)

RATIONALES = "rationales.jsonl"
JOURNAL = "journal.jsonl"


def generate(options: Options) -> Counter:
    """A teacher's rationales for the data set's questions; writes rationales.jsonl and generate.json.

    Rationales from elsewhere (`rationales`) come first; without a teacher they are checked alone.

    Returns:
        Counts of what happened, as in generate.json.
    """
    prompting, name = options.prompting, options.teacher.teacher_model_name_or_path
    examples = read_data(options.data, require_rationale=False)[: options.data.num_train]
    given, strangers = (None, 0)
    if options.data.rationales is not None:
        given, strangers = read_given(options.data.rationales, examples)
    if name is None and given is None:
        raise ValueError("teacher_model_name_or_path: is not given, must name the teacher (or give rationales)")
    sampling = _sampling(options)
    teacher = prompt = None
    chat = False
    settings = {"sampling": asdict(sampling), "template": options.training.template}
    settings |= {"questions": _digest([(e.id, e.question, e.answer) for e in examples]), "given": _digest(given)}
    if name is not None:
        task = prompt_for(examples) if prompting.prompt == "auto" else prompting.prompt
        prompt = load_prompt(task, prompting.num_shots)
        teacher = _load_teacher(options)
        chat = use_chat(teacher[1], prompting.chat)
        settings |= _settings_of(teacher, prompt, chat)
    rows, counts = write_rationales(
        examples,
        Journal(options.folder / JOURNAL, {"stage": "generate", "teacher": name, **settings}),
        sampling,
        teacher=teacher,
        prompt=prompt,
        chat=chat,
        template=options.training.template,
        given=given,
        progress=not options.training.disable_tqdm,
    )
    if strangers:
        counts["given: of no question"] = strangers
    write_jsonl(options.folder / RATIONALES, rows)
    write_atomically(options.folder / "generate.json", json.dumps(counts, indent=1).encode())
    return counts


def keywords(options: Options) -> Counter:
    """The teacher's key words of the data set's examples; writes rationales.jsonl with them and keywords.json."""
    examples = read_data(options.data, rationales=options.data.rationales)[: options.data.num_train]
    prompting = options.prompting
    prompt = load_prompt("keywords" if prompting.prompt == "auto" else prompting.prompt, prompting.num_shots)
    teacher = _load_teacher(options)
    chat = use_chat(teacher[1], prompting.chat)
    settings = {
        "stage": "keywords",
        "teacher": options.teacher.teacher_model_name_or_path,
        "examples": _digest([(e.id, e.question, e.rationale) for e in examples]),
        "batch_size": options.student.generate_batch_size,
        "max_new_tokens": options.student.max_new_tokens,
        **_settings_of(teacher, prompt, chat),
    }
    examples, counts = name_keywords(
        examples,
        Journal(options.folder / JOURNAL, settings),
        teacher,
        prompt,
        chat=chat,
        batch_size=options.student.generate_batch_size,
        max_new_tokens=options.student.max_new_tokens,
        progress=not options.training.disable_tqdm,
    )
    write_jsonl(options.folder / RATIONALES, [{**vars(e), "keywords": list(e.keywords)} for e in examples])
    write_atomically(options.folder / "keywords.json", json.dumps(counts, indent=1).encode())
    return counts


def compare(options: Options, trained_on: Sequence[Example] = ()) -> list[dict]:
    """Accuracy of every model on every data set; writes comparison.json and, question by question, predictions and
    likelihoods/MODEL--SET.jsonl.

    Args:
        options: models, eval_sets, eval_limit and how to generate.
        trained_on: questions of a set that stand here too are counted ("seen").

    Returns:
        An entry a model and set: model, set, tasks, seen, and `mold.evaluation.predictions.score`.
    """
    evaluation = options.evaluation
    sets = dict(_read_sets(evaluation.eval_sets, evaluation.eval_limit))
    seen = {question_key(example.question) for example in trained_on}
    results = []
    for label, model, tokenizer in _load_models(options):
        for set_name, examples in sets.items():
            stem = options.folder / "predictions" / f"{label}--{set_name}"
            settings = {
                "stage": "eval",
                "weights": weights_fingerprint(model),
                "examples": _digest([(e.id, e.question, e.answer) for e in examples]),
                "template": options.training.template,
                "task": options.training.tasks[-1],
                "batch_size": options.student.generate_batch_size,
                "max_new_tokens": options.student.max_new_tokens,
            }
            predictions = predict(options, model, tokenizer, examples, Journal(f"{stem}.journal", settings))
            write_jsonl(f"{stem}.jsonl", predictions)
            measured = options.folder / "likelihoods" / f"{label}--{set_name}.jsonl"
            measured.parent.mkdir(exist_ok=True)
            write_jsonl(measured, likelihoods(options, model, tokenizer, examples))
            repeated = sum(question_key(example.question) in seen for example in examples)
            about = {"model": label, "set": set_name, "tasks": list(options.training.tasks), "seen": repeated}
            results.append(about | score(predictions))
    write_atomically(options.folder / "comparison.json", json.dumps(results, indent=1).encode())
    return results


def ask_tasks(options: Options) -> list[dict]:
    """What every model reaches in tasks of lm-evaluation-harness; writes lm_eval.json.

    Args:
        options: models, lm_eval_tasks, lm_eval_include_path, lm_eval_shots, eval_limit and generate_batch_size.

    Returns:
        An entry a model, task and metric: model, and `mold.evaluation.harness.evaluate_tasks`.
    """
    evaluation = options.evaluation
    tasks = Tasks(
        evaluation.lm_eval_tasks,
        evaluation.lm_eval_include_path,
        shots=evaluation.lm_eval_shots,
        limit=evaluation.eval_limit,
    )
    results = []
    for label, model, tokenizer in _load_models(options):
        found = evaluate_tasks(model, tokenizer, tasks, batch_size=options.student.generate_batch_size)
        results += [{"model": label, **entry} for entry in found]
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(options.folder / "lm_eval.json", json.dumps(results, indent=1).encode())
    return results


def analyse(options: Options) -> dict[str, dict]:
    """Attention to key words by step and layer of every model on the data set; writes analysis.json and analysis.svg.

    Args:
        options: the data set, how many of its examples (eval_limit), and models (teacher and student where not given).

    Returns:
        By model, what `mold.evaluation.analysis.key_word_mass` found.
    """
    names = options.evaluation.models or [
        name
        for name in (options.teacher.teacher_model_name_or_path, options.student.model_name_or_path)
        if name is not None
    ]
    if not names:
        raise ValueError("models: is not given, must name the models to analyse (or a teacher, a student)")
    examples = read_data(options.data, rationales=options.data.rationales)[: options.evaluation.eval_limit]
    found = {}
    for name, label in zip(names, _labels(names), strict=True):
        model, tokenizer = load_model(name, dtype=options.teacher.teacher_dtype)
        found[label] = key_word_mass(
            model.to(options.training.device),
            tokenizer,
            examples,
            options.training.template,
            batch_size=options.teacher.extract_batch_size,
            max_length=options.training.max_length,
            progress=not options.training.disable_tqdm,
        )
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(options.folder / "analysis.json", json.dumps(found, indent=1).encode())
    svg = plots.figure_to_svg(plots.key_word_attention(found))
    write_atomically(options.folder / "analysis.svg", svg.encode())
    return found


def check_prompting(options: Options) -> None:
    """Raise a ValueError if a teacher cannot be prompted with these options, as far as that is known without it."""
    _sampling(options)
    if options.prompting.prompt != "auto":
        load_prompt(options.prompting.prompt, options.prompting.num_shots)


def _sampling(options: Options) -> Sampling:
    prompting = options.prompting
    return Sampling(
        prompting.temperature,
        prompting.top_p,
        prompting.num_tries,
        prompting.hint,
        options.training.seed,
        options.student.generate_batch_size,
        options.student.max_new_tokens,
    )


def parse_set(text: str) -> tuple[str, str, str | None]:
    """Name, path and split of "NAME=PATH@SPLIT"; the name is the path's where not given, the split None.

    A path may hold both signs; a name and a split hold no slash.
    """
    name, equals, place = text.partition("=")
    if not equals or "/" in name:
        name, place = "", text
    path, at, split = place.rpartition("@")
    if not at or "/" in split:
        path, split = place, ""
    return name or Path(path).stem, path, split or None


def _read_sets(specifications: Sequence[str], limit: int | None) -> Iterator[tuple[str, list[Example]]]:
    names = set()
    for text in specifications:
        name, path, split = parse_set(text)
        if name in names:
            raise ValueError(f"eval_sets: has the name {name!r} twice; write NAME=PATH")
        names.add(name)
        if path == "generated":
            # Other problems than those of a training, whose seeds are small.
            yield name, generate_problems(limit or 100, seed=1_000_003)
            continue
        examples, report = read_examples(path, split=split, require_rationale=False)
        if report.left_out:
            logger.warning(f"{name}: {report}")
        yield name, examples[:limit]


def _load_models(options: Options) -> Iterator[tuple]:
    """Label, model and tokenizer of each model to compare."""
    names = options.evaluation.models or [options.student.model_name_or_path]
    if None in names:
        raise ValueError("models: is not given, must name the models to compare (or model_name_or_path one)")
    for name, label in zip(names, _labels(names), strict=True):
        model, tokenizer = load_model(name, dtype=options.student.model_dtype)
        yield label, model.to(options.training.device), tokenizer


def _labels(names: Sequence[str]) -> list[str]:
    """Short, distinct names of models: the last parts of their paths."""
    for parts in range(1, 10):
        labels = ["-".join(Path(name).parts[-parts:]) for name in names]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"models: is {', '.join(names)}, must name different ones")


def _load_teacher(options: Options):
    model, tokenizer = load_teacher(options)
    return model.to(options.training.device), tokenizer


def _settings_of(teacher, prompt, chat: bool) -> dict:
    model, _ = teacher
    weights = {"weights": weights_fingerprint(model), "dtype": str(model.dtype)}
    return {**weights, "prompt": _digest(asdict(prompt)), "chat": chat}


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
