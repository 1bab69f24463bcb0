"""The baselines by one option: their texts, losses and evaluation, on the same data and seeds."""

import pytest
import torch
import torch.nn.functional as F

from mold import MoldConfig
from mold.data.encoding import encode_example
from mold.data.examples import ANSWER, DEFAULT_TEMPLATE, PROMPT, RATIONALE, Example, render
from mold.evaluation.predictions import generate_predictions
from mold_kernels import reference
from tests.tiny_runs import EXAMPLES, STUDENT_TOKENIZER, make_student, make_trainer, metrics, weights
from tests.tiny_tokenizers import KINDS, make_tokenizer

HENS = Example("hens", "Ann has 3 hens and buys 4. How many?", "She has 3 + 4 = 7 hens. It is 7.", "7")
METHODS = ["mixture", "single_layer", "step_by_step", "rationales", "answers"]


def test_texts_of_the_tasks():
    prompts = {
        "joint": "Question: Ann has 3 hens and buys 4. How many?\nReasoning:",
        "explain": "explain: Question: Ann has 3 hens and buys 4. How many?\nReasoning:",
        "predict": "predict: Question: Ann has 3 hens and buys 4. How many?\nAnswer:",
        "answer": "Question: Ann has 3 hens and buys 4. How many?\nAnswer:",
    }
    learned = {
        "joint": " She has 3 + 4 = 7 hens. It is 7.\nAnswer: 7",
        "explain": " She has 3 + 4 = 7 hens. It is 7.",
        "predict": " 7",
        "answer": " 7",
    }
    for task, prompt in prompts.items():
        rendered = render(HENS, DEFAULT_TEMPLATE, task)
        assert (rendered.prompt, rendered.text) == (prompt, prompt + learned[task])
        assert rendered.text[slice(*rendered.question)] == HENS.question


@pytest.mark.parametrize("kind", KINDS)
def test_regions_of_the_tasks(kind):
    """Every learned token is of the one region its task has; explain has the steps and key words of joint."""
    tokenizer = make_tokenizer(kind)
    encoded = {
        task: encode_example(HENS, tokenizer, DEFAULT_TEMPLATE, task=task)
        for task in ("joint", "explain", "predict", "answer")
    }
    for task, region in (("explain", RATIONALE), ("predict", ANSWER), ("answer", ANSWER)):
        example = encoded[task]
        prompt = tokenizer(render(HENS, DEFAULT_TEMPLATE, task).prompt)["input_ids"]
        first = next(i for i, r in enumerate(example.regions) if r != PROMPT)
        assert example.input_ids[:first] == prompt[:first]
        assert set(example.regions[first:]) == {region}
        assert example.input_ids[-1] == tokenizer.eos_token_id
        if task == "explain":
            assert example.step_texts == encoded["joint"].step_texts
            assert example.key_word_texts == encoded["joint"].key_word_texts
        else:
            assert "7" in tokenizer.decode(example.input_ids[first:])
            assert example.row_spans == example.key_spans == []


def mean_cross_entropy(model, example, region):
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[torch.tensor(example.regions[1:]) == region]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_methods(tmp_path, signals, method):
    trainer = make_trainer(tmp_path, signals, method=method, beta=None, alpha=0.3, eval_examples=EXAMPLES[:2])
    evaluated = trainer.evaluate()
    model, losses = trainer.model.eval(), {RATIONALE: [], ANSWER: []}
    for example in EXAMPLES[:2]:
        for task in trainer.args.tasks:
            encoded = encode_example(example, STUDENT_TOKENIZER, DEFAULT_TEMPLATE, task=task)
            for region, values in losses.items():
                values.append(mean_cross_entropy(model, encoded, region))
    rationale, answer = (torch.cat(values) for values in losses.values())
    expected = 0.3 * answer.mean() + 0.7 * rationale.mean()
    if method in ("rationales", "answers"):
        expected = torch.cat([rationale, answer]).mean()
    if method in ("mixture", "single_layer"):
        expected = expected + evaluated["eval_loss_attention"]
    assert evaluated["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert ("eval_loss_rationale" in evaluated) == (method != "answers")
    assert ("eval_loss_attention" in evaluated) == (method != "answers")


def test_a_single_layer_is_taught_by_a_single_layer(tmp_path, signals):
    trainer = make_trainer(tmp_path, signals, method="single_layer", mol_teacher_layer=1, mol_student_layer=0)
    (entry,) = trainer.attention_maps(trainer.eval_dataset[:1])
    assert entry["teacher_layer_weights"] == [0, 1, 0, 0, 0]
    assert entry["student_layer_weights"] == [1, 0, 0]
    item = trainer.eval_dataset[0]
    teacher, student = item["signal"]()[1:2, None], torch.tensor(entry["student"])[None, None]
    counts = torch.tensor([teacher.shape[2]]), torch.tensor([teacher.shape[3]])
    expected = reference.layer_mixture_kl(teacher, student, torch.ones(1, 1), *counts, row_norm="l1")
    assert entry["kl"] == pytest.approx(expected.item(), rel=1e-4)
    trainer.train()
    assert not list(trainer.mold_loss.parameters())
    assert metrics(tmp_path)[0]["router_weights"] == [1, 0, 0]


def test_methods_see_the_same_data_in_the_same_order(tmp_path, signals):
    seen = {}
    for method in METHODS:
        trainer = make_trainer(tmp_path / method, signals, method=method, beta=None)
        collate, ids = trainer.data_collator, seen.setdefault(method, [])

        def recording(items, collate=collate, ids=ids):
            ids.extend(item["example"].id for item in items)
            return collate(items)

        trainer.data_collator = recording
        trainer.train()
    assert len(seen["mixture"]) == 12
    assert all(ids == seen["mixture"] for ids in seen.values())


def test_step_by_step_is_the_mixture_of_two_tasks_without_attention(tmp_path, signals):
    options = {"optim": "sgd"}
    first = make_trainer(tmp_path / "1", signals, method="step_by_step", beta=None, **options)
    second = make_trainer(tmp_path / "2", signals, method="mixture", mol_two_tasks=True, beta=0.0, **options)
    for trainer in (first, second):
        trainer.train()
    for name, value in weights(first).items():
        assert torch.equal(weights(second)[name], value), name


@pytest.mark.parametrize("task", ["predict", "answer"])
def test_evaluation_asks_what_the_method_learned(task):
    student = make_student()
    student.generation_config.eos_token_id = None
    rows = generate_predictions(student, STUDENT_TOKENIZER, EXAMPLES[:3], task=task, max_new_tokens=6, progress=False)
    for example, row in zip(EXAMPLES, rows, strict=False):
        prompt = STUDENT_TOKENIZER(render(example, DEFAULT_TEMPLATE, task).prompt, return_tensors="pt")["input_ids"]
        expected = student.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=2)
        assert row["completion"] == STUDENT_TOKENIZER.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
        answer = row["completion"].strip().partition("\n")[0].strip(" _")  # marks of emphasis are none of it
        assert row["prediction"] == (answer or None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method: is 'best', must be one of mixture, single_layer"),
        ({"method": "answers", "beta": 1.0}, r"beta: is 1\.0, must be 0 with method='answers'"),
        ({"method": "rationales", "mol_two_tasks": True}, "mol_two_tasks: is True, must be False"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MoldConfig(output_dir=str(tmp_path), **options)


def test_layers_that_are_not_there_are_refused(tmp_path, signals):
    with pytest.raises(ValueError, match="mol_student_layer: is 3, must be from -3 to 2"):
        make_trainer(tmp_path, signals, method="single_layer", mol_student_layer=3)
    with pytest.raises(ValueError, match="mol_teacher_layer: is -6, must be from -5 to 4"):
        make_trainer(tmp_path, signals, method="single_layer", mol_teacher_layer=-6).evaluate()
