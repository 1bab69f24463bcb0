import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mold.data.examples import (
    DEFAULT_TEMPLATE,
    Example,
    check_template,
    question_key,
    render,
    split_examples,
    text_hash,
    without_questions_of,
)

EXAMPLE = Example("a", "How many?", "Two and two are four.", "4")


def test_parts_of_the_rendered_text():
    rendered = render(EXAMPLE)
    assert rendered.text == "Question: How many?\nReasoning: Two and two are four.\nAnswer: 4"
    assert rendered.prompt == "Question: How many?\nReasoning:"
    parts = [rendered.text[slice(*span)] for span in (rendered.question, rendered.rationale, rendered.answer)]
    assert parts == ["How many?", "Two and two are four.", "\nAnswer: 4"]


texts = st.text(st.sampled_from("ab {}.\n5"), min_size=1, max_size=12)


@given(texts, texts, texts)
def test_parts_are_found_whatever_the_texts_hold(question, rationale, answer):
    rendered = render(Example("a", question, rationale, answer), "<{question}|{rationale}|{answer}>")
    assert rendered.text == f"<{question}|{rationale}|{answer}>"
    assert rendered.text[slice(*rendered.question)] == question
    assert rendered.text[slice(*rendered.rationale)] == rationale
    assert rendered.text[slice(*rendered.answer)] == f"|{answer}>"
    assert rendered.text.startswith(rendered.prompt)


@pytest.mark.parametrize(
    "template",
    ["", "{question} {rationale}", "{rationale} {question} {answer}", "{question} {rationale} {answer} {answer}"],
)
def test_templates_that_do_not_fit(template):
    with pytest.raises(ValueError, match=r"template: is .* must hold \{question\}, \{rationale\}, \{answer\} once"):
        check_template(template)
    with pytest.raises(ValueError, match="template: is"):
        render(EXAMPLE, template)


def test_the_hash_is_of_everything_that_decides_the_text_and_its_key_words():
    changes = ({"question": "?"}, {"rationale": "?"}, {"answer": "5"}, {"keywords": ("two",)}, {"keywords": ()})
    hashes = {text_hash(replace(EXAMPLE, **change), DEFAULT_TEMPLATE) for change in ({}, *changes)}
    assert len(hashes) == len(changes) + 1
    assert text_hash(EXAMPLE, DEFAULT_TEMPLATE) != text_hash(EXAMPLE, DEFAULT_TEMPLATE + "!")
    assert text_hash(EXAMPLE, DEFAULT_TEMPLATE) == text_hash(replace(EXAMPLE, id="b"), DEFAULT_TEMPLATE)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("How many apples, Tom?", "  how many  apples Tom", True),
        ("Tom's 1,000 pens.", "Tom's 1000 pens", True),
        ("It costs 2.5 dollars", "It costs 25 dollars", False),
        ("It costs 2.5 dollars", "It costs 2 5 dollars", False),
        ("What is 3 + 5?", "What is 3 - 5?", False),
        ("Of 3, 4 and 5", "Of 34 and 5", False),
    ],
)
def test_questions_that_are_the_same(first, second, same):
    assert (question_key(first) == question_key(second)) is same


def numbered(count):
    return [Example(str(i), f"Question {i}?", "So.", "1") for i in range(count)]


def test_a_split_is_decided_by_its_seed_and_loses_nothing():
    examples = numbered(20)
    train, held_out = split_examples(examples, 6, seed=1)
    assert (len(train), len(held_out)) == (14, 6)
    assert sorted(map(vars_key, train + held_out)) == sorted(map(vars_key, examples))
    assert (train, held_out) == split_examples(examples, 6, seed=1)
    assert held_out != split_examples(examples, 6, seed=2)[1]


def vars_key(example):
    return json.dumps(vars(example))


def test_no_question_is_on_both_sides():
    # Three rationales a question, and another spelling of each question.
    examples = [replace(e, id=f"{e.id}{n}", rationale=f"So {n}.") for e in numbered(10) for n in range(3)]
    examples += [replace(e, id=f"{e.id}-again", question=e.question.upper() + " ") for e in numbered(10)]
    for seed in range(5):
        train, held_out = split_examples(examples, 4, seed)
        assert len({question_key(e.question) for e in held_out}) == len(held_out) == 4
        assert not {question_key(e.question) for e in held_out} & {question_key(e.question) for e in train}
        assert len(train) == 6 * 4


def test_leakage_between_two_sets_is_taken_out():
    train, test = numbered(6), [Example("x", "QUESTION 3", "", "1"), Example("y", "Question 9?", "", "1")]
    assert [example.id for example in without_questions_of(train, test)] == ["0", "1", "2", "4", "5"]
