import dataclasses
import fcntl

import datasets
import pytest
import torch
from safetensors.torch import load_file

from mold import MoldConfig, MoldTrainer, StepwiseAttentionMixin
from mold.data.chat import CHAT_TEMPLATE
from mold.data.examples import Example
from mold.data.problems import generate_problems
from mold.files import LOCK
from mold.method.extraction import extract_signals
from mold.method.signal_settings import SignalSettings
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

trl = pytest.importorskip("trl")

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
EXAMPLES = generate_problems(8, seed=4)
BARE = Example("train-7", "Who came first?", "The hen came first.", "the hen")


class Trainer(StepwiseAttentionMixin, trl.SFTTrainer):
    pass


def tokenizer():
    made = make_tokenizer.__wrapped__("smollm")
    made.chat_template = CHATML
    return made


def rows(examples):
    """As TRL's users have them: messages, without ids."""
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": e.question},
                    {"role": "assistant", "content": f"{e.rationale}\nAnswer: {e.answer}"},
                ]
            }
            for e in examples
        ]
    )


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    teacher_tokenizer = make_tokenizer.__wrapped__("llama3")
    teacher_tokenizer.chat_template = "<s>" + CHATML
    teacher = make_model("qwen3", vocab=len(teacher_tokenizer), layers=4, seed=8)
    named = [Example(f"train-{i}", e.question, e.rationale, e.answer) for i, e in enumerate(EXAMPLES[:7])]
    named += [BARE, *(Example(f"eval-{i}", e.question, e.rationale, e.answer) for i, e in enumerate(EXAMPLES[:2]))]
    settings = SignalSettings.of(teacher, "tiny", CHAT_TEMPLATE, "sum")
    return extract_signals(teacher, teacher_tokenizer, named, tmp_path_factory.mktemp("s"), settings, progress=False)


def make_trainer(folder, signals, *, dtype=torch.float32, examples=(*EXAMPLES[:7], BARE), kwargs=None, **options):
    tok = tokenizer()
    student = make_model("llama", vocab=len(tok), initializer_range=0.05, dtype=dtype, attention="sdpa")
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    } | options
    kwargs = {"signals": signals, "beta": 2.0, "row_norm": "l1"} | (kwargs or {})
    return Trainer(
        student,
        trl.SFTConfig(**options),
        train_dataset=rows(examples),
        eval_dataset=rows(EXAMPLES[:2]),
        processing_class=tok,
        **kwargs,
    )


def losses(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def parameters(trainer):
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.mold_loss.named_parameters())}
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def test_the_loss_is_that_of_sft_and_beta_times_the_attention_loss(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    plain = trl.SFTTrainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset.remove_columns("mold_index"),
        processing_class=trainer.processing_class,
    )
    plain.train()
    attention = losses(trainer, "loss_attention")[0]
    assert attention > 0
    assert losses(trainer, "loss")[0] == pytest.approx(losses(plain, "loss")[0] + 2 * attention, rel=1e-4)
    assert trainer.evaluate()["eval_loss_attention"] > 0


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals)
    with open(tmp_path / LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"output_dir: .* is in use by another process"):
            trainer.train()
    trainer.train()


def test_every_parameter_of_student_and_router_moves_and_the_loss_goes_down(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, max_steps=20)
    before = parameters(trainer)
    trainer.train()
    for name, value in parameters(trainer).items():
        assert not torch.equal(value, before[name]), name
    found = losses(trainer, "loss_attention")
    assert sum(found[-5:]) < 0.7 * sum(found[:5])  # batches differ


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_accumulation_changes_nothing(tmp_path, signals, checkpointing):
    """Of eight examples one has no key words: micro-batches differ in tokens and in signals."""
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path / str(size),
            signals,
            dtype=torch.float64,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            optim="sgd",
        )
        trainer.mold_loss.double()
        trainer.train()
        results.append(parameters(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_checkpoints_hold_the_router_and_training_goes_on_from_them(tmp_path, signals):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, signals, **options).train()
    expected = load_file(tmp_path / "checkpoint-4/mold_router.safetensors")
    resumed = make_trainer(tmp_path, signals, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in resumed.mold_loss.router.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    resumed.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "generated_from_trainer" in card or "trl" in card
    assert signals.about()["fingerprint"] in card


def test_lora(tmp_path, signals):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    trainer = make_trainer(tmp_path, signals, kwargs={"peft_config": config})
    before = parameters(trainer)
    trainer.train()
    for name, value in parameters(trainer).items():
        is_trained = "lora_" in name or "router" in name
        assert torch.equal(value, before[name]) != is_trained, name


# Refusals


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, {}, "packing: is True"),
        ({"completion_only_loss": False}, {}, "completion_only_loss: is False"),
        ({"max_length": 20}, {}, "more than max_length=20"),
        ({}, {"beta": 0.0}, r"beta: is 0\.0, must be greater than 0"),
        ({}, {"data_collator": len}, "data_collator: is given, must be None"),
    ],
)
def test_what_the_loss_cannot_follow_is_refused(tmp_path, signals, options, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, signals, kwargs=kwargs, **options)


def trainer_of_rows(like, rows, signals, **options):
    """A trainer of other rows, with the model and the arguments of one that there is."""
    data = datasets.Dataset.from_list(rows)
    options |= {"processing_class": tokenizer(), "signals": signals}
    return Trainer(like.model, like.args, train_dataset=data, **options)


def test_signals_are_found_whatever_the_rows_are_called(tmp_path, signals):
    """The cache was made of examples with other ids, in another order and without blanks around their texts."""
    examples = [*EXAMPLES[:7], BARE][::-1]
    trainer = make_trainer(tmp_path, signals, examples=examples)
    padded = [{k: f" {getattr(e, k)}\n" for k in ("question", "rationale", "answer")} for e in examples]
    plain = trainer_of_rows(trainer, padded, signals)
    for one, other, example in zip(trainer._items, plain._items, examples, strict=False):
        assert (one["signal"] is None) == (other["signal"] is None) == (example is BARE)
        assert one["signal"] is None or torch.equal(one["signal"](), other["signal"]())


def solution(example):
    return f"{example.rationale}\nAnswer: {example.answer}"


FORMS = {
    "problem": lambda e: {"problem": e.question, "solution": solution(e)},
    "instruction": lambda e: {"instruction": e.question, "output": solution(e)},
    "alpaca": lambda e: {"instruction": e.question, "input": "", "output": solution(e)},
    "query": lambda e: {"query": e.question, "response": solution(e)},
    "capitals": lambda e: {"Problem": e.question, "Solution": e.rationale, "Answer": e.answer},
    "prompt": lambda e: {"prompt": e.question, "completion": solution(e)},
    "prompt of messages": lambda e: {
        "prompt": [{"role": "user", "content": e.question}],
        "completion": [{"role": "assistant", "content": solution(e)}],
    },
    "conversations": lambda e: {
        "conversations": [{"from": "human", "value": e.question}, {"from": "gpt", "value": solution(e)}]
    },
    "question": lambda e: {"question": e.question, "rationale": e.rationale, "answer": e.answer},
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_of_common_sets_are_trained_as_in_mold_trainer(tmp_path, signals, form):
    data = [FORMS[form](example) for example in EXAMPLES[:4]]
    trainer = make_trainer(tmp_path, signals, examples=EXAMPLES[:4], max_steps=2)
    trained = trainer_of_rows(trainer, data, signals, row_norm="l1")
    options = MoldConfig(output_dir=str(tmp_path), template=CHAT_TEMPLATE, use_cpu=True, disable_tqdm=True)
    student = make_model("llama", vocab=len(tokenizer()), initializer_range=0.05, attention="sdpa")
    expected = MoldTrainer(student, options, data, processing_class=tokenizer(), signals=signals).train_dataset
    for mine, theirs in zip(trained._items, expected, strict=True):
        assert dataclasses.replace(mine["example"], id="") == dataclasses.replace(theirs["example"], id="")
        assert torch.equal(mine["signal"](), theirs["signal"]())
    before = parameters(trained)
    trained.train()
    assert losses(trained, "loss_attention")[0] > 0
    assert all(not torch.equal(value, before[name]) for name, value in parameters(trained).items())


def test_data_without_signals_is_refused(tmp_path, signals):
    with pytest.raises(ValueError, match="train-8: has no teacher signal"):
        make_trainer(tmp_path, signals, examples=[*EXAMPLES[:7], BARE, EXAMPLES[7]])


def test_a_mixture_of_another_temperature_is_refused(tmp_path, signals):
    options = {"signal_layers": "mixture", "tau_1": 0.5, "teacher_layers_left_out": []}
    mixed = extract_signals(
        make_model("qwen3", vocab=len(tokenizer()), layers=4, seed=8),
        *(tokenizer(), EXAMPLES[:4], tmp_path / "mixture", dataclasses.replace(signals.settings, **options)),
        progress=False,
    )
    with pytest.raises(ValueError, match=r"was extracted with tau_1=0\.5, must be 0\.1"):
        make_trainer(tmp_path, mixed, examples=EXAMPLES[:4])
    trainer = make_trainer(tmp_path, mixed, examples=EXAMPLES[:4], kwargs={"tau_1": 0.5})
    trainer.train()
    assert losses(trainer, "loss_attention")[0] > 0


def test_an_evaluation_between_two_loggings(tmp_path, signals):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    trainer = make_trainer(tmp_path, signals, **options)
    trainer.train()
    for name, count in (("loss_attention", 2), ("eval_loss_attention", 4)):
        values = [row[name] for row in trainer.state.log_history if name in row]
        assert len(values) == count
        assert all(isinstance(value, float) and value > 0 for value in values)
