"""How much memory a model takes, reckoned from its configuration without weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's weights and of what goes with them.

    state: weights, and in training gradients and Adam's two moments; exact. activations: of a step, an estimate.
    """

    parameters: int
    state: int
    activations: int

    def __str__(self) -> str:
        total = (self.state + self.activations) / GIB
        return (
            f"{self.parameters / 1e6:,.0f} M parameters, {total:.1f} GiB ({self.activations / GIB:.1f} of activations)"
        )


def inference_memory(config: PretrainedConfig, dtype: torch.dtype, batch: int, length: int, *, cache: bool) -> Memory:
    """Of a forward without gradients over [batch, length] tokens: one layer's activations, and cached keys and values.

    An upper bound of a layer's: its inputs, queries, keys, values, outputs and the two halves of its widest product.
    """
    parameters = _count(config)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    values = 8 * config.hidden_size + 3 * inner
    if cache:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values += 2 * config.num_hidden_layers * heads * head_dim
    return Memory(parameters, parameters * dtype.itemsize, batch * length * values * dtype.itemsize)


def training_memory(
    config: PretrainedConfig, dtype: torch.dtype, batch: int, length: int, *, mixed: bool, checkpointing: bool
) -> Memory:
    """Of a training step with AdamW over [batch, length] tokens.

    State: weight, gradient and two moments, each in the weights' dtype. Activations: 34 hidden values of two bytes a
    token and layer without stored attention maps (twice that in float32), or with checkpointing each layer's input and
    one layer's activations; and logits with their gradient, in float32.

    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, equation 1
        without its attention maps.
    """
    parameters = _count(config)
    half = mixed or dtype.itemsize == 2
    layer = 34 * config.hidden_size * (1 if half else 2)
    layers = config.num_hidden_layers
    stored = layers * config.hidden_size * (2 if half else 4) + layer if checkpointing else layers * layer
    logits = 2 * 4 * config.vocab_size
    return Memory(parameters, 4 * parameters * dtype.itemsize, batch * length * (stored + logits))


def _count(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
