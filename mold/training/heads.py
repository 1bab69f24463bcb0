"""From a model's forward to the cross-entropy of its rationales and answers, with as few logits as can be.

Every kind of head is used alike, in training and in its plan:

    head = make_head(model, "chunked")
    learned = head.learned(batch)
    outputs = model(**batch, **head.arguments(learned))
    sums = head.cross_entropy(outputs, input_ids, regions, learned)

`learned` is the only thing whose size depends on values.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mold.extras import missing_extra
from mold.method.loss import region_cross_entropy, region_sums
from mold.training.chunked_cross_entropy import chunked_cross_entropy, liger_cross_entropy, logits_of
from mold_kernels.backends import RUNTIMES


def make_head(model: PreTrainedModel, kind: str, *, check: bool = True) -> FullHead | ChunkedHead:
    """The head for `MoldConfig.cross_entropy`: "full", "chunked" or "liger".

    Args:
        model: a causal language model, with adapters or without.
        kind: of the cross-entropy.
        check: see `ChunkedHead`.

    Raises:
        ValueError, ImportError: see `ChunkedHead`.
    """
    return FullHead(model) if kind == "full" else ChunkedHead(model, kind, check=check)


class FullHead:
    """Cross-entropy from a model's logits; in training none are made of positions that predict prompts and padding."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self.keeps_logits = keeps_logits(model)

    def learned(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Positions [K] that some text of a `Collator`'s batch learns from; None: all logits are made."""
        return batch["learned_positions"] if self.keeps_logits and self._model.training else None

    def arguments(self, learned: torch.Tensor | None) -> dict[str, Any]:
        """What the model's forward must be called with."""
        return {} if learned is None else {"logits_to_keep": learned}

    def cross_entropy(
        self, outputs: ModelOutput, input_ids: torch.Tensor, regions: torch.Tensor, learned: torch.Tensor | None
    ) -> torch.Tensor:
        """See `region_cross_entropy`."""
        return region_cross_entropy(outputs.logits, input_ids, regions, learned)


class ChunkedHead:
    """Cross-entropy from what the output layer takes, without its logits.

    Args:
        model: a causal language model, with adapters or without.
        kind: "chunked", or "liger": by `liger_cross_entropy`.
        check: whether to compare with the model's own logits, which takes weights.

    Raises:
        ValueError: the output layer is no plain linear layer (an adapter on it would silently not be trained), the
            forward cannot leave out logits, or its logits are something else than the output layer's, soft-capped; or
            the model is not where liger-kernel runs.
        ImportError: liger-kernel is not installed.
    """

    def __init__(self, model: PreTrainedModel, kind: str = "chunked", *, check: bool = True):
        self._layer = model.get_output_embeddings()
        name = type(model).__name__
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if kind == "liger":
            _check_liger(self._layer.weight.device, self._softcap)
        chunked = functools.partial(chunked_cross_entropy, softcap=self._softcap)
        losses: dict[str, Callable[..., torch.Tensor]] = {"chunked": chunked, "liger": liger_cross_entropy}
        self.losses = losses[kind]
        if type(self._layer) is not nn.Linear:
            raise ValueError(
                f"cross_entropy: is {kind!r}, must be 'full' with an output layer {type(self._layer).__name__}: an "
                "adapter or quantization on it would be left out"
            )
        if not keeps_logits(model):
            raise ValueError(f"cross_entropy: is {kind!r}, must be 'full' for {name}: it cannot leave out its logits")
        self._hidden = None
        model.base_model.register_forward_hook(self._keep_hidden)
        if check:
            self._check(model, name, kind)

    def learned(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rows and positions [2, N] of the tokens of a `Collator`'s batch that predict a rationale or answer."""
        return batch["learned_tokens"]

    def arguments(self, learned: torch.Tensor) -> dict[str, Any]:
        """What the model's forward must be called with: it makes the last logit at the least."""
        return {"logits_to_keep": 1}

    def cross_entropy(
        self,
        outputs: ModelOutput,
        input_ids: torch.Tensor,
        regions: torch.Tensor,
        learned: torch.Tensor,
    ) -> torch.Tensor:
        """As `region_cross_entropy`, of the model's last forward."""
        rows, positions = learned
        losses = self.losses(
            self._take_hidden()[rows, positions],
            self._layer.weight,
            input_ids[rows, positions + 1],
            bias=self._layer.bias,
        )
        return region_sums(losses, regions[rows, positions + 1])

    def _keep_hidden(self, module, args, output):
        self._hidden = output.last_hidden_state

    def _take_hidden(self):
        hidden, self._hidden = self._hidden, None
        return hidden

    @torch.no_grad()
    def _check(self, model, name, kind):
        ids = torch.arange(8, device=self._layer.weight.device)[None]
        expected = model(input_ids=ids, use_cache=False).logits.double()
        found = logits_of(self._take_hidden(), self._layer.weight, self._layer.bias, self._softcap)
        error = (found.double() - expected).norm() / expected.norm()
        if not error <= 10 * torch.finfo(self._layer.weight.dtype).eps:
            raise ValueError(
                f"cross_entropy: is {kind!r}, must be 'full' for {name}: its logits are not its output layer's "
                f"(relative difference {error:.1e})"
            )


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward can be told which logits to make."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _check_liger(device: torch.device, softcap: float | None) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise missing_extra("cross_entropy='liger'", "liger-kernel", "liger")
    if device.type not in RUNTIMES["triton"].devices:
        raise ValueError(
            f"cross_entropy: is 'liger', must be 'chunked' or 'full' on {device.type}: liger-kernel runs on GPUs"
        )
    if softcap is not None:
        raise ValueError("cross_entropy: is 'liger', must be 'chunked' or 'full' for soft-capped logits: untested")
