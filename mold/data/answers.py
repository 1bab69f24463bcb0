r"""Answers: found in a completion, and compared with the right one.

Who decides what: this module knows the template, choices, yes and no, and where a completion says its answer;
`mold.data.quantities` reads plain numbers, exactly; math-verify compares everything else (`mold.data.formulas`). Where
math-verify would say something else, the plain reading wins:

- a percent sign counts for nothing ("50%" is 50, not 0.5), as data sets of word problems have it;
- the base of a numeral counts (52_8 is not 52: math-verify drops the index);
- a list of numbers has all of its members as often as the right one has them (math-verify compares sets: 13, 13, 14
  would be 13, 14), in any order; a point or tuple in brackets has an order, which math-verify keeps;
- of prose only a formula in it is given to math-verify, which takes the letters of words for a product ("listen" would
  be "silent").
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from typing import Literal, NamedTuple

from mold.data.examples import ASSISTANT, DEFAULT_TEMPLATE
from mold.data.formulas import same_formula
from mold.data.quantities import (
    LONGEST,
    NUMBER_WORDS,
    Statement,
    boxed,
    boxes,
    find_quantities,
    formula_in,
    is_formula,
    last_math,
    plain,
    stated,
)
from mold.data.segmentation import find_numbers, split_sentences

AnswerKind = Literal["choice", "yes_no", "number", "text"]

_TOLERANCE = Fraction(1, 10**6)  # relative: data sets state 1/3 as 0.3333333

# --- where a completion says its answer ---

_BLANK = r"[^\S\n]"
_MARKS = r"[#>*_`\[(<| \t]*"
# What opens another problem, at the start of a line; and behind a sentence, where it is written as a heading.
_NEXT_PROBLEM = re.compile(
    rf"""
    ^{_MARKS} (?i: (?:here\s+is\s+)? (?:(?:an?other|the\s+next|next|new|follow-?up|similar|practice|bonus)\s)? (?:
          (?:q|question|problem|exercise|puzzle|task|instruction|human|user|student|prompt|input) [*_]* {_BLANK}? :
        | (?:q|question|problem|exercise|puzzle|task|example) {_BLANK}? \#? \d+ [*_]* {_BLANK}? (?:[:.)]|$)
        | q\. {_BLANK}+ (?=\S) | (?<=\[) (?:q|question|problem) \]
        ) | <\|(?:im_start|user|start_header_id)\b | \[INST\] | <start_of_turn>
        | \#\#\#{_BLANK}(?:instruction|question) )
    | (?<=[.!?$\d*]) {_BLANK}+ (?:Question|Problem|Q) (?:{_BLANK}?\d+)? : (?=\s)
    """,
    re.VERBOSE | re.MULTILINE,
)
# The line that ends a solution of GSM8K; "#### Step 2: Add" is a heading of Markdown.
_SOLUTION_END = re.compile(r"####[^\S\n]*(?P<answer>[^\n]*)")
_SOLUTION_ANSWER = re.compile(
    r"[*_$\\({\s]*(?:[-−–+]?\s?[$€£]?\s?(?!\d{1,2}[.)]\s+[A-Za-z])[\d.]|boxed|d?frac|sqrt|[A-Ja-j][).*_]*\s*$|(?:yes|no)\b)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    rf"(?<![A-Za-z])answer[*_`\"')\]]*{_BLANK}*(?::|=(?!=))"
    rf"|<answer>|^{_MARKS}(?:the{_BLANK}+)?(?:(?:final|correct|short){_BLANK}+)?answer[*_:. \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_PHRASE = re.compile(
    r"(?<![A-Za-z])answers?(?![A-Za-z])[*_`\"']*(?:\s++(?!(?:is|are|choices?|options?)\b)[^\s.:=]++){0,5}?\s*(?:=(?!=)|\b(?:is|be|was)\b:?)"
    r"|\banswer\b(?:\s++(?!(?:is|are|choices?|options?)\b)[^\s.:=]++){1,5}?:",
    re.IGNORECASE,
)
_OPENING_MARKS = re.compile(r"[\s*_`:>#]*(?:[-•]\s+)?(?:\\displaystyle\s*)?")
_DISPLAYS = {"$$": "$$", "\\[": "\\]", "\\begin{": "\\end{"}
_TRIES = 3  # phrases that are looked at, from the last one on


class _Announcement(NamedTuple):
    start: int  # of the marker
    answer: str | None


@functools.lru_cache(maxsize=4096)
def answer_kind(right: str) -> AnswerKind:
    """What kind of answer a task wants, told from the right one: a choice's letter, yes or no, a number, or a text.

    A point, list, interval, equation or expression with unknowns is a text.
    """
    if re.fullmatch(r"\(?[A-J]\)?\.?", right.strip()):
        return "choice"
    if right.strip(" .").casefold() in _AFFIRMED:
        return "yes_no"
    return "text" if _right_number(right) is None else "number"


def extract_answer(
    completion: str, template: str = DEFAULT_TEMPLATE, kind: AnswerKind = "number", task: str = "joint"
) -> str | None:
    r"""The answer a completion gives.

    A completion that goes on with another problem is read up to there (see `first_problem`). The answer is what stands
    behind the template's answer marker or "Answer:", the last of them, or behind "####"; without one, the last
    \boxed{...}; then the sentence behind the last "the answer is"; then, whatever the kind of answer asks for: the
    number that the last sentence with one states, the sentence that names a choice, or says yes or no, a formula. A
    text has to be announced.

    Args:
        completion: generated text, from the rationale on.
        template: the training text's, for its markers.
        kind: what is looked for where nothing announces the answer.
        task: what was asked for (see `mold.data.examples.render`); "predict" and "answer" complete to the answer's line
            itself.

    Returns:
        The answer's text, None where nothing looks like one.
    """
    text = first_problem(completion, template)
    if task in ("predict", "answer"):
        return _behind(text, 0, whole_line=True)
    if label := _label(text, template):
        if label.answer is not None:
            return label.answer
        text = text[: label.start]
    if (content := boxed(text)) is not None:
        return content
    announced, rest = _announced(text, kind)
    if announced is not None and (rest is None or (found := _unannounced(rest, kind)) is None):
        return announced
    if announced is not None:
        return found
    return None if label else _unannounced(text, kind)


def split_completion(completion: str, template: str = DEFAULT_TEMPLATE) -> str:
    """The rationale in a completion: up to its last sentence before the line that announces the answer, or all of it.

    It ends where `extract_answer` stops to read.
    """
    text = first_problem(completion, template)
    if label := _label(text, template):
        return without_announcement(text[: label.start])
    if (found := boxes(text)) and _only_marks(text[found[-1].end :]):
        line = text.rfind("\n", 0, found[-1].start) + 1
        if _only_marks(text[line : found[-1].start]):
            return without_announcement(text[:line])
    return text.strip(" *\n")


def first_problem(completion: str, template: str = DEFAULT_TEMPLATE) -> str:
    """A completion up to where it goes on with another problem.

    Another problem is opened by the template's own opening, "Q:", "Problem:" and the like, or another turn of a chat;
    the first line "#### answer" ends a solution.
    """
    content = len(completion) - len(completion.lstrip())
    ends = [found.start() for found in _NEXT_PROBLEM.finditer(completion) if found.start() > content][:1]
    opening = template.split("{question}")[0].replace(ASSISTANT, "").strip()
    if opening:
        own = re.compile(rf"^{_BLANK}*{re.escape(opening)}", re.MULTILINE)
        ends += [found.start() for found in own.finditer(completion) if found.start() > content][:1]
    text = completion[: min(ends, default=len(completion))]
    for found in _SOLUTION_END.finditer(text):
        if _SOLUTION_ANSWER.match(found["answer"]):
            return text[: found.end()]
    return text


def without_announcement(text: str) -> str:
    """A text that an answer's marker follows, without what belongs to the marker: "The final", "###", "**"."""
    body, tail = text[:-200], text[-200:]
    while True:
        shorter = re.sub(r"[\s*_#>`(\[<|:$-]+$|\\[(\[]$", "", tail)
        shorter = re.sub(
            r"(?:^|(?<=[\s*_#>(]))(?:so|thus|therefore|hence|then|and|the|my|our|final|correct|right|short|numerical|numeric"
            r"|this\s+is),?$",
            "",
            shorter,
            flags=re.IGNORECASE,
        )
        if shorter == tail:
            return (body + tail).strip(" *\n")
        tail = shorter


def _only_marks(text: str) -> bool:
    return not text.strip(" \t\n$*_`#>.\\[]()")


def _label(text: str, template: str) -> _Announcement | None:
    """The last of the template's markers, "Answer:", headings and "####", with the answer behind it."""
    found = []
    content = len(text.rstrip())
    marker = template.split("{rationale}")[1].split("{answer}")[0].strip()
    if marker and (place := text.rfind(marker)) >= 0:
        found.append((place, place + len(marker)))
    for pattern in (_LABEL, _SOLUTION_END):
        for match in pattern.finditer(text):
            last = match
            if pattern is _SOLUTION_END and not (_SOLUTION_ANSWER.match(match["answer"]) or match.end() >= content):
                continue
            end = last.start("answer") if pattern is _SOLUTION_END else last.end()
            found.append((last.start(), end))
    if not found:
        return None
    start, end = max(found)
    answer = _behind(text, end, whole_line=True)
    return _Announcement(start, answer)


def _announced(text: str, kind: AnswerKind) -> tuple[str | None, str | None]:
    """What the last "the answer is" says that states such an answer; else what the last one says, and the rest."""
    last = rest = None
    for phrase in list(_PHRASE.finditer(text))[: -_TRIES - 1 : -1]:
        answer = _behind(text, phrase.end(), whole_line=False)
        if answer is None:
            continue
        if _states(answer, kind):
            return answer, None
        if last is None:
            last, rest = answer, text[phrase.end() :]
    return last, rest


def _behind_marks(text: str, start: int) -> int:
    return _OPENING_MARKS.match(text, start).end()  # type: ignore[union-attr]  # matches anything


def _behind(text: str, start: int, whole_line: bool) -> str | None:
    """The answer behind a marker: a display of LaTeX, a line, or its first sentence."""
    start = _behind_marks(text, start)
    for opening, closing in _DISPLAYS.items():
        if text.startswith(opening, start):
            end = text.find(closing, start + len(opening))
            return text[start + len(opening) * (opening != "\\begin{") : len(text) if end < 0 else end].strip() or None
    end = _line_end(text, start)
    while whole_line and text[start:end].rstrip(" *_").endswith((":", "=")) and text[end:].strip():
        end = _line_end(text, _behind_marks(text, end))
    if not whole_line:
        for _, last in split_sentences(text, start, min(end, start + LONGEST)):
            # "Rs. 72": the first of these ends no sentence.
            if not re.fullmatch(r"[A-Za-z]{2,6}\.", text[start:last].strip()):
                end = last
                break
        return text[start:end].strip().strip("*_`").rstrip(" *_`.!").strip() or None
    return text[start:end].strip().removesuffix("</answer>").strip("*_`").strip() or None


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _states(answer: str, kind: AnswerKind) -> bool:
    if kind == "number":
        return stated(answer) is not None
    if kind == "choice":
        return len(_choices(answer) or ()) == 1
    return kind == "text" or bool(_said(answer))


def _unannounced(text: str, kind: AnswerKind) -> str | None:
    if kind == "text":
        return last_math(text)
    find = {"number": _last_number, "choice": _last_choice, "yes_no": _last_yes_no}[kind]
    return find(text)


# --- numbers ---

_CONCLUDES = re.compile(r"\W*(?:so|thus|hence|therefore|in\s+total|altogether|in\s+all|finally)\b", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,2}[.)]\s+(?=\S))")


def _last_number(text: str) -> str | None:
    """The number that the last sentence with one states; of a calculation, its last number.

    Numbers in words count in a sentence that concludes, or where the text has no digits.
    """
    digits = any(char.isdigit() for char in text)
    for line in reversed(text.split("\n")):
        if not (
            NUMBER_WORDS.search(line) or any(char.isdigit() or unicodedata.category(char) == "No" for char in line)
        ):
            continue
        for start, end in reversed(split_sentences(line)):
            sentence = _BULLET.sub("", line[start:end])[-LONGEST:]
            statement = _statement_of(sentence, not digits or bool(_CONCLUDES.match(sentence)))
            if statement is None:
                continue
            if statement.kind == "formula" and not re.search(r"\\|√|[!^_|\[{]|\*\*", statement.text):
                return find_quantities(plain(statement.text))[-1].text
            return statement.text
    return None


def _statement_of(sentence: str, in_words: bool) -> Statement | None:
    """What a sentence that announces nothing states; letters alone are no formula there."""
    typed = plain(sentence)
    if not find_numbers(typed) and not (in_words and find_quantities(typed)):
        return None
    statement = stated(sentence)
    return statement if statement and (statement.value is not None or find_quantities(plain(statement.text))) else None


@functools.lru_cache(maxsize=4096)
def _right_number(right: str) -> Fraction | None:
    """The number that a right answer is: alone, behind "x =", or with a currency and a unit of a few words."""
    statement = None if len(right) > LONGEST else stated(right)
    if statement is None or statement.kind != "number":
        return None
    side = re.split(r"=|≈", plain(boxed(right) or right))[-1].strip(" $*_`.,")
    found = find_quantities(side)
    if len(found) != 1:
        return statement.value if "=" in right and not re.search(r"[A-Za-z]{2}", right) else None
    before, behind = side[: found[0].start], side[found[0].end :]
    if not re.fullmatch(r"(?:minus|negative|about|approximately|Rs\.?|[A-Z]{3})?[-–\s$€£¥₹≈(]*", before):
        return None
    in_words = not any(char.isdigit() for char in found[0].text)
    if not re.fullmatch(
        r"[)!]?" if in_words else r"[\s$)]*[-°%]?(?:\s*[^\W\d_]+[./]?){0,3}\s*(?:\([^()\d]*\))?", behind
    ):
        return None
    return statement.value


# --- choices ---

_FOLLOWS_A = r"(?=\s+(?:or|and|nor|because|since|is|was|seems|rather|instead|over|but)\b)"
_MENTION = re.compile(
    rf"""
      [(\[]\s?(?P<bracket>[A-Ja-j])\s?[)\]]
    | (?i:\b(?:option|choice|letter|alternative|answer)\s+)["'(\[]?
      (?P<named>[A-J](?![\w'’-])|[b-j](?![\w'’-])|a(?=\s*(?:[).,;:]|$)))
    | (?<![\w'’.-])(?P<marked>[A-J])(?=["']|\s*(?:$|[).:,;/&!?\]\n]))
    | (?<![\w'’.-])(?P<bare>[B-HJ]|A{_FOLLOWS_A})(?![\w'’.-])
    | \A\W*(?P<lower>[a-j])(?=\s*(?:\W*\Z|[).:](?:\s|\Z)))
    """,
    re.VERBOSE,
)
_DENIES = re.compile(
    r"(?:\b(?:not|neither|nor|never|except|cannot|unlike|over|than|without|instead\s+of|eliminat\w+|rul\w+\s+out|exclud\w+"
    r"|discard\w*|reject\w*)|n['’]t)(?:\s+(?:be|in|with|to|of|the|an?|options?|choices?|answers?|letter|either|both|just|really|likely)){0,4}\W{0,3}$",
    re.IGNORECASE,
)
_DENIED_BEHIND = re.compile(
    r"\W{0,3}(?:[^\W\d]+\s+){0,4}?(?:is|are|was|were|can|could|do|does|would|will|seems?|makes?)(?:n['’]t|not\b|\s+(?:\w+\s+)?(?:not|never|no)\b"
    r"|\s+(?:\w+\s+)?(?:wrong|incorrect|false|eliminated|ruled|excluded|unlikely|impossible|out|irrelevant)\b)",
    re.IGNORECASE,
)
_DECIDES = re.compile(
    r"\b(?:so|thus|hence|therefore|but|because|since|is|are|was|were|would|will|can|could|may|might|makes?|seems?|fits?"
    r"|choose|pick|select|say|prefer|go\s+with|must|leav\w+|leads?|rather|instead|not|than|over|which|while|whereas|if|then)\b|n['’]t\b|[.!?→=]",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"\W*(?:(?:it\s+is|it['’]s|is|the|probably|likely|most\s+likely|definitely|i\s+think|only)\s+)*\W*", re.IGNORECASE
)
_DECLARES = re.compile(
    r"\b(?:options?|choices?|alternative|correct|right|best|choose|chose|pick|select|go(?:ing)?\s+with|opt|settle|conclude"
    r"|guess|answer|must\s+be|so|thus|hence|therefore|leav(?:es|ing)|left\s+with|probably|likely|most|sense)\b",
    re.IGNORECASE,
)


_LINE_OF_LIST = re.compile(r"\W*[A-Ja-j][).:]")


class _Mention(NamedTuple):
    letter: str
    start: int
    end: int


def _mentions(text: str) -> list[_Mention]:
    return [_Mention(found[found.lastgroup or 0].upper(), *found.span()) for found in _MENTION.finditer(text)]


def _choices(text: str) -> set[str] | None:
    """The letters a text leaves: one where it decides, none where it denies what it names; None where it names none."""
    text = plain((boxed(text) or text)[:LONGEST])
    mentions = _mentions(text)
    if not mentions:
        return None
    groups = [[mentions[0]]]
    for left, right in itertools.pairwise(mentions):
        if _one_list(text, left, right):
            groups[-1].append(right)
        else:
            groups.append([right])
    live = [group for group in groups if not _is_denied(text, group)]
    if not live:
        return set()
    leads = live[0] is groups[0] and len(live[0]) == 1 and _LEADING.fullmatch(text[: min(groups[0][0].start, 60)])
    return {mention.letter for mention in (live[0] if leads else live[-1])}


def _one_list(text: str, left: _Mention, right: _Mention) -> bool:
    """Whether two mentions are members of one list: "A or B", "(A) bank (B) mall"."""
    if right.start - left.end > 100:
        return False
    gap = text[left.end : right.start].lstrip(").:] ")
    joined = "\n" not in gap and re.search(r"[,;/&]|\b(?:or|and|nor)\b", gap)
    if not joined and ord(right.letter) != ord(left.letter) + 1:
        return False
    return len(gap.split()) <= 8 and not _DECIDES.search(gap)


def _is_denied(text: str, group: list[_Mention]) -> bool:
    before, behind = text[max(0, group[0].start - 60) : group[0].start], text[group[-1].end : group[-1].end + 80]
    return bool(_DENIES.search(before) or _DENIED_BEHIND.match(behind))


def _last_choice(text: str) -> str | None:
    """The last sentence that declares a choice; else the letter that the text begins with, or that it names last."""
    lines = [line for line in text.split("\n") if _MENTION.search(line)]
    sentences = [line[slice(*span)] for line in lines for span in split_sentences(line)]
    # A line for each of the choices is the question's list.
    listed = len({lead[0] for line in lines if (lead := _LINE_OF_LIST.match(line))}) > 1
    undeclared = None
    for sentence in reversed(sentences):
        # Neither denied choices nor the list of the question, repeated, are an answer.
        letters = _choices(sentence) or set()
        if 0 < len(letters) < 3 and _DECLARES.search(sentence):
            return sentence if len(letters) > 1 else letters.pop()
        if len(letters) == 1 and not (listed and _LINE_OF_LIST.match(sentence)):
            undeclared = undeclared or letters.pop()
    first = _choices(sentences[0]) if sentences else None
    mentions = _mentions(plain(text))
    if (
        first
        and len({mention.letter for mention in mentions}) == 1
        and not plain(text)[: mentions[0].start].strip(" \n([*")
    ):
        return first.pop()
    return undeclared


# --- yes and no ---

_AFFIRMED = {"yes": True, "true": True, "no": False, "false": False}
_SAID = re.compile(
    r"(?P<denied>(?:\b(?:not|never|neither|nor|hardly)|n['’]t|\bcannot\s+be)\s+(?:(?:be|at\s+all|really|entirely|quite|necessarily|always|actually|completely|exactly|fully|strictly|generally|an?|the)\s+){0,2})?"
    r"\b(?P<word>yes|yeah|yep|no|nope|true|false|correct|incorrect)\b(?!\s+(?:doubt|longer|matter|idea|more|one|less|other|answer)\b)",
    re.IGNORECASE,
)
_SAYS_YES = frozenset(("yes", "yeah", "yep", "true", "correct"))
# "There is no bird": no answer.
_DETERMINER = re.compile(
    r"\s+(?!(?:it|he|she|they|we|you|i|this|that|because|since|as|but|and|or|so)\b)[a-z]", re.IGNORECASE
)


_DEPENDS = re.compile(
    r"\b(?:it\s+depends|cannot\s+be\s+(?:determined|known|said)|unclear|undetermined)\b", re.IGNORECASE
)


class _Said(NamedTuple):
    yes: bool
    start: int
    end: int


def _said(text: str) -> list[_Said]:
    found = []
    for match in _SAID.finditer(text):
        word = match["word"].lower()
        if word == "no" and not match["denied"] and match.start() and _DETERMINER.match(text, match.end()):
            continue
        found.append(_Said((word in _SAYS_YES) != bool(match["denied"]), match.start(), match.end()))
    return found


def _yes_or_no(text: str) -> bool | None:
    """What a text says, None where it says both without deciding, or neither."""
    text = plain((boxed(text) or text)[:LONGEST])
    said = _said(text)
    if not said:
        return None
    if _DEPENDS.search(text):
        return None
    if len({answer.yes for answer in said}) == 1:
        return None if re.search(r"\bneither\b", text, re.IGNORECASE) and len(said) > 1 else said[0].yes
    decisions = list(re.finditer(r"\b(?:so|thus|hence|therefore)\b", text, re.IGNORECASE))
    if decisions and (behind := {answer.yes for answer in said if answer.start > decisions[-1].start()}):
        return behind.pop() if len(behind) == 1 else None
    first, second = said[0], next(answer for answer in said if answer.yes != said[0].yes)
    if text[: first.start].strip(" *_\"'([,.") and not text[: first.start].strip().endswith((":", "is")):
        return None
    gap = text[first.end : second.start]
    return None if re.fullmatch(r"\W*(?:(?:and|or|but|also|maybe|perhaps|then|again)\W*)*", gap) else first.yes


def _last_yes_no(text: str) -> str | None:
    """What the completion begins with, or what its last sentence with a yes or no says."""
    first = text.lstrip()[:LONGEST]
    begins = re.match(r"\W{0,8}(yes|no)\b\s*(?:[,.;:!*]|$)", first, re.IGNORECASE)
    lines = (line for line in reversed(text.split("\n")) if _SAID.search(line))
    last = next(
        (s for line in lines for span in reversed(split_sentences(line)) if _said(s := line[slice(*span)])), None
    )
    if last is None:
        return None
    if begins and not re.search(r"\b(?:so|thus|hence|therefore)\b", last, re.IGNORECASE):
        return begins[1]
    said = _said(last)
    return last[said[0].start : said[0].end] if len(said) == 1 else last


# --- comparing ---


def answers_match(predicted: str | None, right: str) -> bool:
    """Whether two answers say the same; what cannot be judged is wrong (see `judge_answer`)."""
    return judge_answer(predicted, right) is True


def judge_answer(predicted: str | None, right: str) -> bool | None:
    r"""Whether two answers say the same, None where that cannot be judged within the limits of `mold.data.formulas`.

    Numbers are compared by value, to a millionth: currency, percent signs, thousands separators and units do not count,
    "1/2" is 0.5, "5 thousand" 5000, and of a sentence the number that it states counts (see
    `mold.data.quantities.stated`); one that leaves open which of several it is counts as none. Choices are compared by
    the letter that is decided for, yes and no by what is said ("not true" is no). Everything else is compared without
    case, Markdown and extra space, and formulas, points, lists, intervals and equations by math-verify.

    Args:
        predicted: None counts as wrong.
        right: the right answer.
    """
    if predicted is None:
        return False
    predicted = (boxed(predicted) or predicted)[-LONGEST:] if len(predicted) > LONGEST else predicted
    kind = answer_kind(right)
    if kind == "choice":
        return _choices(predicted) == {right.strip(" ().")}
    if kind == "yes_no":
        return _yes_or_no(predicted) is _AFFIRMED[right.strip(" .").casefold()]
    if kind == "text" and _folded(predicted) == _folded(right):
        return True
    statement = stated(predicted) if kind == "number" or is_formula(_formula(right)) else None
    if statement is None:
        return False
    if kind == "number":
        target = _right_number(right)
        if target is None:
            return False
        if statement.value is not None:
            return abs(statement.value - target) <= _TOLERANCE * abs(target)
        return statement.kind == "formula" and _is_number(statement.text, target)
    expected, found = _formula(right), formula_in(_formula(predicted))
    if _folded(expected) == _folded(found):
        return True
    if (members := _members(expected)) is not None and (others := _members(found)) is not None:
        return members == others
    if _INDEX.search(expected) or _INDEX.search(found):
        return re.sub(r"[\s{}]", "", expected) == re.sub(r"[\s{}]", "", found)
    return same_formula(found, expected)


_INDEX = re.compile(r"\d\s?_\s?\{?\d")


def _is_number(formula: str, target: Fraction) -> bool | None:
    """Whether a formula is a number; one with an unknown on its right side is none."""
    side = re.sub(r"\\[A-Za-z]+", " ", formula.rpartition("=")[2])
    if re.search(r"(?<![A-Za-z])[A-DF-HJ-Za-df-hj-z](?![A-Za-z])", side) or _INDEX.search(formula):
        return False
    shown = (
        str(target.numerator) if target.denominator == 1 else rf"\frac{{{target.numerator}}}{{{target.denominator}}}"
    )
    return same_formula(formula, shown)


def _formula(text: str) -> str:
    return plain(boxed(text) or text).strip(" \n$*`.").strip()


_MEMBER = re.compile(r"[-+$\s\d./%]+")


def _members(formula: str) -> Counter | None:
    """The numbers of a list without brackets, None for anything else."""
    pieces = re.split(r"\s*(?:[,;]\s*(?:and|or)?|\b(?:and|or)\b)\s*", formula.strip(" $"))
    values = [statement.value for piece in pieces if (statement := stated(piece)) and _MEMBER.fullmatch(piece)]
    return Counter(values) if 1 < len(values) == len(pieces) and None not in values else None


def _folded(text: str) -> str:
    return " ".join(plain(boxed(text) or text).casefold().split()).strip(" .$*_`\"'“”")
