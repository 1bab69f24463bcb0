"""A small recipe."""

import pytest
import yaml

from mold.data.problems import generate_problems
from tests.mold.conftest import write_rows


@pytest.fixture
def tiny(models, tmp_path):
    """A recipe in a file: ten problems to train on, two test sets, one of which shares three questions with them."""
    rows = [vars(problem) for problem in generate_problems(16, seed=6)]
    write_rows(tmp_path / "train.jsonl", rows[:13])
    write_rows(tmp_path / "near.jsonl", [row | {"rationale": None} for row in rows[10:]])
    write_rows(tmp_path / "far.jsonl", [vars(problem) for problem in generate_problems(4, seed=9)])
    values = {
        "output_dir": str(tmp_path / "out"),
        "data": {
            "own": {"dataset": "{data_dir}/train.jsonl", "train": "all"},
            "near": {"dataset": "{data_dir}/near.jsonl", "test": "all"},
            "far": {"dataset": "{data_dir}/far.jsonl", "test": 3},
        },
        "options": {
            "teacher_model_name_or_path": str(models / "teacher"),
            "model_name_or_path": str(models / "student"),
            "max_new_tokens": 6,
            "num_eval": 3,
            "num_maps": 1,
            "disable_tqdm": True,
        },
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1},
        "variants": {
            "answers": {"method": "answers"},
            "a pair": {"method": "single_layer", "mol_teacher_layer": 3, "mol_student_layer": 1},
            "mixture": None,
        },
        "sweep": {"beta": [5.0]},
        "seeds": [0, 1],
        "baseline": "mixture",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
