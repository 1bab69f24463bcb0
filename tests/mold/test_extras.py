"""Every hint of a missing package must be one that works: its extra is in pyproject.toml and holds the package."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from mold.extras import missing_extra

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(path for package in ("mold", "mold_kernels") for path in (ROOT / package).rglob("*.py"))
HINT = re.compile(r"pip install (?P<quote>['\"]?)(?P<what>[^'\"`]*)(?P=quote)")


def hints():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "missing_extra":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.args


@pytest.mark.parametrize(("place", "arguments"), [*hints()])
def test_the_extra_installs_the_package(place, arguments):
    package, extra = (argument.value for argument in arguments[1:])
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in PROJECT["optional-dependencies"][extra]]
    assert package in names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_names_another_distribution_or_an_unknown_extra(path):
    for hint in HINT.finditer(path.read_text()):
        if found := re.fullmatch(r"(?P<name>[\w-]+)\[(?P<extra>[^]]*)\]", hint["what"]):
            assert found["name"] == PROJECT["name"]
            assert found["extra"] in (*PROJECT["optional-dependencies"], "{extra}")


def test_the_message():
    error = missing_extra("peft_config", "peft", "peft")
    assert isinstance(error, ImportError)
    assert str(error) == f"peft_config: needs peft: pip install '{PROJECT['name']}[peft]'"
