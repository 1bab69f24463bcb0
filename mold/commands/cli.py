"""The command line: mold demo, generate, keywords, extract, train, eval, analyse, run, plan, inspect and info."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
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
    "num_eval": 24,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "cross_entropy": "chunked",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 5,
    "save_steps": 25,
    "save_total_limit": 1,
    "max_new_tokens": 128,
    "generate_batch_size": 32,
}


@app.command(context_settings=PASS_ON)
def demo(context: typer.Context, config: ConfigFile = None):
    """The whole path on generated problems: extract, train, evaluate, report. Takes a few minutes on a CPU."""
    from mold.commands import train as run

    options = parse_options(context.args, config, DEMO, "demo")
    teacher = run.load_teacher(options)
    train_examples, held_out = run.load_examples(options.data)
    cache, seconds = timed(run.extract, options, train_examples + held_out, teacher)
    console.print(f"{len(cache)} teacher signals in {options.signals_folder} ({seconds:.0f} s)")
    show_summary(run.train(options, teacher, {"extract": seconds}))
    show_report(options.folder)


@app.command(context_settings=PASS_ON)
def generate(context: typer.Context, config: ConfigFile = None):
    """Let a teacher write rationales, or check some from elsewhere. Goes on where a killed run stopped."""
    from mold.commands import stages

    options = parse_options(context.args, config, {}, "generate")
    show_counts(stages.generate(options), options.folder / stages.RATIONALES)


@app.command(context_settings=PASS_ON)
def keywords(context: typer.Context, config: ConfigFile = None):
    """Let a teacher name the key words of commonsense examples. Goes on where a killed run stopped."""
    from mold.commands import stages

    options = parse_options(context.args, config, {}, "keywords")
    show_counts(stages.keywords(options), options.folder / stages.RATIONALES)


@app.command(context_settings=PASS_ON)
def extract(context: typer.Context, config: ConfigFile = None):
    """Extract the teacher's stepwise attention of a data set into a cache. Goes on where a killed run stopped."""
    from mold.commands import train as run

    options = parse_options(context.args, config, {}, "extract")
    train_examples, held_out = run.load_examples(options.data)
    cache, seconds = timed(run.extract, options, train_examples + held_out)
    console.print(f"{len(cache)} teacher signals in {options.signals_folder} ({seconds:.0f} s)")


@app.command(context_settings=PASS_ON)
def train(context: typer.Context, config: ConfigFile = None):
    """Train a student, evaluate it before and after, write the report. Goes on where a killed run stopped."""
    from mold.commands import train as run

    options = parse_options(context.args, config, {}, "train")
    show_summary(run.train(options))
    show_report(options.folder)


@app.command("eval", context_settings=PASS_ON)
def evaluate(context: typer.Context, config: ConfigFile = None):
    """Evaluate a student on held-out examples with its losses, or compare models (eval_sets, lm_eval_tasks)."""
    from mold.commands import stages
    from mold.commands import train as run

    options = parse_options(context.args, config, {}, "eval")
    if options.evaluation.lm_eval_tasks:
        show_tasks(stages.ask_tasks(options))
        if not options.evaluation.eval_sets:
            return
    if options.evaluation.eval_sets:
        trained_on = run.read_data(options.data, require_rationale=False) if "dataset" in options.chosen else ()
        show_comparison(stages.compare(options, trained_on))
        console.print(f"predictions: {options.folder / 'predictions'}")
        return
    metrics = run.evaluate(options)
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    console.print(f"predictions: {options.folder / 'predictions_eval.jsonl'}")


@app.command(context_settings=PASS_ON)
def analyse(context: typer.Context, config: ConfigFile = None):
    """Attention to key words by step and layer, of any models on any data set with rationales, as a plot."""
    from mold.commands import stages

    options = parse_options(context.args, config, {}, "analyse")
    found = stages.analyse(options)
    table = Table("attention to key words, %", "beginning", "end", "evenly spread: beginning", "end", "examples")
    for name, entry in found.items():
        layers = [sum(layer[place] or 0 for layer in entry["mass"]) / len(entry["mass"]) for place in (0, -1)]
        shares = [f"{100 * value:.2f}" for value in (*layers, entry["even"][0], entry["even"][-1])]
        table.add_row(name, *shares, f"{entry['examples']} ({entry['without_key_words']} without key words)")
    console.print(table)
    console.print(str(options.folder / "analysis.svg"), soft_wrap=True)


@app.command("run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package (small, ...) or a YAML file.")],
    data_dir: Annotated[
        str, typer.Option("--data_dir", help="Folder of the data sets, {data_dir} in the recipe.")
    ] = "data",
    output_dir: Annotated[str | None, typer.Option("--output_dir", help="In place of the recipe's.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, such as train.learning_rate=1e-4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Check configuration, inputs and memory alone.")] = False,
):
    """Run all stages of a recipe, from data to the table of accuracies; what is done and still matches is skipped."""
    from mold.commands import recipe as recipes
    from mold.report.results import table as rows_of

    loaded = recipes.load_recipe(
        recipe, data_dir, [*(set_ or []), *([f"output_dir={output_dir}"] if output_dir else [])]
    )
    if dry_run:
        for line in recipes.dry_run(loaded):
            console.print(line, soft_wrap=True, highlight=False)
        return
    summary = recipes.run_recipe(loaded, lambda line: console.print(line, soft_wrap=True, highlight=False))
    heading, *rows = rows_of(summary)
    table = Table(*heading)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{loaded.output_dir}/results.md, results.json, results.svg")


@app.command(context_settings=PASS_ON)
def inspect(
    context: typer.Context,
    config: ConfigFile = None,
    example: Annotated[str, typer.Option(help="The example's id, or its place in the data set.")] = "0",
):
    """One example: its steps, key words and token spans, and the teacher's attention if a cache is given."""
    from mold.commands.inspect import describe

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
    from mold.commands.plan_table import describe_plan

    for part in describe_plan(parse_options(context.args, config, {}, "plan"), gpu, memory, lora_rank):
        console.print(part)


@app.command()
def info():
    """Versions, devices and backends, and why one is missing."""
    import torch

    from mold.commands import train as run
    from mold_kernels import cuda, native
    from mold_kernels.backends import available_backends
    from mold_kernels.tables import HEADER, backend_rows

    table = Table("what", "here")
    for name, version in run.versions().items():
        table.add_row(name, version)
    table.add_row("threads", str(torch.get_num_threads()))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none")
    for backend, module in (("native", native), ("cuda", cuda)):
        for name, value in (module.build_info() or {}).items():
            table.add_row(f"{backend}: {name}", value)
    reasons = available_backends()
    for name, reason in reasons.items():
        table.add_row(f"backend {name}", "available" if reason is None else f"missing: {reason}")
    console.print(table)
    for op, rows in itertools.groupby(backend_rows(), key=lambda row: row[0]):
        table = Table(*HEADER[1:], "here", title=op)
        table.columns[HEADER.index("options") - 1].min_width = len("key_padding_mask")
        for _, name, *cells in rows:
            table.add_row(name, *cells, "missing" if reasons[name] else "yes")
        console.print(table)


def parse_options(arguments: list[str], config: Path | None, defaults: dict, command: str):
    """Options from defaults, a YAML file and the command line, each winning over the one before."""
    from mold.commands.options import make_options, read_yaml

    chosen = defaults | (read_yaml(config, "--config") if config is not None else {})
    return make_options(chosen, arguments, command, f"--config: {config}")


def timed(function, *arguments):
    """A function's result and how many seconds it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def show_summary(summary: dict) -> None:
    """The table of a run, shown by one of its processes."""
    if not PartialState().is_main_process:
        return
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


def show_counts(counts: dict, path: Path) -> None:
    """The counts of a stage, and where its rows are."""
    table = Table("what", "count")
    for name, count in sorted(counts.items()):
        table.add_row(name, str(count))
    console.print(table)
    console.print(str(path), soft_wrap=True)


def show_comparison(results: list[dict]) -> None:
    """A row a model, a column a data set: accuracy in percent with its 95 % interval."""
    sets = list(dict.fromkeys(result["set"] for result in results))
    sizes = {result["set"]: result["total"] for result in results}
    table = Table("model", *(f"{name} ({sizes[name]})" for name in sets), title="accuracy, % (95 % interval)")
    for model in dict.fromkeys(result["model"] for result in results):
        cells = {result["set"]: result for result in results if result["model"] == model}
        table.add_row(
            model,
            *(
                "{:.1f} ({:.1f} to {:.1f})".format(*(100 * cells[s][k] for k in ("accuracy", "low", "high")))
                for s in sets
            ),
        )
    console.print(table)
    remarks = {
        "seen": "{} questions that the training data asks too",
        "no_answer": "{} without an answer",
        "not_judged": "not judged: {}",
        "truncated": "{} cut off at max_new_tokens",
    }
    for name, remark in remarks.items():
        for result in results:
            if result.get(name):
                console.print(f"{result['model']} on {result['set']}: {remark.format(result[name])}")


def show_tasks(results: list[dict]) -> None:
    """A row a task and metric, a column a model: the value with its standard error."""
    models = list(dict.fromkeys(result["model"] for result in results))
    table = Table("task", "metric", *models, title="lm-evaluation-harness (+- standard error)")
    for task, metric in dict.fromkeys((result["task"], result["metric"]) for result in results):
        cells = {r["model"]: r for r in results if (r["task"], r["metric"]) == (task, metric)}
        errors = {m: "" if cells[m]["stderr"] is None else f" +- {cells[m]['stderr']:.3f}" for m in models}
        table.add_row(task, metric, *(f"{cells[m]['value']:.3f}{errors[m]}" for m in models))
    console.print(table)


def show_report(folder: Path) -> None:
    """Write the report and say where it is, or why there is none."""
    from mold.report.page import write_report

    if not PartialState().is_main_process:
        return
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
