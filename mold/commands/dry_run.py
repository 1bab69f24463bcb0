"""mold run --dry_run: a recipe's configuration, inputs and memory, without loading weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mold.commands.generate import check_prompting
from mold.commands.inputs import student_config
from mold.commands.options import Options
from mold.commands.parsing import make_options
from mold.commands.plan import setup_of
from mold.commands.recipe import Recipe
from mold.commands.recipe_data import number_of, read_source
from mold.data.readers import is_hub_name
from mold.plan import GIB, inference_peak, plan_step


def dry_run(recipe: Recipe) -> Iterator[str]:
    """Check every stage's configuration, inputs and memory without loading weights; yields what was found.

    Raises:
        ValueError: something is wrong: an unknown option, a missing file, more memory than `memory_gib`.
    """
    recipe.check_baseline()
    for name, source in recipe.data.items():
        if is_hub_name(recipe.place(source["dataset"])):
            yield f"data {name}: on the hub, not checked"
            continue
        for part in ("train", "test"):
            if source.get(part):
                examples, report = read_source(recipe, name, part, part == "train" and recipe.generate is None)
                yield f"data {name}, {part}: {number_of(name, part, source[part], len(examples))} of {report}"
    # A recipe for a GPU can be checked without one; what stages read is not there yet.
    here = {"dataset": "generated", "output_dir": recipe.output_dir, "use_cpu": not torch.cuda.is_available()}
    for stage in ("generate", "keywords"):
        if (more := getattr(recipe, stage)) is not None:
            options = make_options(stage, recipe.values(stage, more, here), source=f"recipe: {stage}")
            check_prompting(options)
            yield f"{stage}: by {options.teacher.teacher_model_name_or_path}"
            yield from _check_memory(recipe, options, stage, options.generation.generate_batch_size)
    if recipe.teacher is not None:
        options = make_options("train", recipe.values("train", recipe.teacher, here), source="recipe: teacher")
        yield from _check_memory(recipe, options, "teacher", options.training.per_device_train_batch_size)
        here["teacher_model_name_or_path"] = options.student.model_name_or_path
    options = make_options("extract", recipe.values("extract", recipe.train, here), source="recipe: train")
    yield from _check_memory(recipe, options, "extract", options.teacher.extract_batch_size)
    options = make_options("train", recipe.values("train", recipe.train, here), source="recipe: train")
    yield from _check_memory(recipe, options, "train", options.training.per_device_train_batch_size)
    for name, change in recipe.trainings().items():
        more = (recipe.train, change, here)
        make_options("eval", recipe.values("eval", *more), source=f"recipe: {name}")
        options = make_options("train", recipe.values("train", *more), source=f"recipe: {name}")
        sizes = "" if recipe.train_sizes is None else f" of {', '.join(map(str, recipe.train_sizes))} examples"
        steps = options.training.max_steps
        length = f"{steps} steps" if steps > 0 else f"{options.training.num_train_epochs:g} epochs"
        yield f"train {name}{sizes}: {len(recipe.seeds)} seeds, {length}"


def _check_memory(recipe: Recipe, options: Options, stage: str, batch: int) -> Iterator[str]:
    length, training = options.training.max_length, stage in ("train", "teacher")
    try:
        if training:
            planned = plan_step(student_config(options, recipe.config), setup_of(options, recipe.config))
            needed = planned.weights + planned.optimizer + planned.step
        else:
            config = recipe.config(options.teacher.teacher_model_name_or_path)
            needed = inference_peak(config, options.teacher.teacher_dtype, batch, length, cache=stage != "extract")
    except ValueError as error:
        yield f"{stage}: memory not checked ({error})"
        return
    yield f"{stage}: {needed / GIB:.1f} GiB at most, {batch} x {length} tokens"
    if recipe.memory_gib is not None and needed > recipe.memory_gib * GIB:
        raise ValueError(f"{stage}: needs {needed / GIB:.1f} GiB of memory, memory_gib is {recipe.memory_gib}")
