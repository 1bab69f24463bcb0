"""The attention loss's options, against the definition in float64."""

import pytest
import torch
from transformers import MambaConfig

from mold.method.attention_interface import LayerAttention, use_mold_attention
from mold.method.loss import MoldLoss, visible_keys
from mold.method.router import FixedLayer, LayerRouter
from mold_kernels import reference
from tests.tiny_models import make_model

LAYERS, BATCH, STEPS, KEYS, WIDTH = 3, 2, 4, 5, 6
ROWS = torch.tensor([[[0, 6], [6, 9], [9, 14], [0, 0]], [[1, 5], [5, 8], [8, 12], [12, 15]]])
KEY_SPANS = torch.tensor([[[1, 2], [4, 6], [8, 10], [0, 0], [0, 0]], [[2, 3], [4, 5], [6, 7], [11, 13], [14, 15]]])
COUNTS = torch.tensor([3, 4]), torch.tensor([3, 5])


def maps(seed, layers=LAYERS, dtype=torch.float64):
    """Stepwise attention that is zero where a step cannot see a key word."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(BATCH, layers, STEPS, KEYS, generator=generator, dtype=torch.float64)
    return (values * visible_keys(ROWS, KEY_SPANS)[:, None]).to(dtype)


def student(dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(LAYERS, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    attention = maps(2, dtype=dtype).transpose(0, 1).contiguous().requires_grad_()
    return attention, [LayerAttention(a, f) for a, f in zip(attention, features, strict=True)]


def make_router(layers=LAYERS):
    torch.manual_seed(3)
    router = LayerRouter(layers, WIDTH).double()
    torch.nn.init.normal_(router.projection.weight)
    return router


def by_hand(teacher, attention, weights, kept=range(LAYERS), tau=0.1, tau_row=1.0, row_keys="all"):
    """equation 6, cell by cell."""
    teacher = teacher[:, list(kept)].transpose(0, 1)
    mixing = reference.teacher_layer_weights(teacher, *COUNTS, tau)
    losses = []
    for b in range(BATCH):
        t = sum(mixing[b, i] * teacher[i, b] for i in range(len(teacher)))
        s = sum(weights[b, i] * attention[i, b] for i in range(LAYERS))
        total = 0
        for row in range(COUNTS[0][b]):
            seen = [m for m in range(COUNTS[1][b]) if row_keys == "all" or KEY_SPANS[b, m, 0] < ROWS[b, row, 1]]
            if seen:
                p, q = ((x[row, seen] / tau_row).softmax(-1) for x in (t, s))
                total = total + (p * (p / q).log()).sum()
        losses.append(total / COUNTS[0][b])
    return torch.stack(losses)


def test_what_a_step_can_see():
    seen = visible_keys(ROWS, KEY_SPANS)
    assert seen[0, :3, :3].tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    assert seen[1].tolist() == [
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True] * 5,
    ]


@pytest.mark.parametrize("tau_row", [1.0, 0.2, 3.0])
@pytest.mark.parametrize("row_keys", ["all", "visible"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_are_a_softmax_with_a_temperature_over_their_key_words(tau_row, row_keys, dtype):
    teacher, (attention, layers) = maps(4), student(dtype)
    loss_fn = MoldLoss(make_router(), tau_row=tau_row, row_keys=row_keys)
    loss, weights = loss_fn(layers, teacher.to(dtype), *COUNTS, visible_keys(ROWS, KEY_SPANS))
    exact = attention.detach().double().requires_grad_()
    expected = by_hand(teacher, exact, weights.double(), tau_row=tau_row, row_keys=row_keys)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    (found,) = torch.autograd.grad(loss.sum(), attention)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(found.double(), gradient, rtol=tolerance, atol=tolerance)
    if row_keys == "visible":
        assert not found[:, ~visible_keys(ROWS, KEY_SPANS)].any()


def test_the_routers_gradient_is_that_of_the_definition():
    teacher, (attention, layers) = maps(4), student()
    router = make_router()
    loss_fn = MoldLoss(router, tau_row=0.3, row_keys="visible")
    loss, _ = loss_fn(layers, teacher, *COUNTS, visible_keys(ROWS, KEY_SPANS))
    found = torch.autograd.grad(loss.sum(), list(router.parameters()))
    weights = router([layer.value_features for layer in layers])
    expected = by_hand(teacher, attention.detach(), weights, tau_row=0.3, row_keys="visible")
    for mine, exact in zip(found, torch.autograd.grad(expected.sum(), list(router.parameters())), strict=True):
        torch.testing.assert_close(mine, exact)


def test_a_row_that_sees_no_key_word_adds_nothing():
    rows = ROWS.clone()
    rows[:, 0] = torch.tensor([0, 1])
    teacher, (attention, layers) = maps(4), student()
    teacher[:, :, 0], attention.data[:, :, 0] = 0, 0
    loss, _ = MoldLoss(make_router(), row_keys="visible")(layers, teacher, *COUNTS, visible_keys(rows, KEY_SPANS))
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), attention)
    assert not gradient[:, :, 0].any()
    assert gradient.any()


@pytest.mark.parametrize("left_out", [[0], [-1], [1, 2], [0, -1, 2]])
def test_layers_left_out_of_the_students_mixture(left_out):
    teacher, (attention, layers) = maps(4), student()
    kept = [layer for layer in range(LAYERS) if layer not in {i % LAYERS for i in left_out}]
    router = make_router(len(kept))
    loss_fn = MoldLoss(router, student_layers_left_out=sorted({i % LAYERS for i in left_out}))
    loss, weights = loss_fn(layers, teacher, *COUNTS)
    assert weights.shape == (BATCH, LAYERS) == (BATCH, loss_fn.num_layers)
    torch.testing.assert_close(weights[:, kept], router([layers[i].value_features for i in kept]))
    torch.testing.assert_close(weights.sum(1), torch.ones(BATCH, dtype=torch.float64))
    torch.testing.assert_close(loss, by_hand(teacher, attention, weights))
    (gradient,) = torch.autograd.grad(loss.sum(), attention)
    assert [bool(layer.any()) for layer in gradient] == [layer in kept for layer in range(LAYERS)]


@pytest.mark.parametrize("left_out", [[0], [-1], [1, 2]])
@pytest.mark.parametrize("row_keys", ["all", "visible"])
def test_layers_left_out_of_the_teachers_mixture(left_out, row_keys):
    teacher, (attention, layers) = maps(4), student()
    kept = [layer for layer in range(LAYERS) if layer not in {i % LAYERS for i in left_out}]
    loss_fn = MoldLoss(make_router(), teacher_layers_left_out=left_out, row_keys=row_keys)
    loss, weights = loss_fn(layers, teacher, *COUNTS, visible_keys(ROWS, KEY_SPANS))
    torch.testing.assert_close(loss, by_hand(teacher, attention, weights, kept, row_keys=row_keys))
    mixing = loss_fn.teacher_weights(teacher, *COUNTS)
    assert mixing.shape == (BATCH, LAYERS)
    assert (mixing > 0)[0].tolist() == [layer in kept for layer in range(LAYERS)]


def test_one_teacher_layer_is_a_mixture_of_it():
    teacher, (attention, layers) = maps(4), student()
    router = FixedLayer(LAYERS, 1)
    loss, weights = MoldLoss(router, teacher_layer=-1, row_keys="visible")(
        layers, teacher, *COUNTS, visible_keys(ROWS, KEY_SPANS)
    )
    torch.testing.assert_close(loss, by_hand(teacher, attention, weights, [LAYERS - 1], row_keys="visible"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_row": 0.0}, r"tau_row: is 0\.0, must be greater than 0"),
        ({"row_keys": "some"}, "row_keys: is 'some', must be one of all, visible"),
        ({"row_norm": "l1", "tau_row": 0.5}, r"tau_row: is 0\.5, must be 1 with row_norm='l1'"),
        ({"row_norm": "l1", "row_keys": "visible"}, "row_keys: is 'visible', must be 'all' with row_norm='l1'"),
        ({"student_layers_left_out": [3]}, "student_layers_left_out: is 3, must be from -3 to 2"),
        ({"student_layers_left_out": [0, 1, -1]}, "student_layers_left_out: is 0, 1, -1, must leave one of 3 layers"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MoldLoss.for_config(make_model("llama", layers=3).config, **options)


def test_what_is_missing_is_named():
    teacher, (_, layers) = maps(4), student()
    with pytest.raises(ValueError, match="visible: is None, must be of visible_keys"):
        MoldLoss(make_router(), row_keys="visible")(layers, teacher, *COUNTS)
    with pytest.raises(ValueError, match="teacher_layers_left_out: is 3, must be from -3 to 2"):
        MoldLoss(make_router(), teacher_layers_left_out=[3])(layers, teacher, *COUNTS)


def test_a_student_without_attention_is_refused():
    with pytest.raises(ValueError, match="model: is a mamba without attention heads"):
        MoldLoss.for_config(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2))


def test_layers_that_are_left_out_need_not_be_captured():
    """Loss, weights and gradients are those of a forward that captured all of them; no other layer pools anything."""
    torch.manual_seed(0)
    model = use_mold_attention(make_model("llama", layers=4)).eval()
    loss_fn = MoldLoss.for_config(model.config, student_layers_left_out=[1, -1])
    torch.nn.init.normal_(loss_fn.router.projection.weight, std=0.1)
    batch = {"input_ids": torch.randint(3, 60, (BATCH, 16)), "row_spans": ROWS.int(), "key_spans": KEY_SPANS.int()}
    found = []
    for layers in (None, loss_fn.student_layers):
        out = model(**batch, output_attentions=True, value_features=True, span_layers=layers, use_cache=False)
        assert len(out.attentions) == (4 if layers is None else 2)
        loss, weights = loss_fn(out.attentions, maps(4, dtype=torch.float32), *COUNTS)
        assert weights.shape == (BATCH, 4)
        assert (weights[:, [1, 3]] == 0).all()
        found.append([loss, weights, *torch.autograd.grad(loss.sum(), model.model.layers[2].self_attn.q_proj.weight)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
