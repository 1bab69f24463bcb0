"""Comparisons of variants, on results whose differences are known."""

import json

import numpy as np
import pytest

from mold.evaluation.comparison import HELD_OUT, MEASURES, Run, read_run, summarise
from mold.evaluation.predictions import wilson_interval
from mold.files import write_jsonl


def run(variant, seed, rights, size=None, tasks=("joint",), likelihoods=None, held_out=None, set_name="a"):
    total = len(rights)
    sets = [{"set": set_name, "total": total, "accuracy": sum(rights) / total}]
    outcomes = {(set_name, MEASURES[0]): {f"q{i}": float(right) for i, right in enumerate(rights)}}
    if likelihoods is not None:
        outcomes[HELD_OUT, MEASURES[1]] = {f"h{i}": value for i, value in enumerate(likelihoods)}
    return Run(variant, size, seed, tasks, sets, held_out or {}, outcomes)


def test_results_are_means_over_seeds():
    runs = [
        run("x", 0, [1] * 2 + [0] * 8, held_out={"attention KL": 1.0, "accuracy": 0.0}),
        run("x", 1, [1] * 5 + [0] * 5, held_out={"attention KL": 2.0, "accuracy": 0.0}),
        run("y", 0, [1] * 10),
    ]
    summary = summarise(runs)
    found = summary["variants"]["x"]
    assert found["sets"]["a"]["mean"] == pytest.approx(0.35)
    assert found["sets"]["a"]["accuracies"] == [0.2, 0.5]
    assert found["seeds"] == [0, 1]
    # Of ten questions, however many seeds answer them.
    assert (found["sets"]["a"]["low"], found["sets"]["a"]["high"]) == wilson_interval(3.5, 10)
    assert found["held_out"] == {"attention KL": 1.5}
    assert found["likelihoods"] == {}
    assert (summary["baseline"], summary["comparisons"], summary["examples_needed"]) == (None, [], [])


def made(gain, seeds=range(4), questions=200, name="mixture", **more):
    """Runs of which a share `gain` more is right than of the baseline's, question by question paired."""
    runs = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        right = rng.random(questions) < 0.3
        better = right | (rng.random(questions) < gain / 0.7)
        likelihoods = rng.normal(-20, 5, 50)
        runs.append(run("plain", seed, right, likelihoods=likelihoods, **more))
        runs.append(run(name, seed, better, likelihoods=likelihoods + 3 * gain, **more))
    return runs


def test_a_known_difference_is_found_and_none_is_not():
    summary = summarise(made(0.15), "plain")
    found = {(entry["set"], entry["measure"]): entry for entry in summary["comparisons"]}
    assert set(found) == {("a", "accuracy"), (HELD_OUT, "rationale log-likelihood")}
    entry = found["a", "accuracy"]
    assert (entry["variant"], entry["size"], entry["seeds"], entry["questions"]) == ("mixture", None, 4, 200)
    assert entry["verdict"] == "better"
    assert entry["low"] < 0.15 < entry["high"]
    assert found[HELD_OUT, "rationale log-likelihood"]["mean"] == pytest.approx(0.45)
    nothing = summarise(made(0.0), "plain")["comparisons"]
    assert {entry["verdict"] for entry in nothing} == {"undecided"}
    json.dumps(summary, allow_nan=False)


def test_only_seeds_that_both_have_are_compared():
    runs = [r for r in made(0.2, seeds=range(5)) if (r.variant, r.seed) not in {("plain", 0), ("mixture", 4)}]
    assert {entry["seeds"] for entry in summarise(runs, "plain")["comparisons"]} == {3}
    apart = [r for r in made(0.2, seeds=range(2)) if (r.variant == "plain") == (r.seed == 0)]
    assert summarise(apart, "plain")["comparisons"] == []
    # A table stands before the baseline is trained.
    assert summarise([r for r in made(0.2) if r.variant != "plain"], "plain")["comparisons"] == []


def test_log_likelihoods_of_other_tasks_are_not_compared():
    runs = [r._replace(tasks=("explain", "predict")) if r.variant == "mixture" else r for r in made(0.2)]
    summary = summarise(runs, "plain")
    assert [entry["measure"] for entry in summary["comparisons"]] == ["accuracy"]
    assert summary["variants"]["mixture"]["likelihoods"] == {}
    found = summary["variants"]["plain"]["likelihoods"][HELD_OUT]["rationale log-likelihood"]
    assert found["low"] < found["mean"] < found["high"]
    assert found["mean"] == pytest.approx(np.mean(found["means"]))


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="plain, seed 0: was asked 2 questions of a that are not the 3 of x"):
        summarise([run("plain", 0, [1, 0]), run("x", 0, [1, 0, 1])], "plain")


def test_sizes_are_compared_each_and_make_a_curve():
    runs = [r for gain, size in ((0.1, 100), (0.2, 200)) for r in made(gain, size=size)]
    # The variant with 100 examples is as good as the baseline with 400.
    runs += [r._replace(variant="plain", size=400) for r in runs if (r.variant, r.size) == ("mixture", 100)]
    runs += [r._replace(variant="mixture") for r in runs if r.size == 400]
    summary = summarise(runs, "plain")
    assert list(summary["variants"]) == [f"{name}, {size}" for size in (100, 200, 400) for name in ("plain", "mixture")]
    sized = {entry["size"]: entry["mean"] for entry in summary["comparisons"] if entry["measure"] == "accuracy"}
    assert list(sized) == [100, 200, 400]
    assert sized[400] == 0
    needed = {entry["examples"]: entry for entry in summary["examples_needed"]}
    assert needed[100]["needed"] == pytest.approx(400)
    assert needed[200]["needed"] is None
    json.dumps(summary, allow_nan=False)


def test_a_run_is_read_from_its_folders(tmp_path):
    student, evaluated = tmp_path / "student", tmp_path / "evaluated"
    for folder in (student, evaluated / "predictions", evaluated / "likelihoods"):
        folder.mkdir(parents=True)
    entry = {"model": "m", "set": "a", "tasks": ["joint"], "total": 2, "accuracy": 0.5}
    (evaluated / "comparison.json").write_text(json.dumps([entry]))
    (student / "summary.json").write_text(json.dumps({"rows": [{"metric": "loss", "before": 2.0, "after": 1.0}]}))
    predictions = [{"id": "q", "correct": True}, {"id": "p", "correct": False}]
    likelihoods = [{"id": "q", "rationale": -3.0, "answer": -1.0}, {"id": "p", "rationale": None, "answer": -2.0}]
    write_jsonl(evaluated / "predictions" / "m--a.jsonl", predictions)
    write_jsonl(evaluated / "likelihoods" / "m--a.jsonl", likelihoods)
    write_jsonl(student / "predictions_after.jsonl", predictions[:1])
    write_jsonl(student / "likelihoods_after.jsonl", [likelihoods[0] | {"rationale": None}])
    found = read_run(student, evaluated, "mixture", 100, 3)
    assert (found.name, found.seed, found.tasks) == ("mixture, 100", 3, ("joint",))
    assert found.held_out == {"loss": 1.0}
    assert found.outcomes == {
        ("a", "accuracy"): {"q": 1.0, "p": 0.0},
        ("a", "rationale log-likelihood"): {"q": -3.0},
        ("a", "answer log-likelihood"): {"q": -1.0, "p": -2.0},
        (HELD_OUT, "accuracy"): {"q": 1.0},
        (HELD_OUT, "answer log-likelihood"): {"q": -1.0},
    }
