"""MoldTrainer: transformers' Trainer with the three losses of the method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput, align_special_tokens, rotate_checkpoints
from transformers.utils import logging

from mold.data.chat import choose_template, record_template, recorded_template
from mold.data.conversations import example_from_row
from mold.data.encoding import Collator, encode_example, has_signal, shortened
from mold.data.examples import Example
from mold.files import append_jsonl, sole_use
from mold.method.attention_interface import (
    ATTENTION_NAME,
    check_attention_dropout,
    observe_attention,
    use_mold_attention,
)
from mold.method.chunked_mlp import chunk_mlps
from mold.method.loss import TERMS, MoldLoss, denominators, visible_keys
from mold.method.online_teacher import OnlineTeacher
from mold.method.signals import SignalCache
from mold.models import check_model_init_kwargs, load_config, load_model
from mold.processes import check_processes
from mold.training.adapters import add_adapter, check_adapter, without_adapter
from mold.training.attention_weight import AttentionWeight
from mold.training.checkpoints import STATE_FILE, check_can_go_on, last_complete_checkpoint, read_seal, seal
from mold.training.config import MoldConfig
from mold.training.diagnostics import Diagnostics
from mold.training.heads import make_head
from mold.training.host_memory import freed_memory_kept
from mold.training.router_training import RouterTraining

logger = logging.get_logger(__name__)

METRICS_FILE = "metrics.jsonl"


class MoldTrainer(AttentionWeight, RouterTraining, Diagnostics, Trainer):
    """Trains a student on rationales, answers and its teacher's stepwise attention.

    Args:
        model: the student, or a name or folder for `from_pretrained`.
        args: options.
        train_dataset: examples, or rows with the fields of `mold.data.examples.Example`.
        eval_dataset: likewise; None: no evaluation.
        processing_class: the student's tokenizer, a fast one; loaded with the model when that is a name.
        signals: the teacher's signals of all examples. Neither these nor a teacher_model: trains on cross-entropy alone
            and needs beta=0.
        teacher_model: a teacher that runs beside the student instead of signals, or its name for `mold.models`. It is
            frozen; the rationales may come from anybody else.
        teacher_processing_class: its tokenizer; loaded with the teacher when that is a name.
        callbacks: as of Trainer.
        optimizers: as of Trainer; an optimizer given here must hold `trainer.mold_loss.parameters()` too.
        peft_config: trains an adapter (LoRA and its like) instead of the model, and the router with it.

    Raises:
        ValueError: the data set is empty, an example does not fit (see `encode_example`, `SignalCache.signal`), no
            example has a signal, the cache was made with another row_reduction, or the model has attention dropout or
            an attention that cannot be replaced.

    Source: MoLSAKI (EMNLP 2025), equation 7.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: MoldConfig,
        train_dataset: Sequence[Example | Mapping] | None = None,
        eval_dataset: Sequence[Example | Mapping] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        signals: SignalCache | None = None,
        teacher_model: PreTrainedModel | str | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config=None,
    ):
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            init: Any = args.model_init_kwargs or {}
            check_model_init_kwargs(load_config(model), init)
            model = AutoModelForCausalLM.from_pretrained(model, **init)
        if processing_class is None:
            raise ValueError("processing_class: is None, must be the student's tokenizer")
        if signals is not None and teacher_model is not None:
            raise ValueError("teacher_model: is given together with signals, must be only one of them")
        teacher: Any = teacher_model
        if isinstance(teacher_model, str):
            teacher, loaded = load_model(teacher_model)
            teacher_processing_class = teacher_processing_class or loaded
        if teacher_model is not None and teacher_processing_class is None:
            raise ValueError("teacher_processing_class: is None, must be the teacher's tokenizer")
        self.signals, self.teacher = signals, None
        train, held_out = (
            None if rows is None else _examples(rows, name)
            for rows, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset"))
        )
        self.template = choose_template(
            recorded_template(processing_class) if train is None and args.template is None else args.template,
            held_out or () if train is None else train,
            *(one for one in (processing_class, teacher_processing_class) if one is not None),
            tasks=args.tasks,
        )
        if train is not None:
            record_template(processing_class, self.template)
        if teacher_model is not None:
            self.teacher = OnlineTeacher(
                teacher.to(args.device),
                teacher_processing_class,
                self.template,
                args.row_reduction,
                args.max_length,
                args.segments,
                args.teacher_chunk_size,
            )
        if signals is None and teacher_model is None and args.trains_attention:
            raise ValueError(
                f"signals: is None, must be the teacher's signals (or give teacher_model) while beta={args.beta} "
                "(beta=0 trains without)"
            )
        if args.padding_free or signals is not None or teacher_model is not None:
            use_mold_attention(without_adapter(model))
        if args.trains_attention:
            check_attention_dropout(model.config)
        if signals is not None:
            signals.require(**args.signal_settings(signals.settings.signal_layers))
            if args.trains_attention:
                signals.require_template(self.template)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        check_adapter(model)
        if args.mlp_chunk_size is not None:
            chunk_mlps(without_adapter(model), "mlp_chunk_size", args.mlp_chunk_size)
        mixed, layers = signals is not None and signals.settings.signal_layers == "mixture", {}
        if args.method == "single_layer":
            layers = {"teacher_layer": args.mol_teacher_layer, "student_layer": args.mol_student_layer}
        self.mold_loss = MoldLoss.for_config(
            model.config,
            args.tau_1,
            args.tau_2,
            args.row_norm,
            tau_row=args.tau_row,
            row_keys=args.row_keys,
            teacher_layers_left_out=() if mixed else args.mol_teacher_layers_left_out or (),
            student_layers_left_out=args.mol_student_layers_left_out or (),
            **layers,
        )
        pad_token_id = processing_class.pad_token_id
        self._tokenizer, self._options = processing_class, args
        names = ("method", "alpha", "beta", "tau_1", "tau_2", "tau_row", "row_norm", "row_reduction", "row_keys")
        names += ("key_scope", "step_unit", "max_reasoning_steps", "max_key_words")
        names += ("mol_teacher_layers_left_out", "mol_student_layers_left_out")
        self.method_options = {name: getattr(args, name) for name in names} | {"template": self.template}
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(
                processing_class.eos_token_id if pad_token_id is None else pad_token_id,
                args.padding_side,
                args.pad_to_multiple_of,
                args.padding_free,
                None if self.teacher is None else self.teacher.collator,
            ),
            train_dataset=None if train is None else self.encode(train, "train_dataset"),
            eval_dataset=None if held_out is None else self.encode(held_out, "eval_dataset"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._refuse_unsupported_parallelism()
        self._enable_checkpointing()
        self.mold_loss.to(self.args.device)
        self._head: Any = make_head(without_adapter(self.model), args.cross_entropy)
        # Every term is normalised over the whole accumulation window here: Trainer must not divide again. The first
        # flag says so since transformers 5.19, the second one before.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.mol_router_learning_rate = args.mol_router_learning_rate
        self._reset_window()
        self.add_callback(_BestCheckpoint(self))
        if args.torch_compile and args.trains_attention:
            self._install_capturing()

    def _install_capturing(self):
        """transformers hooks into layers in the first forward that wants their attention; a graph would break there."""
        model, one = without_adapter(self.model), torch.ones(1, 1, dtype=torch.int64, device=self.args.device)
        training, spans = model.training, torch.tensor([[[0, 1]]], dtype=torch.int32, device=self.args.device)
        observe_attention(
            model.eval(), {"input_ids": one, "attention_mask": one, "row_spans": spans, "key_spans": spans}
        )
        model.train(training)

    def _enable_checkpointing(self):
        """As `train` does, too late for the gradients that are measured before its first step."""
        name = self.args.checkpointing_option
        if not getattr(self.args, name):
            return
        kwargs = dict(getattr(self.args, f"{name}_kwargs") or {})
        layers = {key: kwargs.pop(key) for key in ("every_n_layers", "offload") if key in kwargs}
        getattr(self.model, f"{name}_enable")(kwargs or None, **layers)

    def _refuse_unsupported_parallelism(self):
        for name in ("fsdp", "deepspeed"):
            # On by option or by accelerate's configuration; on CPUs accelerate would ignore the option in silence.
            if getattr(self.args, name) or getattr(self, f"is_{name}_enabled"):
                raise ValueError(
                    f"{name}: is on, must be off: the router stands beside the model, and the gradients of a model "
                    "that is split cannot be clipped together with its; use DDP (torchrun or accelerate launch)"
                )
        check_processes()
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu: is {self.args.n_gpu}, must be 1 a process: start with torchrun or accelerate launch, or make "
                "one GPU visible (CUDA_VISIBLE_DEVICES)"
            )

    def encode(self, examples: Sequence[Example | Mapping], name: str = "dataset") -> list[dict]:
        """Items for the collator: each example encoded, with what teaches it. Counts the examples without a signal."""
        options, items = self._options, []
        taught = options.method != "answers" and (self.signals is not None or self.teacher is not None)
        rows = _examples(examples, name)
        for example in tqdm(rows, desc=f"Encoding {name}", disable=options.disable_tqdm, leave=False):
            encoded = [
                encode_example(
                    *(example, self._tokenizer, self.template),
                    task=task,
                    max_length=options.max_length,
                    segments=options.segments,
                )
                for task in options.tasks
            ]
            item: dict[str, Any] = {"example": encoded[0], "signal": None}
            if taught and self.signals is not None:
                item["signal"] = self.signals.reader(example, encoded[0])
            elif taught:
                item["teacher"] = self.teacher.encode(example, encoded[0])
            if len(encoded) > 1:
                item["predict"] = encoded[1]
            items.append(item)
        if said := shortened(item["example"] for item in items):
            logger.warning(f"{name}: {said}")
        without = len(items) - sum(map(has_signal, items))
        if taught and without == len(items) and options.trains_attention:
            raise ValueError(
                f"{name}: none of its {len(items)} examples has key words, so there is no attention to learn"
            )
        if taught and without:
            logger.warning(
                f"{name}: {without} of {len(items)} examples have no key words and count in the cross-entropy alone"
            )
        return items

    # The loss

    def _prepare_inputs(self, inputs):
        """Trainer's, with the attention of a teacher that runs beside the student."""
        inputs = super()._prepare_inputs(inputs)
        if "teacher_input_ids" in inputs:
            names = [name for name in inputs if name.startswith("teacher_")]
            batch = {name.removeprefix("teacher_"): inputs.pop(name) for name in names}
            if self._wants_attention():
                inputs["teacher_attention"] = self.teacher.attention(batch)
        return inputs

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, and what each term is divided by, over all processes: [3] as TERMS."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([denominators(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.reduce(counts)
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the three terms, normalised over the accumulation window."""
        sums, weights, outputs = self._term_sums(model, inputs)
        counts = denominators(inputs)
        counted = counts if num_items_in_batch is None else num_items_in_batch
        loss = self._weigh(sums, counted, self.scheduled_beta(self.state.global_step))
        # Nothing here is read back: a GPU is not waited for until something is logged.
        self._window["sums"] += sums.detach()
        self._window["counts"][:2] += counts[:2]
        self._window["examples"] += len(inputs["num_keys"]) // len(self.args.tasks)
        if weights is not None:
            # What was not measured (beta = 0) is not counted.
            self._window["counts"][2] += counts[2]
            taught = weights.detach().masked_fill((inputs["num_keys"] == 0)[:, None], 0)
            self._window["weights"] += taught.sum(0)
            self._window["entropy"] += torch.special.entr(taught).sum()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The gradient is averaged over the processes, the denominators are summed.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def term_counts(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What each term of a batch is divided by: int64 [3] as TERMS."""
        return denominators(inputs)

    def _term_sums(self, model, inputs):
        """Sums [3] of the terms over the batch, the router's weights [B, L2] or None, the model's output."""
        with_attention = "teacher_attention" in inputs and self._wants_attention()
        learned = self._head.learned(inputs)
        # accelerate has it in a prepared model's forward alone: the head, and a model before `train`, need it too.
        with self.accelerator.autocast():
            outputs = self._forward(model, inputs, with_attention, **self._head.arguments(learned))
            cross_entropy = self._head.cross_entropy(outputs, inputs["input_ids"], inputs["regions"], learned)
        if not with_attention:
            return torch.cat([cross_entropy, cross_entropy.new_zeros(1)]), None, outputs
        self.mold_loss.train(model.training)
        attention = self.mold_loss(
            outputs.attentions,
            inputs["teacher_attention"],
            inputs["num_steps"],
            inputs["num_keys"],
            visible_keys(inputs["row_spans"], inputs["key_spans"]),
        )
        return torch.cat([cross_entropy, attention.loss.sum()[None]]), attention.layer_weights, outputs

    def _forward(self, model, inputs, with_attention, **kwargs):
        if with_attention:
            kwargs |= {
                "output_attentions": True,
                "value_features": True,
                "span_layers": self.mold_loss.student_layers,
                "row_reduction": self.args.row_reduction,
                "row_spans": inputs["row_spans"],
                "key_spans": inputs["key_spans"],
            }
        if self.model.config.get_text_config()._attn_implementation == ATTENTION_NAME:
            kwargs["padded"] = len(inputs["padded_rows"]) > 0
        kwargs |= {name: inputs[name] for name in ("position_ids", "cu_seqlens") if name in inputs}
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **kwargs)

    def _wants_attention(self):
        # With beta = 0 it is measured in evaluation and costs nothing in training.
        return self.args.trains_attention or not self.model.training

    def _weigh(self, sums, counts, beta, cross_entropy=1.0):
        alpha = self.args.alpha
        if self.args.method in ("rationales", "answers"):
            return sums[:2].sum() / counts[:2].sum().clamp(min=1)
        terms = sums / counts.clamp(min=1)
        return cross_entropy * ((1 - alpha) * terms[0] + alpha * terms[1]) + beta * terms[2]

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; ``resume_from_checkpoint=True`` goes on from the last whole checkpoint, or starts anew without one.

        A training that has ended is only loaded: its weights stay as they are, and training_loss, the mean over the
        steps of this call, is NaN.

        Raises:
            ValueError: the checkpoint is damaged, or another process trains in args.output_dir.
        """
        if not self.args.should_save:
            return self._train(resume_from_checkpoint, **kwargs)
        with sole_use(Path(self.args.output_dir), "output_dir"):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, wanted: str | bool | None, **kwargs):
        checkpoint = wanted or None
        if checkpoint is True:
            checkpoint = last_complete_checkpoint(self.args.output_dir, self.args.load_best_model_at_end)
        note = None
        if checkpoint is not None:
            try:
                note = read_seal(checkpoint)
            except ValueError as error:
                raise ValueError(f"resume_from_checkpoint: {error}") from error
            self.layer_weights = note.get("layer_weights")
            if self._has_ended(state := TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))):
                self.settle_beta(note, checkpoint)
                return self._take_up(checkpoint, state)
            check_can_go_on(checkpoint)
        self.settle_beta(note, checkpoint)
        keep = self.args.keep_freed_memory and self.args.device.type == "cpu"
        with freed_memory_kept() if keep else nullcontext():
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _has_ended(self, state: TrainerState) -> bool:
        """Whether a training with this state has made all its steps, or was stopped early."""
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        stopped = state.stateful_callbacks.get("EarlyStoppingCallback", [])
        counts = [one["attributes"]["early_stopping_patience_counter"] for one in _listed(stopped)]
        early = [cb for cb in self.callback_handler.callbacks if isinstance(cb, EarlyStoppingCallback)]
        found = zip(early, counts, strict=False)  # a callback may have been added or left out since
        return state.global_step >= steps or any(n >= callback.early_stopping_patience for callback, n in found)

    def _take_up(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Load what a training that has ended left behind."""
        logger.info(f"{checkpoint}: the training has ended at step {state.global_step}")
        align_special_tokens(self.model, self.processing_class)  # as a training does before its first step
        self._load_from_checkpoint(checkpoint)
        self.state = state
        self.log({"train_runtime": 0.0})  # where the model card finds the end of a training
        self._find_best_checkpoint()
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, math.nan, {})

    def _issue_warnings_after_load(self, load_result):
        tied = getattr(self.model, "all_tied_weights_keys", {})  # a file holds one of two that are the same
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _find_best_checkpoint(self) -> None:
        """The state has its path as it was when it was written: the folder may lie elsewhere by now."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _save_checkpoint(self, model, trial):
        self._check_finite(self.accelerator.reduce(self._window["sums"]))
        # Old checkpoints may go only when the new one is known to be whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial))
            note: dict[str, Any] = {
                "step": self.state.global_step,
                "beta": self.beta,
                "layer_weights": self.layer_weights,
            }
            seal(folder / f"checkpoint-{self.state.global_step}", **note)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=False
            )

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the steps since the last logging, averaged exactly, and writes metrics.jsonl.

        Raises:
            FloatingPointError: the loss of one of these steps is not finite.
        """
        extra = {}
        window = self.accelerator.reduce(self._window) if "loss" in logs else None
        self._check_finite((window or self._window)["sums"])
        if window and window["examples"]:
            logs.update(self._term_metrics(window["sums"], window["counts"], "loss"))
            signals = window["counts"][2].item()
            if self.args.trains_attention:
                logs["beta"] = self.scheduled_beta(max(self.state.global_step - 1, 0))
                logs["signal_share"] = signals / window["examples"].item()
            if signals:
                logs["router_entropy"] = window["entropy"].item() / signals
                extra["router_weights"] = self.layer_weights = (window["weights"] / signals).tolist()
            self._reset_window()
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or any(key.startswith("eval_") for key in logs)):
            append_jsonl(Path(self.args.output_dir) / METRICS_FILE, {"step": self.state.global_step, **logs, **extra})

    def _check_finite(self, sums: torch.Tensor) -> None:
        """Of the terms, over the steps since the last logging; no step waits for it, and nothing is saved before it."""
        wrong = [f"{t} is {v}" for t, v in zip(TERMS, sums.tolist(), strict=True) if not math.isfinite(v)]
        if wrong:
            raise FloatingPointError(
                f"the loss is not finite at step {self.state.global_step} or not long before it: {', '.join(wrong)}; "
                "lower the learning rate or look for weights or signals that are not finite (logging_steps=1 names the "
                "step)"
            )

    def _term_metrics(self, sums, counts, prefix):
        values = (sums / counts.clamp(min=1)).tolist()
        return {f"{prefix}_{t}": v for t, v, n in zip(TERMS, values, counts.tolist(), strict=True) if n}

    def _reset_window(self):
        device, layers = self.args.device, self.mold_loss.num_layers
        self._window = {
            "sums": torch.zeros(3, device=device),
            "counts": torch.zeros(3, device=device, dtype=torch.int64),
            "weights": torch.zeros(layers, device=device),
            "entropy": torch.zeros((), device=device),
            "examples": torch.zeros((), device=device, dtype=torch.int64),
        }

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Every term over the whole data set (token and example means, whatever the batches are).

        Args:
            eval_dataset: items of `encode`; None: the trainer's own. Every process takes its share, no item twice.
            ignore_keys: not used.
            metric_key_prefix: of the metrics' names.

        Returns:
            eval_loss and eval_loss_rationale, eval_loss_answer, eval_loss_attention where they are defined.
        """
        model = self.model
        was_training = model.training
        model.eval()
        sums, counts = torch.zeros(3, device=self.args.device), torch.zeros(3, device=self.args.device)
        items: Any = list(self.eval_dataset if eval_dataset is None else eval_dataset)
        items = items[self.accelerator.process_index :: self.accelerator.num_processes]
        loader: DataLoader = DataLoader(items, self.args.eval_batch_size, collate_fn=self.data_collator)
        for inputs in tqdm(loader, desc="Evaluating", disable=self.args.disable_tqdm, leave=False):
            inputs = self._prepare_inputs(inputs)
            sums += self._term_sums(model, inputs)[0]
            counts += denominators(inputs)
        sums, counts = self.accelerator.reduce(sums), self.accelerator.reduce(counts)
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": self._weigh(sums, counts, self.beta).item()}
        metrics |= self._term_metrics(sums, counts, f"{metric_key_prefix}_loss")
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a training that goes on."""

    def __init__(self, trainer: MoldTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._find_best_checkpoint()


def _examples(rows: Sequence[Example | Mapping], name: str) -> list[Example]:
    if not hasattr(rows, "__len__"):
        raise ValueError(f"{name}: is {type(rows).__name__}, must have a length: every example is encoded first")
    if not len(rows):
        raise ValueError(f"{name}: is empty, must hold at least one example")
    return [example_from_row(row, f"{name}-{index}") for index, row in enumerate(rows)]


def _listed(found: dict | list) -> list:
    return found if isinstance(found, list) else [found]
