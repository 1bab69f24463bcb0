"""mold train, with tiny random models."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mold.data.problems import generate_problems
from mold.models import load_config, name_of
from mold.training.trainer import MoldTrainer
from tests.mold.command_line import eval_options, extract_options, flags, options_of, refusal
from tests.mold.conftest import rows_of, write_rows
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer


def held_out_of(folder, problems):
    """A file of the rows that a training held out."""
    asked = {row["id"] for row in rows_of(folder / "predictions_after.jsonl")}
    path = problems.with_name("held.jsonl")
    write_rows(path, [row for row in rows_of(problems) if row["id"] in asked])
    return path


def test_the_whole_path(mold, models, problems, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    options = options_of(models, problems, folder)
    status, out, _ = mold("extract", *extract_options(models, problems, folder))
    assert status == 0
    assert "14 teacher signals" in out
    status, out, _ = mold("train", *options)
    assert status == 0
    assert "attention KL" in out
    assert "report.html" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["metric"] for row in summary["rows"]] == [
        "accuracy",
        "rationale log-likelihood",
        "answer log-likelihood",
        "attention KL",
        "rationale loss",
        "answer loss",
        "loss",
    ]
    assert all("verdict" in row and "change" in row["intervals"] for row in summary["rows"][:3])
    assert summary["rows"][0]["intervals"].keys() == {"before", "after", "change"}
    assert (summary["num_train"], summary["num_eval"]) == (10, 4)
    for name in ("report.html", "model.safetensors", "mold_router.safetensors", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    rows = [json.loads(line) for line in (folder / "predictions_after.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {"id", "question", "answer", "prediction", "completion", "correct", "judged", "truncated"} == rows[0].keys()

    # The trained student again, by eval on what was held out: the same numbers as after training.
    held_out = {row["id"] for row in rows}
    write_rows(
        tmp_path / "held.jsonl",
        [json.loads(x) for x in problems.read_text().splitlines() if json.loads(x)["id"] in held_out],
    )
    trained = eval_options(models, tmp_path / "held.jsonl", folder, model_name_or_path=folder)
    status, out, _ = mold("eval", *trained)
    assert status == 0
    result = json.loads((folder / "eval.json").read_text())
    after = {row["metric"]: row["after"] for row in summary["rows"]}
    assert result["eval_loss_attention"] == pytest.approx(after["attention KL"], rel=1e-5)
    assert result["eval_loss_rationale"] == pytest.approx(after["rationale loss"], rel=1e-5)

    looked = {"dataset": problems, "teacher_model_name_or_path": models / "teacher", "output_dir": folder}
    status, out, _ = mold("inspect", *flags(looked), "--example", "2")
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


@pytest.mark.slow
def test_a_line_a_logging_step_and_nothing_else_of_other_libraries(models, problems, tmp_path):
    options = options_of(models, problems, tmp_path / "run", teacher_online=True, logging_steps=1, disable_tqdm=False)
    command = [sys.executable, "-m", "mold.commands.cli", "train", *map(str, options), "--verbosity"]
    done = subprocess.run([*command, "normal"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("starting", "resuming", "saved"))] == [
        "starting: 3 steps",
        f"saved to {tmp_path / 'run'}",
    ]
    steps = [line for line in lines if re.match(r"(before training|step [1-3] of 3): (held-out )?loss \d", line)]
    assert len(steps) == 1 + 3 + 1
    assert re.fullmatch(
        r"step 2 of 3: loss \S+ \(rationale \S+, answer \S+, attention \S+\), weight of attention 1, "
        r"gradient norm \S+, learning rate \S+",
        steps[2],
    )
    assert "{" not in done.stdout
    assert "Training:" in done.stderr
    for noise in ("Loading weights", "Writing model", "missing keys", "FutureWarning"):
        assert noise not in done.stderr

    shutil.rmtree(tmp_path / "run/checkpoint-3")
    done = subprocess.run([*command, "quiet"], capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr
    assert "accuracy, %" in done.stdout
    assert not re.search(r"^(step|starting|resuming|saved)", done.stdout, re.MULTILINE)


def test_a_checkpoint_of_tied_heads_lacks_nothing(mold, models, problems, tmp_path, caplog):
    tied = make_model("llama", vocab=len(make_tokenizer("smollm")), attention="eager", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    make_tokenizer("smollm").save_pretrained(tmp_path / "tied")
    options = options_of(models, problems, tmp_path / "run", teacher_online=True, model_name_or_path=tmp_path / "tied")
    assert mold("train", *options)[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    caplog.clear()
    status, out, _ = mold("train", *options)
    assert status == 0
    assert "resuming at step 2 of 3" in out
    assert not [message for message in caplog.messages if "missing" in message or "do not match" in message]


def test_a_student_of_the_teachers_layers(mold, models, problems, tmp_path):
    options = options_of(models, problems, tmp_path / "run", max_steps=1)
    place = options.index("--model_name_or_path")
    options[place : place + 2] = ["--student_num_layers", "2"]
    assert mold("extract", *extract_options(models, problems, tmp_path / "run"))[0] == 0
    assert mold("train", *options)[0] == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["num_hidden_layers"] == 2
    called = f"{models / 'teacher'} with 2 of 4 layers (0, 3)"
    assert json.loads((tmp_path / "run/summary.json").read_text())["model"] == called
    assert called in (tmp_path / "run/README.md").read_text()
    assert f"{called} learnt from" in (tmp_path / "run/report.html").read_text()
    # It is called after its own folder when it is loaded, and what it was made of is not lost.
    loaded = load_config(str(tmp_path / "run"))
    assert name_of(loaded) == f"{tmp_path / 'run'}, 2 of 4 layers (0, 3) of {models / 'teacher'}"


def test_the_card_says_what_came_of_it_and_by_which_command(mold, models, problems, tmp_path):
    folder, template = tmp_path / "run", "Q: {question}\nR: {rationale}\nA: {answer}"
    options = options_of(models, problems, folder, max_steps=1, teacher_online=True, template=template)
    assert mold("train", *options)[0] == 0
    card = (folder / "README.md").read_text()
    order = [card.index(f"\n## {title}\n") for title in ("Results", "Training procedure", "Data and command")]
    assert order == sorted(order)
    assert re.search(r"\n\| 4 held-out examples \| before \| after \| change \|  \|\n", card)
    assert re.search(r"\n\| accuracy, % \| 0\.0 \(0\.0 to \d", card)
    assert f"Of `{problems}`: 10 examples to train on, 4 held out." in card
    (command,) = re.findall(r"```\n(mold train .*?)\n```", card, re.DOTALL)
    words = shlex.split(command)
    assert words[words.index("--template") + 1] == template
    assert words[-2:] == ["--output_dir", "..."]
    for unknown in ("unknown dataset", "from scratch", "More information needed"):
        assert unknown not in card
    # It is a command: with another folder it begins the same training.
    status, _, err = mold(*words[1:-1], tmp_path / "again")
    assert status == 0, err
    assert (tmp_path / "again/README.md").read_text() == card.replace("# run\n", "# again\n").replace(
        "name: run\n", "name: again\n"
    )


def test_an_adapter_is_trained_and_evaluated(mold, models, problems, tmp_path):
    savers = {"use_peft": True, "cross_entropy": "chunked", "padding_free": True, "teacher_online": True}
    status, out, _ = mold("train", *options_of(models, problems, tmp_path / "run", lora_r=4, **savers))
    assert status == 0
    assert "attention KL" in out
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert not (tmp_path / "run/signals").exists()
    taught = {"teacher_model_name_or_path": models / "teacher", "teacher_online": True}
    held_out = held_out_of(tmp_path / "run", problems)
    evaluated = eval_options(models, held_out, tmp_path / "eval", model_name_or_path=tmp_path / "run")
    status, _, err = mold("eval", *evaluated, *flags(taught))
    assert status == 0, err
    after = {r["metric"]: r["after"] for r in json.loads((tmp_path / "run/summary.json").read_text())["rows"]}
    found = json.loads((tmp_path / "eval/eval.json").read_text())
    assert found["eval_loss_attention"] == pytest.approx(after["attention KL"], rel=1e-4)
    assert found["eval_loss_rationale"] == pytest.approx(after["rationale loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["single_layer", "step_by_step", "rationales", "answers"])
def test_a_baseline_by_one_option(mold, models, problems, tmp_path, method):
    status, out, _ = mold("train", *options_of(models, problems, tmp_path, method=method, teacher_online=True))
    assert status == 0
    assert ("attention KL" in out) == (method != "answers")


def test_models_that_cannot_be_used(mold, models, problems, tmp_path):
    run = tmp_path / "run"
    teacher = extract_options(models, problems, run, teacher_model_name_or_path=models / "bloom")
    assert "BloomForCausalLM: its attention cannot be replaced" in refusal(mold("extract", *teacher))
    assert mold("extract", *extract_options(models, problems, run))[0] == 0
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
    assert mold("extract", *extract_options(models, problems, run))[0] == 0
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


def test_signals_of_other_weights_than_the_loaded_teachers(mold, models, problems, tmp_path):
    """By the same name: the student is made from it, so that it is loaded."""
    run, teacher = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(models / "teacher", teacher)
    options = {"teacher_model_name_or_path": teacher}
    assert mold("extract", *extract_options(models, problems, run, **options))[0] == 0
    layers = options_of(models, problems, run, student_num_layers=2, **options)
    place = layers.index("--model_name_or_path")
    del layers[place : place + 2]
    weights = load_file(teacher / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] + 1}, teacher / "model.safetensors", {"format": "pt"})
    assert f"teacher_model_name_or_path: {teacher} has other weights" in refusal(mold("train", *layers))
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    assert mold("train", *layers)[0] == 0


def test_a_run_that_was_measured_before_it_was_killed_draws_the_same(mold, models, problems, tmp_path):
    states = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        options = options_of(models, problems, folder, method="rationales", max_steps=1)
        if folder.name == "killed":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(MoldTrainer, "train", interrupt)
                assert mold("train", *options)[0] not in (0, None)
            assert (folder / "before.json").is_file()
        assert mold("train", *options)[0] == 0
        states.append(torch.load(folder / "checkpoint-1" / "rng_state.pth", weights_only=False)["cpu"])
    assert torch.equal(*states)


def test_lines_say_where_a_training_begins_and_where_it_ends_up(mold, models, problems, tmp_path):
    folder = tmp_path / "[run]"  # brackets are no markup
    options = options_of(models, problems, folder, method="rationales", max_steps=2)
    status, out, _ = mold("train", *options)
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith(("starting", "resuming", "saved"))] == [
        "starting: 2 steps",
        f"saved to {folder}",
    ]
    shutil.rmtree(folder / "checkpoint-2")
    status, out, _ = mold("train", *options)
    assert status == 0
    assert "resuming at step 1 of 2\n" in out
    assert "starting" not in out


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_other_places_of_the_same_things(mold, models, problems, tmp_path, monkeypatch):
    """The data under another name, the teacher behind a link, and the run folder moved in the middle of a training."""
    run = tmp_path / "run"
    assert mold("extract", *extract_options(models, problems, run))[0] == 0
    renamed, link = tmp_path / "renamed.jsonl", tmp_path / "link"
    write_rows(renamed, [{k: v for k, v in row.items() if k != "id"} for row in rows_of(problems)])
    link.symlink_to(models / "teacher")
    there = {"dataset": renamed, "teacher_model_name_or_path": f"{link}/", "load_best_model_at_end": "true"}
    there |= {"eval_strategy": "steps", "eval_steps": 1}
    assert mold("train", *options_of(models, problems, run, **there))[0] == 0
    whole = (run / "model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint-3")
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert mold("train", *options_of(models, problems, "moved", **there))[0] == 0
    assert (tmp_path / "moved/model.safetensors").read_bytes() == whole
    assert not run.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"model_dtype": "torch.bfloat16"}, "model_dtype: is 'torch.bfloat16', must be one of float32"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: is 0, must be at least 1"),
        ({"model_init_kwargs": "attn_pdrop=0.0"}, "model_init_kwargs: is 'attn_pdrop=0.0', must be a JSON object"),
        ({"model_init_kwargs": '{"nonsense": 1}'}, "model_init_kwargs: has 'nonsense', must have fields of Llama"),
        ({"model_init_kwargs": '{"dtype": "bfloat16"}'}, "model_init_kwargs: has 'dtype', must not: model_dtype"),
        ({"report_to": "nonsense"}, "report_to: is nonsense, must be of azure_ml"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: is 0.1, must be 0.0"),
        ({"fp16": "true", "use_cpu": "true"}, "fp16: is True, must be False on a CPU"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(mold, models, problems, tmp_path, monkeypatch, option, message):
    monkeypatch.setattr("mold.models.AutoModelForCausalLM", None)
    assert message in refusal(mold("train", *options_of(models, problems, tmp_path / "run", **option)))


def test_a_student_from_scratch(mold, models, problems, tmp_path):
    assert mold("extract", *extract_options(models, problems, tmp_path))[0] == 0
    shape = json.dumps({"hidden_size": 24, "num_hidden_layers": 2})
    starts = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        there = {"signals_dir": tmp_path / "signals", "from_scratch": "true", "model_init_kwargs": shape}
        there |= {"seed": seed, "learning_rate": 0.0, "predict_before": "false"}
        assert mold("train", *options_of(models, problems, tmp_path / name, **there))[0] == 0
        starts[name] = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
    given = load_file(models / "student/model.safetensors")["model.embed_tokens.weight"]
    assert starts["a"].shape == (len(given), 24)
    assert torch.equal(starts["a"], starts["b"])  # the seed's, and no model's
    assert not torch.equal(starts["a"], starts["c"])
    config = load_config(str(tmp_path / "a"))
    assert (config.num_hidden_layers, config.shape_of) == (2, str(models / "student"))
    card = (tmp_path / "a/README.md").read_text()
    assert "its weights are from a random start in the shape of" in " ".join(card.split())
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_peft": "true"}, "use_peft: is True, must not be given with from_scratch"),
        ({"student_num_layers": 2}, "student_num_layers: is 2, must not be given with from_scratch"),
        ({"model_init_kwargs": '{"device_map": "auto"}'}, "has 'device_map', must have fields of LlamaConfig alone"),
    ],
)
def test_what_a_student_from_scratch_cannot_be(mold, models, problems, tmp_path, option, message):
    assert mold("extract", *extract_options(models, problems, tmp_path / "run"))[0] == 0
    options = options_of(models, problems, tmp_path / "run", **{"from_scratch": "true"} | option)
    assert message in refusal(mold("train", *options))


def test_a_folder_without_tokenizer(mold, models, problems, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    for name in ("student", "teacher"):  # of some families transformers makes an empty tokenizer
        shutil.copytree(models / name, bare, ignore=shutil.ignore_patterns("token*", "special*"), dirs_exist_ok=True)
        monkeypatch.setattr("mold.models.AutoModelForCausalLM", None)
        options = options_of(models, problems, tmp_path / "run", model_name_or_path=bare)
        assert "model: cannot load the tokenizer of" in refusal(mold("train", *options))


def test_a_loss_that_is_not_finite(mold, models, problems, tmp_path):
    assert mold("extract", *extract_options(models, problems, tmp_path / "run"))[0] == 0
    options = options_of(models, problems, tmp_path / "run", learning_rate=1e30, max_grad_norm=0)
    assert "the loss is not finite at step" in refusal(mold("train", *options))


def test_examples_without_key_words_are_counted(mold, models, problems, tmp_path, caplog):
    rows = [vars(example) for example in generate_problems(14, seed=6)]
    rows[0] = {"question": "Who came first?", "rationale": "The hen came first.", "answer": "the hen"}
    write_rows(problems, rows)
    options = options_of(models, problems, tmp_path / "run", max_steps=1, split_seed=3)
    assert mold("extract", *extract_options(models, problems, tmp_path / "run"))[0] == 0
    status, out, _ = mold("train", *options)
    assert status == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_without_signal"] == 1
    assert "(1 without key words)" in " ".join(out.split())


def test_the_untrained_student_need_not_answer(mold, models, problems, tmp_path):
    folder = tmp_path / "run"
    assert mold("extract", *extract_options(models, problems, folder))[0] == 0
    status, _, _ = mold("train", *options_of(models, problems, folder, predict_before=False, max_steps=1))
    assert status == 0
    assert not (folder / "predictions_before.jsonl").exists()
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert [row["before"] is None for row in rows] == [True] * 3 + [False] * 4
    assert None not in [row["after"] for row in rows]
    assert not any("verdict" in row for row in rows)
