"""Few cases, in which all that is to meet meets."""

import itertools

import pytest

from tests.covering import covering


@pytest.mark.parametrize("strength", [2, 3])
def test_all_meet_and_nothing_impossible_is_there(strength):
    sizes = 5, 3, 2, 4, 2
    parameters = [[pytest.param(f"{place}{index}", place) for index in range(size)] for place, size in enumerate(sizes)]

    def possible(*arguments):
        return not {"00", "11"} <= set(arguments)

    cases = [set(case.values[::2]) for case in covering(*parameters, strength=strength, possible=possible)]
    assert len(cases) < 5 * 3 * 2 * 4 * 2 / 2
    for few in itertools.combinations(parameters, strength):
        for values in itertools.product(*few):
            together = {value.values[0] for value in values}
            assert any(together <= case for case in cases) == (not {"00", "11"} <= together)


def test_cases_are_named_by_their_values():
    cases = covering([1, 2], [pytest.param("b", 3, id="three")])
    assert [(case.id, case.values) for case in cases] == [("1-three", (1, "b", 3)), ("2-three", (2, "b", 3))]
