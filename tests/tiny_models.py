"""Tiny random models of the supported families, for tests."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gpt2"]


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
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab,
            n_positions=512,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            bos_token_id=0,
            eos_token_id=0,
            **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.2} | options,
        )
        model_class = GPT2LMHeadModel
    else:
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }[family]
        config = config_class(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=512,
            **{"initializer_range": 0.2} | options,
        )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = model_class(config).to(dtype)
    model.set_attn_implementation(attention)
    return model
