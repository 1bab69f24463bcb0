"""The whole loss equals the eager form: attn_implementation="eager", T x T maps pooled by hand."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from mold.data.encoding import learned_places
from mold.data.examples import ANSWER, RATIONALE
from mold.method.loss import MoldLoss, region_cross_entropy
from mold_kernels import reference
from tests.covering import covering
from tests.tiny_models import FAMILIES, make_model

ALPHA, BETA = 0.3, 2.0
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_batch(padding, teacher):
    """Two examples of 29 and 40 tokens; student and teacher have different tokens for the same steps and key words."""
    generator = torch.Generator().manual_seed(7 + teacher)
    lengths, total = ((33, 45), 45) if teacher else ((29, 40), 40)
    ids = torch.randint(1, 97, (2, total), generator=generator)
    mask = torch.zeros(2, total, dtype=torch.int64)
    rows, keys = torch.zeros(2, 4, 2, dtype=torch.int32), torch.zeros(2, 5, 2, dtype=torch.int32)
    regions = torch.zeros(2, total, dtype=torch.int64)
    for b, length in enumerate(lengths):
        shift = total - length if padding == "left" else 0
        mask[b, shift : shift + length] = 1
        borders = [1, 9, 15, 22, length - 3]
        steps = 4 if b else 3
        rows[b, :steps] = torch.tensor(list(itertools.pairwise(borders))[:steps]) + shift
        # A key word of several tokens, two that share a token, and one in the last step.
        words = [(2, 3), (4, 7), (6, 8), (11, 12), (19, 21)] if b else [(3, 4), (5, 6), (16, 18)]
        keys[b, : len(words)] = torch.tensor(words) + shift
        regions[b, shift + 9 : shift + length] = 1
        regions[b, shift + length - 3 : shift + length] = 2
    counts = torch.tensor([3, 4]), torch.tensor([3, 5])
    return ids * mask, mask, rows, keys, regions, counts


def pool_by_hand(attentions, rows, keys):
    """[L, B, S, M] from one [B, H, T, T] a layer."""
    layers = []
    for probabilities in attentions:
        mean = probabilities.mean(1)
        layers.append(
            torch.stack(
                [
                    torch.stack([torch.stack([m[i:j, a:z].sum() for a, z in example_keys]) for i, j in example_rows])
                    for m, example_rows, example_keys in zip(mean, rows.tolist(), keys.tolist(), strict=True)
                ]
            )
        )
    return torch.stack(layers)


class ValueRecorder(DynamicCache):
    """Keeps every layer's values [B, T, Hkv * D] and hands keys and values on as they are."""

    def __init__(self):
        super().__init__()
        self.values = []

    def update(self, key_states, value_states, *args, **kwargs):
        self.values.append(value_states.transpose(1, 2).flatten(2))
        return key_states, value_states


def eager_forward(model, ids, mask):
    """Logits, T x T maps and value states [B, T, Hkv * D] of every layer of an eager model."""
    recorder = ValueRecorder()
    softmax = F.softmax

    def wide_softmax(x, dim=None, dtype=None, **kwargs):
        # Eager models round float64 scores to float32 probabilities; the comparison needs them exact.
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    with mock.patch("torch.nn.functional.softmax", wide_softmax):
        out = model(
            input_ids=ids, attention_mask=mask, output_attentions=True, past_key_values=recorder, use_cache=True
        )
    return out.logits, out.attentions, recorder.values


def eager_loss(student, teacher, loss_fn, student_batch, teacher_batch, row_norm):
    ids, mask, rows, keys, regions, counts = student_batch
    with torch.no_grad():
        _, attentions, _ = eager_forward(teacher, *teacher_batch[:2])
        teacher_attention = pool_by_hand(attentions, *teacher_batch[2:4])
    logits, attentions, values = eager_forward(student, ids, mask)
    router = loss_fn.router
    pooled = []
    for layer_values in values:
        normalised = F.rms_norm(layer_values, (layer_values.shape[-1],), router.norm_weight, eps=1e-6)
        pooled.append((normalised * mask.unsqueeze(-1)).sum(1))
    pooled = torch.cat(pooled, -1)
    weights = (router.projection(pooled / pooled.shape[-1]) / router.tau).softmax(-1)
    attention = reference.layer_mixture_kl(
        teacher_attention, pool_by_hand(attentions, rows, keys), weights, *counts, row_norm=row_norm
    )
    return combine(logits, ids, regions, attention)


def combine(logits, ids, regions, attention):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    regions = regions[:, 1:]
    return ALPHA * losses[regions == 2].mean() + (1 - ALPHA) * losses[regions == 1].mean() + BETA * attention.mean()


def fused_forward(model, ids, mask, rows, keys, **options):
    spans = {"row_spans": rows, "key_spans": keys}
    return model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False, **spans, **options)


def fused_loss(student, teacher, loss_fn, student_batch, teacher_batch):
    ids, _, _, _, regions, counts = student_batch
    with torch.no_grad():
        signal = torch.stack(
            [layer.attention for layer in fused_forward(teacher, *teacher_batch[:4]).attentions], dim=1
        )
    out = fused_forward(student, *student_batch[:4], value_features=True)
    attention = loss_fn(out.attentions, signal, *counts).loss
    rationale, answer = region_cross_entropy(out.logits, ids, regions)
    counted = regions[:, 1:]
    return (
        ALPHA * answer / (counted == 2).sum() + (1 - ALPHA) * rationale / (counted == 1).sum() + BETA * attention.mean()
    )


def run(kind, family, teacher_family, dtype, padding, row_norm, checkpointing=False):
    attention = "mold" if kind == "fused" else "eager"
    student = make_model(family, dtype=dtype, seed=1, attention=attention).train()
    teacher = make_model(teacher_family, layers=5, heads=6, kv_heads=3, dtype=dtype, seed=2, attention=attention).eval()
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_fn = MoldLoss.for_config(student.config, row_norm=row_norm)
    torch.manual_seed(3)
    torch.nn.init.normal_(loss_fn.router.projection.weight, std=2.0)
    loss_fn.to(dtype)
    batches = make_batch(padding, False), make_batch(padding, True)
    if kind == "fused":
        loss = fused_loss(student, teacher, loss_fn, *batches)
    else:
        loss = eager_loss(student, teacher, loss_fn, *batches, row_norm)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    router_gradient = torch.cat([parameter.grad.flatten() for parameter in loss_fn.parameters()])
    return loss.detach(), gradients, router_gradient


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_logits_of_the_learned_positions_alone_give_the_same_loss():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 12), generator=generator)
    regions = torch.zeros(3, 12, dtype=torch.int64)
    regions[0, 5:9], regions[0, 9:], regions[1, 7:10], regions[1, 10] = RATIONALE, ANSWER, RATIONALE, ANSWER
    logits = torch.randn(3, 12, 50, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = learned_places(regions)["learned_positions"]
    assert positions.tolist() == list(range(4, 11))
    whole = region_cross_entropy(logits, ids, regions)
    kept = region_cross_entropy(logits[:, positions], ids, regions, positions)
    expected = [0.0, 0.0]
    for b in range(3):
        for t in range(1, 12):
            if regions[b, t]:
                expected[regions[b, t] - 1] -= logits[b, t - 1].log_softmax(-1)[ids[b, t]].item()
    torch.testing.assert_close(whole, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(kept, whole)
    (grad_whole,), (grad_kept,) = (torch.autograd.grad(x.sum(), logits, retain_graph=True) for x in (whole, kept))
    torch.testing.assert_close(grad_kept, grad_whole)
    nothing = torch.zeros_like(regions)
    none = learned_places(nothing)["learned_positions"]
    assert region_cross_entropy(logits[:, none], ids, nothing, none).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("family", "padding", "dtype"), covering(FAMILIES, ["right", "left"], [torch.float32, torch.float64])
)
def test_loss_and_gradients_equal_the_eager_form(family, padding, dtype):
    families = list(FAMILIES)
    teacher_family = families[families.index(family) - 1]
    row_norm = "l1" if padding == "left" else "softmax"
    actual, actual_gradients, actual_router = run("fused", family, teacher_family, dtype, padding, row_norm)
    expected, expected_gradients, expected_router = run("eager", family, teacher_family, dtype, padding, row_norm)
    assert (actual - expected).abs() / expected <= TOLERANCE[dtype]
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient is not None, name
        assert gradient.any(), f"{name} has no gradient at all"
        error = relative_error(actual_gradients[name], gradient)
        # Of sinks and key biases, too, eager's float32 gradient is a small difference of large numbers.
        tolerance = 1e-4 if name.endswith(("sinks", "k_proj.bias")) and dtype == torch.float32 else TOLERANCE[dtype]
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
    # The router's gradient is a small difference of large numbers: in float32 the eager form itself is off by up to
    # 1e-4 of it from its own float64. The float64 case is the proof.
    assert relative_error(actual_router, expected_router) <= {torch.float32: 1e-3, torch.float64: 1e-10}[dtype]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_changes_no_bit(family):
    plain = run("fused", family, "qwen3", torch.float32, "right", "softmax")
    checkpointed = run("fused", family, "qwen3", torch.float32, "right", "softmax", checkpointing=True)
    assert plain[0] == checkpointed[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, checkpointed[1][name]), name
