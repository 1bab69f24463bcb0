"""The attention loss in TRL's SFTTrainer: a mixin for it and for whatever is derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from mold.data.chat import record_template
from mold.data.conversations import example_from_row
from mold.data.encoding import Collator, encode_example, shortened
from mold.data.examples import PROMPT
from mold.files import sole_use
from mold.method.attention_interface import check_attention_dropout, use_mold_attention
from mold.method.loss import MoldLoss
from mold.method.signals import SignalCache
from mold.training.adapters import without_adapter
from mold.training.router_training import RouterTraining
from mold.training.training_options import SFT_REFUSED, check_followed

IGNORED_LABEL = -100
_INDEX = "mold_index"

logger = logging.get_logger(__name__)


class StepwiseAttentionMixin(RouterTraining):
    """Adds beta * stepwise attention KL to the loss of TRL's SFTTrainer.

        class Trainer(StepwiseAttentionMixin, SFTTrainer):
            pass

        trainer = Trainer(model, SFTConfig(...), train_dataset=dataset, processing_class=tokenizer, signals=signals)

    Everything else stays SFTTrainer's: its cross-entropy on rationale and answer, its options, metrics and model card.
    The text is the one that the signals were extracted from; packing is refused, and so is an example longer than
    max_length, because cut text has lost steps. The mean attention KL is logged as loss_attention.

    Args:
        *args, **kwargs: as of SFTTrainer. Rows are those of `MoldTrainer`: question, rationale and answer, prompt and
            completion, or messages.
        signals: the teacher's signals of all examples; their template and row_reduction are used.
        beta: weight of the attention loss.
        tau_1, tau_2, row_norm, mol_router_learning_rate: see `MoldConfig`.

    Raises:
        ValueError: a row does not fit (see `example_from_row`, `encode_example`, `SignalCache.signal`), none
            has a signal, an option cannot be followed (see `mold.training.training_options`), a collator is given, or
            the model has attention dropout or an attention that cannot be replaced.

    Source: MoLSAKI (EMNLP 2025), equation 7, with one weight for rationale and answer.
    """

    def __init__(
        self,
        *args,
        signals: SignalCache,
        beta: float = 1.0,
        tau_1: float = 0.1,
        tau_2: float = 0.5,
        row_norm: str = "softmax",
        mol_router_learning_rate: float | None = None,
        **kwargs,
    ):
        if not beta > 0:
            raise ValueError(f"beta: is {beta}, must be greater than 0 (without attention loss use SFTTrainer itself)")
        if kwargs.get("data_collator") is not None:
            raise ValueError("data_collator: is given, must be None: spans and signals need the one made here")
        options = kwargs.get("args", args[1] if len(args) > 1 else None)
        if options is not None:
            check_followed(options, SFT_REFUSED)
            if options.fp16 and options.device.type == "cpu":
                raise ValueError("fp16: is True, must be False on a CPU")
        if signals.settings.signal_layers == "mixture":
            signals.require(tau_1=tau_1)
        self.signals, self.beta, self.mol_router_learning_rate = signals, beta, mol_router_learning_rate
        self._items: list[dict] = []
        super().__init__(*args, data_collator=self._collate, **kwargs)
        record_template(self.processing_class, signals.settings.template)
        self.method_options = {"beta": beta, "tau_1": tau_1, "tau_2": tau_2, "row_norm": row_norm}
        student = without_adapter(self.model)
        use_mold_attention(student)
        check_attention_dropout(student.config)
        self.mold_loss = MoldLoss.for_config(student.config, tau_1, tau_2, row_norm).to(self.args.device)
        self._captured: list[Sequence] = []
        self._last_weights: torch.Tensor | None = None
        # SFTTrainer's own forward leaves the attentions inside: they are taken where the decoder returns them.
        student.base_model.register_forward_hook(lambda _, __, output: self._captured.append(output.attentions))

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """In place of SFTTrainer's: rows encoded with their steps, key words and signals."""
        from datasets import Dataset

        if formatting_func:
            raise ValueError(f"formatting_func: is given, must be None: {SFT_REFUSED['dataset_text_field']}")
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{dataset_name}: is {type(dataset).__name__}, must be a datasets.Dataset")
        if _INDEX in dataset.column_names:
            return dataset
        settings = self.signals.settings
        start, ids, labels = len(self._items), [], []
        for index, row in enumerate(dataset):
            example = example_from_row(row, f"{dataset_name}-{index}")
            encoded = encode_example(
                *(example, processing_class, settings.template),
                max_length=args.max_length,
                segments=settings.segments,
            )
            self._items.append({"example": encoded, "signal": self.signals.reader(example, encoded)})
            ids.append(encoded.input_ids)
            masked = zip(encoded.input_ids, encoded.regions, strict=True)
            labels.append([IGNORED_LABEL if region == PROMPT else token for token, region in masked])
        if said := shortened(item["example"] for item in self._items[start:]):
            logger.warning(f"{dataset_name}: {said}")
        if all(item["signal"] is None for item in self._items[start:]):
            raise ValueError(
                f"{dataset_name}: none of its {len(dataset)} examples has key words, so there is no attention to learn"
            )
        return Dataset.from_dict({"input_ids": ids, "labels": labels, _INDEX: list(range(start, len(self._items)))})

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if _INDEX not in self._signature_columns:
            self._signature_columns.append(_INDEX)

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenizer = self.processing_class
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        collator = Collator(pad_token_id, pad_to_multiple_of=self.args.pad_to_multiple_of or 1)
        batch: dict[str, Any] = collator([self._items[row[_INDEX]] for row in rows])
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("regions") == PROMPT, IGNORED_LABEL)
        batch["padded"] = len(batch.pop("padded_rows")) > 0
        return {name: value for name, value in batch.items() if not name.startswith("learned_")}

    def train(self, *args, **kwargs):
        """SFTTrainer's.

        Raises:
            ValueError: another process trains in args.output_dir.
        """
        with sole_use(Path(self.args.output_dir), "output_dir") if self.args.should_save else nullcontext():
            return super().train(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        """SFTTrainer's, of what has not been read back until now."""
        for metrics in self._metrics.values():
            if "loss_attention" in metrics:  # of training steps that an evaluation came between: some are read already
                metrics["loss_attention"] = [float(value) for value in metrics["loss_attention"]]
        if self._last_weights is not None:
            self.layer_weights = self._last_weights.tolist()
        super().log(logs, *args, **kwargs)

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """SFTTrainer's; also counts the examples with a signal in the accumulation window."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window_signals = sum((batch["num_keys"] > 0).sum() for batch in batches)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            self._window_signals = self.accelerator.gather(self._window_signals.to(device)).sum()
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """SFTTrainer's loss plus beta times the attention KL, averaged like its cross-entropy."""
        inputs = dict(inputs)
        teacher, num_steps, num_keys = (
            inputs.pop(name, None) for name in ("teacher_attention", "num_steps", "num_keys")
        )
        if teacher is None:
            spans = ("row_spans", "key_spans")
            plain = {name: value for name, value in inputs.items() if name not in spans}
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)
        inputs |= {
            "output_attentions": True,
            "value_features": True,
            "row_reduction": self.signals.settings.row_reduction,
        }
        self._captured.clear()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.mold_loss.train(self.model.training)
        # SFTTrainer may run a second forward for its metrics; the first one is the loss's.
        attention = self.mold_loss(self._captured[0], teacher, num_steps, num_keys)
        self._captured.clear()
        total, count = attention.loss.sum(), (num_keys > 0).sum()
        attention_loss = total / count
        # Read when they are logged: a step does not wait for a GPU.
        self._metrics["train" if self.model.training else "eval"]["loss_attention"].append(attention_loss.detach())
        self._last_weights = attention.layer_weights.detach().masked_fill((num_keys == 0)[:, None], 0).sum(0) / count
        if num_items_in_batch is not None:
            attention_loss = total / self._window_signals.to(total.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                attention_loss = attention_loss * self.accelerator.num_processes
        if return_outputs:
            return result[0] + self.beta * attention_loss, result[1]
        return result + self.beta * attention_loss
