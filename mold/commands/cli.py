"""`mold NAME ...` runs `mold.commands.NAME.main`; this file finds it, shows help and turns errors into one line.

Nothing heavy is imported here: `mold --help` is there at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback

from mold.commands import verbosity

COMMANDS = {
    "demo": "A student with and without attention, on generated problems.",
    "generate": "Let a teacher write rationales, or check some from elsewhere.",
    "keywords": "Let a teacher name the key words of commonsense examples.",
    "extract": "The teacher's stepwise attention of a data set, into a cache.",
    "train": "Train a student, evaluate it before and after, write the report.",
    "eval": "Evaluate a student with its losses, or compare models.",
    "analyse": "Attention to key words by step and layer, of any models, as a plot.",
    "run": "Run all stages of a recipe, from data to the table of accuracies.",
    "plan": "Predict a training step's peak memory and time, without weights.",
    "inspect": "One example: steps, key words, tokens and the teacher's attention.",
    "info": "Versions, devices and backends, and why one is missing.",
}
"""What there is, in a line of at most 80 columns."""


def usage() -> str:
    """What `mold --help` prints."""
    lines = ["usage: mold COMMAND [options]", "", "Distil where a teacher looks while it reasons.", ""]
    lines += [f"  {name:9} {summary}" for name, summary in COMMANDS.items()]
    lines += ["", "A killed command goes on where it stopped when it is started again."]
    lines += ["mold COMMAND --help lists a command's options; all take --verbosity, quiet"]
    lines += ["(results, warnings and errors), normal or debug (all that there is), and"]
    lines += ["--traceback, where an error is from. mold --version says which one this is."]
    return "\n".join(lines)


def dispatch(arguments: list[str]) -> None:
    """Run the command that the arguments begin with.

    Raises:
        ValueError: the command refuses its arguments.
    """
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
    elif name == "--version":
        import mold

        print(f"mold {mold.__version__}")
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else "mold --help lists them"
        print(f"mold: error: No such command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    elif "--help" in rest or "-h" in rest:
        module = importlib.import_module(f"mold.commands.{name}")
        usage_of = f"usage: mold {name} {getattr(module, 'USAGE', '[options]')}"
        print(f"{usage_of} [--verbosity {'|'.join(verbosity.LEVELS)}] [--traceback]\n\n{COMMANDS[name]}\n")
        print(module.help_text() if hasattr(module, "help_text") else _options_help(name))
    else:
        importlib.import_module(f"mold.commands.{name}").main(rest)


def _options_help(name: str) -> str:
    from mold.commands.parsing import help_text

    return help_text(name)


def main() -> None:
    """Run the command line; an error is one line on stderr and exit status 1, with --traceback its traceback too."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    shown = len(arguments) < len(sys.argv) - 1
    try:
        arguments = verbosity.choose(arguments)
        shown = shown or verbosity.is_debug()
        dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("mold: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if shown:
            traceback.print_exc()
        message = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)):
            hint = "" if shown else " (unexpected; --traceback shows where it is from)"
            message = f"{type(error).__name__}: {message}{hint}"
        print(f"mold: error: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
