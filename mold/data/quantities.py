r"""The number that a text states: "$1,200.50", "minus five", "\frac{3}{4}", "not 5 but 6", "3 + 4 = 7 apples".

A plain reading, exact and without a library: of digits and their separators, signs, fractions, powers of numbers,
words of number and size, and of which number of a sentence is meant. What it does not read alone (calculations, roots,
unknowns, points, intervals) it names a formula, for `mold.data.formulas`. Every function takes time linear in the text.
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

from __future__ import annotations

import itertools
import re
import unicodedata
from fractions import Fraction
from typing import Literal, NamedTuple


class Quantity(NamedTuple):
    """A number in a text.

    start, end: characters of it, from its first digit or word on to its word of size.
    value: None where the digits are no single number ("1,5", "3:30", "52_8").
    text: the number with its sign.
    rank: how much the sentence is about something else here; the lowest counts.
    """

    start: int
    end: int
    value: Fraction | None
    text: str
    rank: int


class Statement(NamedTuple):
    """What a text states.

    kind: "number" with its value; "open": several numbers and no decision; "formula": to be compared as a whole.
    text: the number with its sign, the undecided text or the formula.
    """

    kind: Literal["number", "open", "formula"]
    text: str
    value: Fraction | None = None


# --- LaTeX, Markdown and typography, taken away ---

LONGEST = 2000
"""Characters of a text that are read for what it states, its last ones: more than any sentence has."""

_SPELT = re.compile(r"[\\^*_`{~]|\$\$")
_BRACES = re.compile(r"\\[^A-Za-z]|[{}]")
_BOX = re.compile(r"\\f?boxed\s*(?:(?=\{)|(\w|\\[A-Za-z]+))")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*(?:or|and))[\s$]*")
_STYLE = r"text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|bb)?|operatorname|mbox|hbox|boldsymbol|f?boxed|underline"
_STYLED = re.compile(rf"\\(?:{_STYLE})\*?\s*\{{([^{{}}]*)\}}")
_STYLE_ALONE = re.compile(r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|limits)(?![A-Za-z])")
_NUMERAL = r"\s*-?\d[\d,.]*\s*"
_LATEX_FRACTION = re.compile(
    rf"(?P<whole>(?<=\d)\s*)?\\[dtc]?frac\s*(?:\{{({_NUMERAL})\}}|(\d))\s*(?:\{{({_NUMERAL})\}}|(\d))"
)
_SIGNS = {
    **{"cdot": "×", "times": "×", "div": "÷", "pm": "±", "approx": "≈", "sim": "≈", "simeq": "≈", "degree": "°"},
    **{"le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "ne": "≠", "neq": "≠"},
    **{"lt": "<", "gt": ">", "pi": "π", "infty": "∞", "Rightarrow": "→", "to": "→", "rightarrow": "→", "implies": "→"},
    **{"therefore": "", "quad": " ", "qquad": " ", "lvert": "|", "rvert": "|", "euro": "€", "pounds": "£"},
}
_SIGN_COMMAND = re.compile(r"\\([A-Za-z]+)(?![A-Za-z])\s?")
_SUPERSCRIPT = re.compile(r"(?<=[\d)])([⁺⁻]?[⁰¹²³⁴-⁹]+)")
_UNIT_POWER = re.compile(
    r"(?<=\d)(\s?(?:[kcm]m|ft|in|yd|mi|units?|inch(?:es)?|f(?:ee|oo)t|yards?|miles?|[a-z]*met(?:er|re)s?"
    r"|m(?=[²³])|(?<=\s)m))\s?(?:[²³]|\^\{?[23]\}?)(?!\w)"
)
_MARKS = re.compile(r"(?<![\w)*])(?:\*{1,3}|`+|__?)(?=\S)|(?<=\S)(?:\*{1,3}|`+|__?)(?![\w(*{])")
_DASHES = str.maketrans({"−": "-", "﹣": "-", "－": "-", "‐": "-", "‑": "-"})


class Box(NamedTuple):
    """A \boxed{...} of a text: its characters, and what stands up to its matching brace."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""The \boxed{...} of a text that stand in no other one; one without its closing brace is none."""
    matching, opened = {}, []
    for brace in _BRACES.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            matching[opened.pop()] = brace.start()
    found: list[Box] = []
    for box in _BOX.finditer(text):
        if found and box.start() < found[-1].end:
            continue
        if box[1] is not None:
            found.append(Box(box.start(), box.end(), box[1]))
        elif box.end() in matching:
            end = matching[box.end()]
            found.append(Box(box.start(), end + 1, text[box.end() + 1 : end].strip()))
    return found


def boxed(text: str) -> str | None:
    """What the last box of a text holds, None without one; boxes joined by "or", "and" or a comma hold one list."""
    found = boxes(text)
    if not found:
        return None
    content = found[-1].content
    for left, right in zip(reversed(found[:-1]), reversed(found), strict=False):
        gap = text[left.end : right.start]
        if len(gap) > 16 or not _BETWEEN_BOXES.fullmatch(gap):
            break
        content = f"{left.content} {gap.replace('$', ' ').strip()} {content}"
    return content or None


def plain(text: str) -> str:
    """The text with LaTeX's spelling of numbers, Markdown's marks and look-alike signs as one types them on a line."""
    if text.isascii() and not _SPELT.search(text):
        return text
    text = text.replace("{,}", ",").replace("\\!", "").replace("\u2044", "/")
    text = re.sub(r"(?<!\\)\\[,;:\s]|~(?=\d{3})", " ", text)
    text = re.sub(r"\\([$%#&])", r"\1", text)
    text = re.sub(r"\\[()\[\]]|\$\$", " ", text)
    text = _STYLE_ALONE.sub("", text)
    for _ in range(4):  # styles in styles
        text, styled = _STYLED.subn(r"\1", text)
        if not styled:
            break
    text = _LATEX_FRACTION.sub(_typed_fraction, text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)
    text = _SIGN_COMMAND.sub(lambda found: _SIGNS.get(found[1], found[0]), text)
    text = _UNIT_POWER.sub(r"\1", text)
    text = _SUPERSCRIPT.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[1]), text)
    text = re.sub(r"(?<=[\d)])\s*(?:\^|\*\*)\s*(?:\{\s*([-+−]?\d+)\s*\}|\(\s*([-+−]?\d+)\s*\))", _typed_power, text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").translate(_DASHES)
    return _MARKS.sub("", text)


def _typed_fraction(found: re.Match) -> str:
    top, bottom = (found[2] or found[3]).strip(), (found[4] or found[5]).strip()
    return f"{' ' if found['whole'] is not None else ''}{top}/{bottom}"


def _typed_power(found: re.Match) -> str:
    return "^" + (found[1] or found[2])


# --- numbers ---

_LETTER = "A-Za-zÀ-ÖØ-öø-ɏ"
_TOKEN = re.compile(
    rf"""
      (?P<no_word> (?<=\d) [xX] (?=\d) | (?:Rs|USD|EUR|INR|GBP) (?=\d) )
    | (?P<word> [{_LETTER}] (?: [{_LETTER}\d] | _(?=\w) )* | \\[A-Za-z]+ | _\{{?\w+ )
    | (?P<run> \d+ (?: [.,'’] \d+ | [ ] \d{{3}} (?!\d) )* | (?<!\d) \.\d+ )
    """,
    re.VERBOSE,
)
# As in 1,200.50 and 1'200; 1,00,000; 1 200,50; 1.200.000,50; 1.200,50.
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,3}(?:['’]\d{3})+|\d*)(?:\.(?P<decimals>\d+))?",
        r"(?P<whole>\d{1,2}(?:,\d{2})+,\d{3})(?:\.(?P<decimals>\d+))?",
        r"(?P<whole>[1-9]\d{0,2}(?: \d{3})+)(?:[.,](?P<decimals>\d{1,2}))?",
        r"(?P<whole>\d{1,3}(?:\.\d{3}){2,})(?:,(?P<decimals>\d+))?",
        r"(?P<whole>\d{1,3}\.\d{3}),(?P<decimals>\d{1,2})",
    )
)
_MOST_DIGITS = 300
_MOST_BITS = 4096
_DECIMAL_COMMA = re.compile(r"(\d+),(\d{1,2})")
_FRACTION = re.compile(r"\s?/\s?(\d{1,30})(?![\d/]|[.,]\d)")
_AND_FRACTION = re.compile(r"(?:\s+and)?\s+(\d{1,9})\s?/\s?(\d{1,9})(?![\d/]|[.,]\d)")
_SCIENTIFIC = re.compile(r"[eE]([-+]?\d{1,4})(?!\w|[.,]\d)")
_POWER = re.compile(r"\s?(?:\^|\*\*)\s?([-+]?\d{1,4})(?![\d.])")
_TIMES_TEN = re.compile(r"\s?[×xX*·]\s?10\s?(?:\^|\*\*)\s?([-+]?\d{1,4})(?!\d)")
_GOES_ON = re.compile(r"_\{?\w|:\d|\s?(?:\^|\*\*)")
_CURRENCY = r"(?:(?:US|A|C|HK)?[$€£¥₹₩]|\b(?:Rs|INR|USD|EUR|GBP)\.?)"
_SIGN = re.compile(rf"([-–])(\s?)(?:{_CURRENCY}\s?)?\(?$")
_SIGN_WORD = re.compile(rf"(?:^|(?P<before>\w|\))?[^\w)]+)(?:minus|negative)\s+(?:{_CURRENCY}\s?)?$", re.IGNORECASE)
_REACH = 48  # characters looked at on each side of a number

_SIZES = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{
        "mil": 10**6,
        "mln": 10**6,
        "lakh": 10**5,
        "lac": 10**5,
        "crore": 10**7,
        "mn": 10**6,
        "bn": 10**9,
        "k": 10**3,
        "M": 10**6,
        "B": 10**9,
    },
}
_SIZE = re.compile(
    r"[\s-]?((?i:hundred|thousand|million|billion|trillion|dozen|lakh|lac|crore|mil|mln)|mn|bn)s?(?!\w)|([kKMB])(?!\w)"
)

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_VALUES = {word: value for value, word in enumerate(_ONES.split())}
_WORD_VALUES |= {word: 10 * place for place, word in enumerate(_TENS.split(), 2)}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
NUMBER_WORDS = re.compile(rf"\b(?:{'|'.join([*_WORD_VALUES, *_PARTS])}|hundred|thousand|million|dozen)", re.IGNORECASE)
_NEXT_WORD = re.compile(rf"(?:\s*-\s*|\s+)?(?P<and>and\s+)?(?P<article>an?\s+)?(?P<word>[A-Za-z]+)(?![{_LETTER}\d_])")
_AND_PART = re.compile(rf"\s+and\s+(?:an?|one)[\s-]+({'|'.join(_PARTS)})(?!\w)", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?!\w)", re.IGNORECASE)

# --- which of them is meant: the lower the rank the better, the last of the best one counts ---

_TOTAL, _FREE, _IN_WORDS, _PART, _ASIDE, _IN_BRACKETS, _DENIED = range(7)
_BEFORE = (
    r"(?:\s+(?:the|an?|his|her|its|their|our|my|these|those|all|each|every|only|just|about|around|first|last|next|other)"
    rf"){{0,2}}\s+(?:{_CURRENCY}\s?)?-?$"
)
_RANKED = tuple(
    (rank, re.compile(pattern, re.IGNORECASE))
    for rank, pattern in (
        (
            _DENIED,
            r"(?:\b(?:not|never|neither|nor|cannot|without|except|unlike)|n['’]t|\binstead\s+of|\bthan)"
            rf"(?:\s+(?:be|equal(?:\s+to)?|really|exactly|simply|actually)){{0,2}}{_BEFORE}",
        ),
        # A statement, whatever its preposition.
        (
            _FREE,
            r"\b(?:(?:total|sum|profit|distance|average|cost|price|value|result|answer|loss)s?\s+of|(?:result|end|put)\w*\s+in"
            rf"|for\s+a\s+total\s+of){_BEFORE}",
        ),
        (
            _ASIDE,
            r"\b(?:in|within|after|before|during|until|since|from|per|every|on|out\s+of"
            rf"|of\s+(?:the|his|her|its|their|these|those|all|every)){_BEFORE}",
        ),
        (_PART, rf"\bof{_BEFORE}"),
        (
            _ASIDE,
            r"\b(?:step|day|week|option|choice|question|problem|exercise|example|chapter|page|figure|fig|table|grade|case"
            r"|equation|eq|no|part|method|round|level|section|january|february|march|april|may|june|july|august|september"
            r"|october|november|december)\.?\s*#?$",
        ),
    )
)
_DENIED_BEHIND = re.compile(
    r"[^\w.!?]*(?:[^\W\d]+\s+)??(?:is|was|are|were|seems)(?:(?:n['’]t|\s+not)\s+(?:the|a|an|correct|right|it|enough|possible)\b"
    r"|\s+(?:wrong|incorrect|impossible|too)\b)",
    re.IGNORECASE,
)
_TOTAL_BEFORE = re.compile(rf"\b(?:altogether|overall|in\s+total|in\s+all),?{_BEFORE}", re.IGNORECASE)
_TOTAL_BEHIND = re.compile(r"(?:\s+[^\W\d]+){0,2}?\s+(?:altogether|overall|in\s+total|in\s+all)\b", re.IGNORECASE)
_FOR_TIME = re.compile(rf"\bfor{_BEFORE}", re.IGNORECASE)
_TIME = re.compile(r"\s*-?(?:more\s+)?(?:second|minute|hour|day|week|month|year|people|person)s?\b", re.IGNORECASE)
_CALCULATED = re.compile(
    r"(?:[^\W\d]+\s|[\s$€£()%°]){0,4}(?:[-+*×÷/^·–±]|\*\*|(?<![^\W\d])(?:plus|minus|times|x|(?:multiplied|divided)\s+by)(?!\w))"
    r"[\s$€£(-]*",
    re.IGNORECASE,
)
_OPERATORS = {"plus": "+", "minus": "-", "times": "×", "multiplied": "×", "divided": "/", "x": "×", "–": "-"}
_UNDECIDED = re.compile(
    r"(?:%|°)?(?:\s?[^\W\d]+\.?){0,3}?\s*(?:,\s*)?(?:/|&|\b(?:or|and|to|and/or)\b)"
    r"(?:\s*(?:or|maybe|perhaps|possibly|even|about|also|else|then|with|is|it['’]?s|(?:could|may|might)\s+be))?\s*[$€£¥₹]?\s?-?"
    r"|(?:%|°)?\s*[,;–-]\s*[$€£¥₹]?-?"
    # 5 feet 6 inches, 1 hour 30 minutes
    r"|\s?(?:f(?:ee|oo)t|ft|h|hours?|hrs?|minutes?|mins?|pounds?|lbs?|dollars?|euros?|yards?|years?|months?|weeks?|days?|k?m)?\s?",
    re.IGNORECASE,
)
_RANGE = re.compile(r"\(\s*(?:or|maybe|perhaps)\b|\b(?:between|rang\w+|anywhere|somewhere)\b", re.IGNORECASE)
_LEADS = re.compile(
    r"(?:(?:about|approximately|approx\.?|around|roughly|exactly|only|just|a\s+total\s+of|the\s+number|it\s+is|that\s+is|they?"
    rf"\s+(?:is|are))\s+)*[^\w]*{_CURRENCY}?\s?-?",
    re.IGNORECASE,
)
_PREDICATE = re.compile(
    r"\b(?:is|are|was|were|equals?|makes?|gives?|totals?|leaves?|so|thus|hence|therefore)\b", re.IGNORECASE
)
_REASON = re.compile(r"\b(?:because|since|as)\b", re.IGNORECASE)


def find_quantities(text: str) -> list[Quantity]:
    """The numbers of a text with their signs and words of size, in order.

    Args:
        text: as `plain` gives it.
    """
    found: list[Quantity] = []
    position = 0
    while token := _TOKEN.search(text, position):
        position = token.end()
        if token["run"]:
            found += _run(text, token.start(), token.end())
            position = max(position, found[-1].end)
        elif token["word"] and (words := _in_words(text, token.start())):
            position, value = words
            # "one" is a pronoun more often than a number.
            rank = _ASIDE if text[token.start() : position].lower() == "one" else _IN_WORDS
            found.append(_quantity(text, token.start(), position, value, rank))
    depths = _bracket_depths(text, [quantity.start for quantity in found])
    return [
        quantity._replace(rank=max(quantity.rank, _rank(text, quantity), _IN_BRACKETS * depth))
        for quantity, depth in zip(found, depths, strict=True)
    ]


def _run(text: str, start: int, end: int) -> list[Quantity]:
    """The number of a run of digits and separators, or the numbers where blanks part several."""
    digits = text[start:end]
    if len(digits) > _MOST_DIGITS:
        return [_quantity(text, start, end, None)]
    if form := next((found for form in _FORMS if (found := form.fullmatch(digits))), None):
        value = Fraction(re.sub(r"\D", "", form["whole"]) + "." + (form["decimals"] or "0"))
        return [_extended(text, start, end, value)]
    if " " in digits:
        return [
            quantity
            for part in re.finditer(r"[^ ]+", digits)
            for quantity in _run(text, start + part.start(), start + part.end())
        ]
    # A decimal comma where a unit or a currency says that it is one amount; else the numbers of a list.
    if (comma := _DECIMAL_COMMA.fullmatch(digits)) and (
        re.search(rf"{_CURRENCY}\s?-?$", text[max(0, start - 8) : start])
        or re.match(rf"\s?(?:[€£%°]|(?!or\b|and\b)[{_LETTER}])", text[end : end + 5])
    ):
        return [_extended(text, start, end, Fraction(f"{comma[1]}.{comma[2]}"))]
    return [_quantity(text, start, end, None)]


def _extended(text: str, start: int, end: int, value: Fraction) -> Quantity:
    """The number with the fraction, powers and words of size behind it."""
    if text[start - 1 : start] == ":" and text[start - 2 : start - 1].isdigit():
        return _quantity(text, start, end, None)
    if part := _AND_FRACTION.match(text, end):
        if 0 < int(part[1]) < int(part[2]):
            value, end = value + Fraction(int(part[1]), int(part[2])), part.end()
    elif part := _FRACTION.match(text, end):
        if not int(part[1]):
            return _quantity(text, start, part.end(), None)
        value, end = value / int(part[1]), part.end()
    elif part := _AND_PART.match(text, end):
        value, end = value + Fraction(1, _PARTS[part[1].lower()]), part.end()
    for pattern, base in ((_SCIENTIFIC, 10), (_TIMES_TEN, 10), (_POWER, None)):
        if power := pattern.match(text, end):
            scale = _power(value if base is None else Fraction(base), int(power[1]))
            end = power.end()
            if scale is None:
                return _quantity(text, start, end, None)
            value = scale if base is None else value * scale
    if _GOES_ON.match(text, end):
        return _quantity(text, start, end, None)
    while size := _SIZE.match(text, end):
        word = size[1].lower() if size[1] else size[2].replace("K", "k")
        value, end = value * _SIZES[word], size.end()
    return _quantity(text, start, end, value, _ASIDE if _ORDINAL.match(text, end) else 0)


def _power(base: Fraction, exponent: int) -> Fraction | None:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > _MOST_BITS or (base == 0 and exponent < 0):
        return None
    return base**exponent


def _quantity(text: str, start: int, end: int, value: Fraction | None, rank: int = 0) -> Quantity:
    negative = _is_negative(text[max(0, start - _REACH) : start])
    shown = ("-" if negative else "") + text[start:end]
    return Quantity(start, end, -value if negative and value is not None else value, shown, rank)


def _is_negative(before: str) -> bool:
    if sign := _SIGN_WORD.search(before):
        return not (sign["before"] and (sign["before"].isdigit() or sign["before"] == ")"))
    sign = _SIGN.search(before)
    if not sign:
        return False
    left = before[: sign.start()]
    operand = left.rstrip()[-1:]
    if operand.isdigit() or operand in (")", "]", "}", "%") or left.endswith("-"):
        return False  # a difference or a range
    if left[-1:].isalpha() and "$" not in sign[0]:
        return False  # a hyphen in a word
    return not sign[2] or operand in ("=", "(", "→", "≈")  # else a bullet or a dash


def _in_words(text: str, start: int) -> tuple[int, Fraction] | None:
    """Where a number in words that starts here ends, and its value: "twenty-five", "two and a half", "a dozen"."""
    done, last, position = Fraction(0), "", start
    group: Fraction | None = None
    end: int | None = None
    while word := _NEXT_WORD.match(text, position):
        joined, article, name = bool(word["and"]), bool(word["article"]), word["word"].lower()
        name = name[:-1] if name.endswith("s") and name != "s" else name
        name = "half" if name == "halve" else name
        if (value := _WORD_VALUES.get(word["word"].lower())) is not None and not article:
            if not last and not joined:
                group = Fraction(value)
            elif (below := _AND_PART.match(text, position)) and last in ("unit", "size", "hundred"):
                return below.end(), done + (group or 0) + Fraction(1, _PARTS[below[1].lower()])
            elif (last == "tens" and 0 < value < 10 and not joined) or (last == "hundred" and value < 100):
                group = (group or 0) + Fraction(value)
            elif last == "size" and group is None:
                group = Fraction(value)
            else:
                break
            last = "tens" if value >= 20 else "unit"
        elif name in ("hundred", "thousand", "million", "billion", "trillion", "dozen") and not joined:
            if last and article and last != "part":
                break
            amount = (1 if group is None else group) * _SIZES[name]
            if name in ("hundred", "dozen"):
                group, last = Fraction(amount), "hundred"
            else:
                done, group, last = done + amount, None, "size"
        elif name in _PARTS:
            part = Fraction(1, _PARTS[name])
            if not last and (name == "half" or article) and not joined:
                group = part
            elif last and joined and article:
                group = (group or 0) + part
            elif last == "unit" and not joined and not article:
                group = (group or 0) * part
            else:
                break
            last = "part"
        else:
            break
        position = end = word.end()
    return None if end is None else (end, done + (group or 0))


def _bracket_depths(text: str, places: list[int]) -> list[bool]:
    """Whether each of the places stands in round brackets, unless everything there does."""
    inside, opened, closed = [], [], []
    for bracket in re.finditer(r"[()]", text):
        if bracket[0] == "(":
            opened.append(bracket.start())
        elif opened:
            begun = opened.pop()
            if not opened:
                closed.append((begun, bracket.start()))
    remaining = iter(closed)
    current = next(remaining, None)
    for place in places:
        while current and current[1] < place:
            current = next(remaining, None)
        inside.append(current is not None and current[0] < place)
    return inside


def _rank(text: str, quantity: Quantity) -> int:
    before = text[max(0, quantity.start - _REACH) : quantity.start]
    behind = text[quantity.end : quantity.end + _REACH]
    if not (before.strip() or behind.strip()):
        return _FREE
    if _DENIED_BEHIND.match(behind):
        return _DENIED
    if _TOTAL_BEHIND.match(behind) or _TOTAL_BEFORE.search(before):
        return _TOTAL
    if _FOR_TIME.search(before) and _TIME.match(behind):
        return _ASIDE
    return next((rank for rank, pattern in _RANKED if pattern.search(before)), _FREE)


# --- statements ---

_ONLY_NUMBER = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?")
_EQUALS = re.compile(r"(?<![<>!=≤≥:])=(?![=>])|≈|→|\b(?:which\s+)?(?:is\s+)?equals?\b(?:\s+to\b)?")
_EQUATIONS = re.compile(r"[A-Za-z]\s*=")
_FUNCTIONS = (
    "sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|log|ln|exp|sqrt|pi|inf|infinity|mod|and|or|in|max|min|gcd|lcm"
)
_PROSE = re.compile(
    rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})(?![A-Za-z]))(?<![\d^)}}])[{_LETTER}]{{2,}}|[^\W\d_A-Za-zα-ωΑ-Ωπ]"
)
_GLUED = re.compile(
    rf"(?<=[\d^)}}])\s?[{_LETTER}]{{3,}}|(?<=\d)(?:cm|mm|km|kg|mg|ml|ft|in|lb|lbs|oz|hr|hrs|min|am|pm)\b"
)
_NOT_IN_FORMULAS = re.compile(r"[?#@\"“”…\n]|\.\s|[.,;:]$")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-zA-Z]+\*?\}(?:\{[clr|]+\})?")
_UNIT = re.compile(r"\s?(?:[%°]\s?)?[mgslhLKCFWVNJA]?")
_MATH_MARKS = re.compile(r"\\[()\[\]]|\$\$|(?<!\\)\$|\n")


def stated(text: str) -> Statement | None:
    r"""What a text states: one number, several undecided ones, or a formula; None where it has neither.

    Of an equation the last side that is a number counts ("3 + 4 = 7 apples", "72 = 48 + 24"), of a sentence the number
    that it starts with, else the last one that is free: not denied ("not 5 but 6"), compared with ("more than 5"), in
    brackets, or an aside ("in 2 months", "of the 10"). Two free numbers joined by "or", "and", "to" or a comma leave
    it open. The clause of a purpose stays free: 72 is meant in "Ann needs 72 clips to fill 3 boxes" and in "She uses 24
    clips to make 72 bags" alike, and only the question says which.

    Args:
        text: an answer, in one or a few lines; of a \boxed{...} in it only that counts.
    """
    if _ONLY_NUMBER.fullmatch(text):  # most answers
        return Statement("number", text, Fraction(text))
    inner = boxed(text)
    text = plain((text if inner is None else inner)[-LONGEST:]).strip(" \t\n$*_`\"'“”>").rstrip(" .,:;$")
    sides = _EQUALS.split(text)
    if len(sides) == 1:
        return _of_side(text)
    if len(_EQUATIONS.findall(text)) > 1 and re.search(r"[,;]|\b(?:and|or)\b", text):
        return Statement("formula", formula_in(text))
    other = None
    for side in reversed(sides):
        side = side.strip(" $,.")
        statement = None if re.fullmatch(r"[A-Za-z]?", side) else _of_side(side)
        if statement is None:
            continue
        if statement.kind != "formula":
            return statement
        if re.search(r"(?<![A-Za-z\\])[a-zA-Z](?![A-Za-z])", side):
            return Statement("formula", formula_in(text))
        other = other or statement
    return other


def _of_side(text: str) -> Statement | None:
    quantities = find_quantities(text)
    if is_formula(text):
        return _of_formula(text, quantities)
    live = [quantity for quantity in quantities if quantity.rank != _DENIED]
    if re.search(r"\\[A-Za-z]|√|\^", text) and (formula := formula_in(text)) and is_formula(formula):
        number = _of_side(formula) if formula != text else None
        return number or Statement("formula", formula)
    if not live:
        return None
    gaps = [text[left.end : right.start] for left, right in itertools.pairwise(live)]
    calculated: set[int] = set()
    for place, gap in enumerate(gaps):
        if len(gap) < _REACH and _CALCULATED.fullmatch(gap):
            calculated |= {place, place + 1}
    candidates = [
        place for place, quantity in enumerate(live) if place not in calculated and quantity.value is not None
    ]
    if not candidates:
        return Statement("formula", _calculation(live, gaps, calculated)) if calculated else Statement("open", text)
    first = live[candidates[0]]
    best = min(live[place].rank for place in candidates)
    chosen = [place for place in candidates if live[place].rank == best]
    place = chosen[0] if candidates[0] == 0 and _leads(text, first) else chosen[-1]
    neighbours = [place - 1] * (place > 0) + [place] * (place < len(gaps))
    for index in neighbours:
        left, right = live[index], live[index + 1]
        # "9 times 9 feet, or 81 feet" names a calculation and its result.
        told_apart = left.rank == right.rank and left.value != right.value and index not in calculated
        if told_apart and _UNDECIDED.fullmatch(gaps[index][:_REACH]):
            return Statement("open", text)
    if len({quantity.value for quantity in live}) > 1 and _RANGE.search(text):
        return Statement("open", text)
    return Statement("number", live[place].text, live[place].value)


def _calculation(quantities: list[Quantity], gaps: list[str], calculated: set[int]) -> str:
    """The last calculation of a sentence, without its words."""
    first = last = max(calculated)
    while first - 1 in calculated:
        first -= 1
    formula = quantities[first].text
    for place in range(first, last):
        word = re.search(r"plus|minus|times|multiplied|divided|\*\*|[-+*×÷/^·–±x]", gaps[place], re.IGNORECASE)
        formula += f" {_OPERATORS.get(word[0].lower(), word[0])} {quantities[place + 1].text}" if word else ""
    return formula


def _of_formula(text: str, quantities: list[Quantity]) -> Statement:
    """A formula that is nothing but one number, with a unit or a gloss in brackets ("72 (48 + 24)"), is that number."""
    values = {quantity.value for quantity in quantities}
    if None not in values and quantities:
        gloss = re.search(r"(?<=\d)\s+\([^()]*\)$", text)
        first = quantities[0]
        if gloss and _RANGE.match(gloss[0].lstrip()):
            return Statement("open", text)
        if gloss and sum(quantity.end <= gloss.start() for quantity in quantities) == 1:
            quantities, values, text = [first], {first.value}, text[: gloss.start()]
        rest = _between(text, quantities)
        if len(values) == 1 and all(re.fullmatch(r"[-+–\s$€£¥₹~≈(\[{]*|\s?,?\s*or\s*", piece) for piece in rest[:-1]):
            if _UNIT.fullmatch(rest[-1].strip(" .,)]}$€£")):
                return Statement("number", first.text, first.value)
        elif len(values) > 1 and not any(re.search(r"[-–+*/^×÷·<>≤≥(\[{\\:!|√±]", piece) for piece in rest):
            return Statement("open", text)
    return Statement("formula", text)


def _between(text: str, quantities: list[Quantity]) -> list[str]:
    edges = [0, *(edge for quantity in quantities for edge in (quantity.start, quantity.end)), len(text)]
    return [text[edges[place] : edges[place + 1]] for place in range(0, len(edges), 2)]


def _leads(text: str, first: Quantity) -> bool:
    """Whether a sentence begins with its number, and goes on with no other one that it is or makes."""
    if first.rank > _IN_WORDS or not _LEADS.fullmatch(text[max(0, first.start - _REACH) : first.start]):
        return False
    if first.start > _REACH or re.match(r"\s*%?\s*of\b", text[first.end : first.end + 8]):
        return False
    rest = _REASON.split(text[first.end :], maxsplit=1)[0]
    predicates = list(_PREDICATE.finditer(rest))
    return not predicates or not find_quantities(rest[predicates[-1].end() :])


def is_formula(text: str) -> bool:
    """Whether a text is a formula, list, point, interval or equation and no prose."""
    return bool(re.search(r"[^\W_]|\\[A-Za-z]", text)) and not (
        _PROSE.search(_ENVIRONMENT.sub("", text)) or _GLUED.search(text) or _NOT_IN_FORMULAS.search(text)
    )


def formula_in(text: str) -> str:
    """The formula of a text: the last one between dollars or \\( and \\), else the last piece without prose."""
    if (math := last_math(text)) is not None:
        return math
    if is_formula(text):
        return text
    pieces = [piece.strip(" $.,;:?\n") for piece in _PROSE.split(text)]
    return next((piece for piece in reversed(pieces) if re.search(r"\d|\\[A-Za-z]|[=<>≤≥]", piece)), text).strip()


def last_math(text: str) -> str | None:
    r"""The last formula of a text between dollars, \( and \) or \[ and \]."""
    opened: dict[str, int] = {}
    found = None
    for mark in _MATH_MARKS.finditer(text):
        name, place = mark[0], mark.start()
        if name in ("\\)", "\\]", "$$", "$"):
            opening = {"\\)": "\\(", "\\]": "\\["}.get(name, name)
            # "$5 and $6" are amounts: the second dollar closes nothing.
            amount = name == "$" and (text[place - 1 : place].isspace() or text[place + 1 : place + 2].isdigit())
            if opening in opened and not amount:
                found = (opened.pop(opening), place)
                continue
        if name == "\n":
            opened.pop("$", None)
        elif name in ("\\(", "\\[", "$$", "$") and not (name == "$" and text[mark.end() : mark.end() + 1].isspace()):
            opened[name] = mark.end()
    return text[slice(*found)].strip() or None if found else None
