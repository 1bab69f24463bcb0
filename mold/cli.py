"""The command line: mold demo | extract | train | eval | inspect | plan | info."""

from __future__ import annotations

import difflib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil where a teacher looks while it reasons.",
)
console = Console()

# Everything behind the command's own options goes to one parser of all dataclasses: --help lists them, an unknown
# one is an error.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of options; the command line wins.")]

DEMO = {
    "teacher_model_name_or_path": "smollm2-135m-instruct",
    "student_layers": [0, 1, 20, 21, 22, 23, 24, 29],
    "output_dir": "runs/demo",
    "num_train": 240,
    "num_eval": 32,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 5,
    "save_steps": 30,
    "save_total_limit": 1,
    "max_new_tokens": 128,
    "generate_batch_size": 32,
}


@app.command(context_settings=PASS_ON)
def demo(context: typer.Context, config: ConfigFile = None):
    """The whole path on generated problems: extract, train, evaluate, report. Takes a few minutes on a CPU."""
    from mold import run

    options = parse_options(context.args, config, DEMO, "demo")
    teacher = run.load_teacher(options)
    train_examples, held_out = run.load_examples(options.data)
    cache, seconds = timed(run.extract, options, train_examples + held_out, teacher)
    console.print(f"{len(cache)} teacher signals in {options.signals_folder} ({seconds:.0f} s)")
    show_summary(run.train(options, teacher, {"extract": seconds}))
    show_report(options.folder)


@app.command(context_settings=PASS_ON)
def extract(context: typer.Context, config: ConfigFile = None):
    """Extract the teacher's stepwise attention of a data set into a cache. Goes on where a killed run stopped."""
    from mold import run

    options = parse_options(context.args, config, {}, "extract")
    train_examples, held_out = run.load_examples(options.data)
    cache, seconds = timed(run.extract, options, train_examples + held_out)
    console.print(f"{len(cache)} teacher signals in {options.signals_folder} ({seconds:.0f} s)")


@app.command(context_settings=PASS_ON)
def train(context: typer.Context, config: ConfigFile = None):
    """Train a student, evaluate it before and after, write the report. Goes on where a killed run stopped."""
    from mold import run

    options = parse_options(context.args, config, {}, "train")
    show_summary(run.train(options))
    show_report(options.folder)


@app.command("eval", context_settings=PASS_ON)
def evaluate(context: typer.Context, config: ConfigFile = None):
    """Evaluate a student on the held-out examples: losses, accuracy, predictions."""
    from mold import run

    options = parse_options(context.args, config, {}, "eval")
    metrics = run.evaluate(options)
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    console.print(f"predictions: {options.folder / 'predictions_eval.jsonl'}")


@app.command(context_settings=PASS_ON)
def inspect(
    context: typer.Context,
    config: ConfigFile = None,
    example: Annotated[str, typer.Option(help="The example's id, or its place in the data set.")] = "0",
):
    """One example: its steps, key words and token spans, and the teacher's attention if a cache is given."""
    from mold.inspection import describe

    options = parse_options(context.args, config, {}, "inspect")
    for part in describe(options, example):
        console.print(part)


@app.command(context_settings=PASS_ON)
def plan(
    context: typer.Context,
    config: ConfigFile = None,
    gpu: Annotated[str | None, typer.Option(help="Plan for this GPU (h100-80gb, ...) instead of this machine.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB there are; all the machine has where not given.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Of an adapter on all linear layers; 0: none.")] = 0,
):
    """Predict a training step's peak memory and time from the options of `mold train`, without weights."""
    from mold.plan_table import describe_plan

    for part in describe_plan(parse_options(context.args, config, {}, "plan"), gpu, memory, lora_rank):
        console.print(part)


@app.command()
def info():
    """Versions, devices and backends, and why one is missing."""
    import torch

    from mold import run
    from mold_kernels import native
    from mold_kernels.backends import available_backends

    table = Table("what", "here")
    for name, version in run.versions().items():
        table.add_row(name, version)
    table.add_row("threads", str(torch.get_num_threads()))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none")
    for name, value in (native.build_info() or {}).items():
        table.add_row(f"native: {name}", value)
    for name, reason in available_backends().items():
        table.add_row(f"backend {name}", "available" if reason is None else f"missing: {reason}")
    console.print(table)


def parse_options(arguments: list[str], config: Path | None, defaults: dict, command: str):
    """Options from defaults, a YAML file and the command line, each winning over the one before."""
    from transformers import HfArgumentParser

    from mold.config import DataOptions, MoldConfig, StudentOptions, TeacherOptions
    from mold.run import Options

    parser = HfArgumentParser(
        (DataOptions, TeacherOptions, StudentOptions, MoldConfig),
        prog=f"mold {command}",
        allow_abbrev=False,
        epilog="--config FILE: a YAML file of these options (key: value); the command line wins.",
    )
    known = sorted(name.removeprefix("--") for action in parser._actions for name in action.option_strings)
    chosen = dict(defaults)
    if config is not None:
        chosen |= _read_yaml(config)
    flat = []
    for key, value in chosen.items():
        if key not in known:
            raise ValueError(f"--config: {config} has the unknown option {key!r}{_nearest(key, known)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flat += [f"--{key}", *map(str, values)]
    *groups, unknown = parser.parse_args_into_dataclasses(
        [*flat, *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise ValueError(f"{unknown[0]}: is no option of mold {command}{_nearest(name, known)}")
    return Options(*groups)


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"--config: {path} does not exist")
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"--config: {path} holds {type(loaded).__name__}, must hold options (key: value)")
    return loaded


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else "; --help lists them"


def timed(function, *arguments):
    """A function's result and how many seconds it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def show_summary(summary: dict) -> None:
    """The table of a run."""
    table = Table("held-out", "before", "after", title=f"{summary['model']}, taught by {summary['teacher']}")
    for row in summary["rows"]:
        table.add_row(row["metric"], *(f"{row[when]:.4g}" for when in ("before", "after")))
    console.print(table)
    console.print(
        f"{summary['num_train']} training examples ({summary['num_without_signal']} without key words), "
        f"{summary['num_eval']} held out; "
        + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    )
    norms = ", ".join(f"{term} {norm:.3g}" for term, norm in summary["gradient_norms"].items())
    console.print(f"gradient norm of each term before training: {norms}")


def show_report(folder: Path) -> None:
    """Write the report and say where it is, or why there is none."""
    from mold.report import write_report

    try:
        console.print(f"report: {write_report(folder)}")
    except ImportError as error:
        console.print(f"no report: {error}")


def main() -> None:
    """Run the command line; a foreseeable mistake is one message on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"mold: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
