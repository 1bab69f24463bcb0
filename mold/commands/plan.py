"""mold plan: a step's memory and time, the largest T, and what each saver buys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig

from mold.commands.inputs import lora_config, student_config
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.data.segmentation import SegmentOptions
from mold.models import load_config
from mold.plan import GIB, GPUS, SAVERS, Machine, Plan, Setup, largest_length, plan_step, this_machine

_WORTH = 0.005
"""Share of the peak or of the time from which on a change is shown: what the tables' digits can say."""


def main(arguments: Sequence[str]) -> None:
    """Plan, and show the tables."""
    for shown in describe_plan(parse("plan", arguments)):
        get_console().print(shown)


def describe_plan(options: Options) -> Iterator[Text | Table]:
    """The tables of a planned run, and lines that say what is being done.

    Args:
        options: of the training, gpu (a name of `mold.plan.GPUS`) and memory.

    Raises:
        ValueError: no such GPU, no model is named, or an option cannot be planned.
    """
    gpu, memory = options.planning.gpu, options.planning.memory
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu: is {gpu!r}, must be one of {', '.join(GPUS)}")
    machine = this_machine() if gpu is None else GPUS[gpu]
    available = machine.memory if memory is None else memory * GIB
    config, setup = student_config(options), setup_of(options)
    yield _doing(f"a step of {setup.texts} x {setup.length:,} tokens")
    planned = plan_step(config, setup)
    yield Text(f"{planned.parameters / 1e6:,.0f} M parameters, {planned.trainable / 1e6:,.0f} M trained", style="bold")
    yield _parts(planned, machine)
    yield _doing("the largest T that fits")
    peak, longest = planned.peak(machine), largest_length(config, setup, machine, available)
    yield Text(
        f"{'fits' if peak <= available else 'does not fit'} {available / GIB:.1f} GiB of {machine.name}; the largest T "
        f"that fits is {longest:,}"
    )
    table = Table("with", "peak GiB", "saves GiB", "a step", title=f"What saves memory at T = {setup.length:,}")
    savings: dict[str, float] = {}
    every: dict[str, Any] = {}
    for name, change in _savers(options).items():
        if (changed := dataclasses.replace(setup, **change)) == setup:
            continue
        yield _doing(name)
        with_saver = plan_step(config, changed)
        saved = peak - with_saver.peak(machine)
        faster = planned.seconds(machine) - with_saver.seconds(machine)
        if saved < _WORTH * peak and faster < _WORTH * planned.seconds(machine):
            continue
        every |= change
        savings[name] = saved
        table.add_row(name, *_cells(with_saver, machine, peak))
    everything = dataclasses.replace(setup, **every)
    if len(every) > 1:
        table.add_row("all of them", *_cells(plan_step(config, everything), machine, peak))
    if setup.trains_attention and not setup.padding_free:
        yield _doing("eager attention maps instead")
        eager = plan_step(config, dataclasses.replace(setup, attention="eager"))
        table.add_row("eager attention maps instead", *_cells(eager, machine, peak))
    if table.row_count:
        yield table
    if savings:
        best = max(savings, key=savings.__getitem__)
        yield Text(f"{best} buys most: {savings[best] / GIB:.2f} GiB")
        yield _doing("the largest T that fits with all of them")
        yield Text(
            f"with all of them the largest T that fits is {largest_length(config, everything, machine, available):,}"
        )


def _doing(what: str) -> Text:
    return Text(f"planning: {what} ...", style="dim")


def _savers(options: Options) -> dict[str, dict]:
    """What saves memory, as changes of the run's setup."""
    # On a CPU the host's memory is the device's.
    savers = {name: change for name, change in SAVERS.items() if options.planning.gpu or "offload" not in change}
    if options.student.use_peft:
        return savers
    adapted = dataclasses.replace(options.student, use_peft=True)
    return savers | {f"LoRA of rank {adapted.lora_r}": {"peft_config": lora_config(adapted)}}


def setup_of(options: Options, load: Callable[..., PretrainedConfig] = load_config) -> Setup:
    """The planned step of a run's options.

    Args:
        options: of the training.
        load: makes a configuration from a model's name and revision.

    Raises:
        ValueError: max_length is None, an option cannot be planned, or options do not go together.
        ImportError: use_peft is given without peft.
    """
    training, teacher = options.training, options.teacher
    if training.max_length is None:
        raise ValueError("max_length: is None, must be the tokens of the longest example")
    named = None
    if teacher.teacher_model_name_or_path is not None:
        named = load(teacher.teacher_model_name_or_path, revision=teacher.teacher_model_revision)
    elif teacher.teacher_online:
        raise ValueError("teacher_model_name_or_path: is not given, must name the teacher")
    teacher_config = named if teacher.teacher_online else None
    return Setup(
        training.max_length,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        dtype=options.student.model_dtype,
        bf16=training.bf16,
        activation_checkpointing=bool(getattr(training, training.checkpointing_option)),
        cross_entropy=training.cross_entropy,
        mlp_chunk_size=training.mlp_chunk_size,
        optim=str(getattr(training.optim, "value", training.optim)),
        tasks=len(training.tasks),
        trains_attention=training.trains_attention,
        padding_free=training.padding_free,
        peft_config=lora_config(options.student),
        load_in_4bit=options.student.load_in_4bit,
        **{name: getattr(training, name) for name in SegmentOptions.__dataclass_fields__},
        num_steps=options.planning.num_steps,
        num_key_words=options.planning.num_key_words,
        signal_layers=teacher.signal_layers,
        teacher_layers=None if named is None else named.get_text_config().num_hidden_layers,
        teacher=teacher_config,
        teacher_chunk_size=training.teacher_chunk_size,
        teacher_dtype=teacher.teacher_dtype if teacher_config is not None else "float32",
    )


def _parts(planned: Plan, machine: Machine) -> Table:
    setup = planned.setup
    table = Table(title=f"A step of {setup.per_device_train_batch_size} x {setup.length:,} tokens on {machine.name}")
    table.add_column("what")
    table.add_column("predicted", justify="right")
    for name, size in (
        ("process", machine.base),
        ("weights", planned.weights),
        ("optimizer", planned.optimizer),
        ("gradients", planned.gradients),
        ("kept for the backward", planned.activations),
        ("peak", planned.peak(machine)),
    ):
        if size:
            table.add_row(name, f"{size / GIB:.2f} GiB")
    table.add_row("work", f"{planned.flops / 1e12:.3g} TFLOP")
    table.add_row("time", _seconds(planned, machine))
    return table


def _cells(planned: Plan, machine: Machine, peak: float) -> tuple[str, str, str]:
    saved = (peak - planned.peak(machine)) / GIB
    return f"{planned.peak(machine) / GIB:.2f}", f"{saved:.2f}", _seconds(planned, machine)


def _seconds(planned: Plan, machine: Machine) -> str:
    """A GPU's rates are assumed (`mold.plan.EFFICIENCY`)."""
    said = f"{planned.seconds(machine):.3g} s"
    return f"{said} (not measured)" if machine in GPUS.values() else said
