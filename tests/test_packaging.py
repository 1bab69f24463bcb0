"""What pyproject.toml says of versions is what is tested."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "tests/lowest.txt").read_text().splitlines()
    installed = [*project["dependencies"]]
    for extra in ("report", "gguf", "data", "peft"):
        installed += project["optional-dependencies"][extra]
    allowed = [line.split(">=") for line in installed if not line.startswith("torch>=")]
    assert allowed == [line.split("==") for line in lines if not line.startswith("#")]
