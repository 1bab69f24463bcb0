from unittest import mock

import pytest
import torch
from liger_kernel.transformers import functional

from mold.training.chunked_cross_entropy import chunked_cross_entropy, liger_cross_entropy
from mold.training.heads import ChunkedHead
from mold_kernels.testing import assert_as_accurate_as
from tests.tiny_models import make_model
from tests.tiny_runs import BARE, EXAMPLES, make_student, make_trainer, metrics


@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_gradients(generator, with_bias):
    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    hidden, weight, bias = draw(13, 6), draw(101, 6), draw(101) if with_bias else None
    targets, scale = torch.randint(101, (13,), generator=generator), torch.rand(13, generator=generator)
    results = []
    for function, dtype in (
        (liger_cross_entropy, torch.float32),
        (chunked_cross_entropy, torch.float32),
        (chunked_cross_entropy, torch.float64),
    ):
        inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        losses = function(*inputs[:2], targets, bias=inputs[2])
        chosen = [x for x in inputs if x is not None]
        results.append([losses, *torch.autograd.grad((losses * scale).sum(), chosen)])
    names = ("losses", "dhidden", "dweight", "dbias")
    for name, actual, plain, truth in zip(names, *results, strict=False):
        assert actual.dtype == torch.float32
        assert_as_accurate_as(actual, plain, truth, name)


SAVERS = {
    "alone": {},
    "together": {"gradient_checkpointing": True, "padding_free": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("savers", SAVERS)
def test_training_equals_plain_training(tmp_path, signals, savers):
    rows = {}
    for kind, options in (("full", {}), ("liger", SAVERS[savers])):
        options = {"cross_entropy": kind, "max_steps": 2, "use_cpu": True} | options
        options["per_device_train_batch_size"] = 4 // options.get("gradient_accumulation_steps", 1)
        trainer = make_trainer(tmp_path / kind, signals, make_student(layers=2), [BARE, *EXAMPLES[:3]], None, **options)
        with mock.patch.object(
            functional, "liger_fused_linear_cross_entropy", wraps=functional.liger_fused_linear_cross_entropy
        ) as fused:
            trainer.train()
        assert fused.called == (kind == "liger")
        rows[kind] = metrics(tmp_path / kind)
    for term in ("loss_rationale", "loss_answer", "loss_attention"):
        actual, expected = ([row[term] for row in rows[kind]] for kind in ("liger", "full"))
        assert actual == pytest.approx(expected, rel=1e-5), term


def test_soft_capped_logits_are_refused():
    with pytest.raises(ValueError, match="cross_entropy: is 'liger', must be 'chunked' or 'full' for soft-capped"):
        ChunkedHead(make_model("gemma2"), "liger")
