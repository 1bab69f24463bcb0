"""teacher_layer_weights and layer_mixture_kl against the float64 reference and the paper's formulas."""

from functools import partial

import pytest
import torch

from mold_kernels import layer_mixture_kl, reference, teacher_layer_weights
from mold_kernels.testing import assert_as_accurate_as


def make_case(layers=(5, 3), batch=4, steps=6, keys=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (
        torch.rand(count, batch, steps, keys, generator=generator, dtype=torch.float64).to(dtype) for count in layers
    )
    weights = torch.randn(batch, layers[1], generator=generator, dtype=torch.float64).softmax(-1).to(dtype)
    num_steps = torch.tensor([steps, 1, 3, 4][:batch])
    num_keys = torch.tensor([keys, 3, 1, 2][:batch])
    return teacher, student, weights, num_steps, num_keys


def by_hand(teacher, student, weights, num_steps, num_keys, tau, row_norm):
    """Equations 4 to 6, an example at a time, on unpadded maps."""
    losses = []
    for b, (s, m) in enumerate(zip(num_steps.tolist(), num_keys.tolist(), strict=True)):
        maps = teacher[:, b, :s, :m]
        change = (maps[..., 1:] - maps[..., :-1]).abs().mean((1, 2)) if m > 1 else torch.zeros(len(maps))
        mixed_teacher = (torch.softmax(change / tau, 0)[:, None, None] * maps).sum(0)
        mixed_student = (weights[b][:, None, None] * student[:, b, :s, :m]).sum(0)
        if row_norm == "softmax":
            p, q = mixed_teacher.softmax(-1), mixed_student.softmax(-1)
        else:
            p, q = ((x + 1e-6) / (x + 1e-6).sum(-1, keepdim=True) for x in (mixed_teacher, mixed_student))
        losses.append((p * (p / q).log()).sum(-1).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_reference_follows_the_paper(row_norm, tau):
    case = make_case()
    actual = reference.layer_mixture_kl(*case, tau=tau, row_norm=row_norm)
    torch.testing.assert_close(actual, by_hand(*case, tau, row_norm), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", [(5, 3), (1, 2), (30, 6)])
def test_layer_mixture_kl(layers, dtype, row_norm, backend):
    case = make_case(layers, dtype=dtype)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def run(function, dtype):
        teacher, student, weights = (tensor.detach().to(dtype) for tensor in case[:3])
        tensors = [student.requires_grad_(), weights.requires_grad_()]
        loss = function(teacher, *tensors, *case[3:], tau=0.1, row_norm=row_norm)
        return [loss, *torch.autograd.grad((loss * upstream).sum(), tensors)]

    results = run(partial(layer_mixture_kl, backend=backend), dtype), run(reference.layer_mixture_kl, dtype)
    for name, a, b, c in zip(
        ["loss", "dA", "dp"], *results, run(reference.layer_mixture_kl, torch.float64), strict=True
    ):
        assert_as_accurate_as(a, b, c, name)


@pytest.mark.parametrize("row_norm", ["softmax", "l1"])
def test_examples_without_steps_or_key_words_are_exact_zeros(row_norm, backend):
    teacher, student, weights, num_steps, num_keys = make_case()
    num_steps, num_keys = torch.tensor([0, 6, 0, 2]), torch.tensor([3, 0, 0, 2])
    student.requires_grad_()
    weights.requires_grad_()
    loss = layer_mixture_kl(teacher, student, weights, num_steps, num_keys, row_norm=row_norm, backend=backend)
    loss.sum().backward()
    assert not loss[:3].any()
    assert loss[3] > 0
    for gradient in (student.grad.transpose(0, 1), weights.grad):
        assert gradient.isfinite().all()
        assert not gradient[:3].any()
        assert gradient[3].any()


def test_padding_does_not_matter(backend):
    teacher, student, weights, num_steps, num_keys = make_case()
    loss = partial(layer_mixture_kl, num_steps=num_steps, num_keys=num_keys, backend=backend)
    step, key = torch.arange(6) >= num_steps[:, None], torch.arange(7) >= num_keys[:, None]
    padding = step[:, :, None] | key[:, None, :]
    actual = loss(teacher.masked_fill(padding, 9.0), student.masked_fill(padding, 7.0), weights)
    torch.testing.assert_close(actual, loss(teacher, student, weights), rtol=0, atol=0)


def test_any_layout(backend):
    """The trainer's teacher is a transposed view."""
    case = make_case()
    teacher, student = (t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_() for t in case[:2])
    weights = case[2].T.contiguous().T.requires_grad_()
    arguments = teacher, student, weights, case[3].int(), case[4].int()
    results = []
    for function in (partial(layer_mixture_kl, backend=backend), reference.layer_mixture_kl):
        loss = function(*arguments)
        # An upstream gradient of expanded strides, as sum() makes it.
        results.append([loss, *torch.autograd.grad(loss.sum(), (student, weights))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def test_teacher_weights_prefer_the_layer_that_changes_most_and_are_uniform_when_undefined():
    attention = torch.zeros(3, 2, 2, 4)
    attention[1, :, :, ::2] = 1
    weights = teacher_layer_weights(attention, torch.tensor([2, 2]), torch.tensor([4, 1]))
    assert weights[0].argmax() == 1
    assert weights[0, 1] > 0.99
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3))


def test_reference_gradients():
    teacher, student, weights, num_steps, num_keys = make_case((2, 2), 2, 3, 3)
    num_steps = num_steps.clamp(max=3)
    num_keys = num_keys.clamp(max=3)
    for row_norm in ("softmax", "l1"):
        assert torch.autograd.gradcheck(
            lambda a, w, row_norm=row_norm: reference.layer_mixture_kl(
                teacher, a, w, num_steps, num_keys, row_norm=row_norm
            ),
            (student.requires_grad_(), weights.requires_grad_()),
        )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("teacher_attention", torch.zeros(5, 4, 6), "teacher_attention: is"),
        ("student_attention", torch.zeros(3, 4, 6, 8), r"student_attention: shape is \[3, 4, 6, 8\]"),
        ("student_weights", torch.zeros(3, 4), r"student_weights: shape is \[3, 4\], must be \[4, 3\]"),
        ("num_steps", torch.ones(4), "num_steps: is torch.float32"),
        ("num_keys", torch.ones(3, dtype=torch.int64), "num_keys: is"),
        ("num_keys", torch.ones(4, dtype=torch.int64, device="meta"), "num_keys: is on meta, must be on cpu"),
        ("tau", 0.0, "tau: is 0.0"),
        ("row_norm", "l2", "row_norm: is 'l2'"),
    ],
)
def test_wrong_input_names_the_argument(name, value, message):
    names = ("teacher_attention", "student_attention", "student_weights", "num_steps", "num_keys")
    arguments = dict(zip(names, make_case(dtype=torch.float32), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        layer_mixture_kl(**arguments)
