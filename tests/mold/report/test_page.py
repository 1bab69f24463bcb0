import itertools
import json
import re
import sys
import warnings

import numpy as np
import pytest

from mold.report import drawing, maps, plots
from mold.report.page import write_report
from mold.report.results import number, training_rows, training_sentences

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NASTY = "<script>alert('&')</script> costs $3.50 or $4, 答案是五 🍎 \\$ \x00"


def attention_map(steps, key_words, layers=(3, 4), seed=0, identity="svamp-1"):
    random = np.random.default_rng(seed)
    s, m = len(steps), len(key_words)
    seen = np.arange(s)[:, None] >= np.sort(random.integers(0, s, m))
    maps = {
        name: (random.gamma(1, 1, (s, m)) * seen).tolist() for name in ("teacher", "student_before", "student_after")
    }
    weights = {
        "teacher_layer_weights": [1 / layers[0]] * layers[0],
        "student_layer_weights_before": [1 / layers[1]] * layers[1],
        "student_layer_weights_after": random.dirichlet(np.ones(layers[1])).tolist(),
    }
    text = {"id": identity, "question": steps[0], "rationale": " ".join(steps[1:])}
    return {**text, "steps": steps, "key_words": key_words, **maps, **weights, "kl_before": 0.41, "kl_after": 0.087}


def metrics_rows(steps=7, layers=4):
    rows = []
    for step in range(0, steps * 10, 10):
        weights = [1 / layers + step / 1e5] + [1 / layers - step / 1e5 / (layers - 1)] * (layers - 1)
        losses = {f"loss{part}": 2.0 / (1 + step) for part in ("", "_rationale", "_answer", "_attention")}
        rows.append({"step": step, **losses, "router_weights": weights, "router_entropy": 1.3 - step / 100})
        if step % 20 == 0:
            rows.append({"step": step, **{f"eval_{name}": value for name, value in losses.items()}})
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "tiny-run"
    folder.mkdir()
    rows = [
        {"metric": "accuracy", "unit": "%", "before": 0.25, "after": 0.5, "verdict": "better"}
        | {"intervals": {"before": [0.11, 0.47], "after": [0.3, 0.7], "change": [0.1, 0.4]}},
        {"metric": "rationale loss", "unit": "nats a token", "before": 1.5, "after": 1.75},
        {"metric": "answer loss", "unit": "nats a token", "before": 1.0, "after": float("nan")},
        {"metric": "attention KL", "unit": "nats", "before": None, "after": 0.0123456},
    ]
    summary = {"model": "student-1", "teacher": "teacher-2", "rows": rows, "num_train": 1234, "num_eval": 20}
    summary |= {"num_without_signal": 3, "seconds": {"train": 61.5}, "versions": {"torch": "2.11.0"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    steps = ["Tom has 3 apples.", NASTY, "So 3 + 4 = 7."]
    maps = [
        attention_map(steps, ["3", "$3.50", "四", "🍎", "7"]),
        attention_map(steps, list("1234567"), identity="b<2>"),
    ]
    (folder / "attention_maps.json").write_text(json.dumps(maps))
    (folder / "config.yaml").write_text("loss:\n  beta: 1.0\n  note: '<b>'\n")
    write_lines(folder / "metrics.jsonl", metrics_rows())
    for when, right in (("before", 5), ("after", 11)):
        problem = {"question": NASTY, "answer": "7", "completion": f"{NASTY} {when}-completion"}
        predictions = [{"id": i, **problem, "prediction": None if i else "7", "correct": i < right} for i in range(20)]
        write_lines(folder / f"predictions_{when}.jsonl", predictions)
    return folder


def test_report_holds_everything_and_refers_to_nothing_outside(run_folder):
    path = write_report(run_folder)
    html = path.read_text("utf-8")
    assert path == run_folder / "report.html"
    for text in (
        "tiny-run",
        "student-1",
        "teacher-2",
        "1,234 examples",
        "3 of them without",
        "on 20 held-out problems",
    ):
        assert text in html
    assert html.count("<svg") == 2 * 2 + 2
    for text in (
        "accuracy, %",
        "KL 0.087",
        "router weight",
        "attention loss",
        "after-completion",
        "61.5",
        "2.11.0",
    ):
        assert text in html
    assert "6 turned right, 0 turned wrong, 5 were right both times, 9 wrong both times" in html
    assert "The first 12 of 20" in html
    assert html.count("<details><summary>completions") == 12
    order = [html.index(f"<h2>{title}") for title in ("Before", "Losses", "Which", "Where", "Predictions", "How")]
    assert order == sorted(order)
    for target in re.findall(r'(?:src|href|resource|action)\s*=\s*["\']([^"\']*)', html):
        assert target.startswith(("data:", "#"))
    assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink))|@import|url\((?!#)", html)
    assert [p.name for p in run_folder.iterdir() if p.name.startswith(".")] == []


def test_text_is_escaped_everywhere(run_folder):
    html = write_report(run_folder).read_text("utf-8")
    assert "<script" not in html
    assert "<b>'" not in html
    assert "b&lt;2&gt;" in html
    assert "&lt;script&gt;" in html
    assert "costs $3.50 or $4, 答案是五 🍎" in html


def test_a_change_is_judged_where_it_has_an_interval(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    found = {row.pop("metric"): tuple(row.values()) for row in training_rows(summary)}
    assert found == {
        "accuracy, %": ("25.0 (11.0 to 47.0)", "50.0 (30.0 to 70.0)", "+25.0 (+10.0 to +40.0)", "better"),
        "rationale loss, nats a token": ("1.5", "1.75", "+0.25", ""),
        "answer loss, nats a token": ("1", "NaN", "NaN", "worse"),
        "attention KL, nats": ("\N{EN DASH}", "0.01235", "\N{EN DASH}", ""),
    }
    summary["rows"][1] |= {"after": 1.25, "intervals": {"change": [-0.5, 0]}, "verdict": "may be chance"}
    assert training_rows(summary)[1]["change"] == "\N{MINUS SIGN}0.25 (\N{MINUS SIGN}0.5 to 0)"
    said = "Accuracy on 20 held-out problems, in %: 50.0 (30.0 to 70.0) after training, 25.0 (11.0 to 47.0) before; "
    assert training_sentences(summary)[0] == said + "change +25.0 (+10.0 to +40.0): better."
    summary["rows"][0] |= {"before": None, "intervals": {"after": [0.3, 0.7]}}
    assert training_sentences(summary)[0].endswith("50.0 (30.0 to 70.0) after training; not measured before.")


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "attention_maps.json", "predictions_before.jsonl", "predictions_after.jsonl"],
)
def test_a_missing_file_is_said_and_the_rest_is_shown(run_folder, name):
    (run_folder / name).unlink()
    html = write_report(run_folder).read_text("utf-8")
    assert f"{name} is not in this folder" in html
    assert html.count("is not in this folder") == 1
    assert html.count("<svg") == {"metrics.jsonl": 4, "attention_maps.json": 2}.get(name, 6)


def test_a_summary_alone_is_enough_and_no_summary_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"model": "m", "rows": []}')
    assert "holds no measurements" in write_report(tmp_path).read_text("utf-8")


def test_only_a_torn_last_line_is_left_out(run_folder):
    path = run_folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 70, "loss": 1, "note": "é'.encode()[:-1])
    assert "last line of metrics.jsonl is half written" in write_report(run_folder).read_text("utf-8")
    path.write_bytes(b'{"step": 1, "lo\n' + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: is no JSON"):
        write_report(run_folder)
    path.write_bytes(whole + b"[1]\n")
    with pytest.raises(ValueError, match="is a list, must be an object"):
        write_report(run_folder)
    path.write_bytes(whole + b'{"step": null}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:\d+: step is None, must be a number"):
        write_report(run_folder)


def test_a_failed_report_leaves_the_old_one(run_folder):
    old = write_report(run_folder).read_bytes()
    maps = json.loads((run_folder / "attention_maps.json").read_text())
    maps[1]["teacher"] = maps[1]["teacher"][:-1]
    (run_folder / "attention_maps.json").write_text(json.dumps(maps))
    with pytest.raises(ValueError, match=r"example 'b<2>': teacher: is \(2, 7\), must be \(3, 7\)"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_bytes() == old
    assert sorted(p.name for p in run_folder.glob("*report*")) == ["report.html"]


def test_the_last_row_of_a_step_wins(run_folder, monkeypatch):
    rows = metrics_rows()
    write_lines(run_folder / "metrics.jsonl", [*rows, {"step": 20, "loss": 9.0}, {"step": 10, "loss": 8.0}])
    drawn = []
    monkeypatch.setattr(plots, "loss_curves", lambda metrics: drawn.extend(metrics) or drawing.Plot(None, []))
    write_report(run_folder)
    training = {row["step"]: row["loss"] for row in drawn if "loss" in row}
    assert list(training) == [0, 10, 20, 30, 40, 50, 60]
    assert (training[10], training[20], training[30]) == (8.0, 9.0, rows[5]["loss"])
    assert [row["step"] for row in drawn if "eval_loss" in row] == [0, 20, 40, 60]


@pytest.mark.parametrize(("s", "m"), [(1, 2), (1, 6), (6, 2), (4, 16), (4, 17), (40, 40), (41, 40), (60, 80), (9, 500)])
def test_maps_of_all_sizes(s, m):
    steps = [f"Step {i} says something rather long about {i} apples and {i + 1} pears in a basket." for i in range(s)]
    figure, remarks = maps.attention_comparison(attention_map(steps, [str(7 * j) for j in range(m)], (1, 1)))
    svg = drawing.figure_to_svg(figure)
    assert len(figure.axes) == 4
    assert len(svg) < 600_000
    widths = [axes.get_position().width * figure.get_figwidth() for axes in figure.axes[:3]]
    shape = figure.axes[0].images[0].get_array().shape[:2]
    assert shape == (min(s, 40), min(m, 40))
    assert min(widths) / shape[1] > 0.115  # the inches that a key word turned upright needs
    assert [
        f"The {n} {name} are drawn as 40 groups" in " ".join(remarks) for n, name in ((s, "steps"), (m, "key words"))
    ] == [
        s > 40,
        m > 40,
    ]


def test_a_long_map_is_drawn_in_groups(monkeypatch):
    monkeypatch.setattr(maps, "MOST_DRAWN", 2)
    attention = [[4.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]]
    entry = attention_map(list("abcd"), list("5678")) | {"teacher": attention}
    figure, remarks = maps.attention_comparison(entry)
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in drawn if text.startswith((".", "1."))] == ["1.00", ".25", ".75"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["5 +1", "7 +1"]
    assert {"1\N{EN DASH}2", "3\N{EN DASH}4", "a", "c"} <= set(drawn)
    assert len(remarks) == 2


def test_labels_of_every_script():
    steps = [NASTY, "", "所以答案是橱柜" * 30, "$x^{", "a" * 200, "\ud83d lone surrogate"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, _ = maps.attention_comparison(attention_map(steps, ["$", "$5$", "橱柜", "🍎"]))
        svg = drawing.figure_to_svg(figure)
    for label in ("&lt;script&gt;", ">$5$<", ">$x^{<", "橱柜", "…", "🍎"):
        assert label in svg
    svg.replace("\ufffd", "").encode("utf-8")


def same_map(attention, steps, key_words):
    names = ("teacher", "student_before", "student_after")
    return {"steps": steps, "key_words": key_words} | dict.fromkeys(names, attention)


@pytest.mark.parametrize(("attention", "said"), [([[0.3], [0.1]], "share is 1,"), ([[0.0, 0.0]] * 2, "share is 0,")])
def test_a_map_that_is_the_same_everywhere_is_a_sentence(attention, said):
    figure, (remark,) = maps.attention_comparison(same_map(attention, ["a", "b"], ["3", "4"][: len(attention[0])]))
    assert figure is None
    assert said in remark


def test_shares_zeros_and_nan_are_told_apart():
    attention = [[2.0, 0.0, 0.0], [1.0, 3.0, 0.0], [1.0, float("nan"), 1.0]]
    figure, _ = maps.attention_comparison(same_map(attention, ["a", "b", "c"], ["1", "2", "3"]))
    cells = figure.axes[0].images[0].get_array()
    assert (cells[..., 3] == 0).tolist() == [[False, True, True], [False, False, True], [False] * 3]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"1.00", ".25", ".75", "NaN"} <= set(texts)
    assert "NaN" in figure.texts[0].get_text()


@pytest.mark.parametrize("top", [3e-5, 0.0481, 0.1, 0.37, 1.0, 73.0])
@pytest.mark.parametrize("height", [0.3, 1.0, 2.4])
def test_ticks_of_a_colour_bar_are_round_and_apart(top, height):
    for scale in (drawing.from_zero(np.array([top])), drawing.around(1 / 30, np.array([1 / 30 + top]))):
        figure = drawing.make_figure(2, 3)
        drawing.colour_bar(figure, 0, 0, height, scale, "share")
        places, names = figure.axes[0].get_yticks(), [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert len(places) >= 2 or height < 0.5
        assert (np.diff(places) * height > 0.179).all()
        assert all(len(name.strip("-0.e+").replace("e-0", "")) <= 4 for name in names), names


def test_nan_in_a_metric_is_shown():
    rows = metrics_rows()
    rows[3]["loss"] = rows[5]["loss"] = float("nan")
    gone = [{**row, "grad_norm": float("inf") if row["step"] else 1.0} for row in rows if "loss" in row]
    svg = drawing.figure_to_svg(plots.loss_curves(gone).figure)
    assert re.search(r">NaN at step 20 and 1 more<", svg)
    assert ">inf at step 10 and" in svg
    entry = attention_map(["a", "b"], ["1", "2"]) | {
        "teacher_layer_weights": [0.5, float("nan")],
        "kl_after": float("nan"),
    }
    assert ">NaN at layer 1<" in drawing.figure_to_svg(maps.teacher_student_layer_weights(entry).figure)
    assert ">KL NaN nats<" in drawing.figure_to_svg(maps.attention_comparison(entry).figure)


@pytest.mark.parametrize("words", [3, 16])
def test_what_is_written_over_maps_is_not_written_over(words):
    """Sixteen key words are the most that stand side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    entry = attention_map(["What is asked?", "A step."], [str(100 + j) for j in range(words)])
    figure = maps.attention_comparison(entry | {"kl_before": 0.000123, "kl_after": 0.000234}).figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    said = [text for text in figure.findobj(Text) if re.match(r"teacher|student|KL \d", text.get_text())]
    assert len(said) == 5
    for one, other in itertools.combinations([text.get_window_extent(renderer) for text in said], 2):
        assert not one.overlaps(other)


def test_what_does_not_vary_is_a_sentence():
    figure, said = plots.loss_curves([{"step": step, "loss": 1.0, "grad_norm": step} for step in (1, 2)])
    assert [axes.get_title("left") for axes in figure.axes] == ["gradient norm"]
    assert said == ["Loss: 1 all 2 times that it was logged."]
    assert plots.loss_curves([{"step": 3, "loss": 1.5}]) == (None, ["Loss: 1.5 the one time it was logged."])
    figure, said = plots.layer_weights_over_training([{"step": 1, "router_weights": [0.25] * 4}])
    assert (figure, said) == (None, ["All 4 layers weighed 0.25 at each of the 1 logged steps."])
    entry = attention_map(["a", "b"], ["1", "2"])
    figure, said = maps.teacher_student_layer_weights(entry)
    assert (len(figure.axes), said) == (1, ["All 3 layers of the teacher weigh 0.333."])
    same = entry | {"student_layer_weights_after": [0.25] * 4}
    assert maps.teacher_student_layer_weights(same)[1][1] == "All 4 layers of the student weigh 0.25, before and after."


def test_loss_curves_take_few_many_and_uneven_steps():
    figure, _ = plots.loss_curves(metrics_rows(500))
    assert [axes.get_title("left") for axes in figure.axes][3] == "attention loss"
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4 + ["linear"]
    assert [len(axes.lines) for axes in figure.axes] == [3] * 4 + [2]
    with pytest.raises(ValueError, match="0 rows without a loss"):
        plots.loss_curves([])


def test_router_weights_by_the_nearest_logged_step():
    rows = [
        {"step": step, "router_weights": [weight, 1 - weight]} for step, weight in ((0, 0.5), (10, 0.7), (100, 1.0))
    ]
    figure, _ = plots.layer_weights_over_training(rows)
    cells = figure.axes[0].images[0].get_array()
    scale = drawing.around(0.5, np.array([0.0, 1.0]))
    expected = drawing.colours(np.array([[0.5, 0.7, 0.7, 1.0], [0.5, 0.3, 0.3, 0.0]]), scale, drawing.DIVERGING)
    np.testing.assert_allclose(cells[:, [0, 25, 215, 225]], expected)
    assert "1/2" in drawing.figure_to_svg(figure)
    one, _ = plots.layer_weights_over_training([{"step": 5, "router_weights": [0.9, 0.1]}])
    assert one.axes[0].images[0].get_array().shape == (2, 400, 4)
    with pytest.raises(ValueError, match="router_weights: is in 2 rows"):
        plots.layer_weights_over_training([*rows[:1], {"step": 1, "router_weights": [1.0]}])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mold-distill\[report\]'"):
        drawing.make_figure(1, 1)


def test_numbers_as_a_reader_wants_them():
    values = [None, float("nan"), float("-inf"), 3, 0.25, 1234.5678, 4.2e-7]
    assert [number(value) for value in values] == ["\N{EN DASH}", "NaN", "-inf", "3", "0.25", "1235", "4.2e-07"]
