"""What the user sees of a training while it runs."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import PartialState
from rich import get_console
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from mold.commands.verbosity import is_quiet
from mold.method.loss import TERMS
from mold.report.results import number


def say(line: str) -> None:
    """A line on what is being done, once whatever the number of processes; nothing where it shall be quiet."""
    if PartialState().is_main_process and not is_quiet():
        get_console().print(line, soft_wrap=True, highlight=False, markup=False)


def show(result, **style) -> None:
    """A result, once whatever the number of processes, where it shall be quiet too; `style` is that of rich's print."""
    if PartialState().is_main_process:
        get_console().print(result, **style)


class StepBar(ProgressCallback):
    """A bar of the steps, on a terminal or not, without the dictionaries."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="Training",
            dynamic_ncols=True,
            disable=args.disable_tqdm or not state.is_world_process_zero,
        )
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class SayHowItGoes(TrainerCallback):
    """Where a training begins, since a killed one goes on, and a line whenever something is logged."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            say(f"resuming at step {state.global_step} of {state.max_steps}")
        else:
            say(f"starting: {state.max_steps} steps")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (line := said(logs or {})) and not is_quiet():
            where = f"step {state.global_step} of {state.max_steps}" if state.max_steps else "before training"
            tqdm.write(f"{where}: {line}")


def said(logs: Mapping[str, float]) -> str:
    """What was logged, in words; nothing of what holds no loss.

    loss 5.95 (rationale 6.09, answer 5.81, attention 0.0022), gradient norm 3.55, learning rate 3.75e-05
    """
    prefix = "eval_" if "eval_loss" in logs else ""
    if f"{prefix}loss" not in logs:
        return ""
    terms = [f"{term} {number(logs[key])}" for term in TERMS if (key := f"{prefix}loss_{term}") in logs]
    parts = [("held-out " if prefix else "") + f"loss {number(logs[f'{prefix}loss'])} ({', '.join(terms)})"]
    if "beta" in logs:
        parts.append(f"weight of attention {number(logs['beta'])}")
    for key in ("grad_norm", "learning_rate"):
        if key in logs:
            parts.append(f"{key.replace('grad_', 'gradient ').replace('_', ' ')} {number(logs[key])}")
    return ", ".join(parts)
