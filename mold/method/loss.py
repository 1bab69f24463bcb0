"""The losses: stepwise attention (usable alone, in anybody's loop) and cross-entropy by region of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from mold.data.examples import ANSWER, PROMPT, RATIONALE
from mold.method.attention_interface import LayerAttention, check_captured
from mold.method.layer_mixture import loss_of_mixture
from mold.method.router import FixedLayer, LayerRouter, check_layer, kept_layers
from mold_kernels import layer_mixture_kl, teacher_layer_weights

TERMS = ("rationale", "answer", "attention")
"""What a loss is made of."""

ROW_KEYS = ("all", "visible")
# In place of attention to key words that a step cannot see: no mass is left of it in float32, and it is finite, so that
# a row that sees none is uniform for teacher and student alike.
_HIDDEN = -1.0e4


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
        tau_row: temperature of the softmax over a step's row; 1 is the paper's.
        row_keys: "all" (the paper), or "visible": the softmax is over those key words alone that the step can see.
            Behind its last token attention is zero, which a softmax gives mass all the same.
        teacher_layers_left_out: layers that are no part of the teacher's mixture.
        student_layers_left_out: layers that are no part of the student's; the router is of the others.

    Raises:
        ValueError: an option does not fit; tau_row and row_keys are those of a softmax.
    """

    def __init__(
        self,
        router: LayerRouter | FixedLayer,
        tau: float = 0.1,
        row_norm: str = "softmax",
        teacher_layer: int | None = None,
        *,
        tau_row: float = 1.0,
        row_keys: str = "all",
        teacher_layers_left_out: Sequence[int] = (),
        student_layers_left_out: Sequence[int] = (),
    ):
        super().__init__()
        check_rows(row_norm, tau_row, row_keys)
        self.tau_row, self.row_keys = tau_row, row_keys
        self.teacher_layers_left_out = tuple(teacher_layers_left_out)
        self.num_layers = router.num_layers + len(set(student_layers_left_out))
        """Of the student, those that are left out too."""
        self.student_layers = kept_layers("student_layers_left_out", student_layers_left_out, self.num_layers)
        """Of its mixture."""
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
        student_layers_left_out: Sequence[int] = (),
        **options,
    ) -> MoldLoss:
        """The loss for a student of this configuration: with a fresh router, or of one layer where that is given."""
        layers = config.get_text_config().num_hidden_layers
        left_out = [layer % layers for layer in student_layers_left_out if -layers <= layer < layers]
        if student_layer is not None:
            router = FixedLayer(layers, student_layer)
        else:
            kept = kept_layers("student_layers_left_out", student_layers_left_out, layers)
            router = LayerRouter.for_config(config, tau_2, len(kept))
        return cls(router, tau_1, row_norm, teacher_layer, student_layers_left_out=left_out, **options)

    def teacher_weights(
        self, teacher_attention: torch.Tensor, num_steps: torch.Tensor, num_keys: torch.Tensor
    ) -> torch.Tensor:
        """How much each teacher layer counts, [B, L1]; the arguments are those of `forward`."""
        kept = self._teacher_layers(teacher_attention.shape[1])
        found = teacher_layer_weights(teacher_attention[:, kept].transpose(0, 1), num_steps, num_keys, self.tau)
        return _spread(found, kept, teacher_attention.shape[1])

    def _teacher_layers(self, layers: int) -> list[int]:
        if self.teacher_layer is None:
            return kept_layers("teacher_layers_left_out", self.teacher_layers_left_out, layers)
        check_layer("mol_teacher_layer", self.teacher_layer, layers)
        return [self.teacher_layer % layers]

    def forward(
        self,
        attentions: Sequence[LayerAttention],
        teacher_attention: torch.Tensor,
        num_steps: torch.Tensor,
        num_keys: torch.Tensor,
        visible: torch.Tensor | None = None,
    ) -> AttentionLoss:
        """The loss of each example; 0 with zero gradient for one without key words.

        Args:
            attentions: the student's output `attentions`, of a forward with ``value_features=True``: of all layers, or
                of `student_layers` alone (``span_layers=loss_fn.student_layers``). Beside them the loss takes as much
                as a few of them, and its backward one gradient of each, for which they need not be kept.
            teacher_attention: float32 [B, L1, S, M].
            num_steps: int [B].
            num_keys: int [B].
            visible: bool [B, S, M], of `visible_keys`; needed where row_keys is "visible".

        Raises:
            ValueError: visible is missing, nothing was captured, the shapes do not fit, or the captured attention has
                no gradient although gradients are on (reentrant activation checkpointing cuts it).
        """
        check_captured(attentions)
        if any(layer.value_features is None for layer in attentions):
            raise ValueError("attentions: have no value_features; call the model with value_features=True")
        if len(attentions) == self.num_layers:
            attentions = [attentions[layer] for layer in self.student_layers]
        layers = [layer.attention for layer in attentions]
        if self.training and torch.is_grad_enabled() and not any(layer.requires_grad for layer in layers):
            raise ValueError(
                "attentions: carry no gradient. Reentrant activation checkpointing cuts it: use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}; or every parameter of the model is frozen'
            )
        if self.row_keys == "visible" and visible is None:
            raise ValueError('visible: is None, must be of visible_keys where row_keys is "visible"')
        weights = self.router([layer.value_features for layer in attentions])
        kept = self._teacher_layers(teacher_attention.shape[1])
        if len(kept) < teacher_attention.shape[1]:
            # A mixture of one layer is that layer. Indices would be copied to the device, which waits for it.
            teacher_attention = torch.stack([teacher_attention[:, layer] for layer in kept], 1)
        with torch.autocast(layers[0].device.type, enabled=False):
            teacher = teacher_attention.transpose(0, 1).to(layers[0].dtype)
            if (self.tau_row, self.row_keys) != (1, "all"):
                # The layers' weights are told from all of the attention as it is, so the teacher is mixed before.
                mixing = teacher_layer_weights(teacher, num_steps, num_keys, self.tau)
                teacher = self._rows(torch.einsum("bl,lbsm->bsm", mixing, teacher)[None], visible)
            alone = teacher.new_ones(teacher.shape[1], 1)

            def divergence(mixed: torch.Tensor) -> torch.Tensor:
                student = self._rows(mixed[None], visible)
                return layer_mixture_kl(
                    teacher, student, alone, num_steps, num_keys, tau=self.tau, row_norm=self.row_norm
                )

            loss = loss_of_mixture(divergence, weights.to(layers[0].dtype), layers)
        return AttentionLoss(loss, _spread(weights, self.student_layers, self.num_layers))

    def _rows(self, mixed: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """What a step's softmax is of."""
        if self.tau_row != 1:
            mixed = mixed / self.tau_row
        if self.row_keys == "visible" and visible is not None:
            mixed = mixed.masked_fill(~visible, _HIDDEN)
        return mixed


def denominators(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a batch adds to the divisors of TERMS, int64 [3]: rationale and answer tokens, examples with a signal."""
    predicted = batch["regions"][:, 1:]
    signals = batch["num_keys"] > 0
    return torch.stack([(predicted == RATIONALE).sum(), (predicted == ANSWER).sum(), signals.sum()])


def check_rows(row_norm: str, tau_row: float, row_keys: str) -> None:
    """Raise a ValueError unless these say how a step's row becomes a distribution."""
    if not tau_row > 0:
        raise ValueError(f"tau_row: is {tau_row}, must be greater than 0")
    if row_keys not in ROW_KEYS:
        raise ValueError(f"row_keys: is {row_keys!r}, must be one of {', '.join(ROW_KEYS)}")
    if row_norm == "l1" and (tau_row, row_keys) != (1, "all"):
        name, value, needed = ("tau_row", tau_row, 1) if tau_row != 1 else ("row_keys", row_keys, "all")
        raise ValueError(f"{name}: is {value!r}, must be {needed!r} with row_norm='l1', which has no softmax")


def visible_keys(row_spans: torch.Tensor, key_spans: torch.Tensor) -> torch.Tensor:
    """Which key words each step can see: bool [B, S, M], those that begin before its last token's end.

    Args:
        row_spans: int [B, S, 2], half-open token ranges of the steps.
        key_spans: int [B, M, 2], of the key words.
    """
    return key_spans[:, None, :, 0] < row_spans[:, :, None, 1]


def _spread(weights: torch.Tensor, layers: Sequence[int], num_layers: int) -> torch.Tensor:
    """Weights [B, len(layers)] at their places in [B, num_layers], 0 elsewhere."""
    columns = dict(zip(layers, weights.unbind(1), strict=True))
    none = weights.new_zeros(len(weights))
    return torch.stack([columns.get(layer, none) for layer in range(num_layers)], 1)


def region_cross_entropy(
    logits: torch.Tensor, input_ids: torch.Tensor, regions: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed next-token cross-entropy of the rationale's and of the answer's tokens.

    Args:
        logits: [B, T, vocabulary], of the tokens; logits at t predict token t + 1. [B, K, vocabulary] with positions.
        input_ids: int [B, T].
        regions: int [B, T], PROMPT, RATIONALE or ANSWER.
        positions: int [K], where the logits are (learned_positions of a `Collator`); None: everywhere.

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
