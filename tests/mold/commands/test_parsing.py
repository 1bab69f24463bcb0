"""A command takes its own options alone, from the command line and from files; a wrong one is one line."""

import dataclasses
import itertools
import json

import pytest
from transformers.trainer_callback import TrainerState

from mold.commands.options import GROUPS, NEEDS, TAKES, names
from mold.commands.parsing import make_options, parse
from tests.mold.command_line import refusal

EVERY = sorted({name for taken in TAKES.values() for name in taken})


def given(command):
    """What a command needs."""
    return {name: "generated" if name == "dataset" else "out" for name in NEEDS[command]}


def test_every_option_is_one_of_a_group_and_of_a_command():
    known = set(itertools.chain.from_iterable(map(names, GROUPS.values())))
    ours = {f.name for group in GROUPS.values() for f in dataclasses.fields(group) if group.__name__ != "MoldConfig"}
    for command, taken in TAKES.items():
        assert len(set(taken)) == len(taken), command
        assert set(NEEDS[command]) <= set(taken)
    assert ours <= set(EVERY)
    assert set(EVERY) <= known


@pytest.mark.parametrize("command", TAKES)
def test_a_command_refuses_the_options_of_others_by_name(mold, command):
    others = set(EVERY) - set(TAKES[command])
    assert len(others) > 3
    for name in [*sorted(others), max(others).replace("_", "-")]:
        message = refusal(mold(command, f"--{name}", "1"))
        assert message.startswith(f"mold: error: --{name}: is no option of mold {command}; it is one of mold ")


@pytest.mark.parametrize("command", TAKES)
def test_a_command_takes_its_own_options(command):
    needed = given(command)
    options = make_options(command, needed)
    for name, value in needed.items():
        assert name in TAKES[command]
        assert value in (*(options.data.dataset or ()), options.training.output_dir)
    for name in needed:
        with pytest.raises(ValueError, match=f"{name}: is not given, must be: mold {command} --{name} "):
            make_options(command, {key: value for key, value in needed.items() if key != name})


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("train", ["--learning_rte", "1"], "--learning_rte: is no option of mold train; did you mean learning_rate?"),
        ("extract", ["--learning_rte", "1"], "did you mean learning_rate, of mold train?"),
        ("train", ["--tau_1", "much"], "tau_1: is 'much', must be float"),
        ("train", ["--beta"], "beta: expected one argument"),
        ("train", ["--student-layers", "0", "x"], "student_layers: is 'x', must be int"),
        ("train", ["--lr_scheduler_type", "steep"], "lr_scheduler_type: invalid choice: 'steep'"),
        ("train", ["stray"], "stray: is no option of mold train"),
        ("train", ["--method", "mixed"], "method: is 'mixed', must be one of mixture, single_layer"),
        ("generate", ["--chat", "maybe"], "chat: is 'maybe', must be one of auto, on, off"),
        ("train", ["--model_dtype", "torch.bfloat16"], "model_dtype: is 'torch.bfloat16', must be one of float32, bf"),
        ("eval", ["--model_dtype", "int8"], "model_dtype: is 'int8', must be one of float32, bfloat16, float16"),
        ("extract", ["--teacher_dtype", "nn"], "teacher_dtype: is 'nn', must be one of float32"),
        ("train", ["--per_device_train_batch_size", "0"], "per_device_train_batch_size: is 0, must be at least 1"),
        ("eval", ["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size: is 0, must be at least 1"),
        ("train", ["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: is 0, must be at least 1"),
        ("extract", ["--extract_batch_size", "0"], "extract_batch_size: is 0, must be at least 1"),
        ("extract", ["--extract_shard_size", "-1"], "extract_shard_size: is -1, must be at least 1"),
        ("generate", ["--generate_batch_size", "0"], "generate_batch_size: is 0, must be at least 1"),
        ("eval", ["--max_new_tokens", "0"], "max_new_tokens: is 0, must be at least 1"),
        ("analyse", ["--eval_limit", "0"], "eval_limit: is 0, must be at least 1"),
        ("train", ["--num_eval", "0"], "num_eval: is 0, must be at least 1"),
        ("train", ["--lora_r", "0"], "lora_r: is 0, must be at least 1"),
        ("plan", ["--max_length", "1"], "max_length: is 1, must be at least 2"),
        ("train", ["--pad_to_multiple_of", "0"], "pad_to_multiple_of: is 0, must be at least 1"),
        ("train", ["--model_init_kwargs", "attn_pdrop=0.0"], "model_init_kwargs: is 'attn_pdrop=0.0', must be a JSON"),
        ("train", ["--model_init_kwargs", "[1]"], "model_init_kwargs: is '[1]', must be a JSON object such as"),
        ("train", ["--model_init_kwargs", "[" * 100_000], "model_init_kwargs: is '[[[["),
        ("train", ["--lr_scheduler_kwargs", "{broken"], "lr_scheduler_kwargs: is '{broken', must be a JSON object"),
        ("train", ["--student_layers", "1", "--student_num_layers", "2"], "must be only one of them"),
        ("eval", ["--lm_eval_shots", "2"], "lm_eval_shots: is 2, must not be given without lm_eval_tasks"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(mold, command, option, message):
    needed = [text for name, value in given(command).items() for text in (f"--{name}", value)]
    refused = refusal(mold(command, *needed, *option))
    assert message in refused
    assert len(refused) < 400


def test_a_yaml_file_and_the_command_line_that_wins(tmp_path, caplog):
    config = tmp_path / "run.yaml"
    values = {"dataset": "a.jsonl", "output_dir": "run", "learning_rate": "1e-3", "max_length": 99, "prompt": "math"}
    config.write_text(json.dumps(values | {"model_init_kwargs": {"attn_pdrop": 0.0}, "num_train": None}))
    options = parse("train", ["--config", str(config), "--max_length", "50"])
    assert (options.data.dataset, options.training.learning_rate, options.training.max_length) == (
        ["a.jsonl"],
        1e-3,
        50,
    )
    assert options.training.model_init_kwargs == {"attn_pdrop": 0.0}
    assert options.data.num_train is None
    assert "left out what mold train does not take: prompt" in caplog.text
    # One file for several commands: each takes its own.
    assert parse("generate", [f"--config={config}"]).prompting.prompt == "math"
    assert "mold generate does not take: learning_rate, max_length, model_init_kwargs" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 1\n", "has the unknown option 'betta'; did you mean beta?"),
        ("1: 2\n", "has the unknown option 1"),
        ("- beta\n", "holds list, must hold options"),
        ("beta\n", "holds str, must hold options"),
        ("beta: [1\n", "is no YAML"),
        ("a: " + "[" * 100_000, "nested too deep"),
        ("a: 2020-99-99\n", "is no YAML"),
        ("beta: [1, 2]\n", "beta: is [1, 2], must be one value"),
        ("tau_1: much\n", "tau_1: is 'much', must be float"),
        ("use_cpu: 7\n", "use_cpu"),
    ],
)
def test_yaml_files_that_hold_something_else(mold, tmp_path, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert message in refusal(mold("train", "--config", config))


def test_yaml_files_that_are_none(mold, tmp_path):
    assert "--config: none.yaml does not exist" in refusal(mold("train", "--config", "none.yaml"))
    (tmp_path / "a.yaml").write_bytes(b"beta: \xff\n")
    assert "a.yaml is no UTF-8" in refusal(mold("train", "--config", tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("")
    assert "dataset: is not given" in refusal(mold("train", "--config", tmp_path / "a.yaml"))


def test_texts_of_a_file_that_look_like_options(tmp_path):
    config = tmp_path / "run.yaml"
    template = "--beta {question} {rationale} {answer}"
    config.write_text(json.dumps({"dataset": "-a", "output_dir": "--out", "template": template}))
    options = parse("extract", ["--config", str(config)])
    assert (options.data.dataset, options.training.output_dir) == (["-a"], "--out")
    assert options.training.template == template


def test_logging_defaults_to_a_fiftieth_of_the_training():
    options = make_options("train", given("train"))
    state = TrainerState()
    for steps, every in ((1000, 20), (10, 1), (0, 0)):
        state.compute_steps(options.training, steps)
        assert state.logging_steps == every
