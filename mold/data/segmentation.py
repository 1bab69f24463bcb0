"""Steps and key words on characters, and characters to token spans.

Both are found once, on the text, and mapped to the tokens of each model by the offsets of its fast tokenizer, so that
teacher and student agree on the number of steps and key words whatever their tokenizers are. Every interval is
half-open; every function takes time linear in the text. Source: MoLSAKI, EMNLP 2025, section "Stepwise Attention".
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

import re
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise

from mold.data.list_markers import without_markers
from mold.data.sentence_ends import LETTER, REACH, SENTENCE_END, UNSPACED, VULGAR, ends_sentence

Span = tuple[int, int]  # half-open [start, end)

SEGMENTATION_VERSION = 3
"""Of the rules below. Teacher signals of another version are refused: their steps may be other ones."""

_ALPHANUMERIC = rf"[^\W_{UNSPACED}]"
_WORD_BORDER = rf"(?:(?<!{_ALPHANUMERIC})|(?!{_ALPHANUMERIC}))"

# What a line holds that only opens, closes or draws something: LaTeX environments and rules, HTML tags, code fences.
_FRAME = re.compile(
    r"""
    \\(?:begin|end) \{[^{}\n]*\} (?: \{(?:[^{}\n]|\{[^{}\n]*\})*+\} | \[[^\[\]\n]*\] )*+
  | \\(?:hline|toprule|midrule|bottomrule|centering|noindent|displaystyle|newline|(?:small|med|big)skip|q?quad)\b
  | \\cline\{[\d-]*\} | \\label\{[^{}\n]*\} | \\\\\[\w.]*\]
  | </?[a-z][^<>\n]*> | ^(?:```|~~~)[\w+-]*$
    """,
    re.VERBOSE | re.IGNORECASE,
)

# --- numbers ---

# A LaTeX command is no word that the digits behind it belong to, but with its subscript it is a name, like x_1.
_COMMAND = re.compile(
    r"\\(?!(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|"
    r"kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega)_)[a-z]+",
    re.IGNORECASE,
)
_OPERATOR_COMMAND = re.compile(r"\\(?:cdot|times|div|ast)(?![A-Za-z])")
# TeX takes a digit for each argument: \frac12 is 1/2.
_DIGIT_ARGUMENTS = re.compile(r"(?P<command>\\(?:[dtc]?frac|[dt]?binom)[ \t]*)(?P<first>\d)[ \t]*(?P<second>\d)")

# A word is consumed whole, so that the digits glued behind its letters are never seen; the x of "3x4" is no word,
# and the sign of "Nº5" ends one.
_WORD = rf"(?!(?<=[\d{VULGAR}])x\.?\d){LETTER}(?:[^\W\d{UNSPACED}]|(?<!º)\d)*(?:(?<=\d)\.\d+)*"
# A full stop is a decimal point where no word stands before it: not in "No.5".
_BARE_DECIMAL = rf"(?:(?<![^\W_])(?<!\.)|(?<=[\d{VULGAR}]x))\.\d+"
_PLAIN = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?: ?[{VULGAR}])?|{_BARE_DECIMAL}|[{VULGAR}]"
_FRACTION = r"(?:(?P<whole>\d{1,3}+)[ \u00a0])?(?P<top>\d{1,9}+)[/⁄](?P<bottom>\d{1,9}+)(?![.,/⁄]?\d)"
_WORD_OR_NUMBER = re.compile(rf"(?P<word>{_WORD})|(?P<fraction>{_FRACTION})|{_PLAIN}", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(_PLAIN)
# A hyphen before a letter ("1/2-inch"), an x inside a word and the ** of Markdown are no operators.
_OPERATOR_BEFORE = re.compile(rf"(?:[-+−×÷·/=]|(?<!\*)\*|(?<!{LETTER})x)[\s(]*$", re.IGNORECASE)
_OPERATOR_AFTER = re.compile(rf"[\s)]*(?:[+−×÷·/=]|\*(?!\*)|[-x](?!{LETTER}))", re.IGNORECASE)


STEP_UNITS = ("sentence", "line", "paragraph")
KEY_SCOPES = ("all", "question")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class SegmentOptions:
    """How a text is split; texts of 10,000 tokens and more have steps and key words by the hundred.

    Args:
        step_unit: what of the rationale is a step: a "sentence", a "line", or a "paragraph" (blank lines part them).
        max_reasoning_steps: most steps, the question counted; neighbours in the rationale are joined evenly. None: all.
        max_key_words: most key words. The first occurrence of each distinct value (numbers by value, keywords whatever
            the case) goes before repetitions, of each the first ones in the text. None: all.
        key_scope: where key words are looked for: in "all" of question and rationale, or in the "question" alone.

    Raises:
        ValueError: a value is none of these, or a limit is below 2.
    """

    step_unit: str = "sentence"
    max_reasoning_steps: int | None = None
    max_key_words: int | None = None
    key_scope: str = "all"

    def __post_init__(self):
        for name, known in (("step_unit", STEP_UNITS), ("key_scope", KEY_SCOPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: is {getattr(self, name)!r}, must be one of {', '.join(known)}")
        for name in ("max_reasoning_steps", "max_key_words"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 2):
                raise ValueError(f"{name}: is {value!r}, must be a whole number of at least 2, or not given")


PAPER_SEGMENTS = SegmentOptions()
"""A step a sentence, and all of them and of the key words."""


@dataclass(frozen=True)
class Segments:
    """The steps and key words of one example, on characters.

    Args:
        steps: character spans without surrounding whitespace; step 0 is the question.
        key_words: character spans in order of position, none overlapping another.
        steps_joined: how many steps fewer there are than the text has, by `max_reasoning_steps`.
        key_words_left_out: how many key words fewer, by `max_key_words`.
    """

    steps: tuple[Span, ...]
    key_words: tuple[Span, ...]
    steps_joined: int = 0
    key_words_left_out: int = 0


def split_sentences(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Split `text[start:end]` into sentences.

    A sentence ends at the end of a line, at `.`, `!`, `?`, `…` (with the quotes and brackets that close behind it)
    before whitespace, and at `。！？` anywhere. No end is: the period of an abbreviation, an initial or a list marker
    at the start of a line; a mark inside a quotation or bracket after which the sentence goes on in lower case
    ('"Is it 5?" she asked'); any mark before an operator or comma. Punctuation without a letter, digit or symbol joins
    the sentence before it, or the one behind it where it is the first.

    Args:
        text: the whole text.
        start: first character of the region; counts as the start of a line.
        end: end of the region, in characters; the end of the text by default.

    Returns:
        Character spans of `text`, in order, not overlapping, without surrounding whitespace; together they hold every
        non-whitespace character of the region. Empty where the region is.

    Raises:
        ValueError: `start` and `end` are no region of the text.

    Source: the paper splits at periods; the exceptions are ours.
    """
    return _split(text, start, end, "sentence")


def _split(text: str, start: int, end: int | None, unit: str) -> list[Span]:
    region = _region(text, start, end)
    sentences: list[Span] = []
    begun = False  # whether a piece had content: until then, stray punctuation is the beginning of the first sentence
    for piece in _pieces(region) if unit == "sentence" else _between(region, unit):
        first, last = _trim(region, piece)
        if first == last:
            continue
        has_content = any(map(str.isalnum, _FRAME.sub("", region[first:last])))
        if sentences and not (begun and has_content):
            sentences[-1] = (sentences[-1][0], last)
        else:
            sentences.append((first, last))
        begun = begun or has_content
    return [(start + first, start + last) for first, last in sentences]


def find_numbers(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Find the numbers of `text[start:end]`, without sign, currency or percent sign.

    One number is: digits of any script with thousands separators and decimals (`1,200.50`, `.5`); a proper fraction
    that is no part of a calculation (`1/2 of`, but three numbers in `(1/2) * 8`); a mixed number
    (`2 1/2`, `2½`). Parts of dates, times and ranges are numbers of their own. No number is: digits behind a letter
    (`R2D2`, `x_1`; but `3x4` has two, and letters of scripts without spaces do not count), superscripts, written-out
    numbers, the list marker at the start of a line (`1. Take`) and the number of a heading (`Step 1:`).

    Args:
        text: the whole text.
        start: first character of the region; counts as the start of a line.
        end: end of the region, in characters; the end of the text by default.

    Returns:
        Character spans of `text`, in order, not overlapping.

    Raises:
        ValueError: `start` and `end` are no region of the text.

    Source: the paper takes every number, by a regular expression; the rules are ours.
    """
    region = _region(text, start, end)
    masked = without_markers(region)
    spans = [found.span(name) for found in _DIGIT_ARGUMENTS.finditer(masked) for name in ("first", "second")]
    masked = _DIGIT_ARGUMENTS.sub(_blanks, masked)
    masked = _COMMAND.sub(_blanks, _OPERATOR_COMMAND.sub(lambda found: "·".ljust(len(found[0])), masked))
    position = 0
    while match := _WORD_OR_NUMBER.search(masked, position):
        if match["fraction"] and not _is_fraction(masked, match):
            match = _PLAIN_NUMBER.match(masked, match.start()) or match
        position = match.end()
        if not match.groupdict().get("word"):
            spans.append(match.span())
    return [(start + first, start + last) for first, last in sorted(spans)]


def find_keywords(text: str, keywords: Sequence[str], start: int = 0, end: int | None = None) -> list[Span]:
    """Find every whole-word occurrence of the keywords in `text[start:end]`, whatever the case.

    A match may carry a plural or possessive ending (`cats`, `boxes`, `cat's`); whitespace in a keyword matches any run
    of it. Where several keywords start at one place the longest wins; of two that overlap, the one that starts first.

    Args:
        text: the whole text.
        keywords: words or phrases; repeated ones count once, none at all finds nothing.
        start: first character of the region.
        end: end of the region, in characters; the end of the text by default.

    Returns:
        Character spans of `text`, in order, not overlapping.

    Raises:
        TypeError: `keywords` is one string, or holds something else than strings.
        ValueError: a keyword is empty, or `start` and `end` are no region of the text.

    Source: the paper's keywords for commonsense questions; how they are matched is ours.
    """
    if isinstance(keywords, str):
        raise TypeError(f"keywords: is the string {keywords!r}, must be a sequence of strings")
    phrases = set()
    for keyword in keywords:
        if not isinstance(keyword, str):
            raise TypeError(f"keywords must hold strings only, holds {keyword!r}")
        if not keyword.strip():
            raise ValueError(f"keywords must hold no empty keyword, holds {keyword!r}")
        phrases.add(" ".join(keyword.split()))
    region = _region(text, start, end)
    if not phrases:
        return []
    longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    alternatives = "|".join(_phrase_pattern(phrase) for phrase in longest_first)
    pattern = re.compile(f"{_WORD_BORDER}(?i:{alternatives}){_WORD_BORDER}")
    return [(start + match.start(), start + match.end()) for match in pattern.finditer(region)]


def segment(
    text: str,
    question: Span,
    rationale: Span,
    keywords: Sequence[str] | None = None,
    options: SegmentOptions = PAPER_SEGMENTS,
) -> Segments:
    """Split an example into steps and key words.

    Args:
        text: the whole text, with everything that the models read.
        question: characters of the question; it is step 0.
        rationale: characters of the rationale; each of its sentences (or lines or paragraphs) is one step.
        keywords: what to look for in question and rationale; None takes every number.
        options: what a step is, where key words are looked for, and how many of both there may be.

    Returns:
        The steps and key words, with how many were joined or left out; every occurrence is one key word, and there may
        be none.

    Raises:
        TypeError: `keywords` is one string, or holds something else than strings.
        ValueError: question or rationale is empty, outside the text, or they overlap; a keyword is empty.

    Source: MoLSAKI, EMNLP 2025, section "Stepwise Attention"; M1 and M2 of its equation 2.
    """
    for name, span in (("question", question), ("rationale", rationale)):
        if not _region(text, *span).strip():
            raise ValueError(f"{name} must hold text, characters {span[0]} to {span[1]} are {text[slice(*span)]!r}")
    if max(question[0], rationale[0]) < min(question[1], rationale[1]):
        raise ValueError(f"question and rationale must not overlap, were {question} and {rationale}")
    found = _split(text, *rationale, options.step_unit)
    steps = [_trim(text, question), *_join_evenly(found, options.max_reasoning_steps)]
    key_words: list[Span] = []
    for region in (question, rationale) if options.key_scope == "all" else (question,):
        key_words += find_numbers(text, *region) if keywords is None else find_keywords(text, keywords, *region)
    chosen = _distinct_first(text, sorted(key_words), options.max_key_words, numbers=keywords is None)
    return Segments(tuple(steps), tuple(chosen), 1 + len(found) - len(steps), len(key_words) - len(chosen))


def token_spans(spans: Sequence[Span], offsets: Sequence[tuple[int, int]], text: str) -> list[Span]:
    """Map character spans to token spans.

    A token belongs to a span when they share a non-whitespace character: [i, j) with i the first and j - 1 the last
    such token. A token that covers two spans belongs to both.

    Args:
        spans: character spans of `text`, in any order.
        offsets: the fast tokenizer's `offset_mapping` for `text`, in characters; (0, 0) for special tokens and padding.
        text: the text that was tokenised, as one sequence.

    Returns:
        One token span for each span, in their order.

    Raises:
        ValueError: a span holds no character, or a character at its border that no token covers (truncation cut it);
            `offsets` go backwards or beyond the text, so they are not those of `text`.

    Source: trimmed of whitespace, the starts and the ends of the tokens are both in order, and a trimmed token and a
        trimmed span that overlap share the first character of their overlap, which is none of whitespace.
    """
    indices: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for index, (first, last) in enumerate(offsets):
        if not 0 <= first <= last <= len(text):
            raise ValueError(f"offsets must lie in the text of {len(text)} characters, token {index} has {first, last}")
        first, last = _trim(text, (first, last))
        if first == last:
            continue
        if starts and (first < starts[-1] or last < ends[-1]):
            raise ValueError(f"offsets must not go backwards, token {index} covers {text[first:last]!r} at {first}")
        indices.append(index)
        starts.append(first)
        ends.append(last)

    result: list[Span] = []
    for span in spans:
        _region(text, *span)
        first, last = _trim(text, span)
        left = bisect_right(ends, first)  # the first token that ends behind the span's first character
        right = bisect_left(starts, last)  # behind the last token that starts before the span's end
        if first == last or left >= right or starts[left] > first or ends[right - 1] < last:
            share = "no token covers" if first == last or left >= right else "the tokens cover only a part of"
            shown = reprlib.repr(text[first:last])
            raise ValueError(f"spans must be covered by tokens, {share} {shown}, characters {span[0]} to {span[1]}")
        result.append((indices[left], indices[right - 1] + 1))
    return result


def _region(text: str, start: int, end: int | None) -> str:
    end = len(text) if end is None else end
    if not 0 <= start <= end <= len(text):
        raise ValueError(f"start and end must lie in the text of {len(text)} characters, were {start} and {end}")
    return text[start:end]


def _blanks(match: re.Match) -> str:
    return " " * len(match[0])


def _trim(text: str, span: Span) -> Span:
    piece = text[span[0] : span[1]]
    first = span[0] + len(piece) - len(piece.lstrip())
    return first, first + len(piece.strip())


def _pieces(region: str) -> Iterator[Span]:
    """Cut the region at line ends and sentence ends; pieces keep their whitespace and may hold nothing else."""
    masked = without_markers(region)
    for line in re.finditer(r"[^\n]+", region):
        start, end = line.span()
        for match in SENTENCE_END.finditer(masked, start, end):
            if ends_sentence(masked, match):
                yield start, match.end()
                start = match.end()
        yield start, end


def _between(region: str, unit: str) -> Iterator[Span]:
    """Cut the region at line ends, or where blank lines part paragraphs."""
    start = 0
    for match in re.finditer("\n", region) if unit == "line" else _PARAGRAPH_BREAK.finditer(region):
        yield start, match.start()
        start = match.end()
    yield start, len(region)


def _join_evenly(steps: Sequence[Span], most: int | None) -> Sequence[Span]:
    """The rationale's steps, neighbours joined so that with the question they are at most so many."""
    if most is None or len(steps) < most:
        return steps
    borders = [len(steps) * group // (most - 1) for group in range(most)]
    return [(steps[first][0], steps[last - 1][1]) for first, last in pairwise(borders)]


def _distinct_first(text: str, key_words: list[Span], most: int | None, *, numbers: bool) -> list[Span]:
    if most is None or len(key_words) <= most:
        return key_words
    seen: set[Decimal | str] = set()
    first: list[Span] = []
    repeated: list[Span] = []
    for span in key_words:
        value = _value(text[slice(*span)], numbers)
        (repeated if value in seen else first).append(span)
        seen.add(value)
    return sorted((first + repeated)[:most])


def _value(word: str, number: bool) -> Decimal | str:
    if number:
        try:
            return Decimal(word.replace(",", ""))
        except InvalidOperation:  # a fraction
            pass
    return " ".join(word.casefold().split())


def _is_fraction(masked: str, match: re.Match) -> bool:
    if int(match["top"]) >= int(match["bottom"]):
        return False
    before = masked[max(0, match.start() - REACH) : match.start()]
    return bool(match["whole"]) or not (_OPERATOR_BEFORE.search(before) or _OPERATOR_AFTER.match(masked, match.end()))


def _phrase_pattern(phrase: str) -> str:
    words = r"\s+".join(re.sub("['’]", "['’]", re.escape(word)) for word in phrase.split())
    return words + ("(?:['’]s|e?s(?:['’]s)?)?" if re.match(LETTER, phrase[-1]) else "")
