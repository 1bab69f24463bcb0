"""What a Trainer does for its model, done for the student's router too, which is no part of the model."""

from __future__ import annotations

import shutil
from collections.abc import Sized
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from mold.files import write_atomically
from mold.training.card import add_method_section
from mold.training.mixin import TrainerMixin

ROUTER_FILE = "mold_router.safetensors"


class RouterTraining(TrainerMixin):
    """A mixin of transformers' Trainer that optimises, clips, saves and loads `self.mold_loss` beside the model.

    A router inside the model would make reloading print unexpected keys, and peft would freeze it.
    """

    mol_router_learning_rate: float | None = None
    method_options: dict[str, object]
    """What the model card says of the method; set by the trainer."""
    layer_weights: list[float] | None = None
    """The router's mean weights over the last logged steps."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's, with the router's gradient averaged over the processes as DDP averages the model's."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in self.mold_loss.parameters():
                # A process whose examples have no signal has no gradient, and must take part all the same.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")
        return loss

    def create_optimizer(self, model=None):
        """Trainer's optimizer, with the router as a parameter group of its own."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        router = list(self.mold_loss.parameters())
        if not given:
            rate = self.mol_router_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": router, "lr": rate, "weight_decay": 0.0})
            # Trainer zeroes the gradients of the model alone.
            optimizer.register_step_post_hook(lambda *_: self.mold_loss.zero_grad())
        return optimizer

    def _clip_grad_norm(self, model):
        parameters = [*model.parameters(), *self.mold_loss.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir) / ROUTER_FILE
            write_atomically(path, save(self.mold_loss.router.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_router(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        self._load_router(Path(self.state.best_model_checkpoint))

    def _load_router(self, checkpoint: Path):
        path = checkpoint / ROUTER_FILE
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {checkpoint} has no {ROUTER_FILE}, the student's router")
        self.mold_loss.router.load_state_dict(load_file(path))

    def save_model(self, output_dir=None, _internal_call=False):
        """Trainer's, with the model card beside the model."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            card = self.create_model_card()
            folder = Path(output_dir or self.args.output_dir)
            if folder != card.parent:
                shutil.copy(card, folder)

    def create_model_card(self, *args, **kwargs):
        """The trainer's own model card, with the method, the signals' fingerprint and the router's weights.

        Returns:
            The card's path, in args.output_dir.
        """
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero():
            card.parent.mkdir(parents=True, exist_ok=True)
            # In the order that a checkpoint gives them: a resumed training's table is no other.
            self.state.log_history = [dict(sorted(row.items())) for row in self.state.log_history]
            super().create_model_card(*args, **kwargs)
            student = self.accelerator.unwrap_model(self.model).config
            number = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
            taught = getattr(self.args, "trains_attention", True)
            about = self.method_options, self.signals, self.layer_weights, taught
            add_method_section(card, student, number, *about)
        return card
