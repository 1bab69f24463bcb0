"""Batched greedy generation, answers, accuracy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.answers import answer_kind, answers_match, extract_answer
from mold.chat import render_for
from mold.data import DEFAULT_TEMPLATE, Example
from mold.signals import write_atomically


@torch.no_grad()
def generate_predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: str = DEFAULT_TEMPLATE,
    *,
    task: str = "joint",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    progress: bool = True,
) -> list[dict]:
    """Greedy completions of the examples' prompts, their answers and whether those are right.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        examples: their rationales and answers are only compared with, never shown to the model.
        template, task: the training text's (see `mold.chat.render_for`).
        batch_size: prompts a batch, padded on the left.
        max_new_tokens: most tokens of a completion. A completion that reaches it is marked "truncated".
        progress: whether to show a progress bar.

    Returns:
        A dictionary an example, in their order: id, question, answer (the right one), prediction (None where no answer
        was found), completion, correct, truncated.
    """
    model.eval()
    rendered = [render_for(example, template, tokenizer, task) for example in examples]
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(rendered)), key=lambda index: len(rendered[index].prompt))
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [None] * len(rendered)
    for start in tqdm(range(0, len(order), batch_size), desc="Generating", disable=not progress):
        chosen = order[start : start + batch_size]
        ids = [
            tokenizer(rendered[index].prompt, add_special_tokens=rendered[index].special_tokens)["input_ids"]
            for index in chosen
        ]
        length = max(map(len, ids))
        batch = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=model.device)
        output = model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, length:]
        for index, tokens in zip(chosen, output, strict=True):
            example = examples[index]
            completion = tokenizer.decode(tokens, skip_special_tokens=True)
            prediction = extract_answer(completion, template, answer_kind(example.answer), task)
            rows[index] = {
                "id": example.id,
                "question": example.question,
                "answer": example.answer,
                "prediction": prediction,
                "completion": completion,
                "correct": answers_match(prediction, example.answer),
                "truncated": len(tokens) == max_new_tokens
                and tokens[-1].item() not in (tokenizer.eos_token_id, pad_token_id),
            }
    return rows


def accuracy(predictions: Sequence[dict]) -> float:
    """Share of right answers."""
    return sum(row["correct"] for row in predictions) / len(predictions)


def write_jsonl(path: str | Path, rows: Sequence[dict]) -> None:
    """Write one JSON object a line, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(Path(path), text.encode())
