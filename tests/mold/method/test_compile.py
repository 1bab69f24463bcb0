"""torch.compile takes a model with the "mold" attention as one graph."""

import pytest
import torch

import mold  # noqa: F401 (registers the "mold" attention)
from tests.tiny_models import make_model

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
