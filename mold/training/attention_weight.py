"""The weight of the attention loss: given, or chosen so that it pulls; over the course of the training."""

from __future__ import annotations

import math

import torch
from accelerate.utils import broadcast
from transformers.utils import logging

from mold.training.mixin import TrainerMixin

logger = logging.get_logger(__name__)

_BATCHES = 4  # that gradients are measured on


class AttentionWeight(TrainerMixin):
    """A mixin of `MoldTrainer` that decides beta.

    With beta="auto" it is chosen once, before the first step, from the norms g of the gradients with respect to the
    model, averaged over the first batches of the training data, so that attention has its share of them:

        share = beta g_attention / (beta g_attention + g_cross_entropy)

    g_cross_entropy is that of alpha answer + (1 - alpha) rationale. The attention loss is small by nature; how small
    depends on the model, its depth and how rows are normalised. A share means the same everywhere.
    """

    _chosen_beta: float | None = None

    @property
    def beta(self) -> float:
        """The weight of the attention loss, at its full height."""
        if self.args.beta != "auto":
            return self.args.beta
        if self._chosen_beta is None:
            self._choose_beta(self._measure_beta())
        return self._chosen_beta

    def scheduled_beta(self, done: int) -> float:
        """The weight in the step behind so many: rising over beta_warmup of the training, falling over beta_decay."""
        steps = self.state.max_steps
        warmup, decay = self.args.beta_warmup * steps, self.args.beta_decay * steps
        rise = (done + 1) / warmup if warmup else 1.0
        fall = (steps - done) / decay if decay else 1.0
        return self.beta * min(1.0, rise, fall)

    def settle_beta(self, note: dict | None, checkpoint: str | None) -> None:
        """Choose beta, or take the one that the checkpoint was trained with from its note."""
        if self.args.beta != "auto":
            return
        if note is None:
            self.beta  # noqa: B018 - measured here, on the model as it is before the first step
            return
        beta = note.get("beta")
        if beta is None:
            raise ValueError(f"beta: is 'auto', must be the number that {checkpoint} was trained with")
        self._choose_beta(beta)

    def _choose_beta(self, beta: float) -> None:
        self._chosen_beta = self.method_options["beta"] = beta
        logger.info(f"beta: {beta:.6g} gives attention {self.args.attention_share:g} of the gradient")

    def _measure_beta(self) -> float:
        if not self.train_dataset:
            raise ValueError("beta: is 'auto', must be a number without training data to choose it on")
        size = self.args.per_device_train_batch_size
        taught = [item for item in self.train_dataset if self.data_collator([item])["num_keys"].any()]
        norms = []
        was_training = self.model.training
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # Dropout must not move the random numbers that the training draws.
        with torch.random.fork_rng(devices):
            for start in range(0, min(len(taught), _BATCHES * size), size):
                inputs = self._prepare_inputs(self.data_collator(taught[start : start + size]))
                norms.append([self._gradient_norm(inputs, *weights) for weights in ((1.0, 0.0), (0.0, 1.0))])
        self.model.train(was_training)
        cross_entropy, attention = torch.tensor(norms, dtype=torch.float64).mean(0).tolist()
        if not attention > 0:
            raise ValueError(
                "beta: is 'auto', must be a number: the attention loss has no gradient here (a row of one key word has "
                "none)"
            )
        share = self.args.attention_share
        found = torch.tensor(share / (1 - share) * cross_entropy / attention, dtype=torch.float64)
        # Gradients of other processes may differ in their last bits; beta must not.
        return broadcast(found.to(self.args.device)).item() if self.args.world_size > 1 else found.item()

    def _gradient_norm(self, inputs, cross_entropy: float, attention: float) -> float:
        """Norm of the gradient of the weighted losses of one batch with respect to the model."""
        self.model.train()
        with torch.enable_grad():  # an evaluation may be what asks first
            sums, _, _ = self._term_sums(self.model, inputs)
            loss = self._weigh(sums, self.term_counts(inputs), attention, cross_entropy)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))
