"""The losses: stepwise attention (usable alone, in anybody's loop) and cross-entropy by region of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from mold.data.examples import ANSWER, PROMPT, RATIONALE
from mold.method.attention_interface import LayerAttention, stack_attention
from mold.method.router import FixedLayer, LayerRouter, check_layer
from mold_kernels import layer_mixture_kl, teacher_layer_weights

TERMS = ("rationale", "answer", "attention")
"""What a loss is made of."""


class AttentionLoss(NamedTuple):
    """loss [B] of each example, and the student's layer weights [B, L2]."""

    loss: torch.Tensor
    layer_weights: torch.Tensor


class MoldLoss(nn.Module):
    """KL between the teacher's and the student's mixed stepwise attention, with the student's router inside.

        loss_fn = MoldLoss.for_config(model.config)
        out = model(**batch, output_attentions=True, value_features=True, row_spans=rows, key_spans=keys)
        loss = loss_fn(out.attentions, teacher_attention, num_steps, num_keys).loss.mean()

    The optimizer must get `loss_fn.parameters()` beside the model's.

    Args:
        router: of the student; a FixedLayer takes one of its layers.
        tau: temperature of the teacher's layer weights (the paper's tau_1).
        row_norm: "softmax" (the paper) or "l1".
        teacher_layer: the only teacher layer to learn from; None: the mixture.
    """

    def __init__(
        self,
        router: LayerRouter | FixedLayer,
        tau: float = 0.1,
        row_norm: str = "softmax",
        teacher_layer: int | None = None,
    ):
        super().__init__()
        self.router = router
        self.tau = tau
        self.row_norm = row_norm
        self.teacher_layer = teacher_layer

    @classmethod
    def for_config(
        cls,
        config: PretrainedConfig,
        tau_1: float = 0.1,
        tau_2: float = 0.5,
        row_norm: str = "softmax",
        *,
        teacher_layer: int | None = None,
        student_layer: int | None = None,
    ) -> MoldLoss:
        """The loss for a student of this configuration: with a fresh router, or of one layer where that is given."""
        if student_layer is None:
            return cls(LayerRouter.for_config(config, tau_2), tau_1, row_norm, teacher_layer)
        router = FixedLayer(config.get_text_config().num_hidden_layers, student_layer)
        return cls(router, tau_1, row_norm, teacher_layer)

    def teacher_weights(
        self, teacher_attention: torch.Tensor, num_steps: torch.Tensor, num_keys: torch.Tensor
    ) -> torch.Tensor:
        """How much each teacher layer counts, [B, L1]; the arguments are those of `forward`."""
        if self.teacher_layer is None:
            return teacher_layer_weights(teacher_attention.transpose(0, 1), num_steps, num_keys, self.tau)
        batch, layers = teacher_attention.shape[:2]
        check_layer("mol_teacher_layer", self.teacher_layer, layers)
        weights = teacher_attention.new_zeros(batch, layers)
        weights[:, self.teacher_layer] = 1
        return weights

    def forward(
        self,
        attentions: Sequence[LayerAttention],
        teacher_attention: torch.Tensor,
        num_steps: torch.Tensor,
        num_keys: torch.Tensor,
    ) -> AttentionLoss:
        """The loss of each example; 0 with zero gradient for one without key words.

        Args:
            attentions: the student's output `attentions`, of a forward with ``value_features=True``.
            teacher_attention: float32 [B, L1, S, M].
            num_steps: int [B].
            num_keys: int [B].

        Raises:
            ValueError: nothing was captured, the shapes do not fit, or the captured attention has no gradient
                although gradients are on (reentrant activation checkpointing cuts it).
        """
        student_attention = stack_attention(attentions)
        if any(layer.value_features is None for layer in attentions):
            raise ValueError("attentions: have no value_features; call the model with value_features=True")
        if self.training and torch.is_grad_enabled() and not student_attention.requires_grad:
            raise ValueError(
                "attentions: carry no gradient. Reentrant activation checkpointing cuts it: use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}; or every parameter of the model is frozen'
            )
        weights = self.router([layer.value_features for layer in attentions])
        if self.teacher_layer is not None:
            # A mixture of one layer is that layer.
            check_layer("mol_teacher_layer", self.teacher_layer, teacher_attention.shape[1])
            teacher_attention = teacher_attention[:, self.teacher_layer, None]
        with torch.autocast(student_attention.device.type, enabled=False):
            loss = layer_mixture_kl(
                teacher_attention.transpose(0, 1).to(student_attention.dtype),
                student_attention,
                weights.to(student_attention.dtype),
                num_steps,
                num_keys,
                tau=self.tau,
                row_norm=self.row_norm,
            )
        return AttentionLoss(loss, weights)


def denominators(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a batch adds to the divisors of TERMS, int64 [3]: rationale and answer tokens, examples with a signal."""
    predicted = batch["regions"][:, 1:]
    signals = batch["num_keys"] > 0
    return torch.stack([(predicted == RATIONALE).sum(), (predicted == ANSWER).sum(), signals.sum()])


def predicting_positions(regions: torch.Tensor) -> torch.Tensor:
    """Positions [K], ascending, whose next token is in some example's rationale or answer; of regions [B, T]."""
    return (regions[:, 1:] > PROMPT).any(0).nonzero()[:, 0]


def region_cross_entropy(
    logits: torch.Tensor, input_ids: torch.Tensor, regions: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed next-token cross-entropy of the rationale's and of the answer's tokens.

    Args:
        logits: [B, T, vocabulary], of the tokens; logits at t predict token t + 1. [B, K, vocabulary] with positions.
        input_ids: int [B, T].
        regions: int [B, T], PROMPT, RATIONALE or ANSWER.
        positions: int [K], where the logits are (see `predicting_positions`); None: everywhere.

    Returns:
        [2]: sums over the batch for RATIONALE and ANSWER, float32.
    """
    regions, targets = regions[:, 1:], input_ids[:, 1:]
    if positions is None:
        logits = logits[:, :-1]
    else:
        regions, targets = regions[:, positions], targets[:, positions]
    targets = targets.masked_fill(regions <= PROMPT, -100)  # which cross_entropy ignores
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return region_sums(losses, regions.flatten())


def region_sums(losses: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Sums [2] of losses [N] whose regions [N] are RATIONALE and ANSWER."""
    answer = regions == ANSWER
    return torch.stack([losses.masked_fill(answer, 0).sum(), losses.masked_fill(~answer, 0).sum()])
