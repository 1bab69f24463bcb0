"""Statistics on made data, whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mold.evaluation.statistics import MIN_SEEDS, change, examples_needed, paired_difference

DATASETS = 200
# 99.9 % of binomial samples: mean -+ 3.3 standard deviations.
SLACK = 3.3 * math.sqrt(0.95 * 0.05 / DATASETS)


def right_or_wrong(rng, seeds, questions, gain=0.0):
    """Right answers of two ways of training: questions differ in how hard they are, trainings in how well they went."""
    hard = rng.normal(0, 1.5, (1, questions))
    ability = rng.normal(0, 0.1, (2, seeds, 1)) + np.array([gain, 0.0])[:, None, None]
    return (rng.random((2, seeds, questions)) < 1 / (1 + np.exp(hard - ability))).astype(float)


def coverage(make, truth, **options):
    rng = np.random.default_rng(1)
    found = [paired_difference(*make(rng), draws=300, **options) for _ in range(DATASETS)]
    return found, np.mean([d.low <= truth <= d.high for d in found])


@pytest.mark.parametrize(("seeds", "questions"), [(3, 150), (5, 60)])
def test_where_there_is_no_difference_none_is_found(seeds, questions):
    found, covered = coverage(lambda rng: right_or_wrong(rng, seeds, questions), 0.0)
    assert covered >= 0.95 - SLACK
    assert np.mean([d.verdict == "better" for d in found]) <= 0.025 + 3.3 * math.sqrt(0.025 * 0.975 / DATASETS)


@pytest.mark.parametrize(
    ("seeds", "seed_noise", "question_noise", "noise", "least"),
    [(3, 0.02, 0.2, 0.4, 0.95), (6, 0.0, 0.3, 0.0, 0.95), (3, 0.02, 0.4, 0.2, 0.95), (3, 0.05, 0.2, 0.4, 0.92)],
)
def test_intervals_hold_a_known_difference_as_often_as_they_say(seeds, seed_noise, question_noise, noise, least):
    def make(rng):
        difference = 0.1 + seed_noise * rng.standard_normal((seeds, 1)) + question_noise * rng.standard_normal((1, 100))
        second = rng.standard_normal((seeds, 100))
        return second + difference + noise * rng.standard_normal((seeds, 100)), second

    found, covered = coverage(make, 0.1)
    assert covered >= least - SLACK
    # And are not much wider than what would do.
    needed = 2 * 1.96 * math.sqrt(seed_noise**2 / seeds + question_noise**2 / 100 + noise**2 / 100 / seeds)
    assert np.mean([d.high - d.low for d in found]) < 1.7 * needed


def test_a_known_difference_is_found():
    found, _ = coverage(lambda rng: right_or_wrong(rng, 4, 150, gain=0.8), 0.0)
    assert np.mean([d.verdict == "better" for d in found]) > 0.95
    assert not any(d.verdict == "worse" for d in found)


def test_pairing_matters():
    """Hard questions are hard for both: the same tables with one side's questions in another order tell less."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 3, (1, 200))
    second = hard + rng.normal(0, 0.2, (4, 200))
    first = hard + 0.1 + rng.normal(0, 0.2, (4, 200))
    paired = paired_difference(first, second)
    apart = paired_difference(first[:, rng.permutation(200)], second)
    assert paired.verdict == "better"
    assert apart.verdict == "undecided"
    assert paired.mean == pytest.approx(apart.mean)
    assert (apart.high - apart.low) > 5 * (paired.high - paired.low)


@pytest.mark.parametrize("seeds", range(1, MIN_SEEDS))
def test_too_few_seeds_decide_nothing(seeds):
    rng = np.random.default_rng(3)
    second = rng.random((seeds, 100))
    found = paired_difference(second + 1 + 0.01 * rng.random((seeds, 100)), second)
    assert found.low > 0
    assert found.verdict == "undecided"


TABLES = arrays.arrays(np.float64, (3, 7), elements=st.floats(-5, 5))


@settings(max_examples=30)
@given(TABLES, TABLES)
def test_differences_are_antisymmetric_and_the_same_for_the_same_seed(first, second):
    there, back = paired_difference(first, second, draws=200), paired_difference(second, first, draws=200)
    assert there == paired_difference(first, second, draws=200)
    np.testing.assert_allclose([there.mean, there.low, there.high], [-back.mean, -back.high, -back.low], atol=1e-12)
    assert there.low - 1e-12 <= there.high
    assert there.mean == pytest.approx(np.mean(first - second))


def test_a_constant_difference_has_no_width():
    second = np.random.default_rng(4).random((3, 50))
    found = paired_difference(second - 0.25, second)
    assert (found.low, found.high) == pytest.approx((-0.25, -0.25))
    assert (found.verdict, found.seeds, found.questions) == ("worse", 3, 50)


def tables(means, shape=(3, 40)):
    return {size: np.full(shape, mean) for size, mean in means.items()}


def test_examples_that_the_second_needs():
    curve = tables({100: 0.1, 200: 0.2, 400: 0.3})
    found = examples_needed(tables({100: 0.15, 200: 0.3, 400: 0.31}), curve)
    assert [f.examples for f in found] == [100, 200, 400]
    # Half way on a logarithmic scale; just the last size; more than were tried.
    assert [f.needed for f in found] == pytest.approx([math.sqrt(100 * 200), 400, math.inf])
    assert [(f.low, f.high) for f in found[:2]] == [pytest.approx((f.needed, f.needed)) for f in found[:2]]
    assert examples_needed(tables({100: 0.05}), curve)[0].needed == 0
    assert examples_needed(tables({100: 0.1}), curve)[0].needed == 100
    # A curve that falls is as good as its best so far.
    assert examples_needed(tables({100: 0.2}), tables({100: 0.1, 200: 0.3, 400: 0.2}))[0].needed == pytest.approx(
        math.sqrt(100 * 200)
    )


def test_the_interval_of_examples_needed_holds_the_truth():
    """Accuracy is log2(size / 25) / 10 without and as with twice the examples with: half of them are needed."""
    rng, held, sizes = np.random.default_rng(5), 0, (100, 200, 400, 800)
    for _ in range(100):
        hard = rng.normal(0, 0.3, (1, 100))

        def outcomes(size, hard=hard):
            ability = math.log2(size / 25) / 10 - 0.5 + rng.normal(0, 0.01, (4, 1))
            return (hard + rng.normal(0, 0.3, (4, 100)) < ability).astype(float)

        first, second = ({size: outcomes(factor * size) for size in sizes} for factor in (2, 1))
        found = examples_needed(first, second, draws=100)[1]
        held += found.low <= 400 <= found.high
    assert held >= 95 - 3.3 * math.sqrt(100 * 0.95 * 0.05)


def test_tables_that_do_not_fit_are_refused():
    table = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"second: is \(2, 2\), must be of first's seeds and questions, \(2, 3\)"):
        paired_difference(table, table[:, :2])
    with pytest.raises(ValueError, match=r"first: is of shape \(3,\), must be \[seeds, questions\]"):
        paired_difference(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"second: has 1 values that are not finite"):
        paired_difference(table, table * [[math.inf, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="second: has 1 sizes, must have at least 2"):
        examples_needed({1: table}, {1: table})
    with pytest.raises(ValueError, match="must be of one"):
        examples_needed({1: table}, {1: table, 2: table[:, :2]})


@pytest.mark.parametrize(
    ("turned", "of", "verdict"),
    [(0, 40, "unchanged"), (3, 3, "may be chance"), (5, 5, "may be chance"), (6, 6, "better"), (12, 40, "better")],
)
def test_the_change_of_one_training(turned, of, verdict):
    before, after = np.zeros(of), (np.arange(of) < turned).astype(float)
    found = change(before, after)
    assert found["verdict"] == verdict
    low, high = found["interval"]
    assert low <= turned / of <= high
    opposite = {"better": "worse"}.get(verdict, verdict)
    assert change(after, before)["verdict"] == opposite
    as_many_back = np.concatenate([after - before, before - after])
    assert change(np.zeros(2 * of), as_many_back)["verdict"] == ("may be chance" if turned else "unchanged")
