"""A teacher that runs beside the student gives the losses that its cached signals give."""

import pytest
import torch

from mold.data.examples import Example
from mold.method.online_teacher import OnlineTeacher
from tests.tiny_runs import (
    BARE,
    EXAMPLES,
    STUDENT_TOKENIZER,
    TEACHER_TOKENIZER,
    make_student,
    make_teacher,
    make_trainer,
    metrics,
    online_teacher,
    weights,
)


@pytest.mark.parametrize("method", ["mixture", "single_layer"])
def test_training_equals_training_on_cached_signals(tmp_path, signals, method):
    examples = [BARE, *EXAMPLES]
    options = {"examples": examples, "optim": "sgd", "method": method, "mol_two_tasks": method == "mixture"}
    cached = make_trainer(tmp_path / "cached", signals, make_student(dtype=torch.float64), **options)
    teacher = make_teacher().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    beside = make_trainer(
        tmp_path / "online", None, make_student(dtype=torch.float64), trainer_options=online_teacher(teacher), **options
    )
    assert cached.evaluate() == pytest.approx(beside.evaluate(), rel=1e-6)
    for trainer in (cached, beside):
        trainer.mold_loss.double()
        trainer.train()
    losses = [[row.get("loss") for row in metrics(tmp_path / name)[1:]] for name in ("cached", "online")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # The teacher's float32 attention depends in its last bits on what shares its batch.
    for name, value in weights(cached).items():
        torch.testing.assert_close(weights(beside)[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    maps = [trainer.attention_maps(trainer.eval_dataset[:2]) for trainer in (cached, beside)]
    for mine, theirs in zip(*maps, strict=True):
        torch.testing.assert_close(torch.tensor(mine["teacher"]), torch.tensor(theirs["teacher"]))


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_a_teacher_in_chunks(tmp_path, size):
    """Texts one by one or two together, and an MLP so many of their tokens: the same attention."""
    trainers = [
        make_trainer(tmp_path, None, trainer_options=online_teacher(), **options)
        for options in ({}, {"teacher_chunk_size": size})
    ]
    batch = trainers[0].data_collator(list(trainers[0].train_dataset)[:3])
    whole, chunked = (trainer._prepare_inputs(dict(batch))["teacher_attention"] for trainer in trainers)
    assert whole.shape[:2] == (3, 5)
    torch.testing.assert_close(chunked, whole)


def test_a_teacher_by_name(tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    TEACHER_TOKENIZER.save_pretrained(tmp_path / "teacher")
    trainers = [
        make_trainer(tmp_path, None, trainer_options=options)
        for options in (online_teacher(), {"teacher_model": str(tmp_path / "teacher")})
    ]
    assert trainers[0].evaluate() == pytest.approx(trainers[1].evaluate(), rel=1e-6)


def test_the_teacher_of_the_attention_need_not_have_written_the_rationales(tmp_path):
    foreign = [Example(e.id, e.question, f"Let us see. {e.rationale}", e.answer) for e in EXAMPLES]
    trainer = make_trainer(
        tmp_path, None, examples=foreign, eval_examples=foreign[:5], trainer_options=online_teacher()
    )
    trainer.train()
    assert all(row["loss_attention"] > 0 for row in metrics(tmp_path))


def test_without_beta_the_teacher_runs_in_evaluation_alone(tmp_path):
    trainer = make_trainer(tmp_path, None, beta=0.0, trainer_options=online_teacher())
    calls = []
    trainer.teacher.model.register_forward_hook(lambda *_: calls.append("whole model"))
    trainer.teacher.model.base_model.register_forward_hook(lambda *_: calls.append("backbone"))
    trainer.train()
    assert not calls
    assert trainer.evaluate()["eval_loss_attention"] > 0
    assert set(calls) == {"backbone"}


def test_what_is_refused(tmp_path, signals):
    with pytest.raises(ValueError, match="teacher_model: is given together with signals"):
        make_trainer(tmp_path, signals, trainer_options=online_teacher())
    with pytest.raises(ValueError, match="teacher_processing_class: is None"):
        make_trainer(tmp_path, None, trainer_options={"teacher_model": make_teacher()})
    teacher = OnlineTeacher(make_teacher(), TEACHER_TOKENIZER, "{question} {rationale} {answer}", "sum")
    student = OnlineTeacher(make_student(), STUDENT_TOKENIZER, "{question} {rationale} {answer}", "sum")
    with pytest.raises(ValueError, match=f"example {EXAMPLES[0].id}: the teacher has"):
        teacher.encode(EXAMPLES[0], student.encode(EXAMPLES[1], student_encoding(EXAMPLES[1])))


def student_encoding(example):
    from mold.data.encoding import encode_example

    return encode_example(example, STUDENT_TOKENIZER, "{question} {rationale} {answer}")
