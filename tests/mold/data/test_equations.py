"""Equations as rationales: by hand, and against Python's own arithmetic on trees that nobody chose."""

import operator
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mold.data.equations import EquationError, equation_rationale, find_equations
from mold.data.segmentation import segment

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LINE = re.compile(r"(\S+) ([-+*/]) (\S+) = (\S+)")


@pytest.mark.parametrize(
    ("equations", "answer", "rationale"),
    [
        (["48/2=24", "48+24=72"], "72", "48 / 2 = 24\n48 + 24 = 72"),  # GSM8K
        (["( 8.0 - 3.0 )"], "5", "8 - 3 = 5"),  # SVAMP
        (["( ( 8.0 + 4.5 ) * 2.0 )"], "25", "8 + 4.5 = 12.5\n12.5 * 2 = 25"),
        (["(3+3)*2=12"], "12", "3 + 3 = 6\n6 * 2 = 12"),  # ASDiv
        (["70-x=27"], "43", "70 - 27 = 43"),  # SingleEq: solved for the unknown
        (["x-7=5"], "12", "5 + 7 = 12"),
        (["2+(5*x)=27"], "5", "27 - 2 = 25\n25 / 5 = 5"),
        (["(x+4)/2=34"], "64", "34 * 2 = 68\n68 - 4 = 64"),
        (["12/x=4"], "3", "12 / 4 = 3"),
        (["60*45=x*12"], "225", "60 * 45 = 2700\n2700 / 12 = 225"),
        (["X=((5.0+3.0)*2.0)"], "16", "5 + 3 = 8\n8 * 2 = 16"),  # MultiArith
        (["10-2-3"], "5", "10 - 2 = 8\n8 - 3 = 5"),
        (["2+3*4"], "14", "3 * 4 = 12\n2 + 12 = 14"),
        (["9=3+6"], "9", "3 + 6 = 9"),
        (["12=12", "12*.50=6"], "6", "12 * 0.5 = 6"),  # what calculates nothing is no step
        (["+3+3=6"], "6", "3 + 3 = 6"),
        (["-21/3=-7"], "-7", "(-21) / 3 = -7"),
        (["5-(-3)"], "8", "5 - (-3) = 8"),
        (["-(2+3)+9"], "4", "2 + 3 = 5\n0 - 5 = -5\n(-5) + 9 = 4"),
        (["20%*50"], "10", "20% * 50 = 10"),
        (["1,200/3"], "400", "1200 / 3 = 400"),
        (["$6×2", "12÷4"], "3", "6 * 2 = 12\n12 / 4 = 3"),  # noqa: RUF001
        (["560//10=56"], "56", "560 / 10 = 56"),
        (["100/3=33.33", "33.33*2=66.66"], "66.66", "100 / 3 = 33.33\n33.33 * 2 = 66.66"),  # rounded by the data set
        (["7/2=3"], "3", "7 / 2 = 3"),  # cut: whole boxes
        (["(1/3)*15+7=12"], "12", "(1/3) * 15 = 5\n5 + 7 = 12"),  # exact in between
        (["60/(2/3)=90"], "90", "60 / (2/3) = 90"),
        (["20/6"], "3.3333333333333335", "20 / 6 = 10/3"),  # the answer in floating point, the step exact
        (["1/2+1/4"], "3/4", "1 / 2 = 0.5\n1 / 4 = 0.25\n0.5 + 0.25 = 0.75"),
    ],
)
def test_an_operation_a_step(equations, answer, rationale):
    assert equation_rationale(equations, answer) == rationale


@pytest.mark.parametrize(
    ("equations", "answer", "reason"),
    [
        ([], "3", "without equations"),
        (["8.0"], "8", "without equations"),
        (["2;3"], "3", "with an equation that is no arithmetic"),
        (["lcm(4,6)=12"], "12", "with an equation that is no arithmetic"),
        (["17/5=3 r2"], "3", "with an equation that is no arithmetic"),
        (["x+y=4"], "2", "with an equation that is no arithmetic"),
        (["x+x=4"], "2", "with an equation that is no arithmetic"),
        (["x=x+1"], "2", "with an equation that is no arithmetic"),
        (["x=3=4"], "3", "with an equation that is no arithmetic"),
        (["x//2=4"], "8", "with an equation that is no arithmetic"),
        (["3/0"], "0", "with an equation that is no arithmetic"),
        (["0*x=4"], "0", "with an equation that is no arithmetic"),
        (["3+"], "3", "with an equation that is no arithmetic"),
        (["(3+4"], "7", "with an equation that is no arithmetic"),
        (["3 4"], "7", "with an equation that is no arithmetic"),
        (["1,2+3"], "15", "with an equation that is no arithmetic"),
        (["__import__('os')"], "1", "with an equation that is no arithmetic"),
        (["(" * 5000 + "1"], "1", "with an equation that is no arithmetic"),
        (["-" * 5000 + "1"], "1", "with an equation that is no arithmetic"),
        (["48/2=25"], "25", "with a wrong equation"),
        (["0.1+0.2=0.31"], "0.31", "with a wrong equation"),
        (["8-3"], "6", "with a wrong equation"),
        (["8-3=5"], "6", "whose equations do not lead to the answer"),
        (["8-3=5"], "a pear", "whose equations do not lead to the answer"),
    ],
)
def test_what_makes_no_rationale_says_why(equations, answer, reason):
    with pytest.raises(EquationError) as error:
        equation_rationale(equations, answer)
    assert str(error.value) == reason


NUMBERS = st.one_of(st.integers(0, 10**6).map(str), st.decimals(0, 999, places=2).map(str))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: "({} {} {})".format(*parts)),
    max_leaves=8,
)


def exact(text):
    """Python's value of a fully bracketed expression, in fractions."""
    return eval(re.sub(r"\d+(?:\.\d+)?", lambda n: f"Fraction('{n[0]}')", text), {"Fraction": Fraction})


def exact_lines(expression):
    """Python's value of an expression with an operator, and its rationale's lines; nothing where it divides by zero."""
    assume("(" in expression)
    try:
        value = exact(expression)
    except ZeroDivisionError:
        assume(False)
    return value, equation_rationale([expression], str(value)).split("\n")


@given(EXPRESSIONS)
def test_steps_are_exact_and_each_uses_what_is_known(expression):
    value, lines = exact_lines(expression)
    known = {Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", expression)}
    for line in lines:
        left, sign, right, result = LINE.fullmatch(line).groups()
        operands = [Fraction(text.strip("()")) for text in (left, right)]
        for operand in operands:
            # A fraction of two known numbers is one that "1 / 3 = 1/3" would have said.
            pairs = {a / b for a in known for b in known if b}
            assert operand in known | pairs
        computed = OPERATIONS[sign](*operands)
        if line is not lines[-1]:
            assert Fraction(result) == computed
        known.add(computed)
    assert Fraction(result) == value


@given(EXPRESSIONS)
def test_every_line_is_a_step_and_all_of_its_numbers_are_key_words(expression):
    _, lines = exact_lines(expression)
    rationale = "\n".join(lines)
    text = f"Question: How much?\nReasoning: {rationale}\nAnswer: 1"
    start = text.index(rationale)
    segments = segment(text, (10, 19), (start, start + len(rationale)))
    assert [text[slice(*span)] for span in segments.steps[1:]] == lines
    assert [text[slice(*s)] for s in segments.key_words] == re.findall(r"\d+(?:\.\d+)?", rationale)


@given(st.text(alphabet="0123456789.,+-*/()=x %$r\n", max_size=40), st.sampled_from(["1", "2.5", ""]))
def test_whatever_stands_there_is_a_rationale_or_a_reason(equation, answer):
    try:
        rationale = equation_rationale([equation], answer)
    except EquationError:
        return
    assert all(LINE.fullmatch(line) for line in rationale.split("\n"))


def test_equations_in_prose():
    text = "Pens cost 3 * 4 = $12. Then 5 x 6 = 30, and (2+3)*4=20. In 2005 - or 2006 - it was 7. So 1,200 / 2 = 600."
    assert find_equations(text) == ["3 * 4 = $12", "5*6 = 30", "(2+3)*4=20", "1,200 / 2 = 600"]
    assert equation_rationale(find_equations(text), "600").split("\n")[0] == "3 * 4 = 12"
