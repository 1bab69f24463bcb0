"""mold generate, mold keywords and mold eval on data sets, with tiny random models: nonsense that must be counted."""

import json

import pytest

from mold.commands import stages
from mold.data.examples import render
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from mold.evaluation.predictions import wilson_interval
from tests.mold.commands.test_cli import refusal
from tests.mold.conftest import write_rows

FAST = ["--disable_tqdm", "true", "--max_new_tokens", "6", "--generate_batch_size", "4"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_teacher_that_writes_nonsense_gives_counts(mold, models, problems, tmp_path):
    folder = tmp_path / "run"
    options = ["--dataset", problems, "--teacher_model_name_or_path", models / "teacher", "--output_dir", folder, *FAST]
    status, out, _ = mold("generate", *options, "--num_shots", "1")
    assert status in (0, None)
    counts = json.loads((folder / "generate.json").read_text())
    assert counts["never right"] == 14
    assert sum(count for name, count in counts.items() if name.startswith("plain")) == 14
    assert sum(count for name, count in counts.items() if name.startswith("hint")) == 14
    assert "never right" in out
    rows = rows_of(folder / "rationales.jsonl")
    assert [row["id"] for row in rows] == [f"problem-6-{n}" for n in range(14)]
    with pytest.raises(ValueError, match=r"holds no usable example \(14 rows, 0 kept, 14 with a wrong rationale"):
        read_examples(folder / "rationales.jsonl")
    # The same again finds everything done; other settings are refused.
    journal = (folder / "journal.jsonl").read_bytes()
    assert mold("generate", *options, "--num_shots", "1")[0] in (0, None)
    assert (folder / "journal.jsonl").read_bytes() == journal
    assert "was written with prompt=" in refusal(mold("generate", *options))
    assert "num_tries: is 2 at temperature 0.0" in refusal(mold("generate", *options, "--num_tries", "2"))
    assert "chat: is 'on', but" in refusal(mold("generate", *options, "--chat", "on"))
    assert "prompt: is 'maths', must be one of" in refusal(mold("generate", *options, "--prompt", "maths"))


def test_rationales_from_elsewhere_are_checked_without_a_teacher(mold, tmp_path):
    problems = generate_problems(4, seed=6)
    write_rows(tmp_path / "questions.jsonl", [{**vars(p), "rationale": None} for p in problems])
    given = [{"id": p.id, "rationale": p.rationale} for p in problems[:2]]
    given += [{"id": problems[2].id, "rationale": "It is 0.5."}, {"question": "Who?", "rationale": "Nobody."}]
    write_rows(tmp_path / "given.jsonl", given)
    options = ["--dataset", tmp_path / "questions.jsonl", "--output_dir", tmp_path / "run"]
    status, _, _ = mold("generate", *options, "--rationales", tmp_path / "given.jsonl")
    assert status in (0, None)
    assert json.loads((tmp_path / "run/generate.json").read_text()) == {
        "given: right": 2,
        "given: with a wrong answer": 1,
        "given: of no question": 1,
        "right": 2,
        "never right": 2,
    }
    examples, _ = read_examples(tmp_path / "run/rationales.jsonl")
    assert [(e.id, e.rationale, e.answer) for e in examples] == [(p.id, p.rationale, p.answer) for p in problems[:2]]
    assert "teacher_model_name_or_path: is not given, must name the teacher" in refusal(mold("generate", *options))


def test_key_words_of_a_teacher(mold, models, tmp_path):
    rows = [
        {"question": f"Where does {name} stand?", "rationale": "By the door.", "answer": "A", "keywords": ["door"]}
        for name in ("Ada", "Ben", "Cora")
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    options = ["--dataset", tmp_path / "rows.jsonl", "--output_dir", folder, "--num_shots", "1", *FAST]
    assert "must name the attention's teacher" in refusal(mold("keywords", *options))
    status, out, _ = mold("keywords", *options, "--teacher_model_name_or_path", models / "teacher")
    assert status in (0, None)
    assert "examples that keep their own key words" in out
    assert json.loads((folder / "keywords.json").read_text())["examples that keep their own key words"] == 3
    assert [e.keywords for e in read_examples(folder / "rationales.jsonl")[0]] == [("door",)] * 3


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
    for piece in ("in (14)", "other (3)", "teacher on in: 14 questions that the training data asks too"):
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
    assert stages.parse_set(text) == expected
