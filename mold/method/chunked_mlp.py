"""The MLPs of a decoder, so many tokens at a time.

An MLP knows no token of another, and of all that a layer makes its inner states are the widest: 3 F of them a token in
Llama's, beside a few of H. In chunks of C tokens there are C of each at once, and not T:

    without gradients    one chunk after another
    with                 each keeps its input alone and is computed again in the backward (activation checkpointing)

Values are the same; the gradients of weights are sums over chunks. Together with checkpointing of the layers an MLP's
forward is computed three times instead of twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

_NAME = "mlp"
"""Of the MLP in a decoder's layer, in transformers' families."""


def chunk_mlps(model: PreTrainedModel, option: str, tokens: int, *, planned: Callable | None = None) -> None:
    """Make every MLP of the model take so many tokens at a time, in place.

    Args:
        model: a decoder, with adapters or without.
        option: what to name in an error.
        tokens: of a chunk, over all rows of the batch.
        planned: for a model without weights: (forward, tokens, hidden) -> output, in place of the chunks.

    Raises:
        ValueError: a layer has no module of that name, it mixes tokens, or routes them to experts, whose auxiliary loss
            is of all tokens.
    """
    refusal = f"{option}: is {tokens}, must not be given for {type(model).__name__}"
    mlps: list[Any] = [getattr(layer, _NAME, None) for layer in decoder_layers(model)]
    if not mlps or any(mlp is None or hasattr(mlp, "experts") for mlp in mlps):
        raise ValueError(f"{refusal}: its layers have no module {_NAME!r} without experts")
    for mlp in mlps:
        forward = functools.partial(type(mlp).forward, mlp)
        if planned is None and not _tokens_are_apart(model, mlp, forward):
            raise ValueError(f"{refusal}: its {type(mlp).__name__} is not the same for each token alone")
        mlp.forward = functools.partial(planned or functools.partial(_in_chunks, mlp), forward, tokens)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder; empty where they are no list of modules."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), nn.ModuleList())


def chunk_length(tokens: int, hidden: torch.Tensor) -> int:
    """Tokens of each row of hidden [B, T, H] that a chunk of so many has."""
    return max(1, tokens // max(1, hidden.shape[0]))


def _in_chunks(mlp: nn.Module, forward: Callable, tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    size = chunk_length(tokens, hidden)
    if hidden.shape[1] <= size:
        return forward(hidden)

    def run(chunk: torch.Tensor) -> torch.Tensor:
        return forward(chunk.contiguous())

    if not torch.is_grad_enabled():
        return torch.cat([run(chunk) for chunk in hidden.split(size, 1)], 1)
    draws = mlp.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules())
    checkpointed = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=draws)
    return torch.cat([checkpointed(chunk) for chunk in hidden.split(size, 1)], 1)


@torch.no_grad()
def _tokens_are_apart(model: PreTrainedModel, mlp: nn.Module, forward: Callable) -> bool:
    training, width = mlp.training, model.config.get_text_config().hidden_size
    states = torch.linspace(-1, 1, 3 * width, device=next(mlp.parameters()).device, dtype=model.dtype).view(1, 3, width)
    mlp.eval()
    whole, parts = forward(states), torch.cat([forward(state) for state in states.split(1, 1)], 1)
    mlp.train(training)
    return torch.allclose(whole, parts, rtol=1e-2, atol=1e-2)
