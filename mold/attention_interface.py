"""The "mold" attention in transformers: stepwise attention of every layer from an unpatched model.

Importing `mold` registers it, so this is the whole interface:

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mold")
    out = model(**batch, output_attentions=True, row_spans=row_spans, key_spans=key_spans)
    out.attentions[layer].attention     # [B, S, M], with gradient

Without spans it is an ordinary causal attention: training, and generation with any cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mold_kernels import attention_with_lse, span_attention, value_pool

ATTENTION_NAME = "mold"
VALUE_NORM_EPSILON = 1e-6
"""Epsilon of the RMS norm over a token's values (the router's features)."""


class LayerAttention(NamedTuple):
    """What one layer returns where transformers expects attention weights.

    attention: float32 [B, S, M], pooled over steps and key words.
    value_features: float32 [B, Hkv * D], the sum over valid tokens of the layer's RMS-normalised values (the router
        multiplies its norm weight in); None unless the forward was called with ``value_features=True``.
    """

    attention: torch.Tensor
    value_features: torch.Tensor | None


def mold_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_spans: torch.Tensor | None = None,
    key_spans: torch.Tensor | None = None,
    row_reduction: str = "sum",
    value_features: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, LayerAttention | None]:
    """One layer's attention, called by transformers with the keyword arguments of the model's forward.

    Args:
        query, key, value: [B, Hq, T, D] and [B, Hkv, T, D].
        attention_mask: what `mold_mask` made: None, bool [B, T] (True at real tokens), or 4-D for anything that is
            not plain causal attention over the whole sequence.
        row_spans, key_spans: int32 [B, S, 2] and [B, M, 2], see `mold_kernels.span_attention`; both or neither.
        row_reduction: "sum" or "mean".
        value_features: whether to pool the values for the router.

    Returns:
        The attention's output [B, T, Hq, D], and a LayerAttention (None without spans).

    Raises:
        ValueError: spans together with something the pooled attention does not have (a cache, attention dropout,
            a sliding window shorter than the sequence, packing, soft-capping, sinks, a bidirectional attention).
    """
    if row_spans is None and key_spans is None:
        return _ordinary_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs), None
    _check_supported(module, query, key, attention_mask, dropout, row_spans, key_spans, kwargs)
    out, lse = attention_with_lse(query, key, value, scale=scaling, key_padding_mask=attention_mask)
    pooled = span_attention(query, key, lse, row_spans, key_spans, scale=scaling, row_reduction=row_reduction)
    features = None
    if value_features:
        batch, heads, length, head_dim = value.shape
        valid = value.new_ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask
        # The router's norm weight factors out of the sum over tokens; the router applies it.
        features = value_pool(value, value.new_ones(heads * head_dim), valid, VALUE_NORM_EPSILON)
    return out.transpose(1, 2), LayerAttention(pooled, features)


def mold_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> torch.Tensor | None:
    """The mask that `mold_attention_forward` gets: no T x T mask for causal attention over a whole sequence.

    transformers sets `allow_is_causal_skip` to False whenever the mask is more than causal and padding (packed
    sequences, overlays), so the flag tells the two cases apart.
    """
    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0
    if whole and allow_is_causal_skip and (local_size is None or kv_length <= local_size):
        # Looking into the mask would break a graph of torch.compile: there it stays, even if nothing is padded.
        if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
            return None
        return attention_mask[:, kv_offset : kv_offset + kv_length]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def use_mold_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a loaded model to the "mold" attention, in place.

    Raises:
        ValueError: the model's attention cannot be replaced.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__}: its attention cannot be replaced (the class does not support transformers' "
            "attention interface); use a model family that does, for example Llama, Qwen, Mistral or GPT-2"
        )
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def stack_attention(attentions: Sequence[LayerAttention]) -> torch.Tensor:
    """Stepwise attention of all layers, [L, B, S, M], from a model output's `attentions`.

    Raises:
        ValueError: nothing was captured, or something else than the "mold" attention's output. An empty capture must
            never become a loss of zero.
    """
    if not attentions or not all(isinstance(layer, LayerAttention) for layer in attentions):
        found = f"{len(attentions)} of {type(attentions[0]).__name__}" if attentions else "nothing"
        raise ValueError(
            f"attentions: holds {found}, must hold one LayerAttention a layer: load the model with "
            f'attn_implementation="{ATTENTION_NAME}" and call it with output_attentions=True, row_spans and key_spans'
        )
    return torch.stack([layer.attention for layer in attentions])


def attention_dropout_option(config) -> str | None:
    """The name of the configuration's option that switches attention dropout on, None where it is off."""
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if getattr(config, name, 0):
            return name
    return None


def _ordinary_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs):
    if attention_mask is not None and attention_mask.ndim == 2:
        if query.device.type == "cpu" and dropout == 0:
            return attention_with_lse(query, key, value, scale=scaling, key_padding_mask=attention_mask)[0].transpose(
                1, 2
            )
        length = query.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        attention_mask = causal & attention_mask[:, None, None, :]
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )[0]


def _check_supported(module, query, key, attention_mask, dropout, row_spans, key_spans, kwargs):
    if row_spans is None or key_spans is None:
        missing = "row_spans" if row_spans is None else "key_spans"
        raise ValueError(f"{missing}: is None, must be given together with the other spans")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"row_spans: given with {query.shape[2]} queries over {key.shape[2]} keys; spans need the whole sequence "
            "in one forward: pass use_cache=False and no past"
        )
    if dropout > 0:
        option = attention_dropout_option(module.config)
        raise ValueError(f"{option}: is {dropout}, must be 0: pooled attention has no attention dropout")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask: is more than causal attention with padding (a sliding window shorter than the sequence, "
            "packed sequences or a custom mask), which pooled attention does not have yet"
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__}: is a bidirectional attention, must be causal")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__}: uses {name}, which pooled attention does not have yet")


AttentionInterface.register(ATTENTION_NAME, mold_attention_forward)
# Without its own mask function transformers passes no mask at all and padding would be attended to.
AttentionMaskInterface.register(ATTENTION_NAME, mold_mask)
