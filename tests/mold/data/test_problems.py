import random
import re
from collections import defaultdict
from fractions import Fraction

import pytest

from mold.data import problems
from mold.data.examples import question_key
from mold.data.problems import GOODS, NAMES, PLACES, SCENARIOS, generate_problems
from mold.data.segmentation import find_numbers

CALCULATION = re.compile(r"(?P<left>\d[\d +*/-]*[+*/-] ?\d+) = \$?(?P<right>\d+)")


def value_of(expression):
    """A calculation's value: products and quotients before sums, from left to right."""
    total = Fraction(0)
    for sign, product in re.findall(r"([+-]?)\s*(\d+(?:\s*[*/]\s*\d+)*)", expression):
        first, *rest = re.findall(r"([*/]?)\s*(\d+)", product)
        value = Fraction(first[1])
        for operator, factor in rest:
            value = value * int(factor) if operator == "*" else value / int(factor)
        total += -value if sign == "-" else value
    return total


def numbers(text):
    return [int(text[slice(*span)]) for span in find_numbers(text)]


def scenario_of(problem):
    """What it asks, without names and goods."""
    asked = re.sub("|".join(NAMES), "NAME", problem.question.rpartition(". ")[2])
    return re.sub("|".join(f"{good}s" for good in GOODS), "GOODS", asked)


def test_the_test_calculates_rightly():
    assert value_of("2 + 3 * 4 - 6 / 4") == Fraction(25, 2)
    assert value_of("80 * 15 / 100") == 12
    assert value_of("9 - 3 - 2") == 4


@pytest.mark.parametrize("seed", [0, 7])
def test_every_stated_calculation_is_right_and_the_last_one_is_the_answer(seed):
    for problem in generate_problems(200, seed):
        for sentence in problem.rationale.split(". "):
            calculation = CALCULATION.search(sentence)
            assert calculation, sentence
            assert value_of(calculation["left"]) == int(calculation["right"]), sentence
            assert int(calculation["right"]) > 0
        assert calculation["right"] == problem.answer, problem


def test_every_number_comes_from_the_question_or_a_calculation_before():
    for problem in generate_problems(200, seed=2):
        known = set(numbers(problem.question))
        for sentence in problem.rationale.split(". "):
            calculation = CALCULATION.search(sentence)
            assert set(numbers(calculation["left"])) <= known, (problem.question, sentence)
            known.add(int(calculation["right"]))


def test_one_distractor_whose_number_is_used_nowhere_else():
    # The templates of the distractors, told by their words around the number.
    frames = {re.sub(r"\d+", "#", problems._distractor(random.Random(i), (), 60)) for i in range(400)}
    assert len(frames) == 3 + 2 * len(PLACES)
    for problem in generate_problems(200, seed=3):
        sentences = re.split(r"(?<=[.?]) ", problem.question)
        distractors = [s for s in sentences if re.sub(r"\d+", "#", s) in frames]
        assert len(distractors) == 1
        (number,) = numbers(distractors[0])
        rest = problem.question.replace(distractors[0], "", 1) + problem.rationale
        assert number not in numbers(rest), problem
        assert sentences[0] != distractors[0]
        assert sentences[-1].endswith("?")


def test_the_same_seed_gives_the_same_problems_and_more_of_them_start_alike():
    assert generate_problems(30, seed=5) == generate_problems(50, seed=5)[:30]
    assert generate_problems(30, seed=5) != generate_problems(30, seed=6)
    state = random.getstate()
    generate_problems(5)
    assert random.getstate() == state  # a generator of its own


def test_all_problems_differ_and_every_scenario_comes():
    found = generate_problems(300, seed=1)
    assert len({question_key(problem.question) for problem in found}) == 300
    assert len({problem.id for problem in found}) == 300
    assert len({scenario_of(problem) for problem in found}) == len(SCENARIOS)
    assert all(problem.keywords is None for problem in found)


@pytest.mark.parametrize("count", [0, -3])
def test_no_problems(count):
    with pytest.raises(ValueError, match=f"count: is {count}, must be at least 1"):
        generate_problems(count)


@pytest.mark.parametrize("form", ["text", "equations"])
@pytest.mark.parametrize("max_value", [20, 30, 100])
def test_a_largest_value_makes_the_numbers_smaller_and_nothing_else(max_value, form):
    easy, hard = (generate_problems(400, seed=3, max_value=most, rationale_form=form) for most in (max_value, None))
    assert max(max(numbers(f"{p.question} {p.rationale}")) for p in easy) <= max_value
    assert max(max(numbers(f"{p.question} {p.rationale}")) for p in hard) > max_value

    def kinds(examples):
        found = defaultdict(list)
        for problem in examples:
            found[scenario_of(problem)].append(problem)
        return found

    # A scenario's calculations are many, and as many steps as without a limit.
    of_easy, of_hard = kinds(easy), kinds(hard)
    assert of_easy.keys() == of_hard.keys()
    assert len(of_easy) == len(SCENARIOS)
    for kind, found in of_easy.items():
        assert 0.5 < len(found) / 50 < 1.5
        assert len({re.sub(r"[^\d+*/=-]", "", p.rationale) for p in found}) >= 10, kind
        assert {p.rationale.count("=") for p in found} == {p.rationale.count("=") for p in of_hard[kind]}


def test_a_largest_value_that_leaves_too_little():
    with pytest.raises(ValueError, match="max_value: is 19, must be at least 20"):
        generate_problems(1, max_value=19)


def test_equations_alone():
    texts, equations = (generate_problems(100, seed=1, rationale_form=form) for form in ("text", "equations"))
    for text, equation in zip(texts, equations, strict=True):
        assert (text.question, text.answer) == (equation.question, equation.answer)
        lines = equation.rationale.split("\n")
        assert all(value_of(line.split(" = ")[0]) == int(line.split(" = ")[1]) for line in lines)
        assert lines[-1].endswith(f"= {equation.answer}")
        assert set(numbers(text.rationale)) <= set(numbers(equation.rationale))
