"""Tiny models, signals and data, and the command line as a function."""

import json
import sys

import pytest
from transformers import BloomConfig, BloomForCausalLM

from mold.commands import cli
from mold.data.examples import DEFAULT_TEMPLATE
from mold.data.problems import generate_problems
from mold.method.extraction import extract_signals
from mold.method.signal_settings import SignalSettings
from tests.tiny_models import make_model
from tests.tiny_runs import BARE, EXAMPLES, TEACHER_TOKENIZER, make_teacher
from tests.tiny_tokenizers import make_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a teacher and a student, and one of a model whose attention cannot be replaced."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer("smollm")
    options = {"vocab": len(tokenizer), "attention": "eager", "initializer_range": 0.05}
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))
    for name, model in (
        ("teacher", make_model("qwen3", layers=4, **options)),
        ("student", make_model("llama", seed=1, **options)),
        ("dropout", make_model("gpt2", attn_pdrop=0.1, **options)),
        ("bloom", bloom),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def signals(tmp_path_factory):
    """Signals of a GPT-2 teacher with another tokenizer than the student has."""
    teacher = make_teacher()
    return extract_signals(
        teacher,
        TEACHER_TOKENIZER,
        [*EXAMPLES, BARE],
        tmp_path_factory.mktemp("signals"),
        SignalSettings.of(teacher, "tiny", DEFAULT_TEMPLATE, "sum"),
        progress=False,
    )


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    write_rows(path, [vars(example) for example in generate_problems(14, seed=6)])
    return path


@pytest.fixture
def mold(monkeypatch, capsys):
    """Runs the command line: (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mold", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
