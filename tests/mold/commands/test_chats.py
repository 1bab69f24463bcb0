"""Rows of messages through the commands: in the chat format of the tokenizers, from extraction to evaluation."""

import json

import pytest
import yaml
from transformers import AutoTokenizer

from mold.commands.run import run_recipe
from mold.data.chat import CHAT_TEMPLATE, recorded_template
from mold.data.examples import DEFAULT_TEMPLATE
from mold.data.problems import generate_problems
from tests.mold.command_line import eval_options, extract_options, load, options_of, refusal
from tests.mold.conftest import rows_of, write_rows
from tests.tiny_tokenizers import make_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def chatty(models, tmp_path_factory):
    """The models, and with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = make_tokenizer.__wrapped__("smollm")
    tokenizer.chat_template = CHATML
    for name in ("teacher", "student"):
        for file in (models / name).iterdir():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / file.name).write_bytes(file.read_bytes())
        tokenizer.save_pretrained(folder / name)
    return folder


def chat_of(problem):
    answer = f"{problem.rationale}\nAnswer: {problem.answer}"
    turns = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": answer}]
    return {"id": problem.id, "messages": turns}


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_rows(path, [chat_of(problem) for problem in generate_problems(14, seed=6)])
    return path


def template_of(run):
    return json.loads((run / "signals/manifest.json").read_text())["settings"]["template"]


@pytest.mark.parametrize("adapter", [False, True])
def test_chats_are_trained_as_chats_and_asked_as_such(mold, chatty, chats, problems, tmp_path, adapter):
    if adapter:
        pytest.importorskip("peft")
    run = tmp_path / "run"
    assert mold("extract", *extract_options(chatty, chats, run))[0] == 0
    assert template_of(run) == CHAT_TEMPLATE
    options = options_of(chatty, chats, run, max_steps=1, use_peft=adapter)
    assert mold("train", *options)[0] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["template"] == CHAT_TEMPLATE
    assert recorded_template(AutoTokenizer.from_pretrained(run)) == CHAT_TEMPLATE
    # The same run again, its template said or not; not with another one.
    assert mold("train", *options)[0] == 0
    assert mold("train", *options, "--template", CHAT_TEMPLATE)[0] == 0
    assert "holds a run with template=" in refusal(mold("train", *options, "--template", DEFAULT_TEMPLATE))
    # Plain questions are asked as the student was trained, the untrained one's as they are.
    judged = tmp_path / "judged"
    models = ["--models", run, chatty / "student"]
    assert (
        mold("eval", *models, "--eval_sets", f"plain={problems}", "--output_dir", judged, "--max_new_tokens", 4)[0] == 0
    )
    for label, template in (("run", CHAT_TEMPLATE), ("student", DEFAULT_TEMPLATE)):
        settings = rows_of(judged / f"predictions/{label}--plain.journal")[0]["settings"]
        assert settings["template"] == template
    if not adapter:
        told = eval_options(chatty, problems, judged, model_name_or_path=run, signals_dir=run / "signals")
        assert mold("eval", *told)[0] == 0
        assert json.loads((judged / "eval.json").read_text())["eval_loss_attention"] > 0


def test_a_student_without_a_chat_template(mold, chatty, models, chats, tmp_path):
    run = tmp_path / "run"
    assert mold("extract", *extract_options(chatty, chats, run))[0] == 0
    mixed = {"model_name_or_path": models / "student", "max_steps": 1}
    said = refusal(mold("train", *options_of(chatty, chats, run, **mixed)))
    assert "give teacher and student one template, for instance 'Question: " in said
    online = options_of(chatty, chats, tmp_path / "online", **mixed, teacher_online=True)
    assert "template: is not given, must be one without {assistant}" in refusal(mold("train", *online))
    plain = tmp_path / "plain"
    assert mold("extract", *extract_options(chatty, chats, plain), "--template", DEFAULT_TEMPLATE)[0] == 0
    assert mold("train", *options_of(chatty, chats, plain, **mixed, template=DEFAULT_TEMPLATE))[0] == 0


def test_chats_among_other_rows_need_a_template(mold, chatty, chats, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    plain = [{"question": "1 + 1?", "rationale": "1 + 1 = 2.", "answer": "2"}]
    write_rows(mixed, [*map(json.loads, chats.read_text().splitlines()), *plain])
    for command, options in (
        ("extract", extract_options(chatty, mixed, tmp_path / "run")),
        ("inspect", ["--dataset", mixed, "--model_name_or_path", chatty / "student"]),
        ("analyse", ["--dataset", mixed, "--models", chatty / "student", "--output_dir", tmp_path / "run"]),
    ):
        said = refusal(mold(command, *options))
        assert said.endswith("14 examples are chats, 1 are not")
    assert mold("inspect", *options_of_inspection(mixed, chatty), "--template", CHAT_TEMPLATE)[0] == 0


def options_of_inspection(rows, models):
    return ["--dataset", rows, "--model_name_or_path", models / "student"]


def test_inspect_and_analyse_show_chats(mold, chatty, chats, tmp_path):
    status, out, _ = mold("inspect", *options_of_inspection(chats, chatty))
    assert status == 0
    assert "<|im_start|>user" in out
    found = ["--dataset", chats, "--models", chatty / "teacher", chatty / "student", "--output_dir", tmp_path]
    assert mold("analyse", *found)[0] == 0


def test_a_recipe_of_chats_with_a_baseline_that_cannot_be_one(tiny, chatty, chats):
    recipe = load(
        tiny,
        f"data.own.dataset={chats}",
        f"options.teacher_model_name_or_path={chatty / 'teacher'}",
        f"options.model_name_or_path={chatty / 'student'}",
        "variants={mixture: null, two tasks: {method: step_by_step}}",
        "sweep={}",
        "seeds=[0]",
        "train.max_steps=1",
    )
    run_recipe(recipe, lambda line: None)
    templates = {
        folder.name.split("-")[1]: yaml.safe_load((folder / "config.yaml").read_text())["template"]
        for folder in (tiny.parent / "out").glob("train-*")
    }
    assert templates == {"mixture": CHAT_TEMPLATE, "two": DEFAULT_TEMPLATE}
