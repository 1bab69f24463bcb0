"""mold generate with tiny random models: nonsense that must be counted."""

import json

import pytest

from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from tests.mold.command_line import FAST, refusal
from tests.mold.conftest import rows_of, write_rows


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
