"""mold run --dry_run: what is wrong is found, what there is is said."""

from dataclasses import replace

import pytest

from mold import plan
from mold.commands.dry_run import dry_run
from mold.commands.recipe import load_recipe
from mold.data.problems import generate_problems
from tests.mold.command_line import refusal
from tests.mold.commands.test_recipe import PACKAGED, PAPERS
from tests.mold.conftest import write_rows


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


def once(function):
    """What a function finds for a model's configuration and other arguments; most recipes have the same."""
    found = {}

    def find(config, *arguments, **options):
        key = config.to_json_string(use_diff=False), repr(arguments), repr(options)
        if key not in found:
            found[key] = function(config, *arguments, **options)
        return found[key]

    return find


@pytest.fixture(scope="module")
def planned_once():
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("plan_step", "inference_peak"):
            monkeypatch.setattr(f"mold.commands.dry_run.{name}", once(getattr(plan, name)))
        yield


@pytest.mark.usefixtures("planned_once")
@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_pass_a_dry_run(name, tmp_path):
    """With files of the right names in place of the data sets."""
    recipe = load_recipe(name, str(tmp_path))
    local = {}
    for key, source in recipe.data.items():
        if source["dataset"] == "generated":
            local[key] = source
            continue
        rows = [vars(problem) for problem in generate_problems(1100, seed=len(local))]
        write_rows(tmp_path / f"{key}.jsonl", rows)
        parts = {part: source[part] for part in ("train", "test", "teacher") if part in source}
        local[key] = {"dataset": str(tmp_path / f"{key}.jsonl"), **parts}
    shapes = dict(recipe.shapes)
    if name not in PAPERS:
        shapes["smollm2-135m-instruct"] = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}
    lines = list(dry_run(replace(recipe, data=local, shapes=shapes)))
    assert any(line.startswith("train: ") and "GiB" in line for line in lines)
    assert not any("not checked" in line for line in lines)


def test_a_folder_of_data_that_is_not_there_is_no_name_on_the_hub(mold, tiny):
    for data_dir in ("data", "nowhere", tiny.parent / "none"):
        message = refusal(mold("run", tiny, "--data_dir", data_dir, "--dry_run"))
        assert f"dataset: {data_dir}/train.jsonl does not exist, must be below --data_dir" in message
    changed = ("--set", "data.own.dataset='{data_dir}/svamp'")
    message = refusal(mold("run", tiny, "--data_dir", "owner", "--dry_run", *changed))
    assert "dataset: owner/svamp does not exist" in message


def test_a_recipe_for_a_gpu_is_checked_without_one(mold, tiny):
    status, _, err = mold("run", tiny, "--data_dir", tiny.parent, "--dry_run", "--set", "train.bf16=true")
    assert status == 0, err
