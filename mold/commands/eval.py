"""mold eval: a student on a data set with its losses, or models compared on data sets and tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from safetensors.torch import load_file
from transformers.utils import logging

from mold.commands.inputs import load_models, load_teacher, make_student, read_data, student_config, teaching
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.commands.progress import show
from mold.commands.train import LOSSES, likelihoods, measure, predict, write_once
from mold.data.chat import choose_template, recorded_template
from mold.data.examples import Example, question_key
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from mold.evaluation.harness import Tasks, evaluate_tasks
from mold.evaluation.predictions import score, wilson_interval
from mold.files import digest, write_atomically, write_jsonl
from mold.generation.batches import Journal
from mold.models import weights_fingerprint
from mold.processes import require_one_process
from mold.training.router_training import ROUTER_FILE
from mold.training.trainer import MoldTrainer

logger = logging.get_logger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Evaluate or compare, and show tables."""
    options = parse("eval", arguments)
    wanted = options.evaluation
    if not (options.data.dataset or wanted.eval_sets or wanted.lm_eval_tasks):
        raise ValueError("dataset: is not given, must name what to evaluate on (or give eval_sets or lm_eval_tasks)")
    if wanted.eval_sets or wanted.lm_eval_tasks:
        require_one_process("eval_sets" if wanted.eval_sets else "lm_eval_tasks")
    if wanted.lm_eval_tasks:
        show(tasks_table(ask_tasks(options)))
    if wanted.eval_sets:
        trained_on = read_data(options.data, require_rationale=False) if options.data.dataset else ()
        results = compare(options, trained_on)
        show(comparison_table(results))
        for remark in remarks(results):
            show(remark)
        show(f"predictions: {options.folder / 'predictions'}", soft_wrap=True)
    elif options.data.dataset:
        show(evaluation_table(evaluate(options)))
        show(f"predictions: {options.folder / 'predictions_eval.jsonl'}", soft_wrap=True)


def evaluate(options: Options) -> dict:
    """Evaluate a trained (or any) student on the data set; writes eval.json and its predictions."""
    examples = read_data(options.data, rationales=options.data.rationales)[: options.evaluation.eval_limit]
    student_config(options)
    teacher = load_teacher(options) if options.teacher.teacher_online else None
    taught_by = teaching(options, teacher, needed=False)
    student, tokenizer = make_student(options, teacher)
    if not any(taught_by.values()):
        options.training.beta = 0.0
    trainer = MoldTrainer(student, options.training, eval_dataset=examples, processing_class=tokenizer, **taught_by)
    router = Path(options.student.model_name_or_path or "") / ROUTER_FILE
    if router.is_file():
        trainer.mold_loss.router.load_state_dict(load_file(router))
    elif options.training.trains_attention:
        logger.warning(f"{router} does not exist: the attention loss is that of an untrained router")
    options.folder.mkdir(parents=True, exist_ok=True)
    result = measure(options, trainer, examples, "eval")
    metrics = result["metrics"] | {"accuracy": result["accuracy"], "num_eval": len(examples)}
    write_once(options.folder / "eval.json", json.dumps(metrics, indent=1).encode())
    return metrics


def evaluation_table(metrics: Mapping[str, float]) -> Table:
    """A row a metric, with its unit."""
    total = int(metrics["num_eval"])
    table = Table(f"{total} examples", "value")
    low, high = wilson_interval(metrics["accuracy"] * total, total)
    shares = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * share for share in (metrics["accuracy"], low, high)))
    table.add_row("accuracy, % (95 % interval)", shares)
    for key, (name, unit) in LOSSES.items():
        if key in metrics:
            table.add_row(f"{name}, {unit}", f"{metrics[key]:.4g}")
    return table


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
    for label, model, tokenizer in load_models(options):
        for set_name, examples in sets.items():
            stem = options.folder / "predictions" / f"{label}--{set_name}"
            given = options.training.template or recorded_template(tokenizer)
            template = choose_template(given, examples, tokenizer, tasks=options.training.tasks)
            settings = {
                "stage": "eval",
                "weights": weights_fingerprint(model),
                "examples": digest([(e.id, e.question, e.answer) for e in examples]),
                "template": template,
                "task": options.training.tasks[-1],
                "batch_size": options.generation.generate_batch_size,
                "max_new_tokens": options.generation.max_new_tokens,
            }
            predictions = predict(options, model, tokenizer, examples, template, Journal(f"{stem}.journal", settings))
            write_jsonl(f"{stem}.jsonl", predictions)
            measured = options.folder / "likelihoods" / f"{label}--{set_name}.jsonl"
            measured.parent.mkdir(exist_ok=True)
            write_jsonl(measured, likelihoods(options, model, tokenizer, examples, template))
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
    for label, model, tokenizer in load_models(options):
        found = evaluate_tasks(model, tokenizer, tasks, batch_size=options.generation.generate_batch_size)
        results += [{"model": label, **entry} for entry in found]
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(options.folder / "lm_eval.json", json.dumps(results, indent=1).encode())
    return results


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


def comparison_table(results: list[dict]) -> Table:
    """A row a model, a column a data set: accuracy in percent with its 95 % interval."""
    sets = list(dict.fromkeys(result["set"] for result in results))
    sizes = {result["set"]: result["total"] for result in results}
    table = Table("model", *(f"{name} ({sizes[name]} questions)" for name in sets), title="accuracy, % (95 % interval)")
    for model in dict.fromkeys(result["model"] for result in results):
        cells = {result["set"]: result for result in results if result["model"] == model}
        table.add_row(
            model,
            *(
                "{:.1f} ({:.1f} to {:.1f})".format(*(100 * cells[s][k] for k in ("accuracy", "low", "high")))
                for s in sets
            ),
        )
    return table


def remarks(results: list[dict]) -> Iterator[str]:
    """What must be known about some of the accuracies."""
    wordings = {
        "seen": "{} questions that the training data asks too",
        "no_answer": "{} without an answer",
        "not_judged": "not judged: {}",
        "truncated": "{} cut off at max_new_tokens",
    }
    for name, wording in wordings.items():
        for result in results:
            if result.get(name):
                yield f"{result['model']} on {result['set']}: {wording.format(result[name])}"


def tasks_table(results: list[dict]) -> Table:
    """A row a task and metric, a column a model: the value with its standard error."""
    models = list(dict.fromkeys(result["model"] for result in results))
    table = Table("task", "examples", "metric", *models, title="lm-evaluation-harness (+- standard error)")
    for task, metric in dict.fromkeys((result["task"], result["metric"]) for result in results):
        cells = {r["model"]: r for r in results if (r["task"], r["metric"]) == (task, metric)}
        errors = {m: "" if cells[m]["stderr"] is None else f" +- {cells[m]['stderr']:.3f}" for m in models}
        total = next((f"{cell['total']}" for cell in cells.values() if cell["total"]), "")
        table.add_row(task, total, metric, *(f"{cells[m]['value']:.3f}{errors[m]}" for m in models))
    return table
