"""Mixture of layers and the KL divergence between teacher and student.

Teacher (equation 4), with |A[s, m+1] - A[s, m]| averaged over the steps and neighbouring key words of a layer:

    p_t = softmax([G(A_1) .. G(A_L1)] / tau)        A_t = sum_l p_t[l] A_l

Student (equation 5), with layer weights from its router: A_s = sum_l p_s[l] A_l. Loss of an example (equation 6):

    loss = 1/|M1| sum_s KL(row(A_t[s, :]) || row(A_s[s, :])),   row = softmax, or division by the sum ("l1")

Gradient, with p and q the rows of teacher and student and c = dloss / |M1|:

    softmax: dA_s = c (q - p)      l1: dA_s = c (1 / sum(a) - p / a),  a = A_s + epsilon
    dA_l = p_s[l] dA_s             dp_s[l] = sum_{s, m} A_l[s, m] dA_s[s, m]

Cost: a few passes over [L, B, S, M], which is small.
"""

from __future__ import annotations

import functools

import torch

from mold_kernels import cuda, native, reference
from mold_kernels.backends import Backend, Op


def teacher_layer_weights(
    attention: torch.Tensor, num_steps: torch.Tensor, num_keys: torch.Tensor, tau: float = 0.1
) -> torch.Tensor:
    """How much each teacher layer counts: softmax over layers of the mean change between neighbouring key words.

    Args:
        attention: [L, B, S, M] stepwise attention of the layers, float32 or float64.
        num_steps: int [B], steps of each example; the rest of S is padding.
        num_keys: int [B], key words of each example; the rest of M is padding.
        tau: temperature > 0.

    Returns:
        [B, L], rows sum to 1. Uniform where an example has fewer than two key words (the statistic is undefined).

    Raises:
        ValueError: a shape or the temperature does not fit; names the argument.

    Source: MoLSAKI (EMNLP 2025), equation 4.
    """
    _check("attention", attention, num_steps, num_keys)
    _check_tau(tau)
    return reference.teacher_layer_weights(attention, num_steps, num_keys, tau)


def layer_mixture_kl(
    teacher_attention: torch.Tensor,
    student_attention: torch.Tensor,
    student_weights: torch.Tensor,
    num_steps: torch.Tensor,
    num_keys: torch.Tensor,
    *,
    tau: float = 0.1,
    row_norm: str = "softmax",
    backend: str = "auto",
) -> torch.Tensor:
    """Mean over an example's steps of KL(teacher || student) between their mixed stepwise attentions.

    Args:
        teacher_attention: [L1, B, S, M], no gradient.
        student_attention: [L2, B, S, M].
        student_weights: [B, L2], the student's layer weights (rows sum to 1).
        num_steps: int [B], steps of each example.
        num_keys: int [B], key words of each example.
        tau: temperature of the teacher's layer weights.
        row_norm: "softmax" over the valid key words of a step (the paper), or "l1": each row, plus
            `mold_kernels.reference.L1_EPSILON`, divided by its sum.
        backend: "auto" or a name of the table in docs/backends.md, which is used or refused, never replaced.

    Returns:
        [B], loss of each example, differentiable in student_attention and student_weights. Exactly 0, with zero
        gradient, where an example has no steps or no key words.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or the backend is not available; names the argument.

    Source: MoLSAKI (EMNLP 2025), equations 4 to 6; the gradient is derived in this module's docstring.
    """
    _check("teacher_attention", teacher_attention, num_steps, num_keys)
    _check("student_attention", student_attention, num_steps, num_keys)
    if student_attention.shape[1:] != teacher_attention.shape[1:]:
        raise ValueError(
            f"student_attention: shape is {list(student_attention.shape)}, must be "
            f"[layers, {', '.join(map(str, teacher_attention.shape[1:]))}] as teacher_attention"
        )
    weights_shape = (student_attention.shape[1], student_attention.shape[0])
    if student_weights.shape != weights_shape:
        raise ValueError(f"student_weights: shape is {list(student_weights.shape)}, must be {list(weights_shape)}")
    for name, tensor in (
        ("teacher_attention", teacher_attention),
        ("student_weights", student_weights),
        ("num_steps", num_steps),
        ("num_keys", num_keys),
    ):
        if tensor.device != student_attention.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {student_attention.device} as the student's")
    _check_tau(tau)
    if row_norm not in ("softmax", "l1"):
        raise ValueError(f'row_norm: is {row_norm!r}, must be "softmax" or "l1"')
    maps = [teacher_attention, student_attention, student_weights]
    if len({tensor.dtype for tensor in maps}) > 1:
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in maps))
        maps = [tensor.to(dtype) for tensor in maps]
    tensors = *maps, num_steps, num_keys
    chosen = LAYER_MIXTURE_KL.choose(backend, tensors[0])
    if chosen.backward is None:
        return chosen.forward(*tensors, tau=tau, row_norm=row_norm)
    return LAYER_MIXTURE_KL.operator(*tensors, tau, row_norm, reference.L1_EPSILON, chosen.name)[0]


def _check(name: str, attention: torch.Tensor, num_steps: torch.Tensor, num_keys: torch.Tensor) -> None:
    if attention.ndim != 4 or attention.dtype not in (torch.float32, torch.float64) or not len(attention):
        raise ValueError(
            f"{name}: is {attention.dtype} {list(attention.shape)}, must be float32 or float64 "
            "[layers, batch, steps, key words] of at least one layer"
        )
    for count_name, count, most in (
        ("num_steps", num_steps, attention.shape[2]),
        ("num_keys", num_keys, attention.shape[3]),
    ):
        if count.shape != (attention.shape[1],) or count.is_floating_point():
            raise ValueError(
                f"{count_name}: is {count.dtype} {list(count.shape)}, must be integers [{attention.shape[1]}]"
            )
        # Not on a device, where reading would wait for it, and not in a graph, which it would break.
        if count.device.type == "cpu" and not torch.compiler.is_compiling():
            for example, value in enumerate(count.tolist()):
                if not 0 <= value <= most:
                    raise ValueError(f"{count_name}: is {value} in example {example}, must be within [0, {most}]")


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau: is {tau}, must be greater than 0")


def _torch_forward(teacher, student, weights, num_steps, num_keys, tau, row_norm, l1_epsilon):
    step_valid, key_valid = reference.valid_cells(student, num_steps, num_keys)
    valid = step_valid[:, :, None] & key_valid[:, None, :]
    teacher_weights = reference.teacher_layer_weights(teacher, num_steps, num_keys, tau)
    teacher = torch.einsum("bl,lbsm->bsm", teacher_weights, teacher)
    student = torch.einsum("bl,lbsm->bsm", weights, student)
    log_p = reference.log_rows(teacher, key_valid, row_norm)
    log_q = reference.log_rows(student, key_valid, row_norm)
    p, q = log_p.exp(), log_q.exp()
    steps = num_steps.clamp(min=1)
    loss = (p * (log_p - log_q)).masked_fill_(~valid, 0).sum((-2, -1)) / steps
    if row_norm == "softmax":
        mixture_grad = q - p
    else:
        mass = (student + l1_epsilon).masked_fill(~key_valid[:, None, :], 0)
        mixture_grad = 1 / mass.sum(-1, keepdim=True) - p / mass
    return loss, mixture_grad.masked_fill_(~valid, 0) / steps[:, None, None]


def _torch_backward(grad, mixture_grad, student, weights):
    mixture_grad = mixture_grad * grad[:, None, None]
    return weights.mT[:, :, None, None] * mixture_grad, torch.einsum("lbsm,bsm->bl", student, mixture_grad)


LAYER_MIXTURE_KL = Op(
    "layer_mixture_kl",
    inputs="Tensor teacher, Tensor student, Tensor weights, Tensor num_steps, Tensor num_keys, float tau, "
    "str row_norm, float l1_epsilon",
    outputs="Tensor loss, Tensor mixture_grad",
    backends=[
        Backend(
            "native",
            native.layer_mixture_kl_forward,
            native.layer_mixture_kl_backward,
            dtypes=(torch.float64, torch.float32),
        ),
        Backend.of_triton("layer_mixture_kl", "layer_mixture_kl", dtypes=(torch.float32,)),
        Backend("cuda", cuda.layer_mixture_kl_forward, cuda.layer_mixture_kl_backward, dtypes=(torch.float32,)),
        Backend("torch", _torch_forward, _torch_backward, dtypes=(torch.float64, torch.float32)),
        Backend("reference", reference.layer_mixture_kl, dtypes=(torch.float64, torch.float32)),
    ],
    fake=lambda teacher, student, *_: (student.new_empty(student.shape[1]), student.new_empty(student.shape[1:])),
    gradients="student, weights",
    kept="mixture_grad, student, weights",
    fake_backward=lambda grad, mixture_grad, student, weights, *_: (
        student.new_empty(student.shape),
        weights.new_empty(weights.shape),
    ),
    auxiliary=1,
)
