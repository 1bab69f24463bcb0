"""Does every function of text take linear time, also on texts made to be slow? Processor time at doubling sizes.

    python -m benchmarks.text_speed      # 25k to 100k characters
    python -m benchmarks.text_speed --characters 50000 --doublings 3

A linear function's time doubles with the text: a ratio near 2; a quadratic one's is near 4. Each time is the least of
three, since other work on the machine only adds to it; times below a millisecond have no ratio to speak of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import get_args

from mold.data.answers import AnswerKind, answer_kind, answers_match, extract_answer, split_completion
from mold.data.conversations import question_row
from mold.data.quantities import boxes, find_quantities, last_math, stated
from mold.data.segmentation import find_keywords, find_numbers, split_sentences, token_spans

KEYWORDS = ["cat", "ice cream", "...", "a a"]


def repeated(unit: str) -> Callable[[int], str]:
    """The maker of a text of n characters that says the unit again and again."""
    return lambda characters: (unit * (characters // len(unit) + 1))[:characters]


def keywords(text: str) -> None:
    find_keywords(text, KEYWORDS)


def tokens(text: str) -> None:
    token_spans(split_sentences(text), [(place, min(place + 4, len(text))) for place in range(0, len(text), 4)], text)


def answers(text: str) -> None:
    for kind in get_args(AnswerKind):
        extract_answer(text, kind=kind)


def matched(text: str) -> None:
    answers_match(text, "72")


def message(text: str) -> None:
    question_row({"prompt": "Q", "completion": text, "answer": "72"}, "here")


FUNCTIONS = [
    ("split_sentences", split_sentences),
    ("find_numbers", find_numbers),
    ("find_keywords", keywords),
    ("token_spans", tokens),
    ("extract_answer", answers),
    ("split_completion", split_completion),
    ("answers_match", matched),
    ("answer_kind", answer_kind),
    ("stated", stated),
    ("find_quantities", find_quantities),
    ("boxes", boxes),
    ("last_math", last_math),
    ("question_row", message),
]
TEXTS = {
    "rationale": "Mr. Tom has 12 apples and 3.5 pens, i.e. 1/2 of 31. ",
    "dots": ".",
    "quotes": '"',
    "brackets": "(",
    "closed brackets": "()",
    "digits": "5",
    "letters": "a",
    "blanks": " ",
    "newlines": "\n",
    "backslashes": "\\",
    "commas": ",",
    "grouped thousands": "1,234,",
    "fractions": "1/",
    "dots and quotes": '."',
    "dots and blanks": " .",
    "blanks and newlines": " \n",
    "markers": "1. ",
    "items": ". 1. ",
    "initials": "A.",
    "emphasis": "*",
    "footnotes": ".[1",
    "environments": "\\begin{",
    "tags": "<a",
    "keywords": "cat ",
    "boxed": "\\boxed{",
    "answers": "Answer: 7\n",
    "announcements": "The answer is ",
    "thoughts": "<think>",
    "choices": "(A) or ",
    "number words": "twenty one ",
    "denials": "not 5 ",
    "dollars": "$",
}
# (name, function of a text, maker of a text of n characters)
TABLE = [
    (f"{name}, {kind}", function, repeated(unit))
    for name, function in FUNCTIONS
    for kind, unit in TEXTS.items()
    if name != "token_spans" or kind in ("rationale", "dots", "letters")
]


def least_time(function: Callable[[str], object], text: str, rounds: int = 3) -> float:
    """Processor seconds of one call, the least of the rounds."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        function(text)
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=25_000, help="the smallest text (default: %(default)s)")
    parser.add_argument("--doublings", type=int, default=2, help="how often it is doubled (default: %(default)s)")
    args = parser.parse_args()
    sizes = [args.characters * 2**doubling for doubling in range(args.doublings + 1)]
    width = max(len(name) for name, _, _ in TABLE)
    print(f"{'milliseconds for characters':{width}}" + "".join(f"{size:>10}" for size in sizes) + "  last ratio")
    for name, function, maker in TABLE:
        times = [least_time(function, maker(size)) for size in sizes]
        ratio = f"{times[-1] / times[-2]:12.1f}" if len(times) > 1 and times[-2] > 1e-3 else " " * 11 + "-"
        print(f"{name:{width}}" + "".join(f"{1000 * seconds:10.1f}" for seconds in times) + ratio)


if __name__ == "__main__":
    main()
