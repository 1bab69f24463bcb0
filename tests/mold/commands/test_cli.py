import json
import re

import pytest
import torch

from mold.data.problems import generate_problems
from tests.mold.conftest import write_rows
from tests.tiny_models import make_model

FAST = ["--disable_tqdm", "true", "--max_new_tokens", "6", "--num_eval", "4", "--num_maps", "2"]


def options_of(models, problems, folder, **more):
    options = {
        "dataset": problems,
        "teacher_model_name_or_path": models / "teacher",
        "model_name_or_path": models / "student",
        "output_dir": folder,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "report_to": "none",
    } | more
    return [*FAST, *(text for key, value in options.items() for text in (f"--{key}", value))]


def refusal(result):
    """The one message of a command that failed."""
    status, _, err = result
    assert status not in (0, None)
    lines = [line for line in err.splitlines() if line.startswith(("mold: error:", "mold ", "usage:"))]
    assert lines, err
    assert "Traceback" not in err
    return lines[-1]


def test_the_whole_path(mold, models, problems, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    options = options_of(models, problems, folder)
    status, out, _ = mold("extract", *options)
    assert status == 0
    assert "14 teacher signals" in out
    status, out, _ = mold("train", *options)
    assert status == 0
    assert "attention KL" in out
    assert "report.html" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["metric"] for row in summary["rows"]] == [
        "attention KL",
        "rationale loss",
        "answer loss",
        "loss",
        "accuracy",
    ]
    assert (summary["num_train"], summary["num_eval"]) == (10, 4)
    for name in ("report.html", "model.safetensors", "mold_router.safetensors", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    rows = [json.loads(line) for line in (folder / "predictions_after.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {"id", "question", "answer", "prediction", "completion", "correct", "judged", "truncated"} == rows[0].keys()

    # The trained student again, by eval: the same numbers as after training.
    trained = options_of(models, problems, folder, model_name_or_path=folder)
    status, out, _ = mold("eval", *trained)
    assert status == 0
    result = json.loads((folder / "eval.json").read_text())
    after = {row["metric"]: row["after"] for row in summary["rows"]}
    assert result["eval_loss_attention"] == pytest.approx(after["attention KL"], rel=1e-5)
    assert result["eval_loss_rationale"] == pytest.approx(after["rationale loss"], rel=1e-5)

    status, out, _ = mold("inspect", *options, "--example", "2")
    assert status == 0
    for text in ("Question:", "steps", "key words", "layers that count most, of 4"):
        assert text in out

    # A run folder belongs to its options.
    assert "holds a run with the default beta, this one has beta=3.0" in refusal(mold("train", *options, "--beta", "3"))
    # The same command again ends at once, with the same result.
    status, out, _ = mold("train", *options)
    assert status == 0
    again = json.loads((folder / "summary.json").read_text())
    assert again["rows"] == summary["rows"]
    # The run folder's config.yaml says all of it.
    status, out, _ = mold("train", "--config", folder / "config.yaml")
    assert status == 0
    assert json.loads((folder / "summary.json").read_text())["rows"] == summary["rows"]


def test_a_student_of_the_teachers_layers(mold, models, problems, tmp_path):
    options = options_of(models, problems, tmp_path / "run", max_steps=1)
    place = options.index("--model_name_or_path")
    options[place : place + 2] = ["--student_num_layers", "2"]
    assert mold("extract", *options)[0] == 0
    assert mold("train", *options)[0] == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_an_adapter_is_trained_and_evaluated(mold, models, problems, tmp_path):
    savers = {"use_peft": True, "cross_entropy": "chunked", "padding_free": True, "teacher_online": True}
    status, out, _ = mold("train", *options_of(models, problems, tmp_path / "run", lora_r=4, **savers))
    assert status == 0
    assert "attention KL" in out
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert not (tmp_path / "run/signals").exists()
    evaluated = options_of(
        models, problems, tmp_path / "eval", model_name_or_path=tmp_path / "run", teacher_online=True
    )
    status, _, _ = mold("eval", *evaluated)
    assert status == 0
    after = {r["metric"]: r["after"] for r in json.loads((tmp_path / "run/summary.json").read_text())["rows"]}
    found = json.loads((tmp_path / "eval/eval.json").read_text())
    assert found["eval_loss_attention"] == pytest.approx(after["attention KL"], rel=1e-4)
    assert found["eval_loss_rationale"] == pytest.approx(after["rationale loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["single_layer", "step_by_step", "rationales", "answers"])
def test_a_baseline_by_one_option(mold, models, problems, tmp_path, method):
    status, out, _ = mold("train", *options_of(models, problems, tmp_path, method=method, teacher_online=True))
    assert status == 0
    assert ("attention KL" in out) == (method != "answers")


def test_a_yaml_file_and_the_command_line_that_wins(mold, models, problems, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"dataset: {problems}\nteacher_model_name_or_path: {models / 'teacher'}\noutput_dir: {tmp_path / 'run'}\n"
        f"num_eval: 4\ndisable_tqdm: true\nlearning_rate: 1e-3\nmodel_init_kwargs: {{dtype: float32}}\n"
    )
    assert mold("extract", "--config", config, "--output_dir", tmp_path / "other")[0] == 0
    assert (tmp_path / "other/signals/manifest.json").is_file()
    assert not (tmp_path / "run").exists()


def test_info(mold):
    status, out, _ = mold("info")
    assert status == 0
    for text in ("torch", "transformers", "GPUs", "backend reference", torch.__version__):
        assert text in out


def test_no_command_shows_the_commands(mold):
    status, out, err = mold("--help")
    assert status in (0, None)
    for command in ("demo", "generate", "keywords", "extract", "train", "eval", "inspect", "info"):
        assert command in out + err


@pytest.mark.parametrize("command", ["demo", "generate", "keywords", "extract", "train", "eval", "inspect"])
def test_help_lists_the_options(mold, command):
    status, out, err = mold(command, "--help")
    assert status in (0, None)
    for option in ("--beta", "--dataset", "--teacher_model_name_or_path", "--config"):
        assert option in out + err


# Wrong input ends in one clear message


def test_commands_that_are_none(mold):
    status, _, err = mold("distil")
    assert status == 2
    assert "No such command 'distil'" in err
    status, out, err = mold()
    assert status in (0, 2)
    assert "extract" in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "dataset: nowhere.jsonl does not exist"),
        ({"dataset_format": "csv"}, "dataset_format: is 'csv', must be"),
        ({"learning_rte": 1}, "--learning_rte: is no option of mold extract; did you mean learning_rate?"),
        ({"beta": "much"}, "argument --beta: invalid float value: 'much'"),
        ({"num_eval": 99}, "num_eval: is 99, must be"),
        ({"num_train": 99}, "num_train: is 99, but only 10 examples are left"),
        ({"max_length": 20}, "more than max_length=20, which would cut a step"),
        ({"teacher_model_name_or_path": "no/such"}, "model: cannot load the tokenizer of 'no/such'"),
        ({"teacher_model_name_or_path": "teacher.gguf"}, "model: teacher.gguf does not exist"),
        ({"teacher_dtype": "float99"}, "dtype: is 'float99', must be a torch dtype"),
        ({"config": "missing.yaml"}, "--config: missing.yaml does not exist"),
    ],
)
def test_wrong_options(mold, models, problems, tmp_path, options, message):
    assert message in refusal(mold("extract", *options_of(models, problems, tmp_path / "run", **options)))


def test_unknown_keys_of_a_yaml_file(mold, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("betta: 1\n")
    assert "has the unknown option 'betta'" in refusal(mold("train", "--config", config))
    config.write_text("- beta\n")
    assert "holds list, must hold options" in refusal(mold("train", "--config", config))
    config.write_text("beta: [1\n")
    assert "is no YAML" in refusal(mold("train", "--config", config))


def test_wrong_data(mold, models, problems, tmp_path):
    def extract(rows):
        write_rows(problems, rows)
        return refusal(mold("extract", *options_of(models, problems, tmp_path / "run")))

    good = [vars(example) for example in generate_problems(8)]
    assert "holds no usable example" in extract([])
    assert re.search(
        r"problems\.jsonl:3: rationale is None, must be a text", extract([*good[:2], good[2] | {"rationale": None}])
    )
    assert re.search(r"problems\.jsonl:9: has the id 'problem-0-0'", extract([*good, good[0]]))
    problems.write_text('{"question": \n')
    assert re.search(
        r"problems\.jsonl:1: is no JSON", refusal(mold("extract", *options_of(models, problems, tmp_path)))
    )


def test_models_that_cannot_be_used(mold, models, problems, tmp_path):
    run = tmp_path / "run"
    teacher = options_of(models, problems, run, teacher_model_name_or_path=models / "bloom")
    assert "BloomForCausalLM: its attention cannot be replaced" in refusal(mold("extract", *teacher))
    assert mold("extract", *options_of(models, problems, run))[0] == 0
    for name, message in (
        ("bloom", "its attention cannot be replaced"),
        ("dropout", r"attn_pdrop: is 0.1, must be 0"),
    ):
        student = options_of(models, problems, run, model_name_or_path=models / name)
        assert message in refusal(mold("train", *student))
        (run / "config.yaml").unlink(missing_ok=True)


def test_signals_that_do_not_fit(mold, models, problems, tmp_path):
    run = tmp_path / "run"
    assert "holds no manifest" in refusal(mold("train", *options_of(models, problems, run)))
    assert mold("extract", *options_of(models, problems, run))[0] == 0
    for option, message in (
        ({"teacher_model_name_or_path": models / "student"}, "was extracted with teacher="),
        ({"row_reduction": "mean"}, "was extracted with row_reduction='sum', must be 'mean'"),
        ({"template": "{question} {rationale} {answer}"}, "was extracted with template="),
        ({"split_seed": 1, "dataset": "generated", "num_train": 9}, "has no teacher signal"),
        (
            {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
            "use_reentrant",
        ),
    ):
        assert message in refusal(mold("train", *options_of(models, problems, run, **option)))


def test_a_slow_tokenizer(mold, models, problems, tmp_path):
    from transformers import ByT5Tokenizer

    make_model("llama", vocab=300, attention="eager").save_pretrained(tmp_path / "slow")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    options = options_of(models, problems, tmp_path / "run", teacher_model_name_or_path=tmp_path / "slow")
    assert "is a slow tokenizer" in refusal(mold("extract", *options))


def test_a_loss_that_is_not_finite(mold, models, problems, tmp_path):
    assert mold("extract", *options_of(models, problems, tmp_path / "run"))[0] == 0
    options = options_of(models, problems, tmp_path / "run", learning_rate=1e30, max_grad_norm=0)
    assert "the loss is nan at step" in refusal(mold("train", *options))


def test_examples_without_key_words_are_counted(mold, models, problems, tmp_path, caplog):
    rows = [vars(example) for example in generate_problems(14, seed=6)]
    rows[0] = {"question": "Who came first?", "rationale": "The hen came first.", "answer": "the hen"}
    write_rows(problems, rows)
    options = options_of(models, problems, tmp_path / "run", max_steps=1, split_seed=3)
    assert mold("extract", *options)[0] == 0
    status, out, _ = mold("train", *options)
    assert status == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_without_signal"] == 1
    assert "(1 without key words)" in " ".join(out.split())
