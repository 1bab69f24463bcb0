"""Mixture of layers and its KL divergence; nothing is read back by the host.

The derivation is in `mold_kernels.layer_mixture`. Forward: the teacher's layer weights need all of its maps before any
can be mixed, so one launch sums the layer statistic (a program a layer and example) and another mixes and compares
whole rows (a program a few rows). One launch alone would leave an example to one multiprocessor, which takes a hundred
times as long. Backward: one launch, a program a layer and example. A row of key words is held in registers (rounded up
to a power of two).
Sums over layers and rows are float64: teacher and student rows are nearly alike, so float32's rounding of either would
be a visible part of their divergence, and it is a few thousand numbers a step.

Cost with n = S M: forward reads 3 L1 n + L2 n floats (L1 n of them twice in a row) and writes n; backward reads
L2 n + n and writes L2 n.
"""

import torch
import triton
import triton.language as tl

from mold_kernels._triton import tiles

# Numbers that change with every batch, which must not make a kernel anew.
_OF_TEACHER = ["teacher_layer", "teacher_batch", "teacher_step", "teacher_key", "S", "M"]
_OF_STUDENT = ["weights_batch", "weights_layer", "student_layer", "student_batch", "student_step", "student_key", "M"]


@triton.jit
def _log_rows(values, valid, l1_epsilon, ROW_NORM: tl.constexpr):
    """(log of each row made a distribution over its valid cells, the values plus epsilon, their sum)"""
    if ROW_NORM == "l1":
        mass = tl.where(valid, values + l1_epsilon, 0.0)
        total = tl.sum(mass, 1)[:, None]
        return tl.log(tl.where(valid, mass / total, 1.0)), mass, total
    else:
        peak = tl.max(tl.where(valid, values, float("-inf")), 1)[:, None]
        shifted = tl.where(valid, values - peak, 0.0)
        total = tl.sum(tl.where(valid, tl.exp(shifted), 0.0), 1)[:, None]
        return tl.where(valid, shifted - tl.log(total), 0.0), values, total


@triton.jit
def _counts(steps_ptr, keys_ptr, batch, S, M):
    """(steps, key words) of an example; none without key words."""
    keys = tl.minimum(tl.load(keys_ptr + batch).to(tl.int32), M)
    return tl.where(keys > 0, tl.minimum(tl.load(steps_ptr + batch).to(tl.int32), S), 0), keys


@triton.jit(do_not_specialize=_OF_TEACHER)
def _layer_statistic_kernel(
    teacher_ptr,
    steps_ptr,
    keys_ptr,
    statistic_ptr,
    teacher_layer,
    teacher_batch,
    teacher_step,
    teacher_key,
    S,
    M,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    steps, keys = _counts(steps_ptr, keys_ptr, batch, S, M)
    teacher_ptr += layer * teacher_layer + batch * teacher_batch
    key = tl.arange(0, BLOCK_M)
    change = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for first in range(0, steps, BLOCK_S):
        step = first + tl.arange(0, BLOCK_S)
        cells = teacher_ptr + step[:, None] * teacher_step + key[None, :] * teacher_key
        valid = (step < steps)[:, None] & (key + 1 < keys)[None, :]
        here = tl.load(cells, mask=valid, other=0.0)
        change += tl.abs(tl.load(cells + teacher_key, mask=valid, other=0.0) - here)
    pairs = tl.maximum(steps * (keys - 1), 1).to(tl.float64)
    mean = tl.sum(tl.sum(change.to(tl.float64), 1), 0) / pairs
    tl.store(statistic_ptr + batch * tl.num_programs(0) + layer, mean)


@triton.jit(do_not_specialize=[*_OF_TEACHER, *_OF_STUDENT, "teacher_layers", "student_layers"])
def _layer_mixture_kl_forward_kernel(
    teacher_ptr,
    student_ptr,
    weights_ptr,
    steps_ptr,
    keys_ptr,
    statistic_ptr,
    loss_ptr,
    mixture_grad_ptr,
    teacher_layer,
    teacher_batch,
    teacher_step,
    teacher_key,
    student_layer,
    student_batch,
    student_step,
    student_key,
    weights_batch,
    weights_layer,
    teacher_layers,
    student_layers,
    S,
    M,
    tau,
    l1_epsilon,
    ROW_NORM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    steps, keys = _counts(steps_ptr, keys_ptr, batch, S, M)
    teacher_ptr += batch * teacher_batch
    student_ptr += batch * student_batch
    key = tl.arange(0, BLOCK_M)
    layer = tl.arange(0, BLOCK_L)
    is_teacher = layer < teacher_layers
    statistic = tl.load(statistic_ptr + batch * teacher_layers + layer, mask=is_teacher, other=float("-inf")) / tau
    teacher_weights = tl.exp(statistic - tl.max(statistic, 0))
    teacher_weights = teacher_weights / tl.sum(teacher_weights, 0)
    student_weights = tl.load(
        weights_ptr + batch * weights_batch + layer * weights_layer, mask=layer < student_layers, other=0.0
    ).to(tl.float64)

    step = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = (step < steps)[:, None] & (key < keys)[None, :]
    teacher = tl.zeros([BLOCK_S, BLOCK_M], tl.float64)
    cells = teacher_ptr + step[:, None] * teacher_step + key[None, :] * teacher_key
    for index in range(teacher_layers):
        weight = tl.sum(tl.where(layer == index, teacher_weights, 0.0), 0)
        teacher += weight * tl.load(cells, mask=valid, other=0.0).to(tl.float64)
        cells += teacher_layer
    student = tl.zeros([BLOCK_S, BLOCK_M], tl.float64)
    cells = student_ptr + step[:, None] * student_step + key[None, :] * student_key
    for index in range(student_layers):
        weight = tl.sum(tl.where(layer == index, student_weights, 0.0), 0)
        student += weight * tl.load(cells, mask=valid, other=0.0).to(tl.float64)
        cells += student_layer
    # Rows of padding are uniform here, so that no row is empty, and leave the loss below.
    row_valid = valid | ((step >= steps)[:, None] & (key < BLOCK_M)[None, :])
    log_p, _, _ = _log_rows(teacher, row_valid, l1_epsilon, ROW_NORM)
    log_q, mass, total = _log_rows(student, row_valid, l1_epsilon, ROW_NORM)
    p = tl.exp(log_p)
    divisor = tl.maximum(steps, 1).to(tl.float64)
    loss = tl.sum(tl.sum(tl.where(valid, p * (log_p - log_q), 0.0), 1), 0) / divisor
    tl.store(loss_ptr + batch * tl.num_programs(0) + tl.program_id(0), loss)
    gradient = 1 / total - p / tl.where(valid, mass, 1.0) if ROW_NORM == "l1" else tl.exp(log_q) - p
    gradient = tl.where(valid, gradient, 0.0) / divisor
    cells = mixture_grad_ptr + batch * S * M + step[:, None] * M + key[None, :]
    tl.store(cells, gradient.to(tl.float32), mask=(step < S)[:, None] & (key < M)[None, :])


@triton.jit(do_not_specialize=["grad_batch", *_OF_STUDENT, "layers", "cells"])
def _layer_mixture_kl_backward_kernel(
    grad_ptr,
    mixture_grad_ptr,
    student_ptr,
    weights_ptr,
    attention_grad_ptr,
    weights_grad_ptr,
    grad_batch,
    weights_batch,
    weights_layer,
    student_layer,
    student_batch,
    student_step,
    student_key,
    layers,
    cells,
    M,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    scale = tl.load(grad_ptr + batch * grad_batch)
    weight = tl.load(weights_ptr + batch * weights_batch + layer * weights_layer)
    student_ptr += layer * student_layer + batch * student_batch
    mixture_grad_ptr += batch * cells
    attention_grad_ptr += (layer * tl.num_programs(1) + batch) * cells
    acc = tl.zeros([BLOCK], tl.float64)
    for first in range(0, cells, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        gradient = tl.load(mixture_grad_ptr + cell, mask=cell < cells, other=0.0) * scale
        # What padding holds is not looked at: 0 times it may be NaN.
        student = tl.load(
            student_ptr + (cell // M) * student_step + (cell % M) * student_key,
            mask=(cell < cells) & (gradient != 0),
            other=0.0,
        )
        acc += student.to(tl.float64) * gradient
        tl.store(attention_grad_ptr + cell, weight * gradient, mask=cell < cells)
    tl.store(weights_grad_ptr + batch * layers + layer, tl.sum(acc, 0).to(tl.float32))


def layer_mixture_kl_forward(
    teacher: torch.Tensor,
    student: torch.Tensor,
    weights: torch.Tensor,
    num_steps: torch.Tensor,
    num_keys: torch.Tensor,
    tau: float,
    row_norm: str,
    l1_epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] and its gradient [B, S, M] in the student's mixture."""
    layers, batch, steps, keys = student.shape
    teacher_layers = teacher.shape[0]
    block_m = max(16, triton.next_power_of_2(keys))
    block_s = max(1, min(tiles.MIXTURE_ELEMENTS // block_m, triton.next_power_of_2(max(steps, 1))))
    blocks = triton.cdiv(steps, block_s)
    mixture_grad = student.new_empty(batch, steps, keys)
    statistic = student.new_empty(batch, teacher_layers, dtype=torch.float64)
    loss = student.new_empty(batch, blocks, dtype=torch.float64)
    num_steps, num_keys = num_steps.contiguous(), num_keys.contiguous()
    options = {"BLOCK_S": block_s, "BLOCK_M": block_m, "num_warps": 8, "enable_fp_fusion": True}
    _layer_statistic_kernel[teacher_layers, batch](
        teacher, num_steps, num_keys, statistic, *teacher.stride(), steps, keys, **options
    )
    _layer_mixture_kl_forward_kernel[blocks, batch](
        *(teacher, student, weights, num_steps, num_keys, statistic, loss, mixture_grad),
        *(*teacher.stride(), *student.stride(), *weights.stride()),
        *(teacher_layers, layers, steps, keys, tau, l1_epsilon),
        ROW_NORM=row_norm,
        BLOCK_L=triton.next_power_of_2(max(layers, teacher_layers)),
        **options,
    )
    return loss.sum(1).float(), mixture_grad


def layer_mixture_kl_backward(
    grad: torch.Tensor, mixture_grad: torch.Tensor, student: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients [L, B, S, M] and [B, L] from grad [B]."""
    layers, batch, steps, keys = student.shape
    attention_grad, weights_grad = student.new_empty(student.shape), weights.new_empty(batch, layers)
    _layer_mixture_kl_backward_kernel[layers, batch](
        *(grad, mixture_grad, student, weights, attention_grad, weights_grad),
        *(*grad.stride(), *weights.stride(), *student.stride(), layers, steps * keys, keys),
        BLOCK=tiles.MIXTURE_CELLS,
        enable_fp_fusion=True,
    )
    return attention_grad, weights_grad
