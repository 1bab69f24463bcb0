from dataclasses import replace

import pytest

from mold.data.examples import render
from mold.data.problems import generate_problems
from mold.evaluation.predictions import accuracy, generate_predictions, score, wilson_interval
from mold.generation.batches import Journal
from tests.mold.scripted_model import ScriptedModel
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
EXAMPLES = generate_problems(7, seed=3)
MARKER = "\nAnswer: "


def learned_by_heart(texts):
    """A stand-in for a model that goes on as the texts do."""

    def answer(prompt, options):
        assert options["do_sample"] is False
        (text,) = (text for text in texts if text.startswith(prompt))
        return text[len(prompt) :]

    return ScriptedModel(TOKENIZER, answer)


def test_right_and_wrong_answers_are_told_apart():
    texts = [render(example).text for example in EXAMPLES]
    texts[2] = texts[2].replace(MARKER, MARKER + "9")
    texts[4] = render(EXAMPLES[4]).prompt + " I do not know."
    rows = generate_predictions(
        learned_by_heart(texts), TOKENIZER, EXAMPLES, batch_size=3, max_new_tokens=150, progress=False
    )
    assert [row["id"] for row in rows] == [example.id for example in EXAMPLES]
    assert [row["correct"] for row in rows] == [True, True, False, True, False, True, True]
    assert rows[2]["prediction"] == "9" + EXAMPLES[2].answer
    assert rows[4]["prediction"] is None
    assert not any(row["truncated"] for row in rows)
    assert accuracy(rows) == pytest.approx(5 / 7)


def test_completions_that_hit_the_limit_are_marked():
    texts = [render(example).text for example in EXAMPLES]
    rows = generate_predictions(learned_by_heart(texts), TOKENIZER, EXAMPLES, max_new_tokens=5, progress=False)
    assert all(row["truncated"] for row in rows)


@pytest.mark.parametrize("attention", ["mold", "sdpa"])
def test_batches_change_no_prediction(attention):
    model = make_model("llama", vocab=len(TOKENIZER), attention=attention)
    rows = [
        generate_predictions(model, TOKENIZER, EXAMPLES, batch_size=size, max_new_tokens=12, progress=False)
        for size in (1, 7)
    ]
    assert rows[0] == rows[1]
    assert len({row["completion"] for row in rows[0]}) > 1


def test_what_is_looked_for_without_a_marker_depends_on_the_right_answer():
    examples = [replace(EXAMPLES[0], answer="B"), replace(EXAMPLES[1], answer="12")]
    model = learned_by_heart([render(e).prompt + " Of 12 only (B) fits." for e in examples])
    rows = generate_predictions(model, TOKENIZER, examples, max_new_tokens=80, progress=False)
    assert [row["prediction"] for row in rows] == ["B", "12"]
    assert accuracy(rows) == 1


def test_a_journal_spares_what_is_done(tmp_path):
    texts = [render(example).text for example in EXAMPLES]
    options = {"batch_size": 3, "max_new_tokens": 150, "progress": False}
    whole = generate_predictions(learned_by_heart(texts), TOKENIZER, EXAMPLES, **options)
    killed = learned_by_heart(texts)
    killed.die_at = 2
    with pytest.raises(KeyboardInterrupt):
        generate_predictions(killed, TOKENIZER, EXAMPLES, journal=Journal(tmp_path / "j", {}), **options)
    model = learned_by_heart(texts)
    assert generate_predictions(model, TOKENIZER, EXAMPLES, journal=Journal(tmp_path / "j", {}), **options) == whole
    assert len(model.calls) == 1


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # By the formula, to four digits; zero and all right have bounds of z^2 / (n + z^2).
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(right, total, z=0.5)[0] >= low


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_no_interval(right, total):
    with pytest.raises(ValueError, match=f"right: is {right} of {total}, must be"):
        wilson_interval(right, total)


def test_score():
    rows = [{"correct": i < 2, "prediction": None if i == 3 else "1", "truncated": i > 2} for i in range(5)]
    low, high = wilson_interval(2, 5)
    expected = {
        "right": 2,
        "total": 5,
        "accuracy": 0.4,
        "low": low,
        "high": high,
        "no_answer": 1,
        "not_judged": 0,
        "truncated": 2,
    }
    assert score(rows) == expected
