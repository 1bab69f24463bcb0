"""What a recipe's file may hold."""

from dataclasses import replace

from mold.commands.recipe import Recipe, load_recipe
from tests.mold.command_line import load, refusal

PACKAGED = [
    "small",
    "small-ablation",
    "llama3-8b-gpt2-large",
    "llama3-8b-gpt2-large-commonsense",
    "qwen2.5-32b-tinyllama",
]


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
    (tmp_path / "svamp").mkdir()
    assert load_recipe("small", str(tmp_path)).place(mine.data["svamp"]["dataset"]) == f"{tmp_path}/svamp"


def test_the_papers_hyperparameters():
    for name in PACKAGED[2:]:
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
