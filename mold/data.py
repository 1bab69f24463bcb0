"""Examples, the text they are trained as, and splits without leakage."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mold.text import Span

DEFAULT_TEMPLATE = "Question: {question}\nReasoning: {rationale}\nAnswer: {answer}"


@dataclass(frozen=True)
class Example:
    """A question, a teacher's rationale and the answer.

    keywords: the key information of a commonsense question; None where it is every number.
    """

    id: str
    question: str
    rationale: str
    answer: str
    keywords: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RenderedText:
    """A training text with the character spans of its parts.

    prompt: what generation starts from, the text before the rationale without trailing spaces.
    answer: from the end of the rationale to the end of the text, so the marker before the answer is learned too.
    """

    text: str
    prompt: str
    question: Span
    rationale: Span
    answer: Span


class TemplateParts(NamedTuple):
    """opening {question} reasoning {rationale} marker {answer} closing.

    A template without {rationale} is for plain fine-tuning on answers: `reasoning` is None.
    """

    opening: str
    reasoning: str | None
    marker: str
    closing: str


def split_template(template: str) -> TemplateParts:
    """The literal parts of a template.

    Raises:
        ValueError: it does not hold {question} and {answer} once each, and {rationale} once or not at all, in the order
            of the text.
    """
    match = re.fullmatch(r"(.*?)\{question\}(?:(.*?)\{rationale\})?(.*?)\{answer\}(.*)", template, re.DOTALL)
    parts = TemplateParts(*match.groups()) if match else None
    if parts is None or re.search(r"\{(question|rationale|answer)\}", "".join(part or "" for part in parts)):
        raise ValueError(
            f"template: is {template!r}, must hold {{question}}, {{rationale}}, {{answer}} once each, in this order "
            "({rationale} may be left out for fine-tuning on answers alone)"
        )
    return parts


def render(example: Example, template: str = DEFAULT_TEMPLATE) -> RenderedText:
    """The training text of an example.

    Raises:
        ValueError: the template does not fit (see `split_template`).
    """
    opening, reasoning, marker, closing = split_template(template)
    question = (len(opening), len(opening) + len(example.question))
    prompt = opening + example.question + (marker if reasoning is None else reasoning)
    if reasoning is None:
        rationale = (question[1], question[1])
        text = prompt + example.answer + closing
    else:
        rationale = (len(prompt), len(prompt) + len(example.rationale))
        text = prompt + example.rationale + marker + example.answer + closing
    return RenderedText(text, prompt.rstrip(" "), question, rationale, (rationale[1], len(text)))


def text_hash(example: Example, template: str) -> str:
    """A hash of everything that decides an example's text and its steps and key words."""
    parts = [example.question, example.rationale, example.answer, example.keywords, template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def split_examples(examples: Sequence[Example], num_eval: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: shuffled by the seed, no question in both.

    Args:
        examples: in any order.
        num_eval: held-out examples.
        seed: of the shuffle.

    Returns:
        (training, held out). Every held-out question stands there once; examples that repeat one belong to neither.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    held_out = {}
    for example in shuffled:
        if len(held_out) < num_eval:
            held_out.setdefault(question_key(example.question), example)
    held_out = list(held_out.values())
    return without_questions_of(shuffled, held_out), held_out


def without_questions_of(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The examples whose question none of the others asks (see `question_key`): training data without leakage."""
    asked = {question_key(example.question) for example in others}
    return [example for example in examples if question_key(example.question) not in asked]


def question_key(question: str) -> str:
    """What two copies of a question have in common: its words and numbers, without case, spaces and punctuation.

    Decimal points, signs and operators before a number count: "2.5" is not "25".
    """
    without_separators = re.sub(r"(?<=\d),(?=\d{3})", "", question.casefold())
    return " ".join(re.findall(r"\w+|\.(?=\d)|[-+*/^](?=\s*\d)", without_separators))
