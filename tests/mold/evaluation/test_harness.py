"""lm-evaluation-harness on a task of our own: no hub is needed."""

import json
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

from mold.data.problems import generate_problems
from mold.evaluation.harness import Tasks, evaluate_tasks
from mold.models import load_model
from tests.mold.conftest import write_rows

CHOICES = ["7", "12", "30"]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: {choices}
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def questions(tmp_path):
    """A folder with a task, and its questions with the right choice of each."""
    rows = [{"question": p.question, "label": index % 3} for index, p in enumerate(generate_problems(9, seed=3))]
    write_rows(tmp_path / "sums.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    path = json.dumps(str(tmp_path / "sums.jsonl"))
    (tmp_path / "tasks/sums.yaml").write_text(TASK.format(path=path, choices=json.dumps(CHOICES)))
    return tmp_path / "tasks", rows


@pytest.mark.slow
def test_accuracy_is_that_of_the_models_own_likelihoods(models, questions):
    folder, rows = questions
    model, tokenizer = load_model(str(models / "student"))
    right = 0
    for row in rows:
        prompt = tokenizer(f"{row['question']}\nAnswer:")["input_ids"]
        scores = []
        for choice in CHOICES:
            ids = tokenizer(f"{row['question']}\nAnswer: {choice}")["input_ids"]
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == row["label"]
    (entry,) = evaluate_tasks(model, tokenizer, Tasks(["sums"], folder), batch_size=4)
    assert entry["value"] == pytest.approx(right / len(rows))
    assert (entry["task"], entry["metric"], entry["shots"], entry["total"]) == ("sums", "acc", 0, len(rows))
    assert entry["stderr"] > 0 or right in (0, len(rows))


@pytest.mark.slow
def test_the_command_line_asks_every_model(mold, models, questions, tmp_path):
    folder, _ = questions
    options = ["--models", models / "student", models / "teacher", "--output_dir", tmp_path / "run"]
    tasks = ["--lm_eval_tasks", "sums", "--lm_eval_include_path", folder, "--lm_eval_shots", "2", "--eval_limit", "5"]
    status, out, err = mold("eval", *options, *tasks)
    assert status in (0, None), err
    rows = json.loads((tmp_path / "run/lm_eval.json").read_text())
    assert [(row["model"], row["shots"], row["total"]) for row in rows] == [("student", 2, 5), ("teacher", 2, 5)]
    assert all(word in out for word in ("sums", "acc", "student", "teacher"))


def test_what_cannot_be_asked_is_refused(mold, models, questions, monkeypatch, tmp_path):
    folder, _ = questions
    options = ["--model_name_or_path", models / "student", "--output_dir", tmp_path / "run"]
    status, _, err = mold("eval", *options, "--lm_eval_shots", "2")
    assert status == 1
    assert "lm_eval_shots: is 2, must not be given without lm_eval_tasks" in err
    with pytest.raises(ValueError, match="lm_eval_tasks: the harness knows no sumz"):
        Tasks(["sums", "sumz"], folder)
    with pytest.raises(ValueError, match=r"lm_eval_include_path: .*nowhere does not exist"):
        Tasks(["sums"], folder / "nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"mold-distill\[lm-eval\]"):
        Tasks(["sums"], folder)
