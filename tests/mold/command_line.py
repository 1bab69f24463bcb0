"""What the tests of the commands share: options of a small run, and the one line of a refusal."""

from mold.commands.recipe import load_recipe

FAST = ["--disable_tqdm", "true", "--max_new_tokens", "6"]
"""Of every command that generates."""


def options_of(models, problems, folder, **more):
    """Of mold train."""
    options = {
        "dataset": problems,
        "teacher_model_name_or_path": models / "teacher",
        "model_name_or_path": models / "student",
        "output_dir": folder,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "report_to": "none",
        "num_eval": 4,
        "num_maps": 2,
    } | more
    return [*FAST, *flags(options)]


def extract_options(models, problems, folder, **more):
    """Of mold extract, for the same run."""
    options = {"dataset": problems, "teacher_model_name_or_path": models / "teacher", "output_dir": folder} | more
    return ["--disable_tqdm", "true", *flags(options)]


def eval_options(models, problems, folder, **more):
    """Of mold eval, for the same run."""
    options = {"dataset": problems, "model_name_or_path": models / "student", "output_dir": folder} | more
    return [*FAST, *flags(options)]


def load(tiny, *changes):
    """The recipe in the file `tiny`, changed as --set does it."""
    return load_recipe(str(tiny), str(tiny.parent), changes)


def flags(options):
    """A dictionary as command-line arguments."""
    return [text for key, value in options.items() for text in (f"--{key}", value)]


def refusal(result):
    """The one line of a command that failed."""
    status, _, err = result
    assert status not in (0, None)
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("mold: error: ")]
    assert len(lines) == 1, err
    return lines[0]
