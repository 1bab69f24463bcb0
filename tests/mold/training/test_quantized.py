"""QLoRA and 8-bit optimizers, through bitsandbytes."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from mold.training.heads import ChunkedHead
from tests.tiny_runs import BARE, EXAMPLES, STUDENT_TOKENIZER, make_student, make_trainer, metrics, weights

bitsandbytes = pytest.importorskip("bitsandbytes")
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def make_quantized(folder):
    make_student(layers=2).save_pretrained(folder)
    STUDENT_TOKENIZER.save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return str(folder), {"quantization_config": quantization, "device_map": "cpu"}


def train(folder, signals, model, **options):
    torch.manual_seed(5)
    options = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2} | options
    trainer = make_trainer(
        folder,
        signals,
        model,
        [BARE, *EXAMPLES[:7]],
        trainer_options={"peft_config": copy.deepcopy(options.pop("peft_config", None))},
        **options,
    )
    before = weights(trainer)
    trainer.train()
    return trainer, before


def test_quantized_weights_on_a_cpu_are_refused(tmp_path, signals):
    student, init = make_quantized(tmp_path)
    with pytest.raises(ValueError, match="model: is quantized and on a CPU, must be on a GPU to be trained"):
        train(tmp_path, signals, student, peft_config=LORA, model_init_kwargs=init)


def test_qlora_with_every_saver_equals_qlora(tmp_path, signals, monkeypatch):
    """On a CPU, where it is refused because of what an evaluation does; there is none here."""
    monkeypatch.setattr("mold.training.trainer.check_adapter", lambda model: None)
    monkeypatch.setattr(ChunkedHead, "_check", lambda *_: None)
    student, init = make_quantized(tmp_path / "student")
    savers = {"gradient_checkpointing": True, "cross_entropy": "chunked", "padding_free": True}
    trained = []
    for name, options in (("plain", {}), ("savers", savers)):
        trainer, before = train(
            tmp_path / name,
            signals,
            student,
            optim="sgd",
            peft_config=LORA,
            model_init_kwargs=init,
            **options,
        )
        base = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
        assert isinstance(base, bitsandbytes.nn.Linear4bit)
        after = weights(trainer)
        for key, value in before.items():
            learned = "lora_" in key or key.startswith("router")
            assert torch.equal(after[key], value) != learned, key
        trained.append(after)
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_8_bit_adam_trains_student_and_router(tmp_path, signals):
    losses = {}
    for optim in ("adamw_torch", "adamw_bnb_8bit"):
        trainer, before = train(tmp_path / optim, signals, make_student(layers=2), optim=optim, learning_rate=1e-3)
        for name, value in weights(trainer).items():
            assert not torch.equal(value, before[name]), name
        losses[optim] = [row["loss"] for row in metrics(tmp_path / optim)]
    states = {s["state1"].dtype for s in trainer.optimizer.state.values()}
    assert torch.uint8 in states
    assert losses["adamw_bnb_8bit"] == pytest.approx(losses["adamw_torch"], rel=1e-2)
