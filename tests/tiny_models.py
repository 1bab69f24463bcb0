"""Tiny random models of the supported families, for tests."""

import torch
import transformers

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {}),
    "mistral_window": ("Mistral", {"sliding_window": 7}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "gemma2": (
        "Gemma2",
        {
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 9,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 9,
            "sliding_window_pattern": 2,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {}),
}
"""Prefix of the class names, and what the family's configuration needs beside the common options."""


def plain_attention(family):
    """transformers' own attention that computes what the family says; sdpa leaves out sinks and soft-capping."""
    return "eager" if family in ("gpt_oss", "gemma2") else "sdpa"


def make_model(
    family,
    *,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=97,
    dtype=torch.float32,
    seed=0,
    attention="mold",
    **options,
):
    """A randomly initialised model, the same for the same seed whatever its attention implementation is."""
    torch.manual_seed(seed)
    hidden = heads * head_dim
    prefix, family_options = FAMILIES[family]
    if family == "gpt2":
        common = {"n_positions": 512, "n_embd": hidden, "n_layer": layers, "n_head": heads}
        common |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        common = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 512,
        }
        if family != "gpt_neox":
            common |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config_options = {"vocab_size": vocab, "initializer_range": 0.2} | special | common | family_options | options
    config = getattr(transformers, f"{prefix}Config" if family != "gemma3" else "Gemma3TextConfig")(**config_options)
    model_class = getattr(transformers, f"{prefix}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}")
    config._experts_implementation = "eager"  # the grouped one has no float64
    model = model_class(config).to(dtype)
    model.set_attn_implementation(attention)
    return model
