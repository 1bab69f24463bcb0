"""mold keywords with a tiny random model."""

import json

from mold.data.readers import read_examples
from tests.mold.command_line import FAST, refusal
from tests.mold.conftest import write_rows


def test_key_words_of_a_teacher(mold, models, tmp_path):
    rows = [
        {"question": f"Where does {name} stand?", "rationale": "By the door.", "answer": "A", "keywords": ["door"]}
        for name in ("Ada", "Ben", "Cora")
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    options = ["--dataset", tmp_path / "rows.jsonl", "--output_dir", folder, "--num_shots", "1", *FAST]
    assert "must name the teacher" in refusal(mold("keywords", *options))
    status, out, _ = mold("keywords", *options, "--teacher_model_name_or_path", models / "teacher")
    assert status in (0, None)
    assert "examples that keep their own key words" in out
    assert json.loads((folder / "keywords.json").read_text())["examples that keep their own key words"] == 3
    assert [e.keywords for e in read_examples(folder / "rationales.jsonl")[0]] == [("door",)] * 3
