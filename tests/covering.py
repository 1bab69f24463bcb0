"""Few cases in place of all combinations of parameters."""

import itertools

import pytest

ParameterSet = type(pytest.param())


def covering(*parameters, strength=2, possible=lambda *values: True):
    """Combinations, a value of each parameter, in which any `strength` parameters meet in all values of theirs.

    Args:
        parameters: the values of each; a `pytest.param` may stand for several arguments of the test.
        strength: 2 where no more than two parameters meet in the code, 3 for kernels.
        possible: whether there is a case of these arguments.

    Returns:
        What `pytest.mark.parametrize` takes, chosen greedily and always the same.
    """
    parameters = [
        [each if isinstance(each, ParameterSet) else pytest.param(each) for each in one] for one in parameters
    ]
    together = list(itertools.combinations(range(len(parameters)), strength))
    meetings = {}
    for row in itertools.product(*parameters):
        arguments = tuple(itertools.chain(*(each.values for each in row)))
        if possible(*arguments):
            case = pytest.param(*arguments, id="-".join(each.id or str(each.values[0]) for each in row))
            meetings[case.id] = case, {(places, *(id(row[place]) for place in places)) for places in together}
    missing, chosen = set().union(*(met for _, met in meetings.values())), []
    while missing:
        case, met = max(meetings.values(), key=lambda each: len(each[1] & missing))
        chosen.append(case)
        missing -= met
    return chosen
