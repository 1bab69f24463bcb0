"""The "mold" attention in transformers: stepwise attention of every layer from an unpatched model.

Importing `mold` registers it, so this is the whole interface:

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mold")
    out = model(**batch, output_attentions=True, row_spans=row_spans, key_spans=key_spans)
    out.attentions[layer].attention     # [B, S, M], with gradient

Without spans it is an ordinary causal attention: training, and generation with any cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mold_kernels import SpanPlan, attention_with_lse, span_attention, value_pool
from mold_kernels.backends import RUNTIMES

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
    span_layers: Sequence[int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    padded: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    lse_to: list[torch.Tensor] | None = None,
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
        span_layers: the layers that return a LayerAttention, so that the model's `attentions` are theirs; None: all.
        cu_seqlens: int32 [B + 1], where each of B texts begins that stand one behind another in one row, and T; spans
            count from there. The model's forward needs position_ids that start again, and a mask of ones.
        padded: False says that a mask of padding is of ones alone, which on a GPU nobody looks at.
        sliding_window: how many keys a row sees, itself included.
        softcap: of the scores, as in Gemma 2.
        s_aux: [Hq] sinks, as in gpt-oss: one more score a head, whose probability goes nowhere.
        lse_to: where the rows' natural log-sum-exp [B, Hq, T] is put if it is computed: of these very queries and keys
            (not of those that autocast made of them), the sinks included.

    Returns:
        The attention's output [B, T, Hq, D], and a LayerAttention; None without spans and for other than span_layers.

    Raises:
        ValueError: spans together with something the pooled attention does not have (a cache, attention dropout, a
            mask that is more than causal, windowed and padding, packing without cu_seqlens, a position bias, a
            bidirectional attention).
    """
    if span_layers is not None and module.layer_idx not in span_layers:
        row_spans = key_spans = None
    options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    options |= {"softcap": softcap, "sinks": s_aux, "row_reduction": row_reduction, "value_features": value_features}
    options |= kwargs
    if not padded and attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = None
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings leave queries and keys in float32.
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
        lse_to = None
    # What accumulates in float32 below must not be cast.
    with torch.autocast(device, enabled=False):
        if row_spans is not None or key_spans is not None:
            _check_supported(module, query, key, attention_mask, dropout, row_spans, key_spans, kwargs)
        if cu_seqlens is not None and (attention_mask is not None or len(query) > 1):
            raise ValueError("cu_seqlens: is given with padding or a mask, must come with one row and a mask of ones")
        if cu_seqlens is not None and len(cu_seqlens) == 2:
            cu_seqlens = None  # one text
        spans = row_spans, key_spans
        out, lse, looks = _attend(module, query, key, value, attention_mask, cu_seqlens, *spans, **options)
        if lse_to is not None and lse is not None:
            lse_to.append(lse)
        return out.transpose(1, 2), looks


def _attend(
    module,
    query,
    key,
    value,
    mask,
    cu_seqlens,
    row_spans,
    key_spans,
    *,
    scaling,
    dropout,
    sliding_window,
    softcap,
    sinks,
    row_reduction,
    value_features,
    **kwargs,
):
    """(output [B, Hq, T, D], log-sum-exp or None, LayerAttention or None) of texts with a row each, or one for all."""
    options: dict[str, Any] = {}
    if sliding_window is not None and sliding_window < key.shape[2]:
        options["sliding_window"] = sliding_window
    if softcap is not None:
        options["softcap"] = softcap
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens
    if row_spans is None:
        return *_ordinary_attention(module, query, key, value, mask, scaling, dropout, options, sinks, **kwargs), None
    out, lse = _attention(query, key, value, mask, scaling, options, sinks)
    pooled = span_attention(
        query,
        key,
        lse,
        row_spans,
        key_spans,
        plan=_plan(row_spans, key_spans, key.shape[2], cu_seqlens),
        scale=scaling,
        row_reduction=row_reduction,
        **options,
    )
    features = None
    if value_features:
        valid = value.new_ones(len(value), value.shape[2], dtype=torch.bool) if mask is None else mask
        # The router's norm weight factors out of the sum over tokens; the router applies it.
        features = value_pool(value, valid, VALUE_NORM_EPSILON, cu_seqlens=cu_seqlens)
    return out, lse, LayerAttention(pooled, features)


_last_plan: SpanPlan | None = None
"""What `_plan` found last, for the other layers of a forward, and for a checkpoint that runs one again."""


def _plan(row_spans: torch.Tensor, key_spans: torch.Tensor, length: int, cu_seqlens: torch.Tensor | None) -> SpanPlan:
    global _last_plan
    given = row_spans, key_spans, length, None, cu_seqlens
    if torch.compiler.is_compiling() or row_spans.is_inference() or key_spans.is_inference():
        return SpanPlan(*given)
    if _last_plan is None or not _last_plan.is_of(*given):
        _last_plan = SpanPlan(*given)
    return _last_plan


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

    A sliding window is no part of the mask: the layers that have one hand it to the attention, as flash needs it.
    transformers sets `allow_is_causal_skip` to False whenever the mask is more than causal and padding (packed
    sequences, overlays), so the flag tells the two cases apart.
    """
    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0
    if (
        whole
        and allow_is_causal_skip
        and (local_size is None or kv_length <= local_size or is_window(mask_function, local_size))
    ):
        # Looking into the mask would wait for a GPU, and break a graph of torch.compile: there it stays, even if
        # nothing is padded.
        looks = attention_mask is not None and attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if attention_mask is None or (looks and bool(attention_mask.all())):
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


def is_window(mask_function, local_size: int) -> bool:
    """Whether a local mask is a sliding window and not one of chunks, whose first row sees nothing before it."""
    first, before = torch.tensor(local_size), torch.tensor(local_size - 1)
    zero = torch.tensor(0)
    return local_size > 1 and bool(mask_function(zero, zero, first, before))


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
        ValueError: as of `check_captured`.
    """
    check_captured(attentions)
    return torch.stack([layer.attention for layer in attentions])


def check_captured(attentions: Sequence[LayerAttention]) -> None:
    """Raise a ValueError if nothing was captured, or something else than the "mold" attention's output.

    An empty capture must never become a loss of zero.
    """
    if not attentions or not all(isinstance(layer, LayerAttention) for layer in attentions):
        found = f"{len(attentions)} of {type(attentions[0]).__name__}" if attentions else "nothing"
        raise ValueError(
            f"attentions: holds {found}, must hold one LayerAttention a layer: load the model with "
            f'attn_implementation="{ATTENTION_NAME}" and call it with output_attentions=True, row_spans and key_spans'
        )


@torch.no_grad()
def observe_attention(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    row_reduction: str = "sum",
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Stepwise attention of layers, [L, B, S, M] on the model's device, of a model that is not trained.

    Args:
        model: with the "mold" attention.
        batch: input_ids, attention_mask, row_spans and key_spans as `mold.data.encoding.Collator` makes them, and
            padded_rows where it is told.
        row_reduction: "sum" or "mean".
        layers: which; None: all.
    """
    names = ("input_ids", "attention_mask", "row_spans", "key_spans")
    # The backbone alone: no logits are needed.
    out = model.base_model(
        **{name: batch[name].to(model.device) for name in names},
        row_reduction=row_reduction,
        span_layers=layers,
        padded="padded_rows" not in batch or len(batch["padded_rows"]) > 0,
        output_attentions=True,
        use_cache=False,
    )
    return stack_attention(out.attentions)


def attention_dropout_option(config) -> str | None:
    """The name of the configuration's option that switches attention dropout on, None where it is off."""
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if getattr(config, name, 0):
            return name
    return None


def check_attention_dropout(config) -> None:
    """Raise a ValueError that names the option if the configuration has attention dropout."""
    if option := attention_dropout_option(config):
        raise ValueError(
            f"{option}: is {getattr(config, option)}, must be 0: pooled attention has no attention dropout; load the "
            f"student with {option}=0.0 (model_init_kwargs)"
        )


def _attention(query, key, value, padding_mask, scaling, options, sinks):
    """Output [B, Hq, T, D] and log-sum-exp [B, Hq, T] of causal attention."""
    out, lse = attention_with_lse(query, key, value, scale=scaling, key_padding_mask=padding_mask, **options)
    if sinks is not None:
        # exp(lse) / (exp(lse) + exp(sink)) of the weight stays; in this form a row that sees no key (lse = inf) is 0.
        sinks = sinks[:, None].to(lse.dtype)
        out = (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)
        lse = lse + torch.nn.functional.softplus(sinks - lse)
    return out, lse


def _ordinary_attention(module, query, key, value, mask, scaling, dropout, options, sinks, **kwargs):
    """(output [B, Hq, T, D], log-sum-exp or None) without spans: training without the loss, and over any cache."""
    whole = query.shape[2] == key.shape[2] and (mask is None or mask.ndim == 2) and getattr(module, "is_causal", True)
    # torch's fused attention has none of these without a T x T mask; ours needs a backend that is fast here.
    special = bool(options) or sinks is not None or (mask is not None and _has_fast_attention(query.device))
    if whole and dropout == 0 and special:
        return _attention(query, key, value, mask, scaling, options, sinks)
    if "cu_seqlens" in options:
        rest = {name: option for name, option in options.items() if name != "cu_seqlens"}
        sizes = options["cu_seqlens"].diff().tolist()
        texts = zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True)
        outs = [
            _ordinary_attention(module, q, k, v, mask, scaling, dropout, rest, sinks, **kwargs)[0] for q, k, v in texts
        ]
        return torch.cat(outs, 2), None
    if whole and (mask is not None or "sliding_window" in options):
        mask = _dense_mask(query, mask, options.get("sliding_window"))
    if "softcap" in options or sinks is not None:
        return _materialised_attention(query, key, value, mask, scaling, dropout, options.get("softcap"), sinks), None
    out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return out.transpose(1, 2), None


def _has_fast_attention(device: torch.device) -> bool:
    return any(
        device.type in (RUNTIMES[name].devices or ()) and RUNTIMES[name].why_missing() is None
        for name in ("aten", "triton")
    )


def _dense_mask(query, padding_mask, sliding_window):
    """bool [B or 1, 1, T, T], True where a row sees a key."""
    token = torch.arange(query.shape[2], device=query.device)
    distance = token[:, None] - token
    visible = (distance >= 0) & (distance < (sliding_window or len(token)))
    return visible[None, None] if padding_mask is None else visible & padding_mask[:, None, None, :]


def _materialised_attention(query, key, value, mask, scaling, dropout, softcap, sinks):
    """Soft-capping and sinks for queries over a cache, which no fused attention of torch has."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None and query.shape[2] > 1:  # transformers' convention: a single query sees the whole cache
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks[:, None, None].to(scores.dtype).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    probabilities = torch.dropout(scores.softmax(-1)[..., : key.shape[2]], dropout, train=True)
    return probabilities.to(value.dtype) @ value


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
            "attention_mask: is more than causal attention with padding and a sliding window (packed sequences "
            "without cu_seqlens, chunked attention or a custom mask), which pooled attention does not have"
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__}: is a bidirectional attention, must be causal")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__}: uses position_bias, which pooled attention does not have")


AttentionInterface.register(ATTENTION_NAME, mold_attention_forward)
# Without its own mask function transformers passes no mask at all and padding would be attended to.
AttentionMaskInterface.register(ATTENTION_NAME, mold_mask)
