"""Equations as rationales: what a data set publishes of its calculations, written one operation a step.

A published equation (`48/2=24`, `( 8.0 - 3.0 )`, `70-x=27`) is parsed to a tree, solved for its unknown where it has
one, and calculated in exact fractions, never by eval. Every operation becomes a step, an equation on a line of its own:

    ( ( 8.0 + 4.5 ) * 2.0 )   ->   8 + 4.5 = 12.5
                                   12.5 * 2 = 25

One operation and not one whole equation a step: a result is written right behind its operands, so two operations in one
step would ask a small model for a value that stands nowhere.
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_SIGNS = str.maketrans("×·⋅÷−–", "***/--", "$€£")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?:{_DIGITS}(?:\.\d*)?|\.\d+)%?)|(?P<unknown>[A-Za-z]\w*)|(?P<sign>//|[-+*/()]))"
)
_OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda left, right: Fraction(left // right),
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2}
_MAX_DECIMALS = 6  # a value with more is written as a fraction
_MAX_LENGTH = 300  # of an equation in characters, which bounds how deep its brackets nest
# A calculation in prose: an operation between numbers, perhaps with currency and units left out, and its result.
_OPERAND = rf"\(*\s?[-−]?\s?[$€£]?(?:{_DIGITS}(?:\.\d+)?|\.\d+)%?\s?\)*"
_TIMES = re.compile(r"(?<=[\d)%])\s?[xX]\s?(?=[\d($€£.])")
_WRITTEN = re.compile(
    rf"(?<![\w.,]){_OPERAND}(?:\s?[-+*/×÷−]\s?{_OPERAND})+\s?=\s?[-−]?\s?[$€£]?(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
)


class EquationError(ValueError):
    """Equations make no rationale; the message says why, in the words that rows are counted by."""


class _Number(NamedTuple):
    value: Fraction
    text: str


class _Unknown(NamedTuple):
    name: str


class _Operation(NamedTuple):
    sign: str
    left: _Number | _Unknown | _Operation
    right: _Number | _Unknown | _Operation


def equation_rationale(equations: Sequence[str], answer: str) -> str:
    """The steps of published equations, a line an operation, that end in the answer.

    Args:
        equations: in the order of the solution. An equation without "=" is the calculation of its result; one with an
            unknown that stands in it once is solved for it; one that calculates nothing (`12=12`) is left out.
        answer: the right answer. It is the result of the last equation where that states none.

    Returns:
        `left sign right = result` lines. A stated result is kept as it is where it is the exact one rounded or cut to
        its decimals; results in between are exact: decimals of up to six places, or else fractions (`(1/3) * 15 = 5`).

    Raises:
        EquationError: "without equations", "with an equation that is no arithmetic", "with a wrong equation" or "whose
            equations do not lead to the answer".
    """
    final = _answer(answer)
    lines: list[str] = []
    results: list[Fraction] = []
    for index, equation in enumerate(equations):
        tree, stated = _solved(equation)
        if not isinstance(tree, _Operation):
            continue
        if stated is None and index == len(equations) - 1 and final is not None and not _is_float(final):
            stated = final
        lines += _steps(tree, stated)
        results.append(_calculated(tree) if stated is None else stated.value)
    if not lines:
        raise EquationError("without equations")
    if final is None or abs(results[-1] - final.value) > abs(final.value) / 10**6:
        raise EquationError("whose equations do not lead to the answer")
    return "\n".join(lines)


def find_equations(text: str) -> list[str]:
    """The calculations that prose states with their results (`The apples cost 3 * 4 = $12.`), in order."""
    return [match[0] for match in _WRITTEN.finditer(_TIMES.sub("*", text))]


def _is_float(number: _Number) -> bool:
    """Whether it has the decimals of floating point: 0.6666666666666666, where 2/3 is exact."""
    return len(number.text.partition(".")[2]) > _MAX_DECIMALS


def _answer(answer: str) -> _Number | None:
    try:
        tree = _parse(answer)
        return tree if isinstance(tree, _Number) else _Number(_calculated(tree), _text(_calculated(tree)))
    except EquationError:
        return None


def _solved(equation: str) -> tuple[_Number | _Unknown | _Operation, _Number | None]:
    """What an equation calculates, and the result that it states."""
    sides = [_parse(side) for side in equation.split("=")]
    unknowns = [index for index, side in enumerate(sides) if _unknowns(side)]
    if not unknowns:
        # 48/2=24, 9=3+6, and 2*3=6=6.
        tree = next((side for side in sides if isinstance(side, _Operation)), sides[0])
        numbers = [side for side in sides if isinstance(side, _Number)]
        return tree, numbers[-1] if numbers and isinstance(tree, _Operation) else None
    if len(sides) != 2 or len(unknowns) != 1 or _unknowns(sides[unknowns[0]]) != 1:
        raise EquationError("with an equation that is no arithmetic")
    tree, value = sides[unknowns[0]], sides[1 - unknowns[0]]
    while isinstance(tree, _Operation):
        sign, left, right = tree
        if sign == "//":
            raise EquationError("with an equation that is no arithmetic")
        if _unknowns(left):
            inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[sign]
            tree, value = left, _Operation(inverse, value, right)
        elif sign in "+*":
            tree, value = right, _Operation({"+": "-", "*": "/"}[sign], value, left)
        else:
            tree, value = right, _Operation(sign, left, value)
    return value, None


def _unknowns(tree) -> int:
    if isinstance(tree, _Operation):
        return _unknowns(tree.left) + _unknowns(tree.right)
    return isinstance(tree, _Unknown)


def _steps(tree: _Operation, stated: _Number | None) -> list[str]:
    lines: list[str] = []

    def written(node, value: Fraction) -> str:
        if isinstance(node, _Number):
            return node.text
        left, right = node.left, node.right
        first, second = _operand(written(left, _calculated(left))), _operand(written(right, _calculated(right)))
        result = stated.text if node is tree and stated is not None else _text(value)
        # "1 / 3 = 1/3" says nothing.
        if node is tree or result != f"{first}/{second}":
            sign = "/" if node.sign == "//" and value * _calculated(right) == _calculated(left) else node.sign
            lines.append(f"{first} {sign} {second} = {result}")
        return result

    exact = _calculated(tree)
    if stated is not None:
        places = len(stated.text.partition(".")[2])
        if abs(exact - stated.value) >= Fraction(1, 10**places):
            raise EquationError("with a wrong equation")
    written(tree, exact)
    return lines


def _calculated(tree) -> Fraction:
    if isinstance(tree, _Number):
        return tree.value
    if isinstance(tree, _Unknown):
        raise EquationError("with an equation that is no arithmetic")
    left, right = _calculated(tree.left), _calculated(tree.right)
    if tree.sign[0] == "/" and right == 0:
        raise EquationError("with an equation that is no arithmetic")
    return _OPERATIONS[tree.sign](left, right)


def _operand(text: str) -> str:
    """A fraction or a negative number in brackets: "60 / (2/3)", "5 - (-3)"."""
    return f"({text})" if "/" in text or text.startswith("-") else text


def _text(value: Fraction) -> str:
    scaled = value * 10**_MAX_DECIMALS
    if scaled.denominator > 1:
        return f"{value.numerator}/{value.denominator}"
    whole, rest = divmod(abs(scaled.numerator), 10**_MAX_DECIMALS)
    decimals = f"{rest:0{_MAX_DECIMALS}d}".rstrip("0")
    return ("-" if value < 0 else "") + str(whole) + (f".{decimals}" if decimals else "")


def _parse(text: str):
    """The tree of an arithmetic expression, by precedence climbing."""
    if len(text) > _MAX_LENGTH:
        raise EquationError("with an equation that is no arithmetic")
    tokens = _tokens(text.translate(_SIGNS))
    tree, position = _expression(tokens, 0, 1)
    if position != len(tokens):
        raise EquationError("with an equation that is no arithmetic")
    return tree


def _tokens(text: str) -> list:
    tokens: list[_Number | _Unknown | str] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise EquationError("with an equation that is no arithmetic")
        position = match.end()
        if match["number"]:
            tokens.append(_literal(match["number"].replace(",", "")))
        else:
            tokens.append(_Unknown(match["unknown"]) if match["unknown"] else match["sign"])
    return tokens


def _literal(text: str) -> _Number:
    """A number without the zeros that say nothing: 8.0 is 8, .50 is 0.5."""
    whole, _, decimals = text.removesuffix("%").partition(".")
    text, percent = (whole.lstrip("0") or "0"), text.endswith("%")
    if decimals := decimals.rstrip("0"):
        text += f".{decimals}"
    value = Fraction(text)
    return _Number(value / 100, f"{text}%") if percent else _Number(value, text)


def _expression(tokens: list, position: int, lowest: int):
    tree, position = _operand_of(tokens, position)
    while position < len(tokens) and _PRECEDENCE.get(tokens[position], 0) >= lowest:
        sign = tokens[position]
        right, position = _expression(tokens, position + 1, _PRECEDENCE[sign] + 1)
        tree = _Operation(sign, tree, right)
    return tree, position


def _operand_of(tokens: list, position: int):
    if position >= len(tokens):
        raise EquationError("with an equation that is no arithmetic")
    token = tokens[position]
    if isinstance(token, _Number | _Unknown):
        return token, position + 1
    if token in ("+", "-"):
        tree, position = _operand_of(tokens, position + 1)
        if token == "+":
            return tree, position
        if isinstance(tree, _Number):
            return _Number(-tree.value, tree.text[1:] if tree.text.startswith("-") else f"-{tree.text}"), position
        return _Operation("-", _Number(Fraction(0), "0"), tree), position
    if token == "(":
        tree, position = _expression(tokens, position + 1, 1)
        if position < len(tokens) and tokens[position] == ")":
            return tree, position + 1
    raise EquationError("with an equation that is no arithmetic")
