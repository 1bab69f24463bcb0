"""Training on a teacher's mixture, or on rounded signals, is training on all of its layers."""

import dataclasses

import pytest
import torch

from mold.method.extraction import extract_signals
from tests.tiny_runs import (
    BARE,
    EXAMPLES,
    TEACHER_TOKENIZER,
    make_student,
    make_teacher,
    make_trainer,
    metrics,
    weights,
)


def stored(folder, signals, **changes):
    """The cache again, stored in another way."""
    settings = dataclasses.replace(signals.settings, **changes)
    return extract_signals(make_teacher(), TEACHER_TOKENIZER, [*EXAMPLES, BARE], folder, settings, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_norm": "softmax", "tau_row": 0.2, "row_keys": "visible"},
        {"tau_1": 0.03, "mol_teacher_layers_left_out": [0, -2]},
        {"mol_student_layers_left_out": [1], "padding_free": True},
    ],
)
def test_a_mixture_teaches_what_all_layers_teach(tmp_path, signals, options):
    mixing = {
        "tau_1": options.get("tau_1", 0.1),
        "teacher_layers_left_out": options.get("mol_teacher_layers_left_out", []),
    }
    mixed = stored(tmp_path / "signals", signals, signal_layers="mixture", **mixing)
    trainers = [
        make_trainer(tmp_path / name, cache, make_student(), examples=[*EXAMPLES, BARE], optim="sgd", **options)
        for name, cache in (("all", signals), ("mixture", mixed))
    ]
    for trainer in trainers:
        trainer.train()
        trainer.evaluate()
    for one, other in zip(metrics(tmp_path / "all"), metrics(tmp_path / "mixture"), strict=True):
        for name in one.keys() & {"loss_attention", "eval_loss_attention", "grad_norm"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-7), name
    for name, value in weights(trainers[0]).items():
        torch.testing.assert_close(weights(trainers[1])[name], value, rtol=1e-4, atol=1e-6, msg=name)
    maps = [trainer.attention_maps(trainer.eval_dataset[:1])[0] for trainer in trainers]
    for one, other in zip(*(torch.tensor(entry["teacher"]) for entry in maps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_1": 0.2}, r"was extracted with tau_1=0\.1, must be 0\.2"),
        ({"mol_teacher_layers_left_out": [1]}, r"was extracted with teacher_layers_left_out=\[\], must be \[1\]"),
        ({"method": "single_layer"}, "was extracted with signal_layers='mixture', must be 'all'"),
        ({"key_scope": "question"}, "was extracted with key_scope='all', must be 'question'"),
    ],
)
def test_a_mixture_is_of_the_options_that_made_it(tmp_path, signals, options, message):
    mixed = stored(tmp_path / "signals", signals, signal_layers="mixture", tau_1=0.1, teacher_layers_left_out=[])
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, mixed, **options)


def test_half_precision_signals_train(tmp_path, signals):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        cache = signals if dtype == "float32" else stored(tmp_path / "signals", signals, signal_dtype=dtype)
        make_trainer(tmp_path / dtype, cache).train()
        losses[dtype] = [entry["loss_attention"] for entry in metrics(tmp_path / dtype) if "loss_attention" in entry]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
