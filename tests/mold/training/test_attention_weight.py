"""beta: chosen from gradients, rising and falling, kept; presets; key words of the question alone."""

import dataclasses
import json
import math

import pytest
import torch

from mold import MoldConfig
from mold.method.extraction import extract_signals
from mold.training import config
from mold.training.checkpoints import COMPLETE_FILE
from tests.tiny_runs import (
    BARE,
    EXAMPLES,
    TEACHER_TOKENIZER,
    make_student,
    make_teacher,
    make_trainer,
    metrics,
    online_teacher,
    weights,
)


def gradient(trainer, items, terms):
    """Norm of the gradient of a weighted sum of the three terms of one batch, by backward."""
    inputs = trainer._prepare_inputs(trainer.data_collator(items))
    trainer.model.zero_grad()
    sums, _, _ = trainer._term_sums(trainer.model.train(), inputs)
    (sums / trainer.term_counts(inputs) * torch.tensor(terms)).sum().backward()
    norm = math.sqrt(
        sum(p.grad.double().square().sum().item() for p in trainer.model.parameters() if p.grad is not None)
    )
    trainer.model.zero_grad()
    trainer.mold_loss.zero_grad()
    return norm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_share": 0.5, "alpha": 0.2},
        {"row_norm": "softmax"},
        {"cross_entropy": "chunked", "padding_free": True},
    ],
)
def test_attention_has_its_share_of_the_gradient(tmp_path, signals, options):
    trainer = make_trainer(tmp_path, signals, beta="auto", **options)
    alpha, share = options.get("alpha", 0.5), options.get("attention_share", 0.1)
    batches = [trainer.train_dataset[start : start + 3] for start in range(0, 12, 3)]
    means = [
        sum(gradient(trainer, batch, terms) for batch in batches) / 4
        for terms in ([1 - alpha, alpha, 0.0], [0, 0, 1.0])
    ]
    weighted = trainer.beta * means[1]
    assert weighted / (weighted + means[0]) == pytest.approx(share, rel=1e-4)


def test_an_evaluation_may_ask_for_beta_first(tmp_path, signals):
    evaluated = make_trainer(tmp_path / "evaluated", signals, beta="auto")
    metrics = evaluated.evaluate(evaluated.train_dataset)
    assert evaluated.beta == make_trainer(tmp_path / "asked", signals, beta="auto").beta
    terms = [metrics[f"eval_loss_{name}"] for name in ("rationale", "answer", "attention")]
    assert metrics["eval_loss"] == pytest.approx(sum(terms[:2]) / 2 + evaluated.beta * terms[2], rel=1e-5)


def test_choosing_beta_changes_nothing_else(tmp_path, signals):
    student = {"family": "gpt2", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
    auto = make_trainer(tmp_path / "auto", signals, make_student(**student), beta="auto")
    auto.train()
    given = make_trainer(tmp_path / "given", signals, make_student(**student), beta=auto.beta)
    given.train()
    for name, value in weights(auto).items():
        assert torch.equal(weights(given)[name], value), name
    assert {row["beta"] for row in metrics(tmp_path / "auto")} == {auto.beta}
    assert str(auto.beta) in auto.create_model_card().read_text()


def test_a_resumed_training_keeps_its_beta(tmp_path, signals):
    options = {"beta": "auto", "beta_warmup": 0.5, "beta_decay": 0.3, "max_steps": 6, "save_strategy": "steps"}
    options |= {"save_steps": 2, "lr_scheduler_type": "cosine"}
    whole = make_trainer(tmp_path / "whole", signals, **options)
    whole.train()
    cut = make_trainer(tmp_path / "cut", signals, **options)
    cut.add_callback(StopAt(4))
    cut.train()
    # Measured on this student, beta would be another.
    resumed = make_trainer(tmp_path / "cut", signals, make_student(seed=99), **options)
    assert resumed.beta != whole.beta
    resumed.train(resume_from_checkpoint=True)
    assert resumed.beta == whole.beta
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert [row["beta"] for row in metrics(tmp_path / "cut")] == [row["beta"] for row in metrics(tmp_path / "whole")]
    marker = tmp_path / "cut" / "checkpoint-6" / COMPLETE_FILE
    note = json.loads(marker.read_text())
    assert (note["step"], note.pop("beta")) == (6, whole.beta)
    marker.write_text(json.dumps(note))
    with pytest.raises(ValueError, match=r"beta: is 'auto', must be the number that .*checkpoint-6 was trained with"):
        make_trainer(tmp_path / "cut", signals, **options).train(resume_from_checkpoint=True)


def StopAt(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_beta_rises_and_falls(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, max_steps=10, beta=4.0, beta_warmup=0.4, beta_decay=0.2)
    trainer.train()
    # Every step has some attention loss, and the full one is reached.
    assert [row["beta"] for row in metrics(tmp_path)] == [1.0, 2.0, 3.0, *[4.0] * 6, 2.0]
    loss = metrics(tmp_path)[1]
    terms = 0.5 * loss["loss_rationale"] + 0.5 * loss["loss_answer"] + 2.0 * loss["loss_attention"]
    assert loss["loss"] == pytest.approx(terms, rel=1e-4)


def test_beta_that_cannot_be_chosen(tmp_path, signals):
    with pytest.raises(ValueError, match="beta: is 'auto', must be a number without training data"):
        make_trainer(tmp_path, signals, examples=None, beta="auto").evaluate()
    with pytest.raises(ValueError, match=r"signals: is None, must be .* beta=auto"):
        make_trainer(tmp_path, None, beta="auto")
    single = make_trainer(tmp_path, signals, beta="auto")
    single._gradient_norm = lambda inputs, cross_entropy, attention: cross_entropy
    with pytest.raises(ValueError, match="the attention loss has no gradient here"):
        single.train()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"beta": "much"}, "beta: is 'much', must be a number or \"auto\""),
        ({"beta": "nan"}, r"beta: is nan, must be in \[0, inf\]"),
        ({"beta": "auto", "method": "rationales"}, "beta: is 'auto', must be 0 with method='rationales'"),
        ({"attention_share": 1.0}, r"attention_share: is 1\.0, must be between 0 and 1"),
        ({"beta_warmup": 1.5}, r"beta_warmup: is 1\.5, must be in \[0, 1\]"),
        ({"beta_warmup": 0.6, "beta_decay": 0.6}, r"beta_decay: is 0\.6, must leave no more than 1"),
        ({"preset": "best"}, "preset: is 'best', must be one of paper"),
        ({"key_scope": "answer"}, "key_scope: is 'answer', must be one of all, question"),
        ({"row_norm": "l1", "tau_row": 0.1}, r"tau_row: is 0\.1, must be 1 with row_norm='l1'"),
        (
            {"method": "single_layer", "mol_teacher_layers_left_out": [0]},
            r"mol_teacher_layers_left_out: is \[0\], must not be given with method='single_layer'",
        ),
    ],
)
def test_options_are_checked(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        MoldConfig(output_dir=str(tmp_path), **option)


def test_a_preset_gives_what_is_not_given(tmp_path, monkeypatch):
    folder = str(tmp_path)
    plain = MoldConfig(output_dir=folder)
    assert {name: getattr(plain, name) for name in config.PRESETS["paper"]} == config.PRESETS["paper"]
    assert config.PRESETS["paper"] == {
        **{"beta": 1.0, "tau_1": 0.1, "tau_2": 0.5, "tau_row": 1.0},
        **{"row_reduction": "sum", "row_norm": "softmax", "row_keys": "all", "key_scope": "all"},
    }
    other = config.PRESETS["paper"] | {"beta": "auto", "row_norm": "l1", "tau_1": 0.3}
    monkeypatch.setitem(config.PRESETS, "other", other)
    chosen = MoldConfig(output_dir=folder, preset="other", tau_1=0.7)
    assert (chosen.beta, chosen.row_norm, chosen.tau_1, chosen.tau_2) == ("auto", "l1", 0.7, 0.5)
    # What was taken from a preset is as if it had been given.
    assert MoldConfig(**{name: getattr(chosen, name) for name in ("output_dir", *other)}).row_norm == "l1"
    # A method without attention has none, whatever the preset.
    assert MoldConfig(output_dir=folder, preset="other", method="rationales").beta == 0.0


@pytest.mark.parametrize("online", [False, True])
def test_key_words_of_the_question_alone(tmp_path, signals, online):
    settings = dataclasses.replace(signals.settings, key_scope="question")
    asked_alone = None
    if not online:
        examples = [*EXAMPLES, BARE]
        asked_alone = extract_signals(
            make_teacher(), TEACHER_TOKENIZER, examples, tmp_path / "signals", settings, progress=False
        )
    trainers = {
        scope: make_trainer(
            tmp_path / scope,
            None if online else cache,
            key_scope=scope,
            trainer_options=online_teacher() if online else None,
            examples=[*EXAMPLES, BARE],
        )
        for scope, cache in (("all", signals), ("question", asked_alone))
    }
    for whole, asked in zip(*(trainer.train_dataset for trainer in trainers.values()), strict=True):
        words = whole["example"].key_word_texts
        count = len(asked["example"].key_word_texts)
        assert asked["example"].key_word_texts == words[:count]
        end = whole["example"].row_spans[0][1]
        assert [start < end for start, _ in whole["example"].key_spans] == [True] * count + [False] * (
            len(words) - count
        )
        if count and not online:
            torch.testing.assert_close(asked["signal"](), whole["signal"]()[:, :, :count], rtol=1e-5, atol=1e-7)
        if count and online:
            assert asked["teacher"].key_spans == whole["teacher"].key_spans[:count]
    assert any(len(item["example"].key_spans) for item in trainers["question"].train_dataset)
    for trainer in trainers.values():
        trainer.train()
    losses = [metrics(tmp_path / scope)[0]["loss_attention"] for scope in trainers]
    assert losses[0] != losses[1]
    assert all(loss > 0 for loss in losses)
    if not online:
        with pytest.raises(ValueError, match="was extracted with key_scope='all', must be 'question'"):
            make_trainer(tmp_path, signals, key_scope="question")


@pytest.mark.parametrize(
    "options",
    [
        {"row_norm": "softmax", "tau_row": 0.1, "row_keys": "visible"},
        {"mol_teacher_layers_left_out": [0, -1], "mol_student_layers_left_out": [0]},
        {"row_norm": "softmax", "row_keys": "visible", "padding_free": True},
    ],
)
def test_options_train_and_are_resumed(tmp_path, signals, options):
    options |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", signals, **options)
    before = weights(whole)
    whole.train()
    assert all(not torch.equal(value, before[name]) for name, value in weights(whole).items())
    cut = make_trainer(tmp_path / "cut", signals, **options)
    cut.add_callback(StopAt(2))
    cut.train()
    resumed = make_trainer(tmp_path / "cut", signals, make_student(seed=5), **options)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    maps = resumed.attention_maps(resumed.eval_dataset[:2])
    layers = whole.model.config.num_hidden_layers
    assert all(len(entry["student_layer_weights"]) == layers for entry in maps)
    assert len(metrics(tmp_path / "cut")[-1]["router_weights"]) == layers
