"""mold plan: a step's memory and time, the largest T, and what each saver buys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text

from mold.commands.inputs import student_config
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.plan import GIB, GPUS, SAVERS, Machine, Plan, Setup, largest_length, plan_step, this_machine


def main(arguments: Sequence[str]) -> None:
    """Plan, and show the tables."""
    for shown in describe_plan(parse("plan", arguments)):
        get_console().print(shown)


def describe_plan(options: Options) -> Iterator[Text | Table]:
    """The tables of a planned run.

    Args:
        options: of the training, gpu (a name of `mold.plan.GPUS`) and memory.

    Raises:
        ValueError: no such GPU, no model is named, or an option cannot be planned.
    """
    gpu, memory, lora_rank = options.planning.gpu, options.planning.memory, 0
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu: is {gpu!r}, must be one of {', '.join(GPUS)}")
    machine = this_machine() if gpu is None else GPUS[gpu]
    available = machine.memory if memory is None else memory * GIB
    config, setup = student_config(options), setup_of(options, lora_rank)
    planned = plan_step(config, setup)
    yield Text(f"{planned.parameters / 1e6:,.0f} M parameters, {planned.trainable / 1e6:,.0f} M trained", style="bold")
    yield _parts(planned, machine)
    peak, longest = planned.peak(machine), largest_length(config, setup, machine, available)
    yield Text(
        f"{'fits' if peak <= available else 'does not fit'} {available / GIB:.1f} GiB of {machine.name}; the largest T "
        f"that fits is {longest:,}"
    )
    table = Table("with", "peak GiB", "saves GiB", "s a step", title=f"What saves memory at T = {setup.length:,}")
    savings: dict[str, float] = {}
    every: dict[str, Any] = {}
    for name, change in SAVERS.items():
        if dataclasses.replace(setup, **change) == setup:
            continue
        every |= change
        with_saver = plan_step(config, dataclasses.replace(setup, **change))
        savings[name] = peak - with_saver.peak(machine)
        table.add_row(name, *_cells(with_saver, machine, peak))
    if every:
        all_on = plan_step(config, dataclasses.replace(setup, **every))
        table.add_row("all of them", *_cells(all_on, machine, peak))
    table.add_row(
        "eager attention maps instead",
        *_cells(plan_step(config, dataclasses.replace(setup, attention="eager")), machine, peak),
    )
    yield table
    if savings:
        best = max(savings, key=savings.get)
        yield Text(f"{best} buys most: {savings[best] / GIB:.2f} GiB")
        longest = largest_length(config, dataclasses.replace(setup, **every), machine, available)
        yield Text(f"with all of them the largest T that fits is {longest:,}")


def setup_of(options: Options, lora_rank: int = 0) -> Setup:
    """The planned step of a run's options.

    Raises:
        ValueError: max_length is None, or an option cannot be planned.
    """
    training = options.training
    if training.max_length is None:
        raise ValueError("max_length: is None, must be the tokens of the longest example")
    return Setup(
        training.max_length,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        dtype=options.student.model_dtype,
        bf16=training.bf16,
        activation_checkpointing=bool(getattr(training, training.checkpointing_option)),
        cross_entropy=training.cross_entropy,
        optim=str(getattr(training.optim, "value", training.optim)),
        lora_rank=lora_rank,
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
        table.add_row(name, f"{size / GIB:.2f} GiB")
    table.add_row("work", f"{planned.flops / 1e12:.3g} TFLOP")
    table.add_row("time", f"{planned.seconds(machine):.3g} s")
    return table


def _cells(planned: Plan, machine: Machine, peak: float) -> tuple[str, str, str]:
    saved = (peak - planned.peak(machine)) / GIB
    return f"{planned.peak(machine) / GIB:.2f}", f"{saved:.2f}", f"{planned.seconds(machine):.3g}"
