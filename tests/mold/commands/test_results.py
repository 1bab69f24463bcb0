import pytest

from mold.commands.results import markdown, summarise, table
from mold.evaluation.predictions import wilson_interval


def test_results_are_means_over_seeds():
    def entry(seed, right, kl):
        sets = [{"set": "a", "total": 10, "accuracy": right / 10}]
        return {"seed": seed, "sets": sets, "held_out": {"attention KL": kl, "accuracy": 0.0}}

    summary = summarise({"x": [entry(0, 2, 1.0), entry(1, 5, 2.0)], "y": [{**entry(0, 10, 1.0), "held_out": {}}]})
    found = summary["variants"]["x"]
    assert found["sets"]["a"]["mean"] == pytest.approx(0.35)
    assert found["sets"]["a"]["accuracies"] == [0.2, 0.5]
    # Of ten questions, however many seeds answer them.
    assert (found["sets"]["a"]["low"], found["sets"]["a"]["high"]) == wilson_interval(3.5, 10)
    assert found["held_out"] == {"attention KL": 1.5}
    rows = list(table(summary))
    assert rows[0] == ["variant", "seeds", "a", "mean", "attention KL"]
    assert rows[1][0] == "x"
    assert rows[1][3:] == ["35.0", "1.5"]
    assert rows[2][3:] == ["100.0", ""]
    assert markdown(summary).splitlines()[2:4] == [
        "| variant | seeds | a | mean | attention KL |",
        "|---|---|---|---|---|",
    ]
