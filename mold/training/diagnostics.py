"""What is asked of a student beside training it: how hard each term pulls, and where student and teacher look."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mold.data.encoding import has_signal
from mold.method.attention_interface import stack_attention
from mold.method.loss import TERMS, denominators, visible_keys
from mold.training.mixin import TrainerMixin


class Diagnostics(TrainerMixin):
    """A mixin of `MoldTrainer`."""

    def term_gradient_norms(self, items: Sequence[dict]) -> dict[str, float]:
        """Norm of each unweighted term's gradient with respect to the model, on one batch of items of `encode`.

        The attention loss is small by nature; this tells whether beta times it pulls at all.
        """
        inputs = self._prepare_inputs(self.data_collator(list(items)))
        self.model.train()
        counts = denominators(inputs).tolist()
        return {
            term: self._term_gradient_norm(inputs, index) / count
            for index, (term, count) in enumerate(zip(TERMS, counts, strict=True))
            if count
        }

    def _term_gradient_norm(self, inputs, index: int) -> float:
        """Of the term's sum. What one term makes is gone before the next one's forward."""
        sums = self._term_sums(self.model, inputs)[0]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sums[index], parameters, allow_unused=True)
        return math.sqrt(sum(g.float().square().sum().item() for g in gradients if g is not None))

    @torch.no_grad()
    def attention_maps(self, items: Sequence[dict]) -> list[dict]:
        """Steps x key words of teacher and student, mixed over layers, of items of `encode` that have a signal.

        Returns:
            A dictionary an item: id, steps, key_words (texts), teacher and student [S][M], their layer weights, and
            the KL between them.
        """
        model, maps = self.model, []
        was_training = model.training
        model.eval()
        self.mold_loss.eval()
        for item in items:
            if not has_signal(item):
                continue
            first_task = {name: value for name, value in item.items() if name != "predict"}
            inputs = self._prepare_inputs(self.data_collator([first_task]))
            with self.accelerator.autocast():
                outputs = self._forward(model, inputs, with_attention=True)
            counts = inputs["num_steps"], inputs["num_keys"]
            teacher, student = inputs["teacher_attention"], stack_attention(outputs.attentions)
            teacher_weights, layers = self.mold_loss.teacher_weights(teacher, *counts), self.mold_loss.student_layers
            visible = visible_keys(inputs["row_spans"], inputs["key_spans"])
            kl, student_weights = self.mold_loss(outputs.attentions, teacher, *counts, visible)
            maps.append(
                {
                    "id": item["example"].id,
                    "steps": item["example"].step_texts,
                    "key_words": item["example"].key_word_texts,
                    "teacher": torch.einsum("bl,blsm->bsm", teacher_weights, teacher)[0].tolist(),
                    "student": torch.einsum("bl,lbsm->bsm", student_weights[:, layers], student)[0].tolist(),
                    "teacher_layer_weights": teacher_weights[0].tolist(),
                    "student_layer_weights": student_weights[0].tolist(),
                    "kl": kl.item(),
                }
            )
        model.train(was_training)
        return maps
