"""Markers of list items and headings, which are neither steps nor key words: "1.", "(b)", "ii)", "Q1.", "Step One:".

At the start of a line a marker is known by its form. In the middle of a line, behind a finished sentence, a number may
be anything ("Is it 3 or 4? 4. So ..."): there it is a marker if it counts on from the marker before it, or begins at
one and the second one follows, or answers the question of its number ("Q2. ... A2.").
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

import re

from mold.data.sentence_ends import BLANK, SENTENCE_END, ends_sentence

_ROMANS = ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii"]
_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_BULLET = r"(?: [-*•◦▪‣●○–—>]+ (?=\s) | \#+ (?=\s) )"
_COUNT = rf"\d{{1,2}}[a-d]? | {' | '.join(sorted(_ROMANS + _WORDS, key=len, reverse=True))} | [a-z]"
_LETTER = r"[^\W\d_]"
# The name of what is counted, its number, and what closes it.
_LABEL = rf"""
    [*_]*+ (?:
        \#? (?P<kind>[a-z](?=\d)|q\.?{BLANK}?(?=\d))? [(\[（]? (?P<count>{_COUNT}) (?:\.\d{{1,2}}){{0,4}} [*_]*+
        (?: \\?[.)\]）．、]{{1,2}} [*_]*+ (?={BLANK}+\S)
          | (?<=\d) (?: [.)）．、] [*_]*+ (?={_LETTER}) | : (?={BLANK}+{_LETTER}) )
        )
      | \d \ufe0f? \u20e3
      | (?P<heading>step|stage|part|case|question|problem|exercise|example|item|task|point|schritt|étape|paso|passo|шаг)
        {BLANK}+ \#? (?P<number>\d+[a-z]? | {_COUNT}) [*_]*+
        (?: {BLANK}*+ (?: [:)–—-] | \.(?!\d) ) [*_]*+ | (?={BLANK}*+$) )
    )"""
_OPTIONS = re.VERBOSE | re.IGNORECASE | re.MULTILINE
_AT_LINE_START = re.compile(
    rf"^ (?: {BLANK}*+ (?: {_BULLET} | {_LABEL} ) )+ {BLANK}* | \bstep\s+\d+[a-z]?\s*:", _OPTIONS
)
_ITEM = re.compile(
    rf"(?: ^ (?: {BLANK}*+ {_BULLET} )* {BLANK}*+ | (?P<colon>[:;]) {BLANK}++"
    rf"| (?P<end>{SENTENCE_END.pattern}) {BLANK}*+ ) (?P<label>{_LABEL})",
    _OPTIONS,
)


def without_markers(text: str) -> str:
    """The text with blanks in place of its markers, character for character."""
    chars = list(_AT_LINE_START.sub(lambda marker: " " * len(marker[0]), text))
    for start, end in _items(text):
        chars[start:end] = " " * (end - start)
    return "".join(chars)


def _items(text: str) -> list[tuple[int, int]]:
    """The markers in the middle of a line."""
    found = [
        (match, _readings(match))
        for match in _ITEM.finditer(text)
        if not (end := match["end"] and SENTENCE_END.match(text, match.start())) or ends_sentence(text, end)
    ]
    last_second = {
        kind: place
        for place, (match, readings) in enumerate(found)
        for kind, count in readings
        if count == 2 and not match["colon"]
    }
    last: dict[str, int] = {}
    items = []
    for place, (match, readings) in enumerate(found):
        inside = bool(match["end"] or match["colon"])
        begins = any(count == 1 and last_second.get(kind, -1) > place for kind, count in readings)
        counts_on = not match["colon"] and any(
            last.get(kind) == count - 1 or (kind == "a" and last.get("q") == count) for kind, count in readings
        )
        if not inside or begins or counts_on:
            last.update(readings)
            if inside:
                items.append(match.span("label"))
    return items


def _readings(match: re.Match) -> list[tuple[str, int]]:
    """What a marker counts and how far: "ii" is the second, "i" the first or, as a letter, the ninth."""
    kind = (match["heading"] or match["kind"] or "").casefold().rstrip(". ")
    count = (match["count"] or match["number"] or "").casefold()
    readings = []
    if digits := re.match(r"\d{1,9}", count):
        readings.append((kind, int(digits[0])))
    for name, counted in (("letter", "abcdefghijklmnopqrstuvwxyz"), ("roman", _ROMANS), ("word", _WORDS)):
        if count and count in counted:
            readings.append((f"{kind} {name}", counted.index(count) + 1))
    return readings
