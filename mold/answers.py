"""Answers: found in a completion, and compared with the right one."""

from __future__ import annotations

import re
from fractions import Fraction

from mold.data import DEFAULT_TEMPLATE
from mold.text import find_numbers

_PHRASES = re.compile(r"(?:####|\b(?:final )?answer(?: is)?:?)\s*", re.IGNORECASE)
_LETTER = re.compile(r"\(?\b([A-E])\b\)?")
_NUMBER = re.compile(r"[-\u2212]?\s?[$€£]?\s?(?P<number>\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?|\.\d+)")


def extract_answer(completion: str, template: str = DEFAULT_TEMPLATE, task: str = "joint") -> str | None:
    """The answer a completion gives.

    The line behind the template's answer marker; without one, what follows the last "the answer is" or "####"; else the
    last number, or the last letter of a choice in brackets.

    Args:
        completion: generated text, from the rationale on.
        template: the training text's, for its marker.
        task: what was asked for (see `mold.data.render`); "predict" and "answer" complete to the answer's line itself.

    Returns:
        The answer's text, None where nothing looks like one.
    """
    if task in ("predict", "answer"):
        return completion.strip().partition("\n")[0].strip() or None
    marker = template.split("{rationale}")[1].split("{answer}")[0].strip()
    if marker and marker in completion:
        line = completion.rpartition(marker)[2].strip().partition("\n")[0].strip()
        return line or None
    phrases = list(_PHRASES.finditer(completion))
    if phrases:
        line = completion[phrases[-1].end() :].strip().partition("\n")[0].strip().rstrip(".")
        if line:
            return line
    if numbers := find_numbers(completion):
        return completion[slice(*numbers[-1])]
    if letters := re.findall(r"\(([A-E])\)", completion):
        return letters[-1]
    return None


def answers_match(predicted: str | None, right: str) -> bool:
    """Whether two answers say the same.

    Numbers are compared by value: currency, percent signs, thousands separators and units do not count, "1/2" is 0.5.
    Where the right answer is no plain number math-verify judges, if it is installed (the extra ``math``). Letters of
    choices are compared without brackets, everything else without case and extra space.

    Args:
        predicted: None counts as wrong.
        right: the right answer.
    """
    if predicted is None:
        return False
    if re.fullmatch(r"\(?[A-E]\)?", right.strip()):
        found = _LETTER.search(predicted)
        return found is not None and found[1] == right.strip(" ()")
    target = _number(right)
    if target is not None:
        return _number(predicted) == target
    if _folded(predicted) == _folded(right):
        return True
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # Its time limits use signals, which only the main thread may set.
    expected, found = parse(f"${right}$", parsing_timeout=None), parse(f"${predicted}$", parsing_timeout=None)
    return bool(expected and found) and verify(expected, found, timeout_seconds=None)


def _number(text: str) -> Fraction | None:
    """The number behind the last "=" that a text starts with, or the only one it holds."""
    found = list(_NUMBER.finditer(text.rpartition("=")[2].strip()))
    if not found or (len(found) > 1 and found[0].start() > 0):
        return None
    try:
        value = Fraction(re.sub(r"[,\s]", "", found[0]["number"]))
    except (ValueError, ZeroDivisionError):
        return None
    return -value if found[0][0][0] in "-\u2212" else value


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")
