from dataclasses import replace

import pytest
import torch

from mold.data.encoding import encode_example
from mold.data.examples import ANSWER, DEFAULT_TEMPLATE, RATIONALE
from mold.data.problems import generate_problems
from mold.evaluation.likelihoods import log_likelihoods
from tests.tiny_models import make_model
from tests.tiny_runs import STUDENT_TOKENIZER, make_student, make_trainer

EXAMPLES = generate_problems(7, seed=3)


def token_by_token(model, example, task, region):
    """The log-likelihood of one region, from the whole text's logits in float64."""
    encoded = encode_example(example, STUDENT_TOKENIZER, DEFAULT_TEMPLATE, task=task)
    with torch.no_grad():
        logits = model.double()(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    model.float()
    places = [t for t, found in enumerate(encoded.regions) if found == region]
    return sum(logits[t - 1, encoded.input_ids[t]].item() for t in places), len(places)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("tasks", "of"),
    [
        (("joint",), {"rationale": "joint", "answer": "joint"}),
        (("explain", "predict"), {"rationale": "explain", "answer": "predict"}),
        (("answer",), {"answer": "answer"}),
    ],
)
def test_log_likelihoods_are_sums_over_tokens(family, tasks, of):
    model = make_student(family)
    rows = log_likelihoods(model, STUDENT_TOKENIZER, EXAMPLES, tasks=tasks, batch_size=3, progress=False)
    assert [row["id"] for row in rows] == [example.id for example in EXAMPLES]
    for row, example in zip(rows, EXAMPLES, strict=True):
        for name, region in (("rationale", RATIONALE), ("answer", ANSWER)):
            if name not in of:
                assert (row[name], row[f"{name}_tokens"]) == (None, 0)
                continue
            value, count = token_by_token(model, example, of[name], region)
            assert row[name] == pytest.approx(value, rel=1e-5)
            assert row[f"{name}_tokens"] == count > 0


def test_an_example_without_a_rationale_has_none():
    bare = replace(EXAMPLES[0], rationale="")
    model = make_student()
    empty = {"id": bare.id, "rationale": None, "rationale_tokens": 0, "answer": None, "answer_tokens": 0}
    whole = log_likelihoods(model, STUDENT_TOKENIZER, EXAMPLES[1:3], progress=False)
    mixed = log_likelihoods(model, STUDENT_TOKENIZER, [EXAMPLES[1], bare, EXAMPLES[2]], progress=False)
    assert mixed[1] == empty
    assert [row["id"] for row in mixed] == [EXAMPLES[1].id, bare.id, EXAMPLES[2].id]
    assert [mixed[0]["rationale"], mixed[2]["rationale"]] == pytest.approx([row["rationale"] for row in whole])
    assert log_likelihoods(model, STUDENT_TOKENIZER, [bare], progress=False) == [empty]
    (row,) = log_likelihoods(model, STUDENT_TOKENIZER, [bare], tasks=("answer",), progress=False)
    assert row["answer"] < 0


def test_they_are_what_the_trainer_measures(tmp_path):
    trainer = make_trainer(tmp_path, None, beta=0.0)
    trainer.train()
    metrics = trainer.evaluate()
    rows = log_likelihoods(trainer.model, STUDENT_TOKENIZER, generate_problems(12, seed=4)[:5], progress=False)
    for name in ("rationale", "answer"):
        mean = -sum(row[name] for row in rows) / sum(row[f"{name}_tokens"] for row in rows)
        assert mean == pytest.approx(metrics[f"eval_loss_{name}"], rel=1e-5)


def test_what_is_not_finite_is_an_error():
    model = make_model("llama", vocab=len(STUDENT_TOKENIZER), attention="sdpa")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=f"example {EXAMPLES[0].id}: its log-likelihood is not finite"):
        log_likelihoods(model, STUDENT_TOKENIZER, EXAMPLES[:1], progress=False)
