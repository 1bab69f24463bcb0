"""What a recipe's file may hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mold.commands.recipe import Recipe, load_recipe
from tests.mold.command_line import load, refusal

PACKAGED = sorted(path.stem for path in (Path(__file__).parents[3] / "mold" / "recipes").glob("*.yaml"))
PAPERS = ["llama3-8b-gpt2-large", "llama3-8b-gpt2-large-commonsense", "qwen2.5-32b-tinyllama"]


def test_recipes_that_there_are_not(mold, tmp_path):
    first = ", ".join(PACKAGED[:3])
    assert f"recipe: is 'big', must be one of {first}" in refusal(mold("run", "big"))
    assert f"recipe: is '', must be one of {first}" in refusal(mold("run"))
    (tmp_path / "mine.yaml").write_text("base: big\n")
    assert "recipe: is 'big', must be one of" in refusal(mold("run", tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("[")
    assert "is no YAML" in refusal(mold("run", tmp_path / "mine.yaml"))


def test_a_recipe_based_on_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: small\ntrain: {beta: 2.0}\nvariants: {only: {}}\noutput_dir: here\n")
    mine, small = load_recipe(str(tmp_path / "mine.yaml"), "there"), load_recipe("small", "there")
    assert mine.train == small.train | {"beta": 2.0}
    assert (mine.variants, mine.output_dir, mine.data) == ({"only": {}}, "here", small.data)
    (tmp_path / "svamp").mkdir()
    assert load_recipe("small", str(tmp_path)).place(mine.data["svamp"]["dataset"]) == f"{tmp_path}/svamp"


def test_the_papers_hyperparameters():
    for name in PAPERS:
        recipe = load_recipe(name)
        train = {**recipe.train, **recipe.variants["mixture"]}
        expected = {"alpha": 0.5, "beta": 1.0, "tau_1": 0.1, "tau_2": 0.5, "per_device_train_batch_size": 16}
        assert train | expected == train
        assert len(recipe.seeds) == 3


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


@pytest.mark.parametrize("name", ["train", "Train", "a/b", "a=b", "../x", "", ".", "a@b", "a\\b"])
def test_names_of_sources_that_would_be_files_or_options(tiny, name):
    recipe = yaml.safe_load(tiny.read_text())
    recipe["data"][name] = {"dataset": "x.jsonl", "test": "all"}
    tiny.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="recipe: data has a source named "):
        load(tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data=[1]", r"recipe: data is \[1\], must be keys with values"),
        ("data.own=3", "recipe: data.own is 3, must be keys with values"),
        ("data.own.dataset=3", "recipe: data.own.dataset is 3, must be a text"),
        ("data.own.dataset=null", "recipe: data.own.dataset is None, must be a text"),
        ("data.own={test: all}", "recipe: data.own.dataset is None, must be a text"),
        ("options=[]", r"recipe: options is \[\], must be keys with values"),
        ("variants=[a]", r"recipe: variants is \['a'\], must be keys with values"),
        ("variants.mixture=3", "recipe: variants.mixture is 3, must be options"),
        ("variants={}", "recipe: variants is empty, must name at least one training"),
        ("sweep.beta=3", "recipe: sweep.beta is 3, must be a list of values"),
        ("sweep.single_layer=[3]", r"recipe: sweep.single_layer is \[3\], must be pairs of layers, or all"),
        ("seeds=3", "recipe: seeds is 3, must be a list"),
        ("seeds=[]", r"recipe: seeds is \[\], must be different whole numbers"),
        ("seeds=[1, 1]", r"recipe: seeds is \[1, 1\], must be different whole numbers"),
        ("train_sizes=[0]", r"recipe: train_sizes is \[0\], must be different numbers"),
        ("memory_gib=much", "recipe: memory_gib is 'much', must be a number"),
        ("baseline=3", "recipe: baseline is 3, must be a text"),
        ("train={lora_rank: 3}", "recipe: train has the unknown option 'lora_rank'"),
        ("data.own.max_value=100", "data.own.max_value is given, must not be with dataset='{data_dir}/train.jsonl'"),
        (
            "data.own={dataset: generated, format: gsm8k}",
            "data.own.format is given, must not be with dataset='generated'",
        ),
        ("train={eval_sets: [a]}", "recipe: train.eval_sets: is given, must not be"),
        ("options={gpu: l4}", "recipe: options has the unknown option 'gpu'; it is one of mold plan"),
        ("options={output_dir: a}", "recipe: options.output_dir: is given, must not be: mold run sets it"),
        ("train={seed: 3}", "recipe: train.seed: is given, must not be"),
        ("generate={beta: 3}", "recipe: generate has the unknown option 'beta'; it is one of mold train, eval"),
        ("keywords={temperature: 1}", "recipe: keywords has the unknown option 'temperature'"),
        ("seeds=[", "--set: seeds is no YAML"),
        ("seeds=" + "[" * 100_000, "--set: seeds is nested too deep"),
    ],
)
def test_values_that_no_recipe_has(tiny, change, message):
    emptied = ["sweep={}"] if change == "variants={}" else []
    with pytest.raises(ValueError, match=message):
        load(tiny, *emptied, change)


def test_options_common_to_all_stages_go_to_those_that_take_them(tiny):
    recipe = load(tiny, "options.temperature=0.0", "generate={}", "train.learning_rate=1", "options.student_layers=[0]")
    assert recipe.values("generate")["temperature"] == 0.0
    assert not recipe.values("train", recipe.train).keys() & {"temperature"}
    assert recipe.values("train", recipe.train)["learning_rate"] == 1
    assert not recipe.values("extract", recipe.train).keys() & {"learning_rate", "student_layers", "max_new_tokens"}
    assert not recipe.values("eval").keys() & {"num_eval", "num_maps", "temperature"}
    # Without the stage that takes it, nothing does.
    with pytest.raises(ValueError, match="recipe: options has the unknown option 'temperature'"):
        load(tiny, "options.temperature=0.0")


def test_a_recipe_that_is_its_own_base(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml has itself as its base"):
        load_recipe(str(tmp_path / "a.yaml"))
