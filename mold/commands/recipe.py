"""mold run: a recipe's stages from a bare data set to the table of accuracies.

A stage writes into a folder named by a digest of everything that decides its result: options, and what the stages
before it wrote. So a finished stage is skipped as long as it still matches, and a changed option leaves what was there
alone. A killed stage is started again in its folder and goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from mold.commands import stages, train
from mold.commands.options import make_options, read_yaml
from mold.commands.plan_table import setup_of, student_config
from mold.data.examples import Example, question_key, without_questions_of
from mold.data.readers import ReadReport, is_hub_name, read_examples
from mold.evaluation.comparison import Run, read_run, summarise
from mold.files import write_atomically, write_jsonl
from mold.models import load_config
from mold.plan import GIB, inference_peak, plan_step
from mold.report import plots
from mold.report.page import write_report
from mold.report.results import markdown

logger = logging.get_logger(__name__)

# A recipe that is based on another adds to these of its, and replaces everything else.
_MERGED = ("options", "train", "shapes")
_SOURCE_KEYS = (
    "dataset",
    "format",
    "rationales",
    "rationale_form",
    "train",
    "train_split",
    "test",
    "test_split",
    "teacher",
)
DONE = "done.json"


@dataclass(frozen=True)
class Recipe:
    """What to run.

    data: by name, where it comes from (dataset, format, rationales, rationale_form, train_split, test_split) and how
        many examples to take (train, test: a number or "all"); a question of a test set is never trained on.
    options: of every stage. generate, keywords, teacher: more options of these stages, which are left out where None.
        teacher trains the attention's teacher, on as many examples of each source as its key teacher says. train: more
        options of training.
    variants: by name, what a training changes. sweep: by option, values that a training changes it to;
        single_layer takes pairs of a teacher's and a student's layer, or "all".
    train_sizes: numbers of training examples that every variant is trained with; None: with all of them.
    seeds: of the trainings of every variant.
    baseline: the variant that the others are compared with; None: no comparison.
    memory_gib: of the device, which a dry run checks against. shapes: configurations for that, by model name, where
        the models' own are not at hand.
    """

    output_dir: str
    data: dict
    options: dict
    generate: dict | None = None
    keywords: dict | None = None
    teacher: dict | None = None
    train: dict = field(default_factory=dict)
    variants: dict = field(default_factory=lambda: {"mixture": {}})
    sweep: dict = field(default_factory=dict)
    train_sizes: list | None = None
    seeds: list = field(default_factory=lambda: [0])
    baseline: str | None = None
    memory_gib: float | None = None
    shapes: dict = field(default_factory=dict)

    def trainings(self) -> dict[str, dict]:
        """What each variant and each value of the sweep changes, by name."""
        swept = {}
        for key, values in self.sweep.items():
            for value in self._every_pair() if (key, values) == ("single_layer", "all") else values:
                if key == "single_layer":
                    teacher, student = value
                    change = {"method": key, "mol_teacher_layer": teacher, "mol_student_layer": student}
                    swept[f"{key}={teacher},{student}"] = change
                else:
                    swept[f"{key}={value}"] = {key: value}
        return {name: dict(values or {}) for name, values in self.variants.items()} | swept

    def sizes(self) -> list[int | None]:
        """Of the training sets, None for the whole one."""
        return self.train_sizes or [None]

    def config(self, name: str, *, revision: str | None = None) -> PretrainedConfig:
        """A model's configuration: of its shape here, or its own.

        Raises:
            ValueError: it is not at hand and not in shapes.
        """
        if name in self.shapes:
            return AutoConfig.for_model(**self.shapes[name])
        return load_config(name, revision=revision)

    def _every_pair(self) -> Iterator[tuple[int, int]]:
        options = make_options({**self.options, "output_dir": self.output_dir}, [], "run", "recipe: options")
        configs = self.config(options.teacher.teacher_model_name_or_path), student_config(options, self.config)
        return itertools.product(*(range(config.num_hidden_layers) for config in configs))


def load_recipe(name: str, data_dir: str = "data", changes: Sequence[str] = ()) -> Recipe:
    """A recipe of the package or of a YAML file.

    Args:
        name: of the recipe or file.
        data_dir: stands for {data_dir} in it.
        changes: "KEY=VALUE" with a dotted key and a value in YAML, such as "train.num_train_epochs=1".

    Raises:
        ValueError: there is no such recipe, or it holds something else than a recipe; names the key.
    """
    values = _read_recipe(name)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set: is {change!r}, must be KEY=VALUE")
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set: {key} goes through {part!r}, which holds no keys")
        place[last] = yaml.safe_load(value)
    known = [f.name for f in fields(Recipe)]
    for key in values:
        if key not in known:
            raise ValueError(f"recipe: {name} has the unknown key {key!r}, must be of {', '.join(known)}")
    for key in ("output_dir", "data", "options"):
        if not values.get(key):
            raise ValueError(f"recipe: {name} has no {key}")
    for source, settings in values["data"].items():
        if unknown := sorted(settings.keys() - set(_SOURCE_KEYS)):
            raise ValueError(
                f"recipe: data.{source} has the unknown key {unknown[0]!r}, must be of {', '.join(_SOURCE_KEYS)}"
            )
        for key in ("dataset", "rationales"):
            if settings.get(key):
                settings[key] = settings[key].replace("{data_dir}", data_dir)
    return Recipe(**values)


def _read_recipe(name: str) -> dict:
    packaged = importlib.resources.files("mold") / "recipes"
    names = sorted(entry.name.removesuffix(".yaml") for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
    path = Path(str(packaged / f"{name}.yaml")) if name in names else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe: is {name!r}, must be one of {', '.join(names)}, or a YAML file")
    values = read_yaml(path, "recipe")
    if (base := values.pop("base", None)) is None:
        return values
    below = _read_recipe(base)
    merged = {key: {**below.get(key, {}), **values.get(key, {})} for key in _MERGED if key in below or key in values}
    return {**below, **values, **merged}


# --- data ---


def collect(recipe: Recipe) -> tuple[list[Example], dict[str, list[Example]], list[str]]:
    """Training examples, test sets by name, and remarks about what was left out.

    The same for the same recipe: which examples are taken is decided by a fixed seed. Without a generate stage every
    training example has a rationale.
    """
    tests, pools, remarks = {}, {}, []
    for name, source in recipe.data.items():
        for part, require in (("test", False), ("train", recipe.generate is None)):
            if not source.get(part):
                continue
            examples, report = _read(source, part, require)
            remarks.append(f"{name}, {part}: {report}")
            if part == "test":
                tests[name] = examples[: _number(name, part, source[part], len(examples))]
            else:
                pools[name] = examples
    asked = [example for examples in tests.values() for example in examples]
    train: dict[str, Example] = {}
    for name, pool in pools.items():
        kept = without_questions_of(pool, asked)
        if len(kept) < len(pool):
            remarks.append(f"{name}, train: {len(pool) - len(kept)} whose question a test set asks are left out")
        for example in kept[: _number(name, "train", recipe.data[name]["train"], len(kept))]:
            values = vars(example) | {"id": f"{name}-{example.id}"}
            train.setdefault(values["id"], Example(**values))
    if not train or not tests:
        raise ValueError("recipe: data must have a source with train and one with test")
    _remark_overlaps(tests, remarks)
    return list(train.values()), tests, remarks


def teacher_examples(recipe: Recipe, tests: Mapping[str, list[Example]]) -> list[Example]:
    """What the attention's teacher is trained on; no question of a test set.

    Raises:
        ValueError: no source has the key teacher.
    """
    asked = [example for examples in tests.values() for example in examples]
    found = []
    for name, source in recipe.data.items():
        if source.get("teacher"):
            pool = without_questions_of(_read(source, "train", True)[0], asked)
            taken = pool[: _number(name, "teacher", source["teacher"], len(pool))]
            found += [Example(**vars(example) | {"id": f"{name}-{example.id}"}) for example in taken]
    if not found:
        raise ValueError("recipe: data must have a source with teacher, how many of its examples the teacher learns")
    return found


def _read(source: Mapping, part: str, require_rationale: bool) -> tuple[list[Example], ReadReport]:
    """The examples of a source's train or test part, shuffled by a fixed seed."""
    examples, report = read_examples(
        source["dataset"],
        source.get("format", "auto"),
        split=source.get(f"{part}_split"),
        rationales=source.get("rationales"),
        rationale_form=source.get("rationale_form", "text"),
        require_rationale=require_rationale,
    )
    random.Random(0).shuffle(examples)
    return examples, report


def _number(name: str, part: str, wanted: int | str, there: int) -> int:
    if wanted == "all":
        return there
    if not isinstance(wanted, int) or not 0 < wanted <= there:
        raise ValueError(
            f"recipe: data.{name}.{part} is {wanted!r}, must be from 1 to the {there} examples left, or all"
        )
    return wanted


def _remark_overlaps(tests: Mapping[str, list[Example]], remarks: list[str]) -> None:
    keys = {name: {question_key(example.question) for example in examples} for name, examples in tests.items()}
    names = list(keys)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            if both := len(keys[first] & keys[second]):
                remarks.append(f"{both} questions are in {first} and in {second}, tests both")


# --- stages ---


def run_recipe(recipe: Recipe, say: Callable[[str], None] = print) -> dict:
    """Run what is not done yet; writes results.json, results.md and pictures into the recipe's folder.

    They are written anew after every training, of what there is by then.

    Args:
        recipe: what to run.
        say: is told of every stage.

    Returns:
        As results.json, see `mold.evaluation.comparison.summarise`.
    """
    _check_baseline(recipe)
    root = Path(recipe.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    examples, tests, remarks = collect(recipe)
    for remark in remarks:
        say(f"data: {remark}")
    data = root / f"data-{_digest([vars(e) for e in examples], {k: [vars(e) for e in v] for k, v in tests.items()})}"
    data.mkdir(exist_ok=True)
    write_jsonl(data / "train.jsonl", [_row(example) for example in examples])
    for name, test in tests.items():
        write_jsonl(data / f"{name}.jsonl", [_row(example) for example in test])
    sets = [f"{name}={data / f'{name}.jsonl'}" for name in tests]
    train_file = data / "train.jsonl"
    done = _Stages(root, say)
    for stage, function in (("generate", stages.generate), ("keywords", stages.keywords)):
        if (more := getattr(recipe, stage)) is not None:
            values = {**recipe.options, **more, "dataset": str(train_file)}
            folder = done.run(stage, values, [_bytes_digest(train_file)], function, ("dataset",))
            train_file = folder / stages.RATIONALES
    content = _bytes_digest(train_file)
    taught = {}
    if recipe.teacher is not None:
        write_jsonl(data / "teacher.jsonl", [_row(example) for example in teacher_examples(recipe, tests)])
        values = {**recipe.options, **recipe.teacher, "dataset": str(data / "teacher.jsonl")}
        folder = done.run("teacher", values, [_bytes_digest(data / "teacher.jsonl")], _train, ("dataset",))
        taught = {"teacher_model_name_or_path": str(folder)}
    runs: list[Run] = []
    # Seed by seed, so that a whole table stands after the first one.
    for seed, size, (variant, change) in itertools.product(recipe.seeds, recipe.sizes(), recipe.trainings().items()):
        common = {**recipe.options, **taught, **recipe.train, **change, "dataset": str(train_file)}
        if size is not None:
            common["num_train"] = size
        # A smaller training set is a part of the larger one: one extraction is for all sizes.
        values = {key: value for key, value in common.items() if size is None or key != "num_train"}
        signals = done.run("extract", values, [content], _extract, ("dataset",), decides=_SIGNAL_OPTIONS)
        common["signals_dir"] = str(signals / "signals")
        label = "".join(c if c.isalnum() or c in "=.-" else "-" for c in variant) + (f"-{size}" if size else "")
        values, inputs = {**common, "seed": seed}, [content, signals.name]
        student = done.run(f"train-{label}-seed{seed}", values, inputs, _train, ("dataset", "signals_dir"))
        values = {**recipe.options, **change, "models": [str(student)], "eval_sets": sets}
        inputs = [data.name, student.name]
        evaluated = done.run(f"eval-{label}-seed{seed}", values, inputs, stages.compare, ("models", "eval_sets"))
        runs.append(read_run(student, evaluated, variant, size, seed))
        summary = summarise(runs, recipe.baseline)
        _write_results(root, summary, say)
    return summary


def _write_results(root: Path, summary: dict, say: Callable[[str], None]) -> None:
    write_atomically(root / "results.json", json.dumps(summary, indent=1).encode())
    write_atomically(root / "results.md", markdown(summary).encode())
    figures = {"results": (plots.variant_accuracies, summary["variants"])}
    if summary["comparisons"]:
        figures["differences"] = plots.variant_differences, summary["comparisons"]
    if any(entry["size"] is not None for entry in summary["variants"].values()):
        figures["sizes"] = plots.accuracy_by_size, summary["variants"]
    for name, (draw, of) in figures.items():
        try:
            write_atomically(root / f"{name}.svg", plots.figure_to_svg(draw(of)).encode())
        except ImportError as error:
            say(f"{name}.svg: not drawn ({error})")


# Of the options, what the teacher's signals depend on (besides the examples).
_SIGNAL_OPTIONS = (
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_dtype", "row_reduction", "template"),
    *("max_length", "num_eval", "num_train", "split_seed"),
)


class _Stages:
    def __init__(self, root: Path, say: Callable[[str], None]):
        self.root, self.say, self.told = root, say, set()

    def run(
        self,
        name: str,
        values: dict,
        inputs: list[str],
        function: Callable,
        places: Sequence[str],
        decides: Sequence[str] | None = None,
    ) -> Path:
        """The folder of a finished stage.

        Args:
            name: of the stage.
            values: its options.
            inputs: digests of what it reads.
            function: called with the stage's options where it is not done.
            places: options that say where inputs lie: `inputs` stands for them.
            decides: the options that its result depends on; None: all but the places.
        """
        chosen = values.keys() - set(places) if decides is None else values.keys() & set(decides)
        folder = self.root / f"{name}-{_digest({key: values[key] for key in sorted(chosen)}, inputs)}"
        done = folder / DONE
        if done.is_file() and json.loads(done.read_text())["files"].items() <= _files(folder).items():
            if folder not in self.told:
                self.say(f"{name}: is there ({folder.name})")
            self.told.add(folder)
            return folder
        self.told.add(folder)
        self.say(f"{name}: {folder.name}")
        options = make_options({**values, "output_dir": str(folder)}, [], "run", f"recipe: {name}")
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        function(options)
        note = {"seconds": time.perf_counter() - start, "files": _files(folder)}
        write_atomically(done, json.dumps(note, indent=1).encode())
        return folder


def _files(folder: Path) -> dict[str, int]:
    """The sizes of a stage's files by name: those that are noted must be there for it to be done."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != DONE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _extract(options: train.Options) -> None:
    examples, held_out = train.load_examples(options.data)
    train.extract(options, examples + held_out)


def _train(options: train.Options) -> None:
    train.train(options)
    try:
        write_report(options.folder)
    except ImportError as error:
        logger.warning(f"{options.folder}: no report ({error})")


# --- dry run ---


def dry_run(recipe: Recipe) -> Iterator[str]:
    """Check every stage's configuration, inputs and memory without loading weights; yields what was found.

    Raises:
        ValueError: something is wrong: an unknown option, a missing file, more memory than `memory_gib`.
    """
    _check_baseline(recipe)
    remote = sorted({source["dataset"] for source in recipe.data.values() if is_hub_name(source["dataset"])})
    local = {name: source for name, source in recipe.data.items() if source["dataset"] not in remote}
    for name, source in local.items():
        for part in ("train", "test"):
            if source.get(part):
                examples, report = _read(source, part, part == "train" and recipe.generate is None)
                wanted = _number(name, part, source[part], len(examples))
                yield f"data {name}, {part}: {wanted} of {report}"
    for name in remote:
        yield f"data {name}: on the hub, not checked"
    # A recipe for a GPU can be checked without one.
    common = {**recipe.options, "output_dir": recipe.output_dir, "use_cpu": not torch.cuda.is_available()}
    for stage in ("generate", "keywords"):
        if (more := getattr(recipe, stage)) is not None:
            values = {**common, **more}
            options = make_options(values, [], "run", f"recipe: {stage}")
            stages.check_prompting(options)
            yield f"{stage}: by {options.teacher.teacher_model_name_or_path}"
            yield from _check_memory(recipe, options, stage, options.student.generate_batch_size)
    if recipe.teacher is not None:
        options = make_options({**common, **recipe.teacher}, [], "run", "recipe: teacher")
        yield from _check_memory(recipe, options, "teacher", options.training.per_device_train_batch_size)
        common["teacher_model_name_or_path"] = options.student.model_name_or_path
    values = {**common, **recipe.train}
    options = make_options(values, [], "run", "recipe: train")
    yield from _check_memory(recipe, options, "extract", options.teacher.extract_batch_size)
    yield from _check_memory(recipe, options, "train", options.training.per_device_train_batch_size)
    for name, change in recipe.trainings().items():
        options = make_options({**values, **change}, [], "run", f"recipe: {name}")
        sizes = "" if recipe.train_sizes is None else f" of {', '.join(map(str, recipe.train_sizes))} examples"
        steps = options.training.max_steps
        length = f"{steps} steps" if steps > 0 else f"{options.training.num_train_epochs:g} epochs"
        yield f"train {name}{sizes}: {len(recipe.seeds)} seeds, {length}"


def _check_baseline(recipe: Recipe) -> None:
    if recipe.baseline is not None and recipe.baseline not in (names := recipe.trainings()):
        raise ValueError(f"recipe: baseline is {recipe.baseline!r}, must be one of {', '.join(names)}")


def _check_memory(recipe: Recipe, options: train.Options, stage: str, batch: int) -> Iterator[str]:
    length, training = options.training.max_length, stage in ("train", "teacher")
    try:
        if training:
            planned = plan_step(student_config(options, recipe.config), setup_of(options))
            needed = planned.weights + planned.optimizer + planned.step
        else:
            config = recipe.config(options.teacher.teacher_model_name_or_path)
            needed = inference_peak(config, options.teacher.teacher_dtype, batch, length, cache=stage != "extract")
    except ValueError as error:
        yield f"{stage}: memory not checked ({error})"
        return
    yield f"{stage}: {needed / GIB:.1f} GiB at most, {batch} x {length} tokens"
    if recipe.memory_gib is not None and needed > recipe.memory_gib * GIB:
        raise ValueError(f"{stage}: needs {needed / GIB:.1f} GiB of memory, memory_gib is {recipe.memory_gib}")


def _row(example: Example) -> dict:
    row = vars(example)
    return row if example.keywords is not None else {k: v for k, v in row.items() if k != "keywords"}


def _digest(*values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _bytes_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
