"""What leaves the trainer: the model, its card, the hub, trackers."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from tests.tiny_runs import EXAMPLES, make_trainer

WITHOUT_MOLD = """
import json, sys
sys.modules["mold"] = sys.modules["mold_kernels"] = None  # importing them raises ImportError
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Question: 2 + 3?", return_tensors="pt").input_ids
out = model.generate(ids, min_new_tokens=4, max_new_tokens=4, do_sample=False)
wrong = {k: len(v) for k, v in info.items() if v}
print(json.dumps({"wrong": wrong, "ids": out[0].tolist(), "attention": model.config._attn_implementation}))
"""


def test_the_saved_student_needs_no_mold(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals)
    trainer.train()
    trainer.save_model()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MOLD, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["wrong"]
    assert result["attention"] in ("sdpa", "eager")
    ids = torch.tensor([result["ids"][:-4]])
    expected = trainer.model.eval().generate(ids, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert result["ids"] == expected[0].tolist()


def test_the_model_card_has_method_signals_and_router_weights(tmp_path, signals):
    trainer = make_trainer(tmp_path / "run", signals, beta=2.5)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run/README.md")
    assert {"mold", "generated_from_trainer"} <= set(card.data.tags)
    about = signals.about()
    assert about["fingerprint"] in card.text
    assert about["weights"] in card.text
    assert "| `beta` | `2.5` |" in card.text
    assert "arXiv:2604.15701" in card.text
    listed = card.text.partition("last logged steps: ")[2].partition(".\n")[0]
    weights = [float(part.partition(": ")[2]) for part in listed.split(", ")]
    assert weights == pytest.approx(trainer.layer_weights, abs=1e-3)
    assert len(weights) == 3
    assert sum(weights) == pytest.approx(1, abs=2e-3)
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/README.md").read_text() == (tmp_path / "run/README.md").read_text()
    assert (tmp_path / "run/README.md").read_text().count("## Stepwise attention distillation") == 1


def test_push_to_hub_uploads_model_router_and_card(tmp_path, signals, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": f"somebody/{repo_id}"})()

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            names = {path.name for path in (tmp_path / "run").iterdir()}
            uploads.append((repo_id, str(folder_path), names, (tmp_path / "run/README.md").read_text()))

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    trainer = make_trainer(tmp_path / "run", signals, hub_model_id="student")
    trainer.train()
    trainer.push_to_hub(tags="arithmetic")
    ((repo, folder, names, card),) = uploads
    assert (repo, folder) == ("somebody/student", str(tmp_path / "run"))
    assert {"model.safetensors", "config.json", "tokenizer.json", "mold_router.safetensors", "README.md"} <= names
    assert signals.about()["fingerprint"] in card
    assert "- arithmetic" in card


def test_trackers_get_every_term(tmp_path, signals):
    """What `report_to` names is a callback whose on_log is called."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, signals, max_steps=1)
    trainer.add_callback(Tracker())
    trainer.train()
    trainer.evaluate()
    terms = {"loss_rationale", "loss_answer", "loss_attention"}
    assert terms | {"signal_share", "router_entropy"} <= seen[0].keys()
    assert {f"eval_{term}" for term in terms} <= seen[-1].keys()
    assert all(isinstance(value, int | float) for value in seen[0].values())


def test_rows_of_the_datasets_library(tmp_path, signals):
    """Columns in any order, keywords null; the same items as from examples."""
    expected = make_trainer(tmp_path, signals).train_dataset
    rows = [{"answer": e.answer, "id": e.id, "rationale": e.rationale, "question": e.question} for e in EXAMPLES]
    data = datasets.Dataset.from_list([{**row, "keywords": None} for row in rows])
    actual = make_trainer(tmp_path, signals, examples=data).train_dataset
    assert [item["example"] for item in actual] == [item["example"] for item in expected]
    streamed = data.to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset: is IterableDataset, must have a length"):
        make_trainer(tmp_path, signals, examples=streamed)
