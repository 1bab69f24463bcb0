"""Whether one way of training is better than another: paired differences, and the examples that one saves.

What is compared are two tables of outcomes, [seeds, questions]: the same questions, answered by trainings of the same
seeds. Both are samples, of the trainings that might have been and of the questions that might have been asked, and a
difference has to hold for others of either. So seeds and questions are drawn anew, each on its own:

    D[r, q] = first[r, q] - second[r, q]        mean* = mean over drawn r, q of D[r, q]

Pairing takes out what the two have in common: a hard question is hard for both. Of n seeds n - 1 are drawn, with
replacement: n of few draws would make the seeds' share of the variance (n - 1) / n of what it is.

Over simulated tables with effects of seed, question and both at once, three to eight seeds of 300 questions, intervals
of 95 % held the truth in 95 to 99 %; where the seeds' own effect was most of the variance in 93 %.
Source: Owen, "The pigeonhole bootstrap", 2007; Rao and Wu, "Resampling inference with complex survey data", 1988.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

MIN_SEEDS = 3
"""Trainings of a variant below which nothing is called better: how much trainings differ is not known."""


MIN_CHANGED = 6
"""Questions that a training must change before anything is made of it: of five, were each as likely to get better as
worse, all would go the same way in one training of sixteen."""


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % interval, over so many seeds and questions."""

    mean: float
    low: float
    high: float
    seeds: int
    questions: int

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """Of the first: undecided where the interval holds 0, or where too few seeds tell how trainings differ."""
        if self.seeds < MIN_SEEDS or self.low <= 0 <= self.high:
            return "undecided"
        return "better" if self.mean > 0 else "worse"


@dataclass(frozen=True)
class ExamplesNeeded:
    """Training examples with which the second does as well as the first with `examples`, with a 95 % interval.

    inf: more than were tried. 0: fewer than the fewest that were tried.
    """

    examples: int
    needed: float
    low: float
    high: float


def paired_difference(first: np.ndarray, second: np.ndarray, *, draws: int = 5_000, seed: int = 0) -> Difference:
    """The mean of first - second, paired over seeds and questions, and the 95 % interval that it lies in.

    Args:
        first, second: [seeds, questions], right or wrong as 1 and 0, or log-likelihoods. The same seeds and questions,
            in the same order.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: the tables are no matrices of one shape, are empty, or hold a value that is not finite.

    Source: the module's derivation.
    """
    first, second = _table("first", first), _table("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second: is {second.shape}, must be of first's seeds and questions, {first.shape}")
    difference = first - second
    seeds, questions = _weights(difference.shape, draws, seed)
    means = (seeds @ difference * questions).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(difference.mean()), float(low), float(high), *difference.shape)


def change(before: np.ndarray, after: np.ndarray) -> dict:
    """What became of the same questions by one training: its mean change, and whether chance would do as much.

    The interval is over the questions alone, so it is about this training; another may change them otherwise.

    Args:
        before, after: [questions], right or wrong as 1 and 0, or log-likelihoods; more is better.

    Returns:
        "interval": [low, high], of 95 %, and "verdict": "better", "worse", "unchanged" if no question did, or, where
        the interval holds 0 or fewer than `MIN_CHANGED` questions changed, "may be chance".

    Raises:
        ValueError: as of `paired_difference`.
    """
    found = paired_difference(np.asarray(after)[None], np.asarray(before)[None])
    changed = np.count_nonzero(np.asarray(after) - before)
    verdict = "may be chance" if changed else "unchanged"
    if (found.low > 0 or found.high < 0) and changed >= MIN_CHANGED:
        verdict = "better" if found.mean > 0 else "worse"
    return {"interval": [found.low, found.high], "verdict": verdict}


def examples_needed(
    first: Mapping[int, np.ndarray], second: Mapping[int, np.ndarray], *, draws: int = 2_000, seed: int = 0
) -> list[ExamplesNeeded]:
    """How many training examples the second needs for what the first reaches with each of its sizes.

    The second's means lie on a curve over the logarithm of the size, straight between the sizes and made to rise: the
    size at which it first reaches the first's mean is what is needed.

    Args:
        first, second: by size, outcomes [seeds, questions] of trainings on so many examples; one shape and order
            throughout, more is better.
        draws, seed: as of `paired_difference`; a draw takes the same seeds and questions at every size.

    Raises:
        ValueError: the tables are not of one shape, or fewer than two sizes make no curve.
    """
    if len(second) < 2:
        raise ValueError(f"second: has {len(second)} sizes, must have at least 2 for a curve")
    tables = [_table(f"size {size}", table) for by_size in (first, second) for size, table in sorted(by_size.items())]
    shape = tables[0].shape
    if any(table.shape != shape for table in tables):
        raise ValueError(f"first: is of shapes {', '.join(str(t.shape) for t in tables)}, must be of one")
    stacked, sizes = np.stack(tables), sorted(second)
    seeds, questions = _weights(shape, draws, seed)
    drawn = [(seeds @ table * questions).sum(1) for table in stacked]
    means = np.concatenate([stacked.mean((1, 2))[None], np.stack(drawn, 1)])
    reached, curve = means[:, : len(first)], np.maximum.accumulate(means[:, len(first) :], 1)
    result = []
    for place, size in enumerate(sorted(first)):
        needed = np.array(
            [_first_reached(sizes, row, target) for row, target in zip(curve, reached[:, place], strict=True)]
        )
        # Of the nearest draw, as infinities have no mean.
        low, high = np.quantile(needed[1:], [0.025, 0.975], method="nearest")
        result.append(ExamplesNeeded(size, float(needed[0]), float(low), float(high)))
    return result


def _first_reached(sizes, curve, target: float) -> float:
    if target <= curve[0]:
        return float(sizes[0]) if target == curve[0] else 0.0
    if target > curve[-1]:
        return float("inf")
    above = int(np.searchsorted(curve, target))
    share = (target - curve[above - 1]) / (curve[above] - curve[above - 1])
    return float(np.exp(np.log(sizes[above - 1]) * (1 - share) + np.log(sizes[above]) * share))


@lru_cache(maxsize=4)
def _weights(shape: tuple[int, int], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of seeds [draws, R] and of questions [draws, Q]: the same for all that is compared on one set."""
    rng = np.random.default_rng(seed)
    drawn = [(shape[0], max(shape[0] - 1, 1)), (shape[1], shape[1])]
    seeds, questions = (rng.multinomial(times, np.full(size, 1 / size), draws) / times for size, times in drawn)
    return seeds, questions


def _table(name: str, table: np.ndarray) -> np.ndarray:
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"{name}: is of shape {table.shape}, must be [seeds, questions] and not empty")
    if not np.isfinite(table).all():
        raise ValueError(f"{name}: has {int((~np.isfinite(table)).sum())} values that are not finite, must have none")
    return table
