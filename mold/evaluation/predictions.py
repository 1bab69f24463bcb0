"""Batched greedy generation, answers, accuracy with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.answers import answer_kind, extract_answer, judge_answer
from mold.data.encoding import encode_prompt
from mold.data.examples import DEFAULT_TEMPLATE, Example
from mold.generation.batches import Completion, Journal, generate_all


def generate_predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: str = DEFAULT_TEMPLATE,
    *,
    task: str = "joint",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    static_cache: bool = False,
    journal: Journal | None = None,
    progress: bool = True,
) -> list[dict]:
    """Greedy completions of the examples' prompts, their answers and whether those are right.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        examples: their rationales and answers are only compared with, never shown to the model.
        template, task: the training text's (see `mold.data.chat.render_for`).
        batch_size: prompts a batch, padded on the left.
        max_new_tokens: most tokens of a completion. A completion that reaches it is marked "truncated".
        static_cache: see `generate_batch`.
        journal: finished batches are noted there and not generated again; None keeps no journal.
        progress: whether to show a progress bar.

    Returns:
        A dictionary an example, in their order: id, question, answer (the right one), prediction (None where no answer
        was found), completion, correct, judged (false where it cannot be within the limits of `mold.data.formulas`;
        wrong then), truncated.
    """
    prompts = [encode_prompt(example, tokenizer, template, task=task) for example in examples]
    completions = generate_all(
        model,
        tokenizer,
        prompts,
        "predictions",
        batch_size=batch_size,
        journal=journal,
        progress=progress,
        max_new_tokens=max_new_tokens,
        static_cache=static_cache,
    )
    return [
        _prediction(example, completion, template, task)
        for example, completion in zip(examples, completions, strict=True)
    ]


def _prediction(example: Example, completion: Completion, template: str, task: str) -> dict:
    prediction = extract_answer(completion.text, template, answer_kind(example.answer), task)
    verdict = judge_answer(prediction, example.answer)
    return {
        "id": example.id,
        "question": example.question,
        "answer": example.answer,
        "prediction": prediction,
        "completion": completion.text,
        "correct": verdict is True,
        "judged": verdict is not None,
        "truncated": completion.truncated,
    }


def accuracy(predictions: Sequence[dict]) -> float:
    """Share of right answers."""
    return sum(row["correct"] for row in predictions) / len(predictions)


def wilson_interval(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that a share of `right` in `total` lies in, at 95 % confidence.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        right: how many were right, or the mean of that over runs.
        total: of how many, n.
        z: quantile of the normal distribution, 1.96 for 95 %.

    Raises:
        ValueError: `total` is not positive or `right` not from 0 to it.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"right: is {right} of {total}, must be from 0 to a total of at least 1")
    share, width = right / total, z * z / total
    middle, half = share + width / 2, z * math.sqrt(share * (1 - share) / total + width / (4 * total))
    return max(0.0, (middle - half) / (1 + width)), min(1.0, (middle + half) / (1 + width))


def score(predictions: Sequence[dict]) -> dict:
    """right, total, accuracy, its 95 % interval (low, high), and how many: no answer, not judged, truncated."""
    right, total = sum(row["correct"] for row in predictions), len(predictions)
    low, high = wilson_interval(right, total)
    return {
        "right": right,
        "total": total,
        "accuracy": right / total,
        "low": low,
        "high": high,
        "no_answer": sum(row["prediction"] is None for row in predictions),
        "not_judged": sum(not row.get("judged", True) for row in predictions),
        "truncated": sum(row["truncated"] for row in predictions),
    }
