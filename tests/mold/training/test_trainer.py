import dataclasses
import logging
import math
import shutil
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    EarlyStoppingCallback,
    MptConfig,
    MptForCausalLM,
)

from mold import MoldConfig, MoldTrainer
from mold.training.checkpoints import last_complete_checkpoint
from tests.tiny_runs import BARE, EXAMPLES, STUDENT_TOKENIZER, make_student, make_trainer, metrics, weights


@contextmanager
def warnings_of(name):
    """The messages that a logger warns with; transformers' loggers do not propagate to pytest's caplog."""
    said = []

    class Keeping(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler = Keeping(logging.WARNING)
    logging.getLogger(name).addHandler(handler)
    yield said
    logging.getLogger(name).removeHandler(handler)


def test_every_parameter_of_student_and_router_moves(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals)
    before = weights(trainer)
    trainer.train()
    for name, value in weights(trainer).items():
        assert not torch.equal(value, before[name]), name
        assert value.isfinite().all(), name


def test_all_terms_go_down(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, max_steps=40, learning_rate=5e-3, beta=5.0)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for term in ("loss", "loss_rationale", "loss_answer", "loss_attention"):
        assert after[f"eval_{term}"] < 0.8 * before[f"eval_{term}"], term


def test_metrics_name_every_term(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, examples=[*EXAMPLES[:5], BARE], per_device_train_batch_size=6)
    trainer.train()
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        terms = row["loss_rationale"], row["loss_answer"], row["loss_attention"]
        assert all(value > 0 for value in terms)
        assert row["loss"] == pytest.approx(0.5 * terms[0] + 0.5 * terms[1] + 2 * terms[2], rel=1e-4)
        assert row["signal_share"] == pytest.approx(5 / 6)
        assert 0 < row["router_entropy"] <= math.log(3) + 1e-6
        assert sum(row["router_weights"]) == pytest.approx(1, abs=1e-5)


def test_gradient_accumulation_changes_nothing(tmp_path, signals):
    """Micro-batches differ in tokens and in examples with a signal; one has none at all. SGD: Adam divides tiny
    gradients by their own size, rounding included."""
    examples = [BARE, *EXAMPLES[:7]]
    results = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            tmp_path / str(size),
            signals,
            make_student(dtype=torch.float64),
            examples,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1e-2,
            max_steps=3,
        )
        trainer.mold_loss.double()
        trainer.train()
        results.append((weights(trainer), [row["loss"] for row in metrics(tmp_path / str(size))]))
    (expected, losses), *others = results
    for actual, other_losses in others:
        assert other_losses == pytest.approx(losses, rel=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_changes_nothing(tmp_path, signals, family):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing), signals, make_student(family), gradient_checkpointing=checkpointing
        )
        trainer.train()
        results.append(weights(trainer))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_the_side_of_the_padding_changes_nothing(tmp_path, signals):
    losses = []
    for side in ("right", "left"):
        trainer = make_trainer(tmp_path / side, signals, padding_side=side, pad_to_multiple_of=16)
        losses.append(trainer.evaluate())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def wide(config, model, **options):
    """Weights wide enough for positions to count."""
    return lambda: model(config(vocab_size=len(STUDENT_TOKENIZER), initializer_range=0.2, **options)).eval()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(wide(BloomConfig, BloomForCausalLM, hidden_size=32, n_layer=2, n_head=2), id="alibi by the mask"),
        pytest.param(wide(MptConfig, MptForCausalLM, d_model=32, n_layers=2, n_heads=2), id="alibi by the length"),
        pytest.param(lambda: make_student("gpt2", initializer_range=0.2), id="learned positions"),
    ],
)
def test_the_side_of_the_padding_changes_nothing_for_other_positions(tmp_path, make):
    torch.manual_seed(0)
    model, losses = make(), []
    for side in ("right", "left"):
        options = {"method": "rationales", "beta": None, "padding_side": side, "pad_to_multiple_of": 16}
        losses.append(make_trainer(tmp_path / side, None, model, **options).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_size_of_evaluation_batches_changes_nothing(tmp_path, signals):
    losses = [
        make_trainer(tmp_path / str(size), signals, eval_examples=[*EXAMPLES, BARE], per_device_eval_batch_size=size)
        for size in (1, 4)
    ]
    one, four = (trainer.evaluate() for trainer in losses)
    assert one == pytest.approx(four, rel=1e-5)


@pytest.mark.parametrize("cut_at", [2, 3])
def test_resumed_training_is_bit_equal(tmp_path, signals, cut_at):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    undisturbed = make_trainer(tmp_path / "undisturbed", signals, **options)
    undisturbed.train(resume_from_checkpoint=True)

    class Killed(Exception):
        pass

    killed = make_trainer(tmp_path / "killed", signals, **options)
    save = killed._save_checkpoint

    def dying_save(model, trial):
        if killed.state.global_step == cut_at:  # the checkpoint lacks the file that says it is whole
            super(MoldTrainer, killed)._save_checkpoint(model, trial)
            raise Killed
        save(model, trial)

    killed._save_checkpoint = dying_save
    with pytest.raises(Killed):
        killed.train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(tmp_path / "killed").endswith(f"checkpoint-{cut_at - 1}")
    resumed = make_trainer(tmp_path / "killed", signals, make_student(seed=99), **options)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(resumed)[name], value), name
    last = [load_file(tmp_path / run / "checkpoint-6/mold_router.safetensors") for run in ("undisturbed", "killed")]
    for name, value in last[0].items():
        assert torch.equal(last[1][name], value)


@pytest.mark.parametrize("length", [{"max_steps": 10}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_what_has_ended_stays_as_it_is(tmp_path, signals, length):
    """Its last step is none of an epoch's end: transformers' own Trainer makes a further one at every start."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", **length}
    options |= {"per_device_train_batch_size": 2}
    ended = make_trainer(tmp_path, signals, **options)
    ended.train()
    ended.save_model()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        again = make_trainer(tmp_path, signals, make_student(seed=99), **options)
        result = again.train(resume_from_checkpoint=True)
        assert result.global_step == ended.state.global_step == again.state.global_step
        for name, value in weights(ended).items():
            assert torch.equal(weights(again)[name], value), name
        again.save_model()  # its card and its special tokens too
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert again.evaluate() == ended.evaluate()
    # More steps than it had: it goes on.
    further = make_trainer(tmp_path, signals, make_student(seed=99), **options | {"max_steps": 12})
    assert further.train(resume_from_checkpoint=True).global_step == 12


def test_a_training_that_was_stopped_early_has_ended(tmp_path, signals):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    trainers = []
    for _ in range(2):
        trainers.append(make_trainer(tmp_path, signals, **options))
        trainers[-1].add_callback(EarlyStoppingCallback(2))
        trainers[-1].train(resume_from_checkpoint=True)
    stopped, again = trainers
    assert stopped.state.global_step == again.state.global_step < 8
    for name, value in weights(stopped).items():
        assert torch.equal(weights(again)[name], value), name


def test_the_best_student_comes_with_its_router(tmp_path, signals):
    """Also where the run folder was moved since, and a copy is left where it was."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    trainer = make_trainer(tmp_path / "run", signals, **options)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 4
    router = load_file(tmp_path / f"run/checkpoint-{best}/mold_router.safetensors")
    last = load_file(tmp_path / "run/checkpoint-4/mold_router.safetensors")
    for name, value in trainer.mold_loss.router.state_dict().items():
        assert torch.equal(value, router[name]), name
        assert not torch.equal(value, last[name]), name
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / f"run/checkpoint-{best}").mkdir(parents=True)
    moved = make_trainer(tmp_path / "moved", signals, make_student(seed=99), **options)
    moved.train(resume_from_checkpoint=True)
    for name, value in weights(trainer).items():
        assert torch.equal(weights(moved)[name], value), name
    # Without the best one nobody knows the end: it is trained again from before it.
    (tmp_path / f"moved/checkpoint-{best}/model.safetensors").write_bytes(b"")
    mended = make_trainer(tmp_path / "moved", signals, make_student(seed=99), **options)
    if best == 1:
        mended = make_trainer(tmp_path / "moved", signals, **options)
    mended.train(resume_from_checkpoint=True)
    for name, value in weights(trainer).items():
        assert torch.equal(weights(mended)[name], value), name


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": cut,
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
FILES += ["mold_router.safetensors", "mold_complete.json", "training_args.bin", "tokenizer.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, signals):
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, signals, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder, weights(trainer)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, signals, trained, file):
    folder, expected = trained
    for name, damage in DAMAGES.items():
        shutil.copytree(folder, tmp_path / name)
        damage(tmp_path / name / "checkpoint-4" / file)
        with warnings_of("mold.training.checkpoints") as said:
            assert last_complete_checkpoint(tmp_path / name).endswith("checkpoint-2"), name
        assert len(said) == 1
        assert said[0].count("\n") == 0
        assert f"{name}/checkpoint-4 " in said[0]
        assert said[0].endswith("checkpoint-4 is passed over")
    if file not in ("optimizer.pt", "mold_router.safetensors"):
        return
    trainer = make_trainer(tmp_path / "cut", signals, make_student(seed=99), save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: \S*checkpoint-4 is damaged \(\S+ is "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    for name, value in expected.items():
        assert torch.equal(weights(trainer)[name], value), name
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-4")


@pytest.mark.parametrize(
    "note", ["[]", "null", "{}", '{"files": 1}', '{"files": {"model.safetensors": 1}}', "[" * 10**5]
)
def test_a_note_of_another_form_is_damage(tmp_path, trained, note):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4/mold_complete.json").write_text(note)
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")


def test_a_training_cannot_go_on_without_its_optimizer(tmp_path, signals):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer = make_trainer(tmp_path, signals, **options)
    trainer.train()
    again = make_trainer(tmp_path, signals, make_student(seed=99), **options)
    again.train(resume_from_checkpoint=True)  # it has ended
    for name, value in weights(trainer).items():
        assert torch.equal(weights(again)[name], value), name
    with pytest.raises(ValueError, match=r"checkpoint-4 holds no optimizer\.pt \(save_only_model\)"):
        make_trainer(tmp_path, signals, **options | {"max_steps": 6}).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path, signals, trained):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4/mold_complete.json").unlink()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4 was cut short"):
        make_trainer(tmp_path, signals).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_old_checkpoints_go(tmp_path, signals):
    make_trainer(tmp_path, signals, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_saved_student_is_an_ordinary_model(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals)
    trainer.train()
    trainer.save_model()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_router_is_clipped_with_the_student(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, max_steps=1)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = math.sqrt(sum((after[n] - before[n]).double().square().sum().item() for n in before))
    assert moved == pytest.approx(1e-3, rel=1e-2)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.mold_loss.parameters())


def test_router_learning_rate(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, mol_router_learning_rate=0.25)
    trainer.create_optimizer()
    rates = {p: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[p] for p in trainer.mold_loss.parameters()} == {0.25}
    assert {rates[p] for p in trainer.model.parameters()} == {1e-3}


def test_without_the_attention_loss(tmp_path, signals):
    """beta=0 trains the same student with and without signals; with them the attention loss is still measured."""
    options = {"beta": 0.0, "optim": "sgd"}  # Adam divides tiny gradients by their own size, rounding included
    with_signals = make_trainer(tmp_path / "with", signals, make_student(dtype=torch.float64), **options)
    without = make_trainer(tmp_path / "without", None, make_student(dtype=torch.float64), **options)
    for trainer in (with_signals, without):
        trainer.train()
    actual = weights(with_signals)
    for name, value in weights(without).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert with_signals.evaluate()["eval_loss_attention"] > 0
    assert "eval_loss_attention" not in without.evaluate()
    logged = [row for row in metrics(tmp_path / "with") if "loss" in row]
    assert logged
    # What training did not measure it does not log, not even as 0.
    assert not any(row.keys() & {"loss_attention", "signal_share", "router_entropy"} for row in logged)


def test_without_the_attention_loss_no_example_needs_key_words(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, examples=[BARE], beta=0.0, max_steps=1)
    assert trainer.train().training_loss > 0
    with pytest.raises(ValueError, match="none of its 1 examples has key words"):
        make_trainer(tmp_path, signals, examples=[BARE])


def test_gradient_norms_and_maps(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, eval_examples=[*EXAMPLES[:3], BARE])
    norms = trainer.term_gradient_norms(trainer.train_dataset[:4])
    assert norms.keys() == {"rationale", "answer", "attention"}
    assert all(norm > 0 for norm in norms.values())
    maps = trainer.attention_maps(trainer.eval_dataset)
    assert [entry["id"] for entry in maps] == [example.id for example in EXAMPLES[:3]]
    for entry in maps:
        shape = (len(entry["steps"]), len(entry["key_words"]))
        assert torch.tensor(entry["teacher"]).shape == torch.tensor(entry["student"]).shape == shape
        assert (len(entry["teacher_layer_weights"]), len(entry["student_layer_weights"])) == (5, 3)
    mean = sum(entry["kl"] for entry in maps) / 3
    assert trainer.evaluate()["eval_loss_attention"] == pytest.approx(mean, rel=1e-4)


def test_a_student_by_name(tmp_path, signals):
    make_student().save_pretrained(tmp_path / "student")
    STUDENT_TOKENIZER.save_pretrained(tmp_path / "student")
    args = MoldConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, disable_tqdm=True, model_init_kwargs={"dtype": "float64"}
    )
    rows = [dataclasses.asdict(example) for example in EXAMPLES]
    trainer = MoldTrainer(str(tmp_path / "student"), args, rows, signals=signals)
    assert trainer.model.dtype == torch.float64
    trainer.train()


# Refusals


def test_attention_dropout_is_refused_by_its_name(tmp_path, signals):
    with pytest.raises(ValueError, match=r"attn_pdrop: is 0\.1, must be 0"):
        make_trainer(tmp_path, signals, make_student("gpt2", attn_pdrop=0.1))
    make_trainer(tmp_path, None, make_student("gpt2", attn_pdrop=0.1), beta=0.0)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant=True, must be False"):
        MoldConfig(
            output_dir=str(tmp_path),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_reentrant_checkpointing_behind_the_options_is_refused(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer.model.enable_input_require_grads()
    with pytest.raises(ValueError, match="carry no gradient"):
        trainer.train()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, signals):
    student = make_student()
    with torch.no_grad():
        student.lm_head.weight[7] = torch.nan
    message = r"the loss is not finite at step 1 or not long before it: rationale is nan, answer is nan; lower"
    with pytest.raises(FloatingPointError, match=message):
        make_trainer(tmp_path, signals, student, logging_steps=1).train()
    # Between two loggings nothing is saved, and at the end it is told too.
    for saving in ({"save_steps": 1}, {"save_strategy": "no"}):
        with pytest.raises(FloatingPointError, match="the loss is not finite"):
            make_trainer(tmp_path / "other", signals, student, logging_steps=100, **saving).train()
        assert not [*(tmp_path / "other").glob("checkpoint-*/model*")]


def test_what_splits_the_model_is_refused(tmp_path, signals):
    for name in ("fsdp", "deepspeed"):
        trainer = make_trainer(tmp_path, signals)
        with (
            mock.patch.object(trainer.args, name, True),
            pytest.raises(ValueError, match=f"{name}: is on, must be off"),
        ):
            trainer._refuse_unsupported_parallelism()
    with (
        mock.patch.object(MoldConfig, "n_gpu", 2),
        pytest.raises(ValueError, match="n_gpu: is 2, must be 1 a process: start with torchrun"),
    ):
        make_trainer(tmp_path, signals)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, signals, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use_cpu: is not set, must be True: 2 processes were started"):
        make_trainer(tmp_path, signals)


def test_data_that_cannot_be_learned_from_is_refused(tmp_path, signals):
    with pytest.raises(ValueError, match="train_dataset: is empty"):
        make_trainer(tmp_path, signals, examples=[])
    with pytest.raises(ValueError, match="none of its 1 examples has key words"):
        make_trainer(tmp_path, signals, examples=[BARE])
    with pytest.raises(ValueError, match=r"signals: is None, must be .* beta=2\.0"):
        make_trainer(tmp_path, None)
    with pytest.raises(ValueError, match="row_reduction='sum', must be 'mean'"):
        make_trainer(tmp_path, signals, row_reduction="mean")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alpha": 1.5}, r"alpha: is 1\.5, must be in \[0, 1\]"),
        ({"beta": -1.0}, r"beta: is -1\.0, must be in"),
        ({"tau_1": 0.0}, r"tau_1: is 0\.0, must be greater than 0"),
        ({"tau_2": -1.0}, r"tau_2: is -1\.0"),
        ({"row_norm": "l2"}, "row_norm: is 'l2', must be one of softmax, l1"),
        ({"row_reduction": "max"}, "row_reduction: is 'max'"),
        ({"padding_side": "both"}, "padding_side: is 'both'"),
        ({"cross_entropy": "fused"}, "cross_entropy: is 'fused', must be one of full, chunked, liger"),
        ({"use_liger_kernel": True}, "use_liger_kernel: is True, must be False"),
        ({"remove_unused_columns": True}, "remove_unused_columns: is True, must be False"),
        ({"template": "{question} {answer}"}, "template: is '{question} {answer}', must hold"),
    ],
)
def test_options_are_checked(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        MoldConfig(output_dir=str(tmp_path), **option)


def test_training_makes_logits_where_something_is_predicted_alone(tmp_path, signals):
    trainer = make_trainer(tmp_path / "kept", signals)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    predicting = (batch["regions"][:, 1:] > 0).any(0).sum()
    assert outputs.logits.shape[1] == predicting < batch["input_ids"].shape[1] - 1

    # A model that cannot leave any out makes all, and learns the same.
    student = make_student()
    forward = student.forward
    student.forward = lambda input_ids, attention_mask=None, **kwargs: forward(
        input_ids=input_ids, attention_mask=attention_mask, **kwargs
    )
    whole = make_trainer(tmp_path / "whole", signals, student)
    whole.mold_loss.load_state_dict(trainer.mold_loss.state_dict())
    whole.model.train()
    whole_loss, outputs = whole.compute_loss(whole.model, batch, return_outputs=True)
    assert outputs.logits.shape[1] == batch["input_ids"].shape[1]
    torch.testing.assert_close(whole_loss, loss)
    for one, other in ((trainer, loss), (whole, whole_loss)):
        one.model.zero_grad()
        other.backward()
    for expected, found in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
