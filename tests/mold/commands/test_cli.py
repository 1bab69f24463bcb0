"""What `mold` itself does: finds the command, shows help, turns errors into one line."""

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mold.commands import cli
from mold.commands.options import TAKES
from mold.data import conversations
from mold.data.readers import FORMATS, SUFFIXES
from tests.mold.command_line import extract_options, refusal


def test_every_command_is_a_file_of_its_name():
    for name in cli.COMMANDS:
        module = __import__(f"mold.commands.{name}", fromlist=["main"])
        assert list(inspect.signature(module.main).parameters) == ["arguments"]
        assert module.__doc__.startswith(f"mold {name}: ")
    assert cli.COMMANDS.keys() == TAKES.keys() | {"demo", "run", "info"}


def test_help_lists_the_commands_in_80_columns(mold):
    for arguments in ([], ["--help"], ["-h"]):
        status, out, _ = mold(*arguments)
        assert status == 0
        assert all(f"\n  {command} " in out for command in cli.COMMANDS)
        assert max(map(len, out.splitlines())) <= 80


def test_the_version(mold):
    import mold as package

    assert mold("--version")[:2] == (0, f"mold {package.__version__}\n")


def test_help_needs_nothing_heavy():
    """Beyond what the package itself imports."""
    code = "import sys, mold; mine = set(sys.modules); from mold.commands import cli; cli.dispatch(['--help']); "
    code += "print([name for name in sys.modules.keys() - mine if '.' not in name])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("transformers", "accelerate", "torch", "rich", "yaml"):
        assert f"'{heavy}'" not in found


def test_commands_that_are_none(mold):
    status, _, err = mold("distil")
    assert status == 2
    assert err == "mold: error: No such command 'distil'; mold --help lists them\n"
    assert mold("evl")[2] == "mold: error: No such command 'evl'; did you mean eval?\n"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        *((command, []) for command in ("generate", "keywords", "analyse", "run", "demo")),
        ("eval", ["--output_dir", "x", "--eval_sets", "a.jsonl"]),
        ("eval", ["--output_dir", "x", "--lm_eval_tasks", "arc_easy"]),
    ],
)
def test_what_several_processes_would_each_do(mold, monkeypatch, command, options):
    """torchrun sets it; both would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = options[2].strip("-") if options else f"mold {command}"
    assert refusal(mold(command, *options)) == f"mold: error: {asked}: is asked for in 2 processes, must be in one"


def test_the_folder_of_results_is_checked_before_the_work(mold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    for command in ("generate", "keywords", "extract", "train", "analyse", "eval"):
        options = ["--output_dir", "taken", "--dataset", "nowhere.jsonl"]
        assert "output_dir: is 'taken', must be a folder" in refusal(mold(command, *options))


def test_info(mold):
    status, out, _ = mold("info")
    assert status == 0
    for text in ("torch", "transformers", "GPUs", "backend reference", torch.__version__):
        assert text in out
    assert "…" not in out  # what is too long for its column goes on in the next line
    assert "--all: is no option of mold info" in refusal(mold("info", "--all"))


def test_other_libraries_lines_about_what_nobody_asked_for(mold, caplog):
    mold("--version")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("a real warning")
    assert caplog.messages == ["a real warning"]


def test_a_share_of_the_steps_is_no_other_number_of_steps(mold, caplog):
    mold("--version")
    logger, warning = logging.getLogger("transformers.trainer_utils"), "The following do not match:"
    logger.warning(f"{warning}\n\tlogging_steps: 0.02 (from args) != 1 (from trainer_state.json)")
    assert not caplog.messages
    logger.warning(f"{warning}\n\tlogging_steps: 0.02 (from args) != 1\n\tsave_steps: 5 (from args) != 3")
    assert len(caplog.messages) == 1
    mold("--version", "--verbosity", "debug")
    logger.warning(f"{warning}\n\tlogging_steps: 0.02 (from args) != 1 (from trainer_state.json)")
    assert len(caplog.messages) == 2


def test_verbosity(mold):
    assert mold("--version", "--verbosity", "quiet")[0] == mold("--version", "--verbosity=debug")[0] == 0
    for wrong in (["--verbosity", "loud"], ["--verbosity=loud"]):
        assert refusal(mold("info", *wrong)).endswith("is 'loud', must be one of quiet, normal, debug")
    assert refusal(mold("info", "--verbosity")).endswith("is '', must be one of quiet, normal, debug")
    mold("--version", "--verbosity", "debug")
    status, _, err = mold("extract", "--verbosity", "debug")
    assert (status, "Traceback" in err) == (1, True)


def test_an_expected_error_is_one_line_and_its_traceback_is_there_on_request(mold, models, problems, tmp_path):
    options = extract_options(models, tmp_path / "none.jsonl", tmp_path)
    assert refusal(mold("extract", *options)).endswith("none.jsonl does not exist")
    status, _, err = mold("extract", *options, "--traceback")
    assert status == 1
    assert "Traceback" in err
    assert "read_examples" in err
    assert err.splitlines()[-1].startswith("mold: error: dataset: ")


def test_an_unexpected_error_says_that_it_is_one(mold, monkeypatch):
    from mold.commands import info

    def breaks():
        raise KeyError("a\nb")

    monkeypatch.setattr(info, "versions", breaks)
    assert refusal(mold("info")) == r"mold: error: KeyError: 'a\nb' (unexpected; --traceback shows where it is from)"
    status, _, err = mold("--traceback", "info")
    assert status == 1
    assert "in breaks" in err


def test_an_interrupted_command(mold, monkeypatch):
    from mold.commands import info

    def stops():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "versions", stops)
    assert mold("info") == (130, "", "mold: interrupted\n")


def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m mold.commands.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(mold, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = mold(command, "--help")
    assert status == 0
    assert out.startswith(f"usage: mold {command}")
    assert max(map(len, out.splitlines())) <= 80
    for option in TAKES.get(command, ()):
        assert f"\n  --{option}" in out
    trains = command == "train"
    assert ("--learning_rate" in out) == trains
    assert trains or len(out.splitlines()) < 80
    # transformers' options come last.
    assert not trains or out.index("--learning_rate") > out.index("--beta")


def test_help_says_which_files_are_read_and_the_docs_which_columns(mold, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("train", "extract", "eval", "generate"):
        said = " ".join(mold(command, "--help")[1].split())
        assert all(name in said for name in (*SUFFIXES, *FORMATS)), command
    docs = (Path(__file__).parents[3] / "docs/guides/data.md").read_text()
    assert conversations.COLUMNS in " ".join(docs.split())
