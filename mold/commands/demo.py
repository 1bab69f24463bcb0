"""mold demo: a student trained with and without attention on generated problems, by the recipe "demo"."""

from __future__ import annotations

from collections.abc import Sequence

from mold.commands import run


def help_text() -> str:
    """The options, as `mold demo --help` prints them."""
    return run.help_text("demo")


def main(arguments: Sequence[str]) -> None:
    """Run the recipe."""
    run.run(arguments, "demo")
