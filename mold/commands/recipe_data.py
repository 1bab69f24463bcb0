"""The data of a recipe: which examples are trained on and which are asked afterwards."""

from __future__ import annotations

import random
from collections.abc import Mapping

from mold.commands.recipe import Recipe
from mold.data.examples import Example, question_key, without_questions_of
from mold.data.problems import generate_problems
from mold.data.readers import ReadReport, read_examples


def collect(recipe: Recipe) -> tuple[list[Example], dict[str, list[Example]], list[str]]:
    """Training examples, test sets by name, and remarks about what was left out.

    The same for the same recipe: which examples are taken is decided by a fixed seed. Without a generate stage every
    training example has a rationale.
    """
    tests, pools, remarks = {}, {}, []
    for name, source in recipe.data.items():
        for part in ("test", "train"):
            if not source.get(part):
                continue
            examples, report = read_source(recipe, name, part, part == "train" and recipe.generate is None)
            remarks.append(f"{name}, {part}: {report}")
            if part == "test":
                tests[name] = examples[: number_of(name, part, source[part], len(examples))]
            else:
                pools[name] = examples
    asked = [example for examples in tests.values() for example in examples]
    train: dict[str, Example] = {}
    for name, pool in pools.items():
        kept = without_questions_of(pool, asked)
        if len(kept) < len(pool):
            remarks.append(f"{name}, train: {len(pool) - len(kept)} whose question a test set asks are left out")
        for example in kept[: number_of(name, "train", recipe.data[name]["train"], len(kept))]:
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
            pool = without_questions_of(read_source(recipe, name, "teacher", True)[0], asked)
            taken = pool[: number_of(name, "teacher", source["teacher"], len(pool))]
            found += [Example(**vars(example) | {"id": f"{name}-{example.id}"}) for example in taken]
    if not found:
        raise ValueError("recipe: data must have a source with teacher, how many of its examples the teacher learns")
    return found


def read_source(recipe: Recipe, name: str, part: str, require_rationale: bool) -> tuple[list[Example], ReadReport]:
    """The examples of a source's train, teacher or test part, shuffled by a fixed seed."""
    source = recipe.data[name]
    if source["dataset"] == "generated":
        return _generate(name, part, source)
    examples, report = read_examples(
        recipe.place(source["dataset"]),
        source.get("format", "auto"),
        split=source.get("test_split" if part == "test" else "train_split"),
        rationales=source.get("rationales") and recipe.place(source["rationales"]),
        rationale_form=source.get("rationale_form", "text"),
        require_rationale=require_rationale,
    )
    random.Random(0).shuffle(examples)
    return examples, report


_PART_SEEDS = {"train": 0, "test": 1, "teacher": 2}


def _generate(name: str, part: str, source: Mapping) -> tuple[list[Example], ReadReport]:
    """Twice as many problems as are wanted, as some may be asked by a test set; each part has a seed."""
    if type(wanted := source[part]) is not int or wanted < 1:
        raise ValueError(f"recipe: data.{name}.{part} is {wanted!r}, must be a number of generated problems")
    form, most = source.get("rationale_form", "text"), source.get("max_value")
    examples = generate_problems(2 * wanted, _PART_SEEDS[part], max_value=most, rationale_form=form)
    return examples, ReadReport(rows=len(examples), kept=len(examples))


def number_of(name: str, part: str, wanted: int | str, there: int) -> int:
    """How many examples to take: as many as wanted, or all that are there."""
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


def row_of(example: Example) -> dict:
    """The example as a row of a JSON-lines file."""
    left_out = [name for name, value in (("keywords", None), ("chat", False)) if getattr(example, name) is value]
    return {key: value for key, value in vars(example).items() if key not in left_out}
