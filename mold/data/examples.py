"""Examples, the text they are trained as, and splits without leakage."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mold.data.segmentation import SEGMENTATION_VERSION, Span

DEFAULT_TEMPLATE = "Question: {question}\nReasoning: {rationale}\nAnswer: {answer}"
_PLACEHOLDERS = ("{question}", "{rationale}", "{answer}")
ASSISTANT = "{assistant}"
"""Where the assistant's message begins in the template of a chat (see `mold.data.chat`)."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
PROMPT, RATIONALE, ANSWER = 0, 1, 2
"""Regions of a training text; every token has one (padding is PROMPT)."""
TASK_PREFIXES = {"joint": "", "explain": "explain: ", "predict": "predict: ", "answer": ""}
"""The texts an example can be trained as: joint holds question, rationale and answer; explain and predict are the two
tasks of distilling step-by-step, question and rationale, question and answer; answer is predict without its prefix."""


@dataclass(frozen=True)
class Example:
    """A question, a teacher's rationale and the answer.

    keywords: the key information of a commonsense question; None where it is every number.
    history: (role, text) of the messages before the question, where the example is a conversation.
    chat: whether its row was a conversation; that decides the template where none is given.

    Raises:
        ValueError: a text is none of Unicode (it holds one half of a surrogate pair).
    """

    id: str
    question: str
    rationale: str
    answer: str
    keywords: tuple[str, ...] | None = None
    history: tuple[tuple[str, str], ...] = ()
    chat: bool = False

    def __post_init__(self):
        texts = [(name, getattr(self, name)) for name in ("id", "question", "rationale", "answer")]
        texts += [("keywords", word) for word in self.keywords or ()]
        texts += [("history", text) for turn in self.history for text in turn]
        for name, text in texts:
            if isinstance(text, str) and (lone := _LONE_SURROGATE.search(text)):
                raise ValueError(
                    f"{name}: holds {lone[0]!a} at character {lone.start()}, one half of a surrogate pair; must be "
                    "Unicode text"
                )


class RenderedText(NamedTuple):
    """A training text with the character spans of its parts.

    prompt: what generation starts from, the text before what is learned without trailing spaces.
    rationale: empty where the task has none.
    answer: behind a rationale from its end to the end of the text, so the marker before the answer is learned too;
        empty where the task has none.
    special_tokens: whether the tokenizer adds its special tokens; a chat template has written them into the text.
    """

    text: str
    prompt: str
    question: Span
    rationale: Span
    answer: Span
    special_tokens: bool = True


def check_template(template: str) -> None:
    """Raise a ValueError unless the template holds each placeholder once, in the order of the text.

    A chat's template holds {assistant} too, between question and rationale.
    """
    expected = list(_PLACEHOLDERS)
    if ASSISTANT in template:
        expected.insert(1, ASSISTANT)
    places = [template.find(placeholder) for placeholder in expected]
    if any(template.count(placeholder) != 1 for placeholder in expected) or places != sorted(places):
        raise ValueError(f"template: is {template!r}, must hold {', '.join(expected)} once each, in this order")


def render(example: Example, template: str = DEFAULT_TEMPLATE, task: str = "joint") -> RenderedText:
    """The training text of an example, for a template without {assistant} (see `mold.data.chat.render_for`).

    Args:
        example: question, rationale and answer.
        template: of the joint task; the other tasks leave out the rationale, or the answer and its marker.
        task: one of TASK_PREFIXES.

    Raises:
        ValueError: the template does not fit (see `check_template`).

    Source: the prefixes are those of Distilling Step-by-Step (arXiv:2305.02301).
    """
    check_template(template)
    if ASSISTANT in template:
        raise ValueError(f"template: holds {ASSISTANT}, must be rendered for a tokenizer (mold.data.chat.render_for)")
    before, rest = template.split("{question}")
    between, rest = rest.split("{rationale}")
    marker, after = rest.split("{answer}")
    before = TASK_PREFIXES[task] + before
    question = (len(before), len(before) + len(example.question))
    if task in ("predict", "answer"):
        prompt = before + example.question + marker
        text, prompt = prompt + example.answer + after, prompt.rstrip(" ")
        return RenderedText(text, prompt, question, (len(prompt), len(prompt)), (len(prompt), len(text)))
    prompt = before + example.question + between
    rationale = (len(prompt), len(prompt) + len(example.rationale))
    text = prompt + example.rationale
    if task == "joint":
        text += marker + example.answer + after
    return RenderedText(text, prompt.rstrip(" "), question, rationale, (rationale[1], len(text)))


def text_hash(example: Example, template: str) -> str:
    """A hash of everything that decides an example's text and its steps and key words, whatever its id is."""
    parts: list[object] = [example.question, example.rationale, example.answer, example.keywords, example.history]
    return hashlib.sha256(json.dumps([*parts, template, SEGMENTATION_VERSION]).encode()).hexdigest()


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
    first: dict[str, Example] = {}
    for example in shuffled:
        if len(first) < num_eval:
            first.setdefault(question_key(example.question), example)
    held_out = list(first.values())
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
