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

import torch

from mold_kernels import cuda, native, reference
from mold_kernels.backends import choose_backend
from mold_kernels.operators import register_gradient, register_operator


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
        backend: "auto", "triton" (GPU, float32), "cuda" (likewise), "native" (CPU; one dtype), "torch" or
            "reference". A named backend is used or refused, never replaced.

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
    tensors = teacher_attention, student_attention, student_weights, num_steps, num_keys
    candidates = ["torch", "reference"]
    if all(tensor.dtype == torch.float32 for tensor in tensors[:3]):
        candidates.insert(0 if student_attention.is_cuda else 1, "triton")
        candidates.append("cuda")
    if len({tensor.dtype for tensor in tensors[:3]}) == 1:
        candidates.insert(0, "native")
    match choose_backend("layer_mixture_kl", backend, candidates, student_attention.device):
        case "cuda":
            return _CudaLayerMixtureKL.apply(*tensors, tau, row_norm)
        case "torch":
            return _LayerMixtureKL.apply(*tensors, tau, row_norm)
        case "reference":
            return reference.layer_mixture_kl(*tensors, tau=tau, row_norm=row_norm)
        case chosen:
            return _OPERATORS[chosen](*tensors, tau, row_norm == "l1")[0]


def _check(name: str, attention: torch.Tensor, num_steps: torch.Tensor, num_keys: torch.Tensor) -> None:
    if attention.ndim != 4 or attention.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: is {attention.dtype} {list(attention.shape)}, must be float32 or float64 "
            "[layers, batch, steps, key words]"
        )
    for count_name, count in (("num_steps", num_steps), ("num_keys", num_keys)):
        if count.shape != (attention.shape[1],) or count.is_floating_point():
            raise ValueError(
                f"{count_name}: is {count.dtype} {list(count.shape)}, must be integers [{attention.shape[1]}]"
            )


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau: is {tau}, must be greater than 0")


class _LayerMixtureKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher_attention, student_attention, student_weights, num_steps, num_keys, tau, row_norm):
        step_valid, key_valid = reference.valid_cells(student_attention, num_steps, num_keys)
        valid = step_valid[:, :, None] & key_valid[:, None, :]
        teacher_weights = reference.teacher_layer_weights(teacher_attention, num_steps, num_keys, tau)
        teacher = torch.einsum("bl,lbsm->bsm", teacher_weights, teacher_attention)
        student = torch.einsum("bl,lbsm->bsm", student_weights.to(student_attention.dtype), student_attention)
        log_p = reference.log_rows(teacher, key_valid, row_norm)
        log_q = reference.log_rows(student, key_valid, row_norm)
        p, q = log_p.exp(), log_q.exp()
        steps = num_steps.clamp(min=1)
        loss = (p * (log_p - log_q)).masked_fill_(~valid, 0).sum((-2, -1)) / steps
        if row_norm == "softmax":
            mixture_grad = q - p
        else:
            mass = (student + reference.L1_EPSILON).masked_fill(~key_valid[:, None, :], 0)
            mixture_grad = 1 / mass.sum(-1, keepdim=True) - p / mass
        mixture_grad = mixture_grad.masked_fill_(~valid, 0) / steps[:, None, None]
        ctx.save_for_backward(student_attention, student_weights, mixture_grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        student_attention, student_weights, mixture_grad = ctx.saved_tensors
        mixture_grad = mixture_grad * grad[:, None, None]
        attention_grad = student_weights.mT[:, :, None, None] * mixture_grad
        weights_grad = torch.einsum("lbsm,bsm->bl", student_attention, mixture_grad)
        return None, attention_grad.to(student_attention.dtype), weights_grad.to(student_weights.dtype), *[None] * 4


class _CudaLayerMixtureKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher_attention, student_attention, student_weights, num_steps, num_keys, tau, row_norm):
        loss, mixture_grad = cuda.layer_mixture_kl_forward(
            teacher_attention, student_attention, student_weights, num_steps, num_keys, tau, row_norm
        )
        ctx.save_for_backward(mixture_grad, student_attention, student_weights)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *cuda.layer_mixture_kl_backward(grad, *ctx.saved_tensors), *[None] * 4


def _register(name, forward, backward):
    operator = register_operator(
        f"{name}(Tensor teacher, Tensor student, Tensor weights, Tensor num_steps, Tensor num_keys, float tau, bool l1)"
        " -> (Tensor, Tensor)",
        forward,
        lambda teacher, student, *_: (student.new_empty(student.shape[1]), student.new_empty(student.shape[1:])),
    )
    backward_operator = register_operator(
        f"{name}_backward(Tensor grad, Tensor mixture_grad, Tensor student, Tensor weights) -> (Tensor, Tensor)",
        backward,
        lambda grad, mixture_grad, student, weights: (
            student.new_empty(student.shape),
            weights.new_empty(weights.shape),
        ),
    )

    def keep(ctx, inputs, output):
        ctx.save_for_backward(output[1], inputs[1], inputs[2])

    def differentiate(ctx, grad, _):
        return None, *backward_operator(grad, *ctx.saved_tensors), *[None] * 4

    register_gradient(operator, keep, differentiate)
    return operator


def _triton_forward(*arguments):
    from mold_kernels._triton.layer_mixture import layer_mixture_kl_forward

    *tensors, tau, l1 = arguments
    return layer_mixture_kl_forward(*tensors, tau, reference.L1_EPSILON, l1)


def _triton_backward(*arguments):
    from mold_kernels._triton.layer_mixture import layer_mixture_kl_backward

    return layer_mixture_kl_backward(*arguments)


_OPERATORS = {
    "native": _register("native_layer_mixture_kl", native.layer_mixture_forward, native.layer_mixture_backward),
    "triton": _register("triton_layer_mixture_kl", _triton_forward, _triton_backward),
}
