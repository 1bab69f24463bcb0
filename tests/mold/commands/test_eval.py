"""mold eval, with tiny random models."""

import json

import pytest

from mold.commands.eval import parse_set
from mold.data.examples import render
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from mold.evaluation.predictions import wilson_interval
from tests.mold.command_line import FAST, refusal
from tests.mold.conftest import rows_of, write_rows


def test_models_side_by_side_on_several_sets(mold, models, problems, tmp_path):
    other = [vars(p) | {"rationale": None} for p in generate_problems(3, seed=8)]
    write_rows(tmp_path / "other.jsonl", other)
    folder = tmp_path / "run"
    options = ["--models", models / "teacher", models / "student", "--output_dir", folder, "--dataset", problems, *FAST]
    status, out, _ = mold("eval", *options, "--eval_sets", f"in={problems}", tmp_path / "other.jsonl")
    assert status in (0, None)
    results = json.loads((folder / "comparison.json").read_text())
    assert [(r["model"], r["set"], r["total"], r["seen"]) for r in results] == [
        ("teacher", "in", 14, 14),
        ("teacher", "other", 3, 0),
        ("student", "in", 14, 14),
        ("student", "other", 3, 0),
    ]
    for result in results:
        rows = rows_of(folder / f"predictions/{result['model']}--{result['set']}.jsonl")
        assert len(rows) == result["total"]
        assert sum(row["correct"] for row in rows) == result["right"]
        assert (result["low"], result["high"]) == wilson_interval(result["right"], result["total"])
    text = " ".join(out.split())
    for piece in (
        "in (14 questions)",
        "other (3 questions)",
        "teacher on in: 14 questions that the training data asks too",
    ):
        assert piece in text
    # The same again generates nothing; a limit takes the first ones; another length is another evaluation.
    journals = {path: path.read_bytes() for path in folder.glob("predictions/*.journal")}
    assert len(journals) == 4
    assert mold("eval", *options, "--eval_sets", f"in={problems}", tmp_path / "other.jsonl")[0] in (0, None)
    assert {path: path.read_bytes() for path in folder.glob("predictions/*.journal")} == journals
    again = [*options, "--eval_sets", f"in={problems}"]
    assert "was written with max_new_tokens=6, this run has 7" in refusal(mold("eval", *again, "--max_new_tokens", "7"))
    assert mold("eval", *again, "--eval_limit", "2", "--output_dir", tmp_path / "two")[0] in (0, None)
    assert json.loads((tmp_path / "two/comparison.json").read_text())[0]["total"] == 2


def test_sets_and_models_that_cannot_be_compared(mold, models, problems, tmp_path):
    def fail(*options):
        return refusal(mold("eval", *options, "--output_dir", tmp_path / "run", *FAST))

    model = ("--models", models / "student")
    assert "dataset: none.jsonl does not exist" in fail(*model, "--eval_sets", "a=none.jsonl")
    assert "eval_sets: has the name 'a' twice" in fail(*model, "--eval_sets", f"a={problems}", f"a={problems}")
    assert "models: is not given" in fail("--eval_sets", f"a={problems}")
    twice = ("--models", models / "student", models / "student")
    assert "must name different ones" in fail(*twice, "--eval_sets", f"a={problems}")


def test_a_set_of_a_folders_split(mold, models, tmp_path):
    rows = [vars(p) for p in generate_problems(3, seed=1)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", rows[:1])
    options = ["--models", models / "student", "--eval_sets", f"{tmp_path}@test", "--output_dir", tmp_path / "run"]
    assert mold("eval", *options, *FAST)[0] in (0, None)
    (result,) = json.loads((tmp_path / "run/comparison.json").read_text())
    assert (result["set"], result["total"]) == (tmp_path.name, 1)
    prediction = rows_of(tmp_path / f"run/predictions/student--{tmp_path.name}.jsonl")[0]
    assert render(read_examples(tmp_path / "test.jsonl")[0][0]).text.startswith(f"Question: {prediction['question']}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=x/b.jsonl", ("a", "x/b.jsonl", None)),
        ("x/b.jsonl", ("b", "x/b.jsonl", None)),
        ("a=owner/name:main@test", ("a", "owner/name:main", "test")),
        ("x/y=z/b.jsonl", ("b", "x/y=z/b.jsonl", None)),
        ("a=x@y/b=c@dev", ("a", "x@y/b=c", "dev")),
        ("a=x@y/b.jsonl", ("a", "x@y/b.jsonl", None)),
    ],
)
def test_names_paths_and_splits_of_sets(text, expected):
    assert parse_set(text) == expected
