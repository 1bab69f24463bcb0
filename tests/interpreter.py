"""Tests of Triton kernels without a GPU, in a process of their own: the interpreter's switch is read at Triton's import
and is for all kernels. `python -m tests.interpreter MODULE ...` runs a module so.
"""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def interpreted(module: str, *arguments: object) -> list[str]:
    """The command that runs a module, as `python -m` does, in Triton's interpreter."""
    return [sys.executable, "-m", "tests.interpreter", module, *map(str, arguments)]


def run_interpreted(file: Path, *options: str) -> None:
    """Run a file of tests in Triton's interpreter, with options for pytest; fails with their output."""
    command = interpreted("pytest", "-q", "-p", "no:cacheprovider", *options, file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def spare_the_interpreter() -> None:
    """The interpreter replaces what triton.language holds at a launch, and again at every call of a function in it:
    more than half of its time. Here what is replaced already is left.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(function):
        languages = [each for each in function.__globals__.values() if each is language or each is language.core]
        if any(language.core.is_builtin(each.load) for each in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not

    # It also makes a table of all types to look up one, at every value.
    known = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: known(language.uint64 if dtype.scalar.is_ptr() else dtype.scalar)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    spare_the_interpreter()
    from mold_kernels._triton import tiles

    tiles.SPAN_PROGRAMS = 12  # they run one after another
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
