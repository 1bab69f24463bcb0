"""The student's layer router: how much each student layer counts in the mixture (MoLSAKI, equation 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig


class LayerRouter(nn.Module):
    """Softmax over the student's layers, from the pooled values of all of them.

    h_l = norm_weight o features_l,   p = softmax((W concat(h_1 .. h_L) / (L value_dim) + b) / tau)

    features_l is the sum over valid tokens of the RMS-normalised values of layer l (see `LayerAttention`); one norm
    weight is shared by all layers. Parameters and arithmetic are float32 whatever the model's dtype is. W and b start
    at zero: training starts from the uniform mixture. The division by the width is part of W in the paper; written
    apart, a step of Adam moves the logits by a mean and not by a sum over all values, which saturated the softmax in
    the first steps of training.

    Args:
        num_layers: L.
        value_dim: key/value heads x head dimension of a layer.
        tau: temperature > 0 (the paper's tau_2).
    """

    def __init__(self, num_layers: int, value_dim: int, tau: float = 0.5):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau: is {tau}, must be greater than 0")
        self.tau = tau
        self.num_layers = num_layers
        self.norm_weight = nn.Parameter(torch.ones(value_dim))
        self.projection = nn.Linear(num_layers * value_dim, num_layers)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    @classmethod
    def for_config(cls, config: PretrainedConfig, tau: float = 0.5, num_layers: int | None = None) -> LayerRouter:
        """The router that fits a model's configuration, over so many of its layers; None: over all.

        Raises:
            ValueError: the model has no attention.
        """
        config = config.get_text_config()
        if not getattr(config, "num_attention_heads", None):
            raise ValueError(
                f"model: is a {config.model_type} without attention heads (num_attention_heads), must have some: the "
                "router looks at their values"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers if num_layers is None else num_layers, heads * head_dim, tau)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Layer weights [B, L] from one features tensor [B, value_dim] a layer.

        Raises:
            ValueError: the number of layers or their width is not the router's.
        """
        expected = (self.num_layers, self.norm_weight.shape[0])
        found = (len(features), features[0].shape[-1] if len(features) else 0)
        if found != expected:
            raise ValueError(f"features: {found[0]} layers of width {found[1]}, must be {expected[0]} of {expected[1]}")
        # Autocast would run the projection in bfloat16; the layer weights are decided in full precision.
        with torch.autocast(features[0].device.type, enabled=False):
            dtype = self.norm_weight.dtype
            pooled = torch.cat([feature.to(dtype) * self.norm_weight for feature in features], dim=-1)
            return (self.projection(pooled / pooled.shape[-1]) / self.tau).softmax(-1)


class FixedLayer(nn.Module):
    """In place of a router: all weight on one of `num_layers` layers. No parameters.

    Source: the single-layer ("SL") ablation of MoLSAKI.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, num_layers: int, layer: int):
        super().__init__()
        check_layer("mol_student_layer", layer, num_layers)
        self.num_layers = num_layers
        self.layer = layer

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Layer weights [B, L], from features that only say what B is."""
        weights = features[0].new_zeros(len(features[0]), self.num_layers)
        weights[:, self.layer] = 1
        return weights


def kept_layers(name: str, left_out: Sequence[int], num_layers: int) -> list[int]:
    """The layers of a model that has so many, without those (from 0 on, or from -1 down).

    Raises:
        ValueError: one of them does not exist, or none would be left; names the option.
    """
    for layer in left_out:
        check_layer(name, layer, num_layers)
    gone = {layer % num_layers for layer in left_out}
    if len(gone) == num_layers:
        raise ValueError(f"{name}: is {', '.join(map(str, left_out))}, must leave one of {num_layers} layers")
    return [layer for layer in range(num_layers) if layer not in gone]


def check_layer(name: str, layer: int, num_layers: int) -> None:
    """Raise a ValueError that names the option unless a model of so many layers has this one (-1: the last)."""
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"{name}: is {layer}, must be from {-num_layers} to {num_layers - 1}")
