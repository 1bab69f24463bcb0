"""mold run: a recipe's stages from a bare data set to the table of accuracies.

A stage writes into a folder named by a digest of everything that decides its result: options, and what the stages
before it wrote. So a finished stage is skipped as long as it still matches, and a changed option leaves what was there
alone. A killed stage is started again in its folder and goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import get_console
from rich.table import Table
from transformers.utils import logging

from mold.commands import eval as evaluation
from mold.commands import extract, generate, keywords, train
from mold.commands.dry_run import dry_run
from mold.commands.options import Options
from mold.commands.parsing import Parser, make_options
from mold.commands.progress import say
from mold.commands.recipe import Recipe, load_recipe
from mold.commands.recipe_data import collect, row_of, teacher_examples
from mold.data.segmentation import SegmentOptions
from mold.evaluation.comparison import Run, read_run, summarise
from mold.files import LOCK, check_writable, digest, file_digest, read_json, write_atomically, write_jsonl
from mold.processes import require_one_process
from mold.report import drawing, plots
from mold.report.page import write_comparison, write_report
from mold.report.results import findings, markdown, table

logger = logging.get_logger(__name__)

DONE = "done.json"
USAGE = "RECIPE [options]"


def _parser(recipe: str | None) -> Parser:
    parser = Parser(usage=f"mold {recipe or 'run RECIPE'} [options]")
    add = parser.add_argument
    if recipe is None:
        add("recipe", metavar="RECIPE", nargs="?", default="", help="A recipe of the package or a YAML file.")
    add("--data_dir", default="data", help="Folder of the data sets, {data_dir} in the recipe.")
    add("--output_dir", help="In place of the recipe's.")
    add("--set", action="append", default=[], help="KEY=VALUE, such as train.learning_rate=1e-4; may be repeated.")
    add("--dry_run", action="store_true", help="Check configuration, inputs and memory alone.")
    return parser


def help_text(recipe: str | None = None) -> str:
    """The options, as `mold run --help` prints them, or the command that always runs one recipe."""
    return _parser(recipe).format_help().partition("\n\n")[2].rstrip()


def main(arguments: Sequence[str]) -> None:
    """Run, or check alone, and show the table."""
    run(arguments)


def run(arguments: Sequence[str], recipe: str | None = None) -> None:
    """As `main`, of a recipe that the first argument names, or of this one.

    Args:
        arguments: of the command line.
        recipe: of a command of its own.
    """
    require_one_process(f"mold {recipe or 'run'}")
    chosen = _parser(recipe).parse_args(arguments)
    changes = [*chosen.set, *([f"output_dir={chosen.output_dir}"] if chosen.output_dir else [])]
    loaded = load_recipe(recipe or chosen.recipe, chosen.data_dir, changes)

    def show(line: str) -> None:
        get_console().print(line, soft_wrap=True, highlight=False, markup=False)

    if chosen.dry_run:
        for line in dry_run(loaded):
            show(line)
        return
    summary = run_recipe(loaded, say)
    heading, *rows = table(summary)
    shown = Table(*heading)
    for row in rows:
        shown.add_row(*row)
    get_console().print(shown)
    for finding in findings(summary):
        show(finding)
    show(f"report: {loaded.output_dir}/report.html; tables: results.md, results.json")


def run_recipe(recipe: Recipe, say: Callable[[str], None] = print) -> dict:
    """Run what is not done yet; writes results.json, results.md and pictures into the recipe's folder.

    They are written anew after every training, of what there is by then.

    Args:
        recipe: what to run.
        say: is told of every stage.

    Returns:
        As results.json, see `mold.evaluation.comparison.summarise`.
    """
    recipe.check_baseline()
    root = Path(recipe.output_dir)
    check_writable(root, "output_dir")
    root.mkdir(parents=True, exist_ok=True)
    examples, tests, remarks = collect(recipe)
    for remark in remarks:
        say(f"data: {remark}")
    data = root / f"data-{_short([vars(e) for e in examples], {k: [vars(e) for e in v] for k, v in tests.items()})}"
    data.mkdir(exist_ok=True)
    write_jsonl(data / "train.jsonl", [row_of(example) for example in examples])
    for name, test in tests.items():
        write_jsonl(data / f"{name}.jsonl", [row_of(example) for example in test])
    sets = [f"{name}={data / f'{name}.jsonl'}" for name in tests]
    train_file = data / "train.jsonl"
    stages = _Stages(root, say)
    for stage, function in (("generate", generate.generate), ("keywords", keywords.keywords)):
        if (more := getattr(recipe, stage)) is not None:
            values = recipe.values(stage, more) | {"dataset": str(train_file)}
            folder = stages.run(stage, stage, values, [file_digest(train_file)], function, ("dataset",))
            train_file = folder / generate.RATIONALES
    content = file_digest(train_file)
    taught = {}
    if recipe.teacher is not None:
        learned = data / "teacher" / "train.jsonl"  # in a folder of its own: a test set may be called teacher
        learned.parent.mkdir(exist_ok=True)
        write_jsonl(learned, [row_of(example) for example in teacher_examples(recipe, tests)])
        values = recipe.values("train", recipe.teacher) | {"dataset": str(learned)}
        folder = stages.run("teacher", "train", values, [file_digest(learned)], _train, ("dataset",))
        taught = {"teacher_model_name_or_path": str(folder)}
    runs: list[Run] = []
    trainings: list[tuple[str, str | None]] = []
    # Seed by seed, so that a whole table stands after the first one.
    for seed, size, (variant, change) in itertools.product(recipe.seeds, recipe.sizes(), recipe.trainings().items()):
        common = {**taught, **recipe.train, **change}
        values = recipe.values("extract", common) | {"dataset": str(train_file)}
        if size is not None:
            # A smaller training set is a part of the larger one: one extraction is for all sizes.
            values.pop("num_train", None)
            common["num_train"] = size
        decides = _SIGNAL_OPTIONS + (_MIXTURE_OPTIONS if values.get("signal_layers") == "mixture" else ())
        signals = stages.run("extract", "extract", values, [content], _extract, ("dataset",), decides)
        label = "".join(c if c.isalnum() or c in "=.-" else "-" for c in variant) + (f"-{size}" if size else "")
        values = recipe.values("train", common) | {"dataset": str(train_file), "seed": seed}
        values["signals_dir"] = str(signals / "signals")
        called, inputs = f"train-{label}-seed{seed}", [content, signals.name]
        student = stages.run(called, "train", values, inputs, _train, ("dataset", "signals_dir"))
        values = recipe.values("eval", common) | {"models": [str(student)], "eval_sets": sets}
        called, inputs = f"eval-{label}-seed{seed}", [data.name, student.name]
        judged = stages.run(called, "eval", values, inputs, evaluation.compare, ("models", "eval_sets"))
        runs.append(read_run(student, judged, variant, size, seed))
        report = student / "report.html"
        trainings.append((f"{runs[-1].name}, seed {seed}", str(report.relative_to(root)) if report.is_file() else None))
        summary = summarise(runs, recipe.baseline)
        _write_results(root, summary, trainings, say)
    return summary


def _write_results(
    root: Path, summary: dict, trainings: Sequence[tuple[str, str | None]], say: Callable[[str], None]
) -> None:
    write_atomically(root / "results.json", json.dumps(summary, indent=1).encode())
    write_atomically(root / "results.md", markdown(summary).encode())
    try:
        for name, figure in plots.comparison_figures(summary).items():
            write_atomically(root / f"{name}.svg", drawing.figure_to_svg(figure, "white").encode())
        write_comparison(root, summary, trainings)
    except ImportError as error:
        say(f"pictures and report: not drawn ({error})")


# Of the options, what the teacher's signals depend on (besides the examples).
_SIGNAL_OPTIONS = (
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_dtype", "row_reduction", "template"),
    *(*SegmentOptions.__dataclass_fields__, "max_length", "num_eval", "num_train", "split_seed"),
    *("signal_layers", "signal_dtype"),
)
_MIXTURE_OPTIONS = ("tau_1", "mol_teacher_layers_left_out")


class _Stages:
    def __init__(self, root: Path, say: Callable[[str], None]):
        self.root, self.say = root, say
        self.told: set[Path] = set()

    def run(
        self,
        name: str,
        command: str,
        values: dict,
        inputs: list[str],
        function: Callable[[Options], object],
        places: Sequence[str],
        decides: Sequence[str] | None = None,
    ) -> Path:
        """The folder of a finished stage.

        Args:
            name: of the stage.
            command: whose options it takes.
            values: its options.
            inputs: digests of what it reads.
            function: called with the stage's options where it is not done.
            places: options that say where inputs lie: `inputs` stands for them.
            decides: the options that its result depends on; None: all but the places.
        """
        chosen = values.keys() - set(places) if decides is None else values.keys() & set(decides)
        folder = self.root / f"{name}-{_short({key: values[key] for key in sorted(chosen)}, inputs)}"
        if folder in self.told:
            return folder
        self.told.add(folder)
        changed = _changed(folder)
        if changed is not None and not changed:
            self.say(f"{name}: is there ({folder.name})")
            return folder
        self.say(f"{name}: {folder.name}" + (f" ({changed[0]} is not as it was written)" if changed else ""))
        options = make_options(command, {**values, "output_dir": str(folder)}, source=f"recipe: {name}")
        for place in {Path(file).parts[0] for file in changed or ()}:  # or what it holds would be gone on with
            if (folder / place).is_dir():  # whose files know of each other
                shutil.rmtree(folder / place)
            else:
                (folder / place).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        function(options)
        note = {"seconds": time.perf_counter() - start, "files": _files(folder)}
        write_atomically(folder / DONE, json.dumps(note, indent=1).encode())
        return folder


def _changed(folder: Path) -> list[str] | None:
    """The files of a finished stage that are gone or other ones by now; None: the stage is not finished."""
    done = folder / DONE
    if not done.is_file():
        return None
    try:
        noted = dict(read_json(done)["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{done}: is not as mold run wrote it ({reason}); delete it to run the stage again") from error
    there = _files(folder)
    return sorted(name for name, found in noted.items() if there.get(name) != found)


def _files(folder: Path) -> dict[str, str]:
    """Hashes of a stage's files by name. Checkpoints may go when the training is done."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name not in (DONE, LOCK))
    return {str(path): file_digest(folder / path) for path in files if not path.parts[0].startswith("checkpoint-")}


def _extract(options: Options) -> None:
    extract.extract(options, extract.examples_of(options.data))


def _train(options: Options) -> None:
    train.train(options)
    try:
        write_report(options.folder)
    except ImportError as error:
        logger.warning(f"{options.folder}: no report ({error})")


def _short(*values) -> str:
    return digest(*values)[:10]
