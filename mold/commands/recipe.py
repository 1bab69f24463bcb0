"""Recipes: what `mold run` runs, as a file says it."""

from __future__ import annotations

import importlib.resources
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from mold.commands.inputs import student_config
from mold.commands.parsing import check_known, make_options, parse_yaml, pick, read_yaml
from mold.models import load_config

# A recipe that is based on another adds to these of its, and replaces everything else.
_MERGED = ("options", "train", "shapes")
_SOURCE_TEXTS = ("dataset", "format", "rationales", "rationale_form", "train_split", "test_split")
_SOURCE_KEYS = (*_SOURCE_TEXTS, "train", "test", "teacher", "max_value")
# What mold run sets itself, or takes from the sources.
_NOT_OPTIONS = (
    *("dataset", "dataset_format", "dataset_split", "rationales", "rationale_form", "max_value"),
    *("output_dir", "signals_dir", "models", "eval_sets"),
    *("lm_eval_tasks", "lm_eval_include_path", "lm_eval_shots"),
)
_FORM = {
    "output_dir": str,
    "data": dict,
    "options": dict,
    "generate": dict | None,
    "keywords": dict | None,
    "teacher": dict | None,
    "train": dict,
    "variants": dict,
    "sweep": dict,
    "train_sizes": list | None,
    "seeds": list,
    "baseline": str | None,
    "memory_gib": float | int | None,
    "shapes": dict,
}
_WORDS = {str: "a text", dict: "keys with values", list: "a list", float | int | None: "a number"}
_WORDS |= {dict | None: _WORDS[dict], list | None: _WORDS[list], str | None: _WORDS[str]}
TRAINING = ("extract", "train", "eval")
"""The commands that make and judge a student."""


@dataclass(frozen=True)
class Recipe:
    """What to run.

    data: by name, where it comes from (dataset, format, rationales, rationale_form, train_split, test_split; max_value
        of generated problems) and how many examples to take (train, test: a number or "all"); a question of a test set
        is never trained on.
    options: of every stage that takes them. generate, keywords, teacher: more options of these stages, which are left
        out where None. teacher trains the attention's teacher, on as many examples of each source as its key teacher
        says. train: more options of training, and of the extraction and evaluation around it.
    variants: by name, what a training changes. sweep: by option, values that a training changes it to;
        single_layer takes pairs of a teacher's and a student's layer, or "all".
    train_sizes: numbers of training examples that every variant is trained with; None: with all of them.
    seeds: of the trainings of every variant.
    baseline: the variant that the others are compared with; None: no comparison.
    memory_gib: of the device, which a dry run checks against. shapes: configurations for that, by model name, where
        the models' own are not at hand.
    data_dir: stands for {data_dir} in the sources.
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
    data_dir: str = "data"

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

    def check_baseline(self) -> None:
        """Raise a ValueError unless the baseline is one of the trainings."""
        if self.baseline is not None and self.baseline not in (names := self.trainings()):
            raise ValueError(f"recipe: baseline is {self.baseline!r}, must be one of {', '.join(names)}")

    def values(self, command: str, *more: Mapping) -> dict:
        """The options of a stage: those common to all, and more, as far as its command takes them."""
        merged = dict(self.options)
        for values in more:
            merged |= values
        return pick(command, merged)

    def config(self, name: str, *, revision: str | None = None) -> PretrainedConfig:
        """A model's configuration: of its shape here, or its own.

        Raises:
            ValueError: it is not at hand and not in shapes.
        """
        if name in self.shapes:
            return AutoConfig.for_model(**self.shapes[name])
        return load_config(name, revision=revision)

    def place(self, text: str) -> str:
        """Where a source of the data lies.

        Raises:
            ValueError: it is below data_dir and not there, where it would be taken for a name on the hub.
        """
        place = text.replace("{data_dir}", self.data_dir)
        if place != text and not Path(place).exists():
            raise ValueError(f"dataset: {place} does not exist, must be below --data_dir ({self.data_dir})")
        return place

    def _every_pair(self) -> Iterator[tuple[int, int]]:
        values = self.values("train", {"dataset": "generated", "output_dir": self.output_dir})
        options = make_options("train", values, source="recipe: options")
        configs = self.config(options.teacher.teacher_model_name_or_path), student_config(options, self.config)
        teacher, student = (range(config.num_hidden_layers) for config in configs)
        return itertools.product(teacher, student)


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
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise ValueError(f"--set: {key} goes through {part!r}, which holds no keys")
        place[last] = parse_yaml(value, f"--set: {key}")
    _check(name, values)
    return Recipe(**values, data_dir=data_dir)


def _read_recipe(name: str, above: tuple[str, ...] = ()) -> dict:
    packaged = importlib.resources.files("mold") / "recipes"
    names = sorted(entry.name.removesuffix(".yaml") for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
    path = Path(str(packaged / f"{name}.yaml")) if name in names else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe: is {name!r}, must be one of {', '.join(names)}, or a YAML file")
    if name in above:
        raise ValueError(f"recipe: {name} has itself as its base")
    values = read_yaml(path, "recipe")
    if (base := values.pop("base", None)) is None:
        return values
    below = _read_recipe(str(base), (*above, name))
    for key in _MERGED:
        both = [found[key] for found in (below, values) if found.get(key) is not None]
        if both and all(isinstance(found, dict) for found in both):
            values[key] = {k: v for found in both for k, v in found.items()}
    return {**below, **values}


def _check(name: str, values: dict) -> None:
    """Raise a ValueError unless these are the keys and values of a recipe."""
    known = [f.name for f in fields(Recipe) if f.name in _FORM]
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"recipe: {name} has the unknown key {key!r}, must be of {', '.join(known)}")
        if not isinstance(value, _FORM[key]):
            raise ValueError(f"recipe: {key} is {value!r}, must be {_WORDS[_FORM[key]]}")
    for key in ("output_dir", "data", "options"):
        if not values.get(key):
            raise ValueError(f"recipe: {name} has no {key}")
    for source, settings in values["data"].items():
        _check_source(source, settings)
    _check_options(values)
    sizes = values.get("train_sizes") or []
    if len(set(map(str, sizes))) < len(sizes) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"recipe: train_sizes is {sizes!r}, must be different numbers of examples")
    seeds = values.get("seeds", [0])
    if not seeds or len(set(map(str, seeds))) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"recipe: seeds is {seeds!r}, must be different whole numbers")
    if not values.get("variants", True) and not values.get("sweep"):
        raise ValueError("recipe: variants is empty, must name at least one training (or sweep one)")


def _check_source(name: str, settings) -> None:
    # Test sets are handed on as NAME=PATH and written beside train.jsonl, which may not care for case.
    if not re.fullmatch(r"\w[\w. -]*", str(name)) or str(name).casefold() == "train":
        raise ValueError(f"recipe: data has a source named {name!r}, must be letters, digits, '_', '-', '.', not train")
    if not isinstance(settings, dict):
        raise ValueError(f"recipe: data.{name} is {settings!r}, must be keys with values")
    if unknown := [key for key in settings if key not in _SOURCE_KEYS]:
        raise ValueError(
            f"recipe: data.{name} has the unknown key {unknown[0]!r}, must be of {', '.join(_SOURCE_KEYS)}"
        )
    generated = settings.get("dataset") == "generated"
    for key in ("format", "rationales", "train_split", "test_split") if generated else ("max_value",):
        if key in settings:
            raise ValueError(
                f"recipe: data.{name}.{key} is given, must not be with dataset={settings.get('dataset')!r}"
            )
    for key in _SOURCE_TEXTS:
        value = settings.get(key)
        if not isinstance(value, str) and (value is not None or key == "dataset"):
            raise ValueError(f"recipe: data.{name}.{key} is {value!r}, must be a text")


def _check_options(values: Mapping) -> None:
    stages = [stage for stage in ("generate", "keywords") if values.get(stage) is not None]
    checked = [("options", values["options"], [*stages, *TRAINING]), ("train", values.get("train", {}), TRAINING)]
    checked += [(stage, values[stage], [stage]) for stage in stages]
    checked.append(("teacher", values.get("teacher") or {}, ["train"]))
    for name, change in values.get("variants", {}).items():
        if not isinstance(change, dict | None):
            raise ValueError(f"recipe: variants.{name} is {change!r}, must be options (key: value)")
        checked.append((name, change or {}, TRAINING))
    for key, swept in values.get("sweep", {}).items():
        if key == "single_layer":
            pairs = isinstance(swept, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in swept)
            if swept != "all" and not pairs:
                raise ValueError(f"recipe: sweep.single_layer is {swept!r}, must be pairs of layers, or all")
            continue
        if not isinstance(swept, list):
            raise ValueError(f"recipe: sweep.{key} is {swept!r}, must be a list of values")
        checked.append(("sweep", {key: None}, TRAINING))
    for name, options, commands in checked:
        check_known(f"recipe: {name}", options, commands)
        for key in options:
            if key in _NOT_OPTIONS or (key == "seed" and name not in ("generate", "teacher")):
                raise ValueError(f"recipe: {name}.{key}: is given, must not be: mold run sets it (data, seeds)")
