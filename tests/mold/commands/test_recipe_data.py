"""Which examples of a recipe are trained on, and which are asked."""

import re
from dataclasses import replace

import pytest

from mold.commands.recipe_data import collect, teacher_examples
from mold.data.examples import question_key
from tests.mold.command_line import load


def test_no_question_is_trained_on_and_tested(tiny):
    train, tests, remarks = collect(load(tiny))
    asked = {question_key(example.question) for test in tests.values() for example in test}
    assert (len(train), len(asked)) == (10, 9)
    assert not {question_key(example.question) for example in train} & asked
    assert "near, test: 6 rows, 6 kept" in remarks
    assert collect(load(tiny)) == (train, tests, remarks)
    # One file for both: split by question. The rest of the recipe does not matter.
    own = {"dataset": str(tiny.parent / "train.jsonl"), "train": 5, "test": 4}
    train, tests, _ = collect(replace(load(tiny), data={"own": own}))
    assert (len(train), len(tests["own"])) == (5, 4)
    own["train"] = 10
    with pytest.raises(ValueError, match=r"data\.own\.train is 10, must be from 1 to the 9 examples left, or all"):
        collect(replace(load(tiny), data={"own": own}))
    twice = {name: {"dataset": own["dataset"], "test": "all"} for name in ("a", "b")}
    far = {"far": {"dataset": str(tiny.parent / "far.jsonl"), "train": "all"}}
    assert "13 questions are in a and in b, tests both" in collect(replace(load(tiny), data=twice | far))[2]


def test_a_teacher_learns_no_test_question(tiny):
    recipe = load(tiny, "data.own.teacher=all", "teacher={}")
    _, tests, _ = collect(recipe)
    learned = teacher_examples(recipe, tests)
    asked = {question_key(example.question) for test in tests.values() for example in test}
    assert len(learned) == 10
    assert not {question_key(example.question) for example in learned} & asked
    with pytest.raises(ValueError, match="must have a source with teacher"):
        teacher_examples(load(tiny), tests)


def test_a_source_may_be_generated(tiny):
    source = {
        "dataset": "generated",
        "rationale_form": "equations",
        "max_value": 100,
        "train": 20,
        "test": 30,
        "teacher": 5,
    }
    recipe = replace(load(tiny), data={"made": source})
    train, tests, _ = collect(recipe)
    assert (len(train), len(tests["made"]), len(teacher_examples(recipe, tests))) == (20, 30, 5)
    asked = {question_key(example.question) for example in tests["made"]}
    assert len(asked) == 30
    assert not {question_key(example.question) for example in train} & asked
    numbers = [int(n) for e in [*train, *tests["made"]] for n in re.findall(r"\d+", e.question)]
    assert max(numbers) <= 100
    assert all("=" in line for example in train for line in example.rationale.split("\n"))
    assert collect(recipe)[:2] == (train, tests)
    with pytest.raises(ValueError, match=r"data\.made\.test is 'all', must be a number of generated problems"):
        collect(replace(recipe, data={"made": source | {"test": "all"}}))
