# ruff: noqa: RUF001 - signs that texts hold
import pytest

from mold.data.answers import answer_kind, answers_match, extract_answer, judge_answer, split_completion
from mold.data.problems import generate_problems


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        # The training text's own marker, and the line behind it alone.
        ("3 + 4 = 7.\nAnswer: 7", "7"),
        ("So 7.\nAnswer: 7 apples\nI am sure of 9.", "7 apples"),
        ("So 7.\nAnswer:", None),
        # What follows when a model asks itself the next question.
        ("It is 7.\nAnswer: 7\n\nQuestion: And 5 + 5?\nReasoning: It is 10.\nAnswer: 10", "7"),
        ("It is 7.\nQuestion: How many are 12?", "7"),
        # Announced in words.
        ("The answer is 12.", "12"),
        ("So the final answer is: $12.50. Tom has 3 left.", "$12.50"),
        ("The answer to the question is **18**.", "18"),
        ("The answer should be 1/2 of it.", "1/2 of it"),
        ("Final answer: 4", "4"),
        ("The answer is 3. No, the answer is 5.", "5"),
        ("16 - 7 = 9\n#### 9", "9"),
        ("The answer is\n\n42", "42"),
        ("The answer is 5 because 2 + 3 = 5.", "5 because 2 + 3 = 5"),
        (r"Hence \boxed{\frac{1}{2}} of 30.", r"\frac{1}{2}"),
        # Not announced: the last number.
        ("She has 3 + 4 = 7 apples.", "7"),
        ("He pays $1,250.50 in all.", "1,250.50"),
        ("The temperature is -5 degrees.", "-5"),
        ("So x = -$3.", "-3"),
        ("That leaves 20 - 5", "5"),
        ("Those are the answers I know of, and 8 remain.", "8"),
        ("The answer is 17.\nThe steps to find the answer are:\n1. Look.", "17"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_answers_are_found_in_what_models_write(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "kind", "answer"),
    [
        ("Of the 2 places only (C) has 3 doors.", "choice", "C"),
        ("Neither (A) nor (E) fits, so (B).", "choice", "B"),
        ("Option D, the mall, is the best one of 5.", "choice", "D"),
        ("The answer choices are (A) bank and (B) mall. The answer is (B).", "choice", "(B)"),
        ("There are 5 of them.", "choice", None),
        ("A dog is no bird. So no, in 2 words.", "yes_no", "no"),
        ("There are 5 of them, in Paris.", "text", None),
        ("The answer is Paris, of 5 towns.", "text", "Paris, of 5 towns"),
    ],
)
def test_what_is_looked_for_depends_on_the_kind(completion, kind, answer):
    assert extract_answer(completion, kind=kind) == answer


def test_the_marker_is_the_templates():
    template = "{question}\n{rationale}\n=> {answer}"
    assert extract_answer("2 + 2 = 4.\n=> 4", template) == "4"
    assert extract_answer("2 + 2 = 4.\n=> four", "{question} {rationale} {answer}") == "4"


@pytest.mark.parametrize(
    ("right", "kind"),
    [
        *(("C", "choice"), ("(C)", "choice"), ("yes", "yes_no"), ("No", "yes_no")),
        *(("1,000", "number"), ("-0.5", "number"), ("$3", "number"), ("12 apples", "number")),
        *(("Paris", "text"), ("3; 4", "text"), ("3:2", "text"), (r"\sqrt{2}", "text")),
    ],
)
def test_kinds(right, kind):
    assert answer_kind(right) == kind


@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        ("5", "5"),
        ("5.0", "5"),
        ("5 apples", "5"),
        ("5 apples. She has 3 more", "5"),
        ("about 5 apples", "5"),
        ("$1,200.50", "1200.5"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("3 + 4 = 7 apples", "7"),
        ("x = 5", "5"),
        ("12%", "12"),
        ("1/2", "0.5"),
        ("½", "0.5"),
        ("2½", "2.5"),
        ("2 1/2", "2.5"),
        ("**18**", "18"),
        ("0.3333333", "1/3"),
        (r"\frac{1}{2}", "0.5"),
        ("2^3", "8"),
        ("(B)", "B"),
        ("B", "(B)"),
        ("B) the mall", "B"),
        ("the answer is B because", "B"),
        ("probably A, because option (A) is", "A"),
        ("A dog, so (C)", "C"),
        ("Yes, because it rained", "yes"),
        ("it is false", "no"),
        ("  the  Mall. ", "The mall"),
    ],
)
def test_the_same_answer(predicted, right):
    assert answers_match(predicted, right)


@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        (None, "5"),
        ("", "5"),
        ("6", "5"),
        ("55", "5"),
        ("-5", "5"),
        ("5.001", "5"),
        ("one of 3 in 5", "5"),
        ("5 - 3", "5"),
        ("5 * 3", "5"),
        ("1/0", "1"),
        ("0", "0.000001"),
        ("A", "B"),
        ("a bee", "B"),
        ("A dog", "B"),
        ("None of them", "B"),
        ("no", "yes"),
        ("nothing", "no"),
        ("Rome", "Paris"),
    ],
)
def test_another_answer(predicted, right):
    assert not answers_match(predicted, right)


def test_own_problems_end_in_their_answers():
    for problem in generate_problems(60, seed=9):
        assert answers_match(extract_answer(f"{problem.rationale}\nAnswer: {problem.answer}"), problem.answer)
