"""Our own multi-step word problems: numbers, distractors, and rationales that state every calculation.

Every problem is computed, never parsed: a scenario draws its numbers and writes question and rationale from them. The
distractor is a sentence of the question with a number that stands nowhere else in question and solution.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Iterator

from mold.data.equations import equation_rationale, find_equations
from mold.data.examples import Example

_LOWEST_MAX_VALUE = 20  # below it, some scenario has few numbers left to draw

NAMES = [
    "Ada",
    "Amir",
    "Bea",
    "Carlos",
    "Chen",
    "Dana",
    "Elif",
    "Femi",
    "Grace",
    "Hana",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Marco",
    "Nadia",
    "Omar",
    "Priya",
    "Rosa",
    "Tomas",
]
GOODS = [
    "apple",
    "book",
    "candle",
    "folder",
    "lamp",
    "marble",
    "notebook",
    "pencil",
    "ribbon",
    "mug",
    "shell",
    "stamp",
    "sticker",
    "ticket",
    "towel",
]
PLACES = ["market", "library", "station", "school", "harbour", "bakery", "museum", "garden"]


def generate_problems(
    count: int, seed: int = 0, *, max_value: int | None = None, rationale_form: str = "text"
) -> list[Example]:
    """`count` different problems, the same for the same seed; a longer list starts with the shorter one.

    Args:
        count: of problems.
        seed: of the numbers and names.
        max_value: the largest number that a problem or its rationale may state: easier arithmetic. The texts, their
            mix, their steps and their distractors stay what they are. None: no limit.
        rationale_form: "text", or "equations": the calculations of the text alone, an operation a step.

    Raises:
        ValueError: count is not positive, or max_value below 20, which leaves some kind of problem few numbers.
    """
    if count < 1:
        raise ValueError(f"count: is {count}, must be at least 1")
    if max_value is not None and max_value < _LOWEST_MAX_VALUE:
        raise ValueError(f"max_value: is {max_value}, must be at least {_LOWEST_MAX_VALUE}")
    examples: list[Example] = []
    asked: set[str] = set()
    for question, rationale, answer in _problems(random.Random(seed), max_value or math.inf):
        if question not in asked:
            asked.add(question)
            if rationale_form == "equations":
                rationale = equation_rationale(find_equations(rationale), str(answer))
            examples.append(Example(f"problem-{seed}-{len(examples)}", question, rationale, str(answer)))
        if len(examples) == count:
            return examples
    raise AssertionError("unreachable: the stream of problems has no end")


def _problems(rng: random.Random, max_value: float) -> Iterator[tuple[str, str, int]]:
    while True:
        scenario = rng.choice(SCENARIOS)
        while True:
            facts, task, steps, answer = scenario(rng)
            used = [int(number) for number in re.findall(r"\d+", " ".join([*facts, *steps]))]
            # Drawn again here and not with another scenario, so that their mix is the same.
            if max(used) <= max_value:
                break
        # The distractor never comes first: a problem opens with what it is about.
        facts.insert(rng.randint(1, len(facts)), _distractor(rng, used, max_value))
        yield " ".join([*facts, task]), " ".join(steps), answer


def _distractor(rng: random.Random, used: Collection[int], most: float) -> str:
    number = rng.choice([number for number in range(2, 61) if number <= most and number not in used])
    return rng.choice(
        [
            f"The {rng.choice(PLACES)} opened {number} years ago.",
            f"It is {number} minutes on foot to the {rng.choice(PLACES)}.",
            f"A neighbour of theirs is {number} years old.",
            f"There are {number} trees along the street.",
            f"The radio played {number} songs in the meantime.",
        ]
    )


def _many(number: int, good: str) -> str:
    return f"{number} {good if number == 1 else good + 's'}"


def _shopping(rng):
    name, (first, second) = rng.choice(NAMES), rng.sample(GOODS, 2)
    price, other_price, amount, other = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 5)
    cost, other_cost = price * amount, other_price * other
    total = cost + other_cost
    paid = (total // 10 + 1) * 10
    facts = [
        f"{name} buys {_many(amount, first)} for ${price} each and {_many(other, second)} for ${other_price} each.",
        f"{name} pays with ${paid}.",
    ]
    steps = [
        f"The {first}s cost {amount} * {price} = ${cost}.",
        f"The {second}s cost {other} * {other_price} = ${other_cost}.",
        f"Together that is {cost} + {other_cost} = ${total}.",
        f"{name} gets back {paid} - {total} = ${paid - total}.",
    ]
    return facts, f"How many dollars does {name} get back?", steps, paid - total


def _work(rng):
    name, wage, hours, days = rng.choice(NAMES), rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 4)
    daily, total = wage * hours, wage * hours * days
    cost = rng.randint(2, min(15, total - 1))
    facts = [
        f"{name} earns ${wage} an hour and works {hours} hours a day.",
        f"{name} works for {days} days and then spends ${cost} on a bus pass.",
    ]
    steps = [
        f"In one day {name} earns {wage} * {hours} = ${daily}.",
        f"In {days} days {name} earns {daily} * {days} = ${total}.",
        f"After the bus pass {total} - {cost} = ${total - cost} are left.",
    ]
    return facts, f"How many dollars does {name} have left?", steps, total - cost


def _sharing(rng):
    name, good = rng.choice(NAMES), rng.choice(GOODS)
    boxes, inside, friends = rng.randint(2, 5), rng.randint(4, 9), rng.randint(2, 5)
    total = boxes * inside
    kept = total % friends or friends
    given, share = total - kept, (total - kept) // friends
    facts = [
        f"{name} has {boxes} boxes with {_many(inside, good)} in each.",
        f"{name} keeps {_many(kept, good)} and shares the rest equally among {friends} friends.",
    ]
    steps = [
        f"In all boxes there are {boxes} * {inside} = {_many(total, good)}.",
        f"To share there are {total} - {kept} = {_many(given, good)}.",
        f"Each friend gets {given} / {friends} = {_many(share, good)}.",
    ]
    return facts, f"How many {good}s does each friend get?", steps, share


def _collections(rng):
    (name, other, third), good = rng.sample(NAMES, 3), rng.choice(GOODS)
    amount, times, more = rng.randint(2, 9), rng.randint(2, 4), rng.randint(2, 9)
    second = amount * times
    last = second + more
    total = amount + second + last
    facts = [
        f"{name} has {_many(amount, good)}.",
        f"{other} has {times} times as many {good}s as {name}.",
        f"{third} has {more} more {good}s than {other}.",
    ]
    steps = [
        f"{other} has {times} * {amount} = {_many(second, good)}.",
        f"{third} has {second} + {more} = {_many(last, good)}.",
        f"Together they have {amount} + {second} + {last} = {_many(total, good)}.",
    ]
    return facts, f"How many {good}s do the three have together?", steps, total


def _savings(rng):
    name, start, weekly, weeks = rng.choice(NAMES), rng.randint(2, 20), rng.randint(2, 9), rng.randint(2, 6)
    saved = weekly * weeks
    total = start + saved
    price = total + rng.randint(2, 30)
    facts = [
        f"{name} wants a bicycle that costs ${price} and has ${start} already.",
        f"{name} saves ${weekly} a week for {weeks} weeks.",
    ]
    steps = [
        f"In {weeks} weeks {name} saves {weekly} * {weeks} = ${saved}.",
        f"Then {name} has {start} + {saved} = ${total}.",
        f"To buy the bicycle {price} - {total} = ${price - total} are missing.",
    ]
    return facts, f"How many dollars are missing for {name}?", steps, price - total


def _discount(rng):
    name, good, amount = rng.choice(NAMES), rng.choice(GOODS), rng.randint(2, 4)
    part, times, less = rng.randint(4, 10), rng.randint(2, 9), rng.randint(1, 2)
    price, off = part * times, times * less
    new = price - off
    facts = [
        f"A box of {good}s costs ${price}.",
        f"Today the shop takes off ${less} of every ${part}, and {name} buys {amount} boxes.",
    ]
    steps = [
        f"The discount on a box is {price} / {part} * {less} = ${off}.",
        f"A box now costs {price} - {off} = ${new}.",
        f"For {amount} boxes {name} pays {new} * {amount} = ${new * amount}.",
    ]
    return facts, f"How many dollars does {name} pay?", steps, new * amount


def _recipe(rng):
    name, flour, people, guests = rng.choice(NAMES), rng.randint(3, 30), rng.randint(2, 4), rng.randint(2, 4)
    total = flour * guests
    have = rng.randint(2, total - 1)
    facts = [
        f"A cake for {people} people needs {flour} spoons of flour.",
        f"{name} bakes for {people * guests} people and has {have} spoons of flour at home.",
    ]
    steps = [
        f"For {people * guests} people {name} needs {people * guests} / {people} = {guests} cakes.",
        f"These take {guests} * {flour} = {total} spoons of flour.",
        f"{name} has to buy {total} - {have} = {total - have} spoons.",
    ]
    return facts, f"How many spoons of flour does {name} have to buy?", steps, total - have


def _travel(rng):
    name, speed, hours = rng.choice(NAMES), rng.randint(3, 60), rng.randint(2, 4)
    slower, more = rng.randint(2, 30), rng.randint(1, 3)
    first, second = speed * hours, slower * more
    plural = "hour" if more == 1 else "hours"
    facts = [
        f"{name} travels {hours} hours at {speed} kilometres an hour.",
        f"Then {name} travels {more} {plural} at {slower} kilometres an hour.",
    ]
    steps = [
        f"At first {name} travels {hours} * {speed} = {first} kilometres.",
        f"After that {name} travels {more} * {slower} = {second} kilometres.",
        f"In total that is {first} + {second} = {first + second} kilometres.",
    ]
    return facts, f"How many kilometres does {name} travel in total?", steps, first + second


SCENARIOS: tuple[Callable, ...] = (
    _shopping,
    _work,
    _sharing,
    _collections,
    _savings,
    _discount,
    _recipe,
    _travel,
)
