"""mold run with tiny random models: from files to the table, what is skipped and what is done again."""

import json
import re

import pytest
import yaml

from mold.commands import eval as evaluation
from mold.commands import extract, generate, run, train
from mold.commands.run import run_recipe
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from tests.mold.command_line import load
from tests.mold.conftest import write_rows


@pytest.mark.slow
def test_from_files_to_the_table(mold, tiny):
    pytest.importorskip("matplotlib")
    status, out, err = mold("run", tiny, "--data_dir", tiny.parent)
    assert status in (0, None), err
    out = " ".join(out.split())
    assert "own, train: 3 whose question a test set asks are left out" in out
    for text in ("answers", "a pair", "mixture", "beta=5.0", "near", "far", "results.md"):
        assert text in out
    folder = tiny.parent / "out"
    summary = json.loads((folder / "results.json").read_text())
    results = summary["variants"]
    assert list(results) == ["answers", "a pair", "mixture", "beta=5.0"]
    for name, entry in results.items():
        assert entry["seeds"] == [0, 1]
        assert {key: value["total"] for key, value in entry["sets"].items()} == {"near": 6, "far": 3}
        assert ("attention KL" in entry["held_out"]) is (name != "answers")
    # Everything but the answers alone has the baseline's tasks, and so its log-likelihoods.
    measures = {(entry["variant"], entry["set"], entry["measure"]) for entry in summary["comparisons"]}
    sets = ("near", "far", "held out")
    assert {name for name, _, _ in measures} == {"answers", "a pair", "beta=5.0"}
    assert {m for m in measures if m[0] == "answers"} == {("answers", name, "accuracy") for name in sets}
    # The questions near lack rationales.
    assert len({m for m in measures if m[0] == "a pair"}) == 3 + 2 * 2
    assert all(entry["verdict"] == "undecided" for entry in summary["comparisons"])
    # Another seed is another training, another weight another loss.
    assert len({path.name for path in folder.glob("train-*")}) == 8
    # So few steps may move one loss by a last bit or not at all: the terms are compared together.
    terms = ("rationale loss", "answer loss")
    assert len({tuple(results[name]["held_out"][term] for term in terms) for name in results if name != "answers"}) == 3
    # One teacher, one extraction for all that need it.
    assert len(list(folder.glob("extract-*"))) == 1
    assert "<svg" in (folder / "results.svg").read_text()
    assert "attention KL" in (folder / "results.md").read_text()
    assert (folder / "results.md").read_text().count("\n| ") == 5 + 4
    assert "<svg" in (folder / "differences.svg").read_text()
    assert len(list(folder.glob("train-*/report.html"))) == 8
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<svg") == 2
    assert "a pair: " in page
    links = re.findall(r'<a href="([^"]+)">', page)
    assert len(links) == 8
    assert all((folder / link).is_file() for link in links)

    # Again: everything is there. Another option: only what depends on it is run.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-*/done.json")}
    said = []
    assert run_recipe(load(tiny), said.append) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-*/done.json")} == before
    assert sum("is there" in line for line in said) == 1 + 8 + 8
    # A stage whose output is gone or was cut off is done again, no other.
    said.clear()
    victims = [
        next(folder.glob("eval-mixture-seed0-*/comparison.json")),
        next(folder.glob("eval-mixture-seed1-*/*/*.jsonl")),
    ]
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:-9])
    assert run_recipe(load(tiny), said.append) == summary
    again = [line.partition(":")[0] for line in said if "is there" not in line and not line.startswith("data")]
    assert again == ["eval-mixture-seed0", "eval-mixture-seed1"]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-*/done.json")}
    said.clear()
    run_recipe(load(tiny, "variants.a pair.mol_teacher_layer=0", "seeds=[0]"), said.append)
    assert [line for line in said if "is there" not in line and not line.startswith("data")] == [
        f"{path.parent.name.rpartition('-')[0]}: {path.parent.name}"
        for path in sorted(set(folder.glob("*-*/done.json")) - before.keys(), key=lambda p: p.parent.name[0] != "t")
    ]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*-*/done.json")}.items()


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny, monkeypatch):
    small = ("variants={mixture: {}}", "sweep={}")
    whole = run_recipe(load(tiny, *small, f"output_dir={tiny.parent / 'whole'}"), lambda line: None)
    killed, count = load(tiny, *small), 0

    def dies(function, at):
        def wrapped(*arguments, **more):
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            return function(*arguments, **more)

        return wrapped

    for module, name, at in ((extract, "extract", 1), (train, "train", 2), (evaluation, "compare", 1)):
        with monkeypatch.context() as patch:
            count = 0
            patch.setattr(module, name, dies(getattr(module, name), at))
            with pytest.raises(KeyboardInterrupt):
                run_recipe(killed, lambda line: None)
    found = run_recipe(killed, lambda line: None)
    assert found == whole


def test_rationales_by_a_teacher_and_key_words_come_before_training(tiny, monkeypatch):
    """The teacher writes nonsense, so its rationales are put in place of what it wrote."""
    problems = generate_problems(13, seed=6)
    rationales = {problem.id: problem.rationale for problem in problems}
    # Key words of its own, which an example keeps where the teacher's are nonsense.
    write_rows(tiny.parent / "train.jsonl", [{**vars(p), "keywords": [p.rationale.split()[0]]} for p in problems])
    written = generate.write_rationales

    def write(examples, *arguments, **more):
        rows, counts = written(examples, *arguments, **more)
        return [
            row | {"rationale": rationales[row["id"].removeprefix("own-")], "correct": True} for row in rows
        ], counts

    monkeypatch.setattr(generate, "write_rationales", write)
    changes = ["generate={num_shots: 0, prompt: math}", "keywords={num_shots: 1}", "sweep={}", "seeds=[0]"]
    recipe = load(tiny, *changes, "variants={none: {method: step_by_step}}", "baseline=null")
    said = []
    run_recipe(recipe, said.append)
    done = [line.partition(":")[0] for line in said if not line.startswith("data")]
    assert done == ["generate", "keywords", "extract", "train-none-seed0", "eval-none-seed0"]
    (folder,) = (tiny.parent / "out").glob("keywords-*")
    examples = read_examples(folder / "rationales.jsonl")[0]
    assert sorted(e.id for e in examples) == sorted(f"own-problem-6-{n}" for n in range(10))
    assert all(len(example.keywords) == 1 for example in examples)


@pytest.mark.slow
def test_sizes_share_one_extraction_and_one_teacher_is_trained_for_all(tiny):
    changes = ["variants={plain: {method: rationales}, mixture: {}}", "baseline=plain", "sweep={}", "seeds=[0]"]
    teacher = {"model_name_or_path": yaml.safe_load(tiny.read_text())["options"]["teacher_model_name_or_path"]}
    teacher |= {"method": "rationales", "max_steps": 2, "num_eval": 2}
    changes += [f"teacher={json.dumps(teacher)}", "data.own.teacher=9", "train_sizes=[3, 6]"]
    recipe, said = load(tiny, *changes), []
    summary = run_recipe(recipe, said.append)
    done = [line.partition(":")[0] for line in said if not line.startswith("data")]
    cells = [f"{name}-{size}-seed0" for size in (3, 6) for name in ("plain", "mixture")]
    trained = [f"{stage}-{cell}" for cell in cells for stage in ("train", "eval")]
    assert done == ["teacher", "extract", *trained]
    assert list(summary["variants"]) == ["plain, 3", "mixture, 3", "plain, 6", "mixture, 6"]
    assert {(e["variant"], e["size"]) for e in summary["comparisons"]} == {("mixture", 3), ("mixture", 6)}
    assert {(e["variant"], e["examples"]) for e in summary["examples_needed"]} == {("mixture", 3), ("mixture", 6)}
    folder = tiny.parent / "out"
    (extracted,), (taught,) = folder.glob("extract-*"), folder.glob("teacher-*")
    manifest = json.loads((extracted / "signals" / "manifest.json").read_text())
    assert manifest["settings"]["teacher"] == str(taught)
    sizes = [json.loads((path / "summary.json").read_text())["num_train"] for path in folder.glob("train-mixture-*")]
    assert sorted(sizes) == [3, 6]
    if (folder / "sizes.svg").exists():
        assert "training examples" in (folder / "sizes.svg").read_text()
    assert run_recipe(recipe, lambda line: None) == summary


def test_results_are_written_after_every_training(tiny, monkeypatch):
    counts = []
    monkeypatch.setattr(
        run,
        "_write_results",
        lambda root, summary, trainings, say: counts.append(
            [len(entry["seeds"]) for entry in summary["variants"].values()]
        ),
    )
    run_recipe(load(tiny, "variants={a: {beta: 0.0}, b: {}}", "sweep={}", "baseline=a"), lambda line: None)
    assert counts == [[1], [1, 1], [2, 1], [2, 2]]


def only_eval(tiny):
    """A recipe of one training, run; its folder."""
    recipe = load(tiny, "variants={mixture: {}}", "sweep={}", "seeds=[0]")
    run_recipe(recipe, lambda line: None)
    return recipe, tiny.parent / "out"


def test_a_changed_byte_in_a_finished_stage_is_made_anew(tiny):
    recipe, folder = only_eval(tiny)
    table = (folder / "results.json").read_bytes()
    for pattern in ("extract-*/signals/*.safetensors", "train-*/model.safetensors", "eval-*/predictions/*.journal"):
        victim = sorted(folder.glob(pattern))[0]
        data = victim.read_bytes()
        victim.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        said = []
        run_recipe(recipe, said.append)
        stage = victim.relative_to(folder).parts[0]
        again = [line for line in said if "is there" not in line and not line.startswith("data")]
        assert len(again) == 1
        assert f"{stage} ({victim.relative_to(folder / stage)} is not as it was written)" in again[0]
        assert victim.read_bytes() == data
    assert (folder / "results.json").read_bytes() == table


def test_checkpoints_of_a_finished_training_may_go(tiny):
    import shutil

    recipe, folder = only_eval(tiny)
    for checkpoint in folder.glob("train-*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    said = []
    run_recipe(recipe, said.append)
    assert all("is there" in line for line in said if not line.startswith("data"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', "{}", "[" * 100_000])
def test_a_damaged_note_of_a_stage_is_named(mold, tiny, text):
    recipe, folder = only_eval(tiny)
    (done,) = folder.glob("extract-*/done.json")
    done.write_text(text)
    with pytest.raises(ValueError, match=r"extract-\w+/done\.json: is not as mold run wrote it"):
        run_recipe(recipe, lambda line: None)
