"""Which number a text states, and where numbers and boxes stand."""
# ruff: noqa: RUF001 - signs that texts hold

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mold.data.quantities import boxed, boxes, find_quantities, formula_in, is_formula, last_math, plain, stated


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("$1,200.50", Fraction("1200.5")),
        ("12,34,567 Rs.", 1234567),
        ("1 234 567", 1234567),
        ("minus five", -5),
        ("−5", -5),
        ("**-5**", -5),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"10{,}000", 10000),
        ("2 1/2", Fraction(5, 2)),
        ("2½", Fraction(5, 2)),
        ("1.5e3", 1500),
        ("3 million", 3_000_000),
        ("twenty-one", 21),
        ("2**3", 8),
        ("10²", 100),
        ("3 + 4 = 7 apples", 7),
        ("72 = 48 + 24", 72),
        ("not 5 but 6", 6),
        ("more than 5, namely 6", 6),
        ("Ann has 6 (of 10)", 6),
        ("72 clips to fill 3 boxes", 72),
        ("There are 3 boxes, so she needs 72 clips.", 72),
        (r"it is \boxed{12} of 30", 12),
    ],
)
def test_the_number_a_text_states(text, value):
    statement = stated(text)
    assert (statement.kind, statement.value) == ("number", value)


@pytest.mark.parametrize("text", ["5 or 6", "5 and 6", "5, 6", "5 to 6"])
def test_numbers_that_are_left_open(text):
    statement = stated(text)
    assert statement is None or statement.value is None


@pytest.mark.parametrize("text", ["blue", "", " ", "$", "not 5"])
def test_texts_that_state_nothing(text):
    assert stated(text) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{5}", ["5"]),
        (r"\boxed{\frac{1}{2}} and \boxed{x_{a_{b}}}", [r"\frac{1}{2}", "x_{a_{b}}"]),
        (r"\boxed{a\}b}", [r"a\}b"]),
        ("none", []),
    ],
)
def test_boxes_end_at_their_matching_brace(text, found):
    assert [text[box.start : box.end].partition("{")[2][:-1] for box in boxes(text)] == found
    assert boxed(text) == (" and ".join(found) or None)


def test_formulas_are_told_from_numbers():
    assert is_formula("x + 1")
    assert not is_formula("5 apples")
    assert last_math("so $x = 5$ and $y$") == "y"
    assert "5" in formula_in("it is x = 5")


UNITS = [
    "5",
    "1,",
    "1/",
    "-",
    "(",
    "\\boxed{",
    "{",
    "}",
    "^{",
    "\\frac{",
    "twenty ",
    "not 5 ",
    "$",
    " ",
    "\n",
    "5 or ",
    "=",
]


@pytest.mark.parametrize("unit", UNITS)
def test_hostile_texts_end(unit):
    text = (unit * 100_000)[:100_000]
    for function in (stated, boxes, boxed, last_math, plain):
        begun = time.process_time()
        function(text)
        assert time.process_time() - begun < 2, function


@given(st.text(alphabet="0123456789.,/-+*^ ()ab{}$\\½²", max_size=40))
def test_any_text_is_read(text):
    for quantity in find_quantities(text):
        assert 0 <= quantity.start < quantity.end <= len(text)
    stated(text)
