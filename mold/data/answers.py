"""Answers: found in a completion, and compared with the right one."""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction
from typing import Literal

from mold.data.examples import DEFAULT_TEMPLATE
from mold.data.segmentation import find_numbers, split_sentences

AnswerKind = Literal["choice", "yes_no", "number", "text"]

_PHRASE = re.compile(r"####|\banswer\b(?:\s+(?!is\b|are\b)[^\s.:=]+){0,5}?\s*(?::|=|\b(?:is|be)\b:?)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# In brackets or named an option; alone or before punctuation; a letter that is no English word.
_CHOICE = (
    re.compile(r"(?:(?<=\()(?=[A-J]\))|(?i:(?<=option )|(?<=choice )))([A-J])\b"),
    re.compile(r"\b([A-J])(?=\W*$|[).:,;])"),
    re.compile(r"\b([B-HJ])\b"),
)
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?)\s?[$€£]?\s?(?P<sign2>[-\u2212]?)"
    r"(?:(?P<whole>\d+)\s+(?=\d+\s?/))?(?P<top>\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?(?P<bottom>\d+))?"
)
_TOLERANCE = Fraction(1, 10**6)  # relative: data sets state 1/3 as 0.3333333


def answer_kind(right: str) -> AnswerKind:
    """What kind of answer a task wants, told from the right one: a choice's letter, yes or no, a number, or a text."""
    if re.fullmatch(r"\(?[A-J]\)?", right.strip()):
        return "choice"
    if right.strip().casefold() in ("yes", "no"):
        return "yes_no"
    return "text" if _number(right) is None else "number"


def extract_answer(
    completion: str, template: str = DEFAULT_TEMPLATE, kind: AnswerKind = "number", task: str = "joint"
) -> str | None:
    r"""The answer a completion gives.

    A completion that goes on with a question of its own is read up to there. The answer is the line behind the
    template's answer marker; without one, the last \boxed{...}; then the sentence behind the last "the answer is" or
    "####"; then, whatever the kind of answer asks for: the last number, letter in brackets, or yes or no. A text has to
    be announced.

    Args:
        completion: generated text, from the rationale on.
        template: the training text's, for its markers.
        kind: what is looked for where nothing announces the answer.
        task: what was asked for (see `mold.data.examples.render`); "predict" and "answer" complete to the answer's line
            itself.

    Returns:
        The answer's text, None where nothing looks like one.
    """
    if task in ("predict", "answer"):
        return completion.strip().partition("\n")[0].strip() or None
    opening = template.split("{question}")[0].strip()
    if opening:
        completion = re.split(rf"\n\s*{re.escape(opening)}", completion, maxsplit=1)[0]
    marker = template.split("{rationale}")[1].split("{answer}")[0].strip()
    if marker and marker in completion:
        return completion.rpartition(marker)[2].strip().partition("\n")[0].strip() or None
    if boxed := _BOXED.findall(completion):
        return boxed[-1].strip() or None
    for phrase in reversed(list(_PHRASE.finditer(completion))):
        if sentences := split_sentences(completion, phrase.end()):
            return completion[slice(*sentences[0])].lstrip(" *_`").rstrip(" *_`.") or None
    if kind == "number" and (numbers := find_numbers(completion)):
        start, end = numbers[-1]
        sign = re.search(r"(?:^|[=\s(])([-\u2212])\s?[$€£]?$", completion[:start])
        minus = sign is not None and not re.search(r"\d\s*$", completion[: sign.start(1)])
        return ("-" if minus else "") + completion[start:end]
    found = {"choice": _CHOICE[0], "yes_no": _YES_NO}.get(kind)
    letters = found.findall(completion) if found else []
    return letters[-1] if letters else None


def answers_match(predicted: str | None, right: str) -> bool:
    r"""Whether two answers say the same.

    Numbers are compared by value, to a millionth: currency, percent signs, thousands separators and units do not count,
    "1/2" is 0.5. What is no plain number (\frac{1}{2}, 2^3) math-verify judges, if it is installed (the extra
    ``math``). Letters of choices are compared without brackets, yes and no by the first such word, everything else
    without case and extra space.

    Args:
        predicted: None counts as wrong.
        right: the right answer.
    """
    if predicted is None:
        return False
    kind = answer_kind(right)
    if kind == "choice":
        found = next((match[1] for pattern in _CHOICE if (match := pattern.search(predicted))), None)
        return found == right.strip(" ()")
    if kind == "yes_no":
        found = _YES_NO.search(predicted)
        return (
            found is not None
            and {"true": "yes", "false": "no"}.get(found[1].casefold(), found[1].casefold()) == right.strip().casefold()
        )
    if kind == "number" and (value := _number(predicted)) is not None:
        target = _number(right)
        return abs(value - target) <= _TOLERANCE * abs(target)
    if kind == "number" and not re.search(r"[\\^*/+×÷]", predicted):
        return False
    return _folded(predicted) == _folded(right) or _verified(predicted, right)


def _verified(predicted: str, right: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # Its time limits use signals, which only the main thread may set; it warns of their absence at every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected, found = parse(f"${right}$", parsing_timeout=None), parse(f"${predicted}$", parsing_timeout=None)
    return bool(expected and found) and verify(expected, found, timeout_seconds=None)


def _number(text: str) -> Fraction | None:
    """The number that a text starts with behind its last "=", or its only one; None for a calculation or a list."""
    # "2½" to "2 1/2"
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text.rpartition("=")[2].strip(" *_`"))
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    found = list(_NUMBER.finditer(text))
    if not found or (len(found) > 1 and found[0].start() > 0) or "\\" in text:
        return None
    number = found[0]
    if re.match(r"\s*[-+*/×÷^;:]\s*[$(]?\d", text[number.end() :]):
        return None
    try:
        value = Fraction(number["top"].replace(",", "")) / int(number["bottom"] or 1) + int(number["whole"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if number["sign"] or number["sign2"] else value


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")
