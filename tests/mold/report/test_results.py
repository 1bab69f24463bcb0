import pytest

from mold.report import drawing, plots
from mold.report.results import difference_table, findings, markdown, needed_table, table


def variant(name, size, mean, held_out):
    sets = {"a": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "accuracies": [mean], "total": 10}}
    likelihoods = {
        "held out": {"rationale log-likelihood": {"means": [-mean], "mean": -mean, "low": -1.5, "high": 0.0}}
    }
    about = {"variant": name, "size": size, "seeds": [0]}
    return about | {"sets": sets, "likelihoods": likelihoods, "held_out": held_out}


def comparison(name, measure, mean, verdict, size=None, set_name="a"):
    about = {"variant": name, "size": size, "set": set_name, "measure": measure, "seeds": 3, "questions": 10}
    return about | {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "verdict": verdict}


def needed(examples, value, low, high):
    return {"variant": "x", "set": "a", "examples": examples, "needed": value, "low": low, "high": high}


SUMMARY = {
    "variants": {"x": variant("x", None, 0.35, {"attention KL": 1.5}), "y": variant("y", None, 1.0, {})},
    "baseline": "y",
    "comparisons": [
        comparison("x", "accuracy", 0.1, "better"),
        comparison("x", "rationale log-likelihood", -0.01, "undecided", set_name="held out"),
    ],
    "examples_needed": [needed(100, 141.4, 90.0, 200.0), needed(200, None, 0.0, None)],
}


def test_accuracies_and_losses():
    rows = list(table(SUMMARY))
    assert rows[0] == ["variant", "seeds", "a, % of 10", "mean, %", "attention KL, nats"]
    assert rows[1] == ["x", "1", "35.0 (25.0 to 45.0)", "35.0", "1.5"]
    assert rows[2][3:] == ["100.0", ""]


def test_differences_stand_out_only_where_they_are_decided():
    assert list(difference_table(SUMMARY["comparisons"])) == [
        ["variant", "a: accuracy", "held out: rationale log-likelihood"],
        ["x", "**+10.0 (+5.0 to +15.0)**", "-0.010 (-0.060 to +0.040)"],
    ]
    sized = [comparison("x", "accuracy", 0.1, "worse", size) for size in (100, 200)]
    assert [row[0] for row in difference_table(sized)] == ["variant", "x, 100", "x, 200"]


def test_examples_needed():
    assert list(needed_table(SUMMARY["examples_needed"])) == [
        ["variant", "examples", "a"],
        ["x", "100", "141 (fewer than 100 to 200)"],
        ["x", "200", "more than 200 (fewer than 100 to more than 200)"],
    ]


def test_all_tables_in_markdown():
    text = markdown(SUMMARY)
    assert text.splitlines()[2:4] == [
        "| variant | seeds | a, % of 10 | mean, % | attention KL, nats |",
        "|---|---|---|---|---|",
    ]
    assert "Differences to y, paired over questions and seeds" in text
    assert "2 intervals are shown, about 1 of which miss the truth by chance" in text
    assert "| x | 100 | 141" in text
    alone = markdown(SUMMARY | {"comparisons": [], "examples_needed": [], "baseline": None})
    assert alone.count("\n|---") == 1
    assert "Differences" not in alone


def test_findings_say_what_may_be_chance():
    (said,) = findings(SUMMARY)
    assert said == (
        "x: 35.0 % right, y: 100.0 %, of 10 questions of a, 3 seeds; difference +10.0 (+5.0 to +15.0) points: better."
    )
    undecided = SUMMARY | {"comparisons": [comparison("x", "accuracy", -0.1, "undecided") | {"seeds": 1}]}
    assert findings(undecided)[0].endswith("1 seed; difference -10.0 (-15.0 to -5.0) points: may be chance.")


def test_pictures():
    pytest.importorskip("matplotlib")
    svg = drawing.figure_to_svg(plots.variant_results(SUMMARY["variants"]))
    assert all(text in svg for text in ("accuracy, %", "rationale log-likelihood, nats", "held out", ">x<", ">y<"))
    assert svg.count(">x<") == 2  # a panel each measure, whose sets differ
    svg = drawing.figure_to_svg(plots.variant_differences(SUMMARY["comparisons"]))
    assert all(text in svg for text in ("held out", "accuracy, points", "rationale log-likelihood, nats", plots.BLUE))
    variants = {f"{n}, {s}": variant(n, s, s / 1000, {}) for n in ("x", "y") for s in (100, 200, 400)}
    svg = drawing.figure_to_svg(plots.accuracy_by_size(variants))
    assert all(text in svg for text in ("training examples", ">400<", ">x<", ">y<"))
    with pytest.raises(ValueError, match="comparisons: is empty"):
        plots.variant_differences([])
    with pytest.raises(ValueError, match="variants: is empty"):
        plots.variant_results({})
    with pytest.raises(ValueError, match="variants: have no size"):
        plots.accuracy_by_size(SUMMARY["variants"])
