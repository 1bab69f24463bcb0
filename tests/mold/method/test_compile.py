"""torch.compile takes a model with the "mold" attention as one graph, whatever the length of its texts."""

import pytest
import torch
from torch._dynamo.utils import counters

from mold.method.loss import MoldLoss
from tests.tiny_models import make_model
from tests.tiny_runs import make_trainer

ROWS = torch.tensor([[[0, 5], [5, 12]], [[1, 4], [0, 0]]], dtype=torch.int32)
KEYS = torch.tensor([[[0, 2], [3, 4]], [[2, 3], [5, 7]]], dtype=torch.int32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_graph_break(backend):
    torch._dynamo.reset()
    model = make_model("llama")
    ids = torch.arange(24).view(2, 12)
    # Without a mask transformers looks for packed sequences, whose mask it cannot leave out while it is traced.
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0

    def step(ids, mask, rows, keys):
        spans = {"row_spans": rows, "key_spans": keys, "value_features": True}
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True, **spans)
        pooled = sum(layer.attention.sum() + layer.value_features.square().mean() for layer in out.attentions)
        return out.logits.square().mean() + pooled

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    results = []
    for function in (step, compiled):
        model.zero_grad()
        loss = function(ids, mask, ROWS, KEYS)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def a_batch(length, steps, keys):
    """Of two texts, of which one is padded; steps of three tokens, key words of one."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(50, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    rows, words = torch.arange(steps) * 3, torch.arange(keys) * 2
    spans = [torch.stack([start, start + size], -1).int().expand(2, -1, -1) for start, size in ((rows, 3), (words, 1))]
    teacher = torch.rand(2, 4, steps, keys, generator=generator)
    return ids, mask, *spans, teacher, torch.full((2,), steps), torch.full((2,), keys)


@pytest.mark.slow
def test_a_step_with_the_loss_is_compiled_once_for_one_length_and_once_for_all():
    torch._dynamo.reset()
    model = make_model("llama").train()
    attention_loss = MoldLoss.for_config(model.config, row_norm="l1", row_keys="all")
    parameters = [*model.parameters(), *attention_loss.parameters()]

    def step(ids, mask, rows, keys, teacher, num_steps, num_keys):
        spans = {"row_spans": rows, "key_spans": keys, "value_features": True}
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True, **spans)
        kl = attention_loss(out.attentions, teacher, num_steps, num_keys).loss
        return out.logits.logsumexp(-1).mean() + 10 * kl.mean()

    compiled, graphs = torch.compile(step, backend="aot_eager", fullgraph=True), []
    for index in range(10):
        batch = a_batch(24 + 7 * index, 2 + index % 5, 3 + 3 * index % 4)
        expected = torch.autograd.grad(step(*batch), parameters)  # first: transformers puts its hooks in
        before = counters["stats"]["unique_graphs"]
        actual = torch.autograd.grad(compiled(*batch), parameters)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)
    assert graphs == [1, 1, *[0] * 8]


@pytest.mark.slow
def test_a_trainer_compiles_without_a_break(tmp_path, signals, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets both, and they would stay
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    options = {"max_steps": 10, "per_device_train_batch_size": 1, "logging_steps": 10}
    losses = []
    for name, compiling in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        torch._dynamo.reset()
        counters.clear()
        trainer = make_trainer(tmp_path / name, signals, **options, **compiling)
        losses.append(trainer.train().training_loss)
    lengths = {len(item["example"].input_ids) for item in trainer.train_dataset}
    assert len(lengths) > 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
