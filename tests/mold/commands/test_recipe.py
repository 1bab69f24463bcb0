"""mold run with tiny random models: from files to the table, what is skipped, what is refused."""

import json
from dataclasses import replace

import pytest
import yaml

from mold.commands import recipe as recipes
from mold.commands import stages, train
from mold.commands.recipe import Recipe, collect, load_recipe, run_recipe
from mold.data.examples import question_key
from mold.data.problems import generate_problems
from mold.data.readers import read_examples
from tests.mold.commands.test_cli import refusal
from tests.mold.conftest import write_rows

PACKAGED = [
    "small",
    "small-ablation",
    "llama3-8b-gpt2-large",
    "llama3-8b-gpt2-large-commonsense",
    "qwen2.5-32b-tinyllama",
]


@pytest.fixture
def tiny(models, tmp_path):
    """A recipe in a file: ten problems to train on, two test sets, one of which shares three questions with them."""
    rows = [vars(problem) for problem in generate_problems(16, seed=6)]
    write_rows(tmp_path / "train.jsonl", rows[:13])
    write_rows(tmp_path / "near.jsonl", [row | {"rationale": None} for row in rows[10:]])
    write_rows(tmp_path / "far.jsonl", [vars(problem) for problem in generate_problems(4, seed=9)])
    values = {
        "output_dir": str(tmp_path / "out"),
        "data": {
            "own": {"dataset": "{data_dir}/train.jsonl", "train": "all"},
            "near": {"dataset": "{data_dir}/near.jsonl", "test": "all"},
            "far": {"dataset": "{data_dir}/far.jsonl", "test": 3},
        },
        "options": {
            "teacher_model_name_or_path": str(models / "teacher"),
            "model_name_or_path": str(models / "student"),
            "max_new_tokens": 6,
            "num_eval": 3,
            "num_maps": 1,
            "disable_tqdm": True,
        },
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1},
        "variants": {
            "answers": {"method": "answers"},
            "a pair": {"method": "single_layer", "mol_teacher_layer": 3, "mol_student_layer": 1},
            "mixture": None,
        },
        "sweep": {"beta": [5.0]},
        "seeds": [0, 1],
        "baseline": "mixture",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def load(tiny, *changes):
    return load_recipe(str(tiny), str(tiny.parent), changes)


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

    for module, name, at in ((train, "extract", 1), (train, "train", 2), (stages, "compare", 1)):
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
    written = stages.write_rationales

    def write(examples, *arguments, **more):
        rows, counts = written(examples, *arguments, **more)
        return [
            row | {"rationale": rationales[row["id"].removeprefix("own-")], "correct": True} for row in rows
        ], counts

    monkeypatch.setattr(stages, "write_rationales", write)
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


def test_no_question_is_trained_on_and_tested(tiny):
    train, tests, remarks = collect(load(tiny))
    asked = {question_key(example.question) for test in tests.values() for example in test}
    assert (len(train), len(asked)) == (10, 9)
    assert not {question_key(example.question) for example in train} & asked
    assert "near, test: 6 rows, 6 kept" in remarks
    assert collect(load(tiny)) == (train, tests, remarks)
    # One file for both: split by question. The rest of the recipe does not matter.
    own = {"dataset": str(tiny.parent / "train.jsonl"), "train": 5, "test": 4}
    train, tests, _ = collect(replace(load(tiny), data={"own": own}))
    assert (len(train), len(tests["own"])) == (5, 4)
    own["train"] = 10
    with pytest.raises(ValueError, match=r"data\.own\.train is 10, must be from 1 to the 9 examples left, or all"):
        collect(replace(load(tiny), data={"own": own}))
    twice = {name: {"dataset": own["dataset"], "test": "all"} for name in ("a", "b")}
    far = {"far": {"dataset": str(tiny.parent / "far.jsonl"), "train": "all"}}
    assert "13 questions are in a and in b, tests both" in collect(replace(load(tiny), data=twice | far))[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("outputs=x", "has the unknown key 'outputs', must be of output_dir, data,"),
        ("data={}", "has no data"),
        ("data.own.path=x", "data.own has the unknown key 'path', must be of dataset,"),
        ("data.own.dataset=none.jsonl", "dataset: none.jsonl does not exist"),
        ("data.far.test=5", "data.far.test is 5, must be from 1 to the 4 examples left, or all"),
        ("data.far.test=some", "data.far.test is 'some', must be from 1"),
        ("options.learning_rte=1", "has the unknown option 'learning_rte'; did you mean learning_rate?"),
        ("variants.mixture={betta: 1}", "recipe: mixture has the unknown option 'betta'"),
        ("baseline=mixtur", "recipe: baseline is 'mixtur', must be one of answers, a pair, mixture, beta=5.0"),
        ("variants.mixture={beta: -1}", "beta: is -1.0, must be in"),
        ("generate={num_tries: 3}", "num_tries: is 3 at temperature 0.0"),
        ("generate={prompt: maths}", "prompt: is 'maths', must be one of"),
        ("memory_gib=0.001", r"needs 0.0 GiB of memory, memory_gib is 0.001"),
        ("output_dir", "--set: is 'output_dir', must be KEY=VALUE"),
        ("output_dir.x=1", "--set: output_dir.x goes through 'output_dir', which holds no keys"),
    ],
)
def test_a_dry_run_finds_what_is_wrong(mold, tiny, change, message):
    assert message in refusal(mold("run", tiny, "--data_dir", tiny.parent, "--dry_run", "--set", change))
    assert not (tiny.parent / "out").exists()


def test_a_dry_run_says_what_there_is(mold, tiny):
    status, out, _ = mold("run", tiny, "--data_dir", tiny.parent, "--dry_run")
    assert status in (0, None)
    for text in ("data near, test: 6 of 6 rows", "extract: ", "train: ", "train a pair: 2 seeds", "GiB at most, "):
        assert text in out
    assert not (tiny.parent / "out").exists()


def test_recipes_that_there_are_not(mold, tmp_path):
    assert "recipe: is 'big', must be one of llama3" in refusal(mold("run", "big"))
    (tmp_path / "mine.yaml").write_text("base: big\n")
    assert "recipe: is 'big', must be one of" in refusal(mold("run", tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("[")
    assert "is no YAML" in refusal(mold("run", tmp_path / "mine.yaml"))


def test_a_recipe_based_on_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: small\ntrain: {beta: 2.0}\nvariants: {only: {}}\noutput_dir: here\n")
    mine, small = load_recipe(str(tmp_path / "mine.yaml"), "there"), load_recipe("small", "there")
    assert mine.train == small.train | {"beta": 2.0}
    assert (mine.variants, mine.output_dir, mine.data) == ({"only": {}}, "here", small.data)
    assert mine.data["svamp"]["dataset"] == "there/svamp"


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_pass_a_dry_run(name, tmp_path):
    """With files of the right names in place of the data sets."""
    recipe = load_recipe(name, str(tmp_path))
    local = {}
    for key, source in recipe.data.items():
        rows = [vars(problem) for problem in generate_problems(1100, seed=len(local))]
        write_rows(tmp_path / f"{key}.jsonl", rows)
        parts = {part: source[part] for part in ("train", "test") if part in source}
        local[key] = {"dataset": str(tmp_path / f"{key}.jsonl"), **parts}
    shapes = dict(recipe.shapes)
    options = dict(recipe.options)
    if options["teacher_model_name_or_path"] == "smollm2-135m-instruct":
        shapes["smollm2-135m-instruct"] = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}
    lines = list(recipes.dry_run(replace(recipe, data=local, shapes=shapes)))
    assert any(line.startswith("train: ") and "GiB" in line for line in lines)
    assert not any("not checked" in line for line in lines)


def test_the_papers_hyperparameters():
    for name in PACKAGED[2:]:
        recipe = load_recipe(name)
        train = {**recipe.train, **recipe.variants["mixture"]}
        expected = {"alpha": 0.5, "beta": 1.0, "tau_1": 0.1, "tau_2": 0.5, "per_device_train_batch_size": 16}
        assert train | expected == train
        assert len(recipe.seeds) == 3


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


def test_a_teacher_learns_no_test_question(tiny):
    recipe = load(tiny, "data.own.teacher=all", "teacher={}")
    _, tests, _ = collect(recipe)
    learned = recipes.teacher_examples(recipe, tests)
    asked = {question_key(example.question) for test in tests.values() for example in test}
    assert len(learned) == 10
    assert not {question_key(example.question) for example in learned} & asked
    with pytest.raises(ValueError, match="must have a source with teacher"):
        recipes.teacher_examples(load(tiny), tests)


def test_results_are_written_after_every_training(tiny, monkeypatch):
    counts = []
    monkeypatch.setattr(
        recipes,
        "_write_results",
        lambda root, summary, say: counts.append([len(entry["seeds"]) for entry in summary["variants"].values()]),
    )
    run_recipe(load(tiny, "variants={a: {beta: 0.0}, b: {}}", "sweep={}", "baseline=a"), lambda line: None)
    assert counts == [[1], [1, 1], [2, 1], [2, 2]]


def test_a_sweep_over_every_pair_of_layers(tiny):
    recipe = load(tiny, "variants={}", "sweep={single_layer: all, tau_1: [0.5]}")
    trainings = recipe.trainings()
    assert len(trainings) == 4 * 3 + 1
    assert trainings["single_layer=3,1"] == {
        "method": "single_layer",
        "mol_teacher_layer": 3,
        "mol_student_layer": 1,
    }
    assert trainings["tau_1=0.5"] == {"tau_1": 0.5}
    few = replace(recipe, options={**recipe.options, "student_num_layers": 2})
    assert len(few.trainings()) == 4 * 2 + 1


def test_a_recipe_has_defaults_of_its_own():
    first, second = Recipe("a", {}, {}), Recipe("b", {}, {})
    assert first.trainings() == {"mixture": {}}
    assert first.variants is not second.variants
