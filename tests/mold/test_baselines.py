"""What the method is compared with: fine-tuning on answers, and one layer pair in place of the mixtures."""

import json

import pytest
import torch
import torch.nn.functional as F

from mold.attention_interface import LayerAttention
from mold.encoding import encode_example
from mold.loss import ANSWER, PROMPT, MoldLoss
from mold.problems import generate_problems
from mold.router import LayerRouter
from tests.mold.test_cli import options_of, refusal
from tests.tiny_tokenizers import make_tokenizer

ANSWERS_ALONE = "Question: {question}\nAnswer: {answer}"


def capture(layers, generator, b=2, s=3, m=4):
    attention = [torch.rand(b, s, m, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(layers)]
    return [LayerAttention(layer, torch.rand(b, 6, generator=generator)) for layer in attention]


def test_one_layer_pair_is_the_kl_of_those_two_layers(generator):
    attentions = capture(4, generator)
    teacher = torch.rand(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    loss = MoldLoss(LayerRouter(4, 6), layer_pair=(3, 1)).double()
    found = loss(attentions, teacher, torch.tensor([3, 3]), torch.tensor([4, 4]))
    student = attentions[1].attention
    log_q, p = student.log_softmax(-1), teacher[:, 3].softmax(-1)
    expected = F.kl_div(log_q, p, reduction="none").sum(-1).mean(-1)
    torch.testing.assert_close(found.loss.double(), expected)
    assert found.layer_weights.tolist() == [[0, 1, 0, 0]] * 2
    weights = loss.teacher_weights(teacher, torch.tensor([3, 3]), torch.tensor([4, 4]))
    assert weights.tolist() == [[0, 0, 0, 1, 0]] * 2
    found.loss.sum().backward()
    assert student.grad.abs().sum() > 0
    others = [layer.attention.grad for index, layer in enumerate(attentions) if index != 1]
    assert all(gradient is None or not gradient.any() for gradient in others)
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_layers_that_there_are_not(generator):
    with pytest.raises(ValueError, match="layer_pair: names the student's layer 4, must be from 0 to 3"):
        MoldLoss(LayerRouter(4, 6), layer_pair=(0, 4))
    loss = MoldLoss(LayerRouter(4, 6), layer_pair=(5, 0))
    counts = torch.tensor([3, 3]), torch.tensor([4, 4])
    with pytest.raises(ValueError, match="layer_pair: names the teacher's layer 5, must be from 0 to 4"):
        loss(capture(4, generator), torch.rand(2, 5, 3, 4), *counts)


def test_the_text_of_fine_tuning_on_answers():
    tokenizer, (problem,) = make_tokenizer("smollm"), generate_problems(1)
    encoded = encode_example(problem, tokenizer, ANSWERS_ALONE)
    assert (encoded.row_spans, encoded.key_spans) == ([], [])
    assert set(encoded.regions) == {PROMPT, ANSWER}
    learned = [i for i, region in zip(encoded.input_ids, encoded.regions, strict=True) if region == ANSWER]
    assert tokenizer.decode(learned, skip_special_tokens=True).strip() == problem.answer


def test_training_the_baselines(mold, models, problems, tmp_path):
    pytest.importorskip("matplotlib")
    options = options_of(models, problems, tmp_path / "base", signals_dir=tmp_path / "signals", max_steps=2)
    assert mold("extract", *options)[0] in (0, None)

    def train(name, *more):
        folder = tmp_path / name
        place = options.index("--output_dir")
        status, _, err = mold("train", *options[:place], "--output_dir", folder, *options[place + 2 :], *more)
        assert status in (0, None), err
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return json.loads((folder / "summary.json").read_text()), rows

    summary, rows = train("pair", "--layer_pair", "2", "1", "--logging_steps", "1")
    assert "attention KL" in [row["metric"] for row in summary["rows"]]
    assert all(row["router_weights"] == [0, 1, 0] for row in rows if "router_weights" in row)
    assert any("router_weights" in row for row in rows)

    summary, rows = train("answers", "--template", ANSWERS_ALONE, "--alpha", "1", "--beta", "0", "--logging_steps", "1")
    assert [row["metric"] for row in summary["rows"]] == ["answer loss", "loss", "accuracy"]
    assert not any("loss_rationale" in row or "loss_attention" in row for row in rows)
    message = "beta: is 1.0, must be 0 with a template without {rationale}"
    assert message in refusal(mold("train", *options, "--template", ANSWERS_ALONE))
    assert "layer_pair: is [1], must be a teacher layer and a student layer" in refusal(
        mold("train", *options, "--layer_pair", "1")
    )
