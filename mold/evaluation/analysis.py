"""How much of its attention a model gives to key words, step by step and layer by layer.

The paper observes that attention shifts towards key information as reasoning goes on. Measured here for any model: the
share of a row's attention that falls on key words, averaged over the rows of a step and over heads,

    mass[l, s] = mean over i in step s of sum over key words m, j in m of I_l[i, j]

and, since later rows see more key words whatever the model does, what attention spread evenly over the visible tokens
would give:

    even[s] = mean over i in step s of (key tokens j <= i) / (i + 1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.encoding import Collator, EncodedExample, encode_example
from mold.data.examples import DEFAULT_TEMPLATE, Example
from mold.method.attention_interface import observe_attention, use_mold_attention


def key_word_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: str = DEFAULT_TEMPLATE,
    *,
    bins: int = 6,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> dict:
    """Attention to key words over the course of the reasoning.

    So that texts of different lengths can be averaged, the reasoning of each goes from 0 to 1: of S steps, the question
    first, step s lasts from s / S to (s + 1) / S, and a bin takes of every step what of it is in the bin.

    Args:
        model: a causal language model; its attention is switched to "mold".
        tokenizer: its tokenizer, a fast one.
        examples: with rationales; those without key words are counted and left out.
        template: the training text's.
        bins: of the reasoning, from its beginning to its end.
        batch_size: examples a forward.
        max_length: most tokens an example may have.
        progress: whether to show a progress bar.

    Returns:
        {"mass": [L][bins], "even": [bins], "examples", "without_key_words"}: means over the examples.

    Raises:
        ValueError: no example has key words, or one does not fit (see `encode_example`).
    """
    use_mold_attention(model).eval()
    encoded = [
        encode_example(example, tokenizer, template, append_eos=False, max_length=max_length) for example in examples
    ]
    chosen = sorted((e for e in encoded if e.key_spans), key=lambda e: len(e.input_ids))
    if not chosen:
        raise ValueError(f"dataset: none of its {len(encoded)} examples has key words, so there is nothing to analyse")
    collate = Collator(pad_token_id=tokenizer.eos_token_id)
    layers = model.config.get_text_config().num_hidden_layers
    mass = torch.zeros(layers, bins, dtype=torch.float64)
    even = torch.zeros(bins, dtype=torch.float64)
    starts = range(0, len(chosen), batch_size)
    for start in tqdm(starts, desc="Attention to key words", disable=not progress):
        batch_examples = chosen[start : start + batch_size]
        attention = observe_attention(model, collate([{"example": e} for e in batch_examples]), "mean")
        pooled = attention.double().sum(-1).cpu()
        for index, example in enumerate(batch_examples):
            count = len(example.row_spans)
            shares = _shares_of_bins(count, bins)
            mass += pooled[:, index, :count] @ shares
            even += _even(example) @ shares
    return {
        "mass": (mass / len(chosen)).tolist(),
        "even": (even / len(chosen)).tolist(),
        "examples": len(chosen),
        "without_key_words": len(encoded) - len(chosen),
    }


def _shares_of_bins(steps: int, bins: int) -> torch.Tensor:
    """How much of each bin is in each step, [S, bins]; of a bin they sum to 1."""
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    inside = (edges[:, None] * bins - torch.arange(bins)).clamp(0, 1)
    return inside.diff(dim=0)


def _even(example: EncodedExample) -> torch.Tensor:
    """What evenly spread attention gives to key words in each step, [S]. A token in two key words counts twice."""
    at_key = torch.zeros(len(example.input_ids), dtype=torch.float64)
    for start, end in example.key_spans:
        at_key[start:end] += 1
    share = at_key.cumsum(0) / torch.arange(1, len(at_key) + 1)
    return torch.stack([share[start:end].mean() for start, end in example.row_spans])
