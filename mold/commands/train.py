"""mold train: train a student, evaluate it before and after, write the report.

A run folder holds config.yaml, before.json, metrics.jsonl, checkpoints, the trained student with its router,
predictions, log-likelihoods, attention_maps.json, summary.json and report.html. A killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean

import numpy as np
import yaml
from accelerate import PartialState
from rich import get_console
from rich.box import SIMPLE
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, set_seed

from mold.commands.info import versions
from mold.commands.inputs import load_split, load_teacher, lora_config, make_student, student_config, teaching
from mold.commands.options import Options
from mold.commands.parsing import parse, read_yaml
from mold.commands.progress import SayHowItGoes, StepBar, say
from mold.data.encoding import check_tokenizer, has_signal
from mold.data.examples import Example
from mold.evaluation.comparison import ACCURACY, HELD_OUT, read_outcomes
from mold.evaluation.likelihoods import log_likelihoods
from mold.evaluation.predictions import accuracy, generate_predictions, wilson_interval
from mold.evaluation.statistics import change
from mold.files import json_object, read_json, sole_use, write_atomically, write_jsonl
from mold.generation.batches import Journal
from mold.models import load_tokenizer, name_of
from mold.report.page import write_report
from mold.report.results import training_rows
from mold.training.card import add_section, block, code, table
from mold.training.trainer import MoldTrainer

CONFIG = "config.yaml"
LOSSES = {
    "eval_loss_attention": ("attention KL", "nats"),
    "eval_loss_rationale": ("rationale loss", "nats a token"),
    "eval_loss_answer": ("answer loss", "nats a token"),
    "eval_loss": ("loss", "weighted sum of the terms"),
}
"""What the losses of held-out examples are called, and their units."""


def main(arguments: Sequence[str]) -> None:
    """Train, and show the summary."""
    options = parse("train", arguments)
    show_summary(train(options))
    show_report(options.folder)


def train(options: Options, teacher=None, seconds: dict | None = None) -> dict:
    """Train the student and evaluate it before and after; a second call goes on where a killed one stopped.

    Args:
        options: of the run.
        teacher: (model, tokenizer) if it is loaded already and the student is made from it.
        seconds: of earlier stages, for the summary.

    Returns:
        The summary, as written to summary.json.
    """
    # What can be wrong without a model is found before one is loaded.
    examples = load_split(options.data)
    lora_config(options.student)
    student_config(options)
    if options.student.model_name_or_path is not None:
        check_tokenizer(load_tokenizer(options.student.model_name_or_path, revision=options.student.model_revision))
    main_process = PartialState().is_main_process
    with sole_use(options.folder, "output_dir") if main_process else nullcontext():
        _check_folder(options)
        return _train(options, *examples, teacher, dict(seconds or {}))


def _train(
    options: Options, train_examples: list[Example], held_out: list[Example], teacher, seconds: dict[str, float]
) -> dict:
    folder = options.folder
    if options.teacher.teacher_online or options.student.model_name_or_path is None:
        teacher = teacher or load_teacher(options)
    taught_by = teaching(options, teacher, needed=options.training.trains_attention)
    student, tokenizer = make_student(options, teacher)
    trainer = MoldTrainer(
        student,
        options.training,
        train_examples,
        held_out,
        processing_class=tokenizer,
        peft_config=lora_config(options.student),
        **taught_by,
    )
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(StepBar())
    trainer.add_callback(SayHowItGoes())
    options.training.template = trainer.template  # as a resumed run reads it from the config: no checkpoint differs
    if not (folder / CONFIG).is_file():
        write_once(
            folder / CONFIG,
            yaml.safe_dump(options.chosen | {"template": trainer.template}, allow_unicode=True).encode(),
        )
    start = time.perf_counter()
    before_file = folder / "before.json"
    if before_file.is_file():
        before = json_object(str(before_file), read_json(before_file))
    else:
        before = measure(options, trainer, held_out, "before")
        before["maps"] = _maps(options, trainer)
        before["gradient_norms"] = trainer.term_gradient_norms(
            trainer.train_dataset[: options.training.per_device_train_batch_size]
        )
        write_once(before_file, json.dumps(before).encode())
    evaluated = time.perf_counter()
    set_seed(options.training.seed)  # what is random from here on is so whether anything was measured before or not
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    say(f"saved to {folder}")
    seconds["train"] = time.perf_counter() - evaluated
    after = measure(options, trainer, held_out, "after")
    seconds["evaluate"] = time.perf_counter() - start - seconds["train"]
    _write_maps(folder, before["maps"], _maps(options, trainer), {e.id: e for e in held_out})
    summary = _summarise(options, trainer, before, after, seconds)
    write_once(folder / "summary.json", json.dumps(summary, indent=1).encode())
    if PartialState().is_main_process:
        _complete_card(folder / "README.md", options, summary)
    return summary


def _complete_card(path: Path, options: Options, summary: dict) -> None:
    """What came of it, the data and the command, which a trainer does not know."""
    columns = ("metric", "before", "after", "change", "verdict")
    rows = [[row[column] for column in columns] for row in training_rows(summary)]
    results = table((f"{summary['num_eval']} held-out examples", *columns[1:4], ""), rows)
    add_section(path, "Results", f"{results}\n\nIn brackets 95 % intervals over the examples.", first=True)
    words = []
    for name, value in options.chosen.items():
        if name != "output_dir":  # the folder may lie elsewhere by now
            texts = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
            words += [f"--{name}", *map(str, texts)]
    data = ", ".join(code(name) for name in options.data.dataset or ())
    counts = f"{summary['num_train']} examples to train on, {summary['num_eval']} held out"
    command = block(shlex.join(["mold", "train", *words, "--output_dir", "..."]))
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    add_section(path, "Data and command", f"Of {data}: {counts}. Made by\n\n{command}\n\nwith {versions}.")


def write_once(path: Path, data: bytes) -> None:
    """Of several processes, which all know the same, one writes."""
    if PartialState().is_main_process:
        write_atomically(path, data)


def _check_folder(options: Options) -> None:
    """Refuse a folder that holds a run of other options; it may lie elsewhere than when the run began."""
    path = options.folder / CONFIG
    if not path.is_file():
        return
    theirs = read_yaml(path, "output_dir")
    if options.training.template is None:  # chosen from the data when the run began
        options.training.template = theirs.get("template")
    mine = options.chosen | {"template": options.training.template}
    for key in sorted((mine.keys() | theirs.keys()) - {"output_dir"}):
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"output_dir: {options.folder} holds a run with {_said(theirs, key)}, this one has "
                f"{_said(mine, key)}; choose another folder, or delete that one"
            )


def _said(chosen: dict, key: str) -> str:
    return f"{key}={chosen[key]!r}" if key in chosen else f"the default {key}"


def measure(options: Options, trainer: MoldTrainer, examples: list[Example], when: str) -> dict:
    """Losses and accuracy (None: not asked for) of the examples; their predictions and log-likelihoods are written."""
    metrics = trainer.evaluate()
    if when == "before" and not options.student.predict_before:
        return {"metrics": metrics, "accuracy": None}
    about = options, trainer.model, trainer.processing_class, examples, trainer.template
    predictions = predict(*about)
    if PartialState().is_main_process:
        write_jsonl(options.folder / f"predictions_{when}.jsonl", predictions)
        write_jsonl(options.folder / f"likelihoods_{when}.jsonl", likelihoods(*about))
    return {"metrics": metrics, "accuracy": accuracy(predictions)}


def _maps(options: Options, trainer: MoldTrainer) -> list[dict]:
    """The attention maps of the first held-out examples that have a signal."""
    with_signal = [item for item in trainer.eval_dataset if has_signal(item)]
    return trainer.attention_maps(with_signal[: options.student.num_maps])


def predict(
    options: Options, model, tokenizer, examples: list[Example], template: str, journal: Journal | None = None
) -> list[dict]:
    """The model's answers, generated as the options say; see `mold.evaluation.predictions.generate_predictions`."""
    return generate_predictions(
        model,
        tokenizer,
        examples,
        template,
        task=options.training.tasks[-1],
        batch_size=options.generation.generate_batch_size,
        max_new_tokens=options.generation.max_new_tokens,
        static_cache=options.generation.static_cache,
        journal=journal,
        progress=not options.training.disable_tqdm,
    )


def likelihoods(options: Options, model, tokenizer, examples: list[Example], template: str) -> list[dict]:
    """Log-likelihoods of the examples as the model was trained on them; see `mold.evaluation.likelihoods`."""
    return log_likelihoods(
        model,
        tokenizer,
        examples,
        template,
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
    write_once(folder / "attention_maps.json", json.dumps(entries).encode())


def _summarise(options: Options, trainer: MoldTrainer, before: dict, after: dict, seconds: dict) -> dict:
    rows: list[dict] = []
    if PartialState().is_main_process:  # which wrote what they are from
        rows += _outcome_rows(options.folder)
    rows += [
        {"metric": name, "unit": unit, "before": before["metrics"][key], "after": after["metrics"][key]}
        for key, (name, unit) in LOSSES.items()
        if key in after["metrics"]
    ]
    teacher = options.teacher.teacher_model_name_or_path
    return {
        "model": name_of(trainer.model.config),
        "teacher": teacher or (trainer.signals.settings.teacher if trainer.signals else None),
        "rows": rows,
        "num_train": len(trainer.train_dataset),
        "num_eval": len(trainer.eval_dataset),
        "num_without_signal": sum(not has_signal(item) for item in trainer.train_dataset),
        "gradient_norms": before["gradient_norms"],
        "seconds": seconds,
        "versions": versions(),
    }


def _outcome_rows(folder: Path) -> list[dict]:
    """Accuracy and log-likelihoods of the held-out examples, with their 95 % intervals."""
    before, after = (
        read_outcomes(HELD_OUT, folder / f"predictions_{when}.jsonl", folder / f"likelihoods_{when}.jsonl")
        if (folder / f"likelihoods_{when}.jsonl").is_file()
        else {}
        for when in ("before", "after")
    )
    rows = []
    for (_, measure), values in after.items():
        means, intervals = {"before": None, "after": mean(values.values())}, {}
        row = {"metric": measure, "unit": "%" if measure == ACCURACY else "nats an example"}
        if old := before.get((HELD_OUT, measure)):
            means["before"] = mean(old.values())
            found = change(np.array([old[one] for one in values]), np.array(list(values.values())))
            intervals["change"] = found["interval"]
            row["verdict"] = found["verdict"]
        if measure == ACCURACY:
            shares = {when: share for when, share in means.items() if share is not None}
            intervals |= {when: wilson_interval(share * len(values), len(values)) for when, share in shares.items()}
        rows.append(row | means | {"intervals": intervals})
    return rows


def show_summary(summary: dict) -> None:
    """The table of a run, shown by one of its processes."""
    if not PartialState().is_main_process:
        return
    table = Table(f"{summary['num_eval']} held-out examples", "before", "after", "change", box=SIMPLE, pad_edge=False)
    table.title = f"{summary['model']}, taught by {summary['teacher']}; 95 % intervals"
    for row in training_rows(summary):
        # An interval under its value, a unit under its name: what 80 columns hold.
        cells = [row[name].replace(" (", "\n(") for name in ("before", "after")]
        change, _, interval = row["change"].partition(" (")
        change = " ".join(filter(None, (change, row["verdict"]))) + (f"\n({interval}" if interval else "")
        table.add_row(row["metric"].replace(", nats an", ",\nnats an"), *cells, change)
    get_console().print(table)
    get_console().print(
        f"{summary['num_train']} training examples ({summary['num_without_signal']} without key words), "
        f"{summary['num_eval']} held out; "
        + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    )
    norms = ", ".join(f"{term} {norm:.3g}" for term, norm in summary["gradient_norms"].items())
    get_console().print(f"gradient norm of each term before training: {norms}")


def show_report(folder: Path) -> None:
    """Write the report and say where it is, or why there is none."""
    if not PartialState().is_main_process:
        return
    try:
        get_console().print(f"report: {write_report(folder)}", soft_wrap=True, highlight=False)
    except ImportError as error:
        get_console().print(f"no report: {error}")
