"""mold extract, with tiny random models."""

import re

import pytest

from mold.data.problems import generate_problems
from tests.mold.command_line import extract_options, flags, options_of, refusal
from tests.mold.conftest import rows_of, write_rows
from tests.tiny_models import make_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "dataset: nowhere.jsonl does not exist"),
        ({"dataset_format": "csv"}, "dataset_format: is 'csv', must be"),
        ({"num_train": 99}, "num_train: is 99, but only 13 examples are left"),
        ({"max_length": 20}, "more than max_length=20, which would cut a step"),
        ({"teacher_model_name_or_path": "no/such"}, "model: 'no/such' is no folder here"),
        ({"teacher_model_name_or_path": "teacher.gguf"}, "model: teacher.gguf does not exist"),
        ({"teacher_dtype": "float99"}, "teacher_dtype: is 'float99', must be one of float32"),
        ({"config": "missing.yaml"}, "--config: missing.yaml does not exist"),
    ],
)
def test_wrong_options(mold, models, problems, tmp_path, options, message):
    assert message in refusal(mold("extract", *extract_options(models, problems, tmp_path / "run", **options)))


def test_wrong_data(mold, models, problems, tmp_path):
    def extract(rows):
        write_rows(problems, rows)
        return refusal(mold("extract", *extract_options(models, problems, tmp_path / "run")))

    good = [vars(example) for example in generate_problems(8)]
    assert "holds no usable example" in extract([])
    assert re.search(
        r"problems\.jsonl:3: rationale is None, must be a text", extract([*good[:2], good[2] | {"rationale": None}])
    )
    assert re.search(r"problems\.jsonl:9: has the id 'problem-0-0'", extract([*good, good[0]]))
    problems.write_text('{"question": \n')
    assert re.search(
        r"problems\.jsonl:1: is no JSON", refusal(mold("extract", *extract_options(models, problems, tmp_path)))
    )


def test_a_slow_tokenizer(mold, models, problems, tmp_path):
    from transformers import ByT5Tokenizer

    make_model("llama", vocab=300, attention="eager").save_pretrained(tmp_path / "slow")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    options = extract_options(models, problems, tmp_path / "run", teacher_model_name_or_path=tmp_path / "slow")
    assert "is a slow tokenizer" in refusal(mold("extract", *options))


def test_several_data_sets(mold, models, problems, tmp_path, caplog):
    rows = rows_of(problems)
    write_rows(problems, rows[:8])
    write_rows(tmp_path / "more.jsonl", rows[6:])
    options = extract_options(models, problems, tmp_path / "run")
    place = options.index(problems) + 1
    status, out, _ = mold("extract", *options[:place], tmp_path / "more.jsonl", *options[place:])
    assert status == 0
    assert "problems.jsonl: 8 rows, 8 kept\n" in out
    assert any(m.endswith(f"more.jsonl: 8 rows, 6 kept, 2 that {problems} has too") for m in caplog.messages)
    assert f"{len(rows)} teacher signals" in out
    said = refusal(mold("extract", *options[:place], "generated", *options[place:]))
    assert said.endswith("problems.jsonl generated, must not have generated problems beside others")


def test_a_mixture_is_inspected_and_trained_on(mold, models, problems, tmp_path):
    """With the options that it was made with, and refused by name without them."""
    made = {"signal_layers": "mixture", "signal_dtype": "float16"}
    of_it = {"tau_1": 0.2, "mol_teacher_layers_left_out": 1, "key_scope": "question"}
    folder = tmp_path / "run"
    status, out, _ = mold("extract", *extract_options(models, problems, folder, **made, **of_it))
    assert (status, "14 teacher signals" in out) == (0, True)
    looked = {"dataset": problems, "teacher_model_name_or_path": models / "teacher", "output_dir": folder}
    status, out, _ = mold("inspect", *flags(looked | of_it), "--example", "2")
    assert (status, "attention of" in out, "layers that count most" in out) == (0, True, False)
    assert "was extracted with key_scope='question', must be 'all'" in refusal(mold("inspect", *flags(looked)))
    assert mold("train", *options_of(models, problems, folder, **of_it))[0] == 0
    assert (folder / "mold_router.safetensors").is_file()
    other = options_of(
        models, problems, tmp_path / "other", **of_it | {"tau_1": 0.1, "signals_dir": folder / "signals"}
    )
    assert "was extracted with tau_1=0.2, must be 0.1" in refusal(mold("train", *other))
