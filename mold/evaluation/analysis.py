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

    Steps are put into bins by their place, so that texts of different lengths can be averaged: of S steps, step s goes
    into bin s (bins - 1) / (S - 1), rounded. The question is in the first bin, the last step in the last one.

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
        {"mass": [L][bins], "even": [bins], "steps": [bins] (how many), "examples", "without_key_words"}; None where no
        step fell into a bin.

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
    even, steps = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.int64)
    starts = range(0, len(chosen), batch_size)
    for start in tqdm(starts, desc="Attention to key words", disable=not progress):
        batch_examples = chosen[start : start + batch_size]
        attention = observe_attention(model, collate([{"example": e} for e in batch_examples]), "mean")
        pooled = attention.double().sum(-1).cpu()
        for index, example in enumerate(batch_examples):
            count = len(example.row_spans)
            places = (torch.arange(count) * (bins - 1) / max(1, count - 1)).round().long()
            mass.index_add_(1, places, pooled[:, index, :count])
            even.index_add_(0, places, _even(example))
            steps.index_add_(0, places, torch.ones(count, dtype=torch.int64))

    def means(sums: torch.Tensor) -> list:
        return [value if n else None for value, n in zip((sums / steps).tolist(), steps.tolist(), strict=True)]

    return {
        "mass": [means(layer) for layer in mass],
        "even": means(even),
        "steps": steps.tolist(),
        "examples": len(chosen),
        "without_key_words": len(encoded) - len(chosen),
    }


def _even(example: EncodedExample) -> torch.Tensor:
    """What evenly spread attention gives to key words in each step, [S]. A token in two key words counts twice."""
    at_key = torch.zeros(len(example.input_ids), dtype=torch.float64)
    for start, end in example.key_spans:
        at_key[start:end] += 1
    share = at_key.cumsum(0) / torch.arange(1, len(at_key) + 1)
    return torch.stack([share[start:end].mean() for start, end in example.row_spans])
