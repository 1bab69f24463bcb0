"""CONTRIBUTING's tree of the files has a line for each, and none for what is not there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".cpp", ".hpp", ".cu", ".cuh", ".html", ".txt")
ENTRY = re.compile(r"(?P<indent> *)(?P<name>[^\s/]+)(?P<slash>/?) +(?P<what>\S.*)")


def told() -> dict[str, str]:
    """What the tree says of each path; folders end with a slash."""
    tree = re.search(r"```\n(mold/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    lines, above = {}, []
    for line in tree.splitlines():
        entry = ENTRY.fullmatch(line)
        assert entry, f"no line of the tree: {line!r}"
        depth, rest = divmod(len(entry["indent"]), 2)
        assert rest == 0, f"indentation: {line!r}"
        assert depth <= len(above), f"indentation: {line!r}"
        above[depth:] = [entry["name"]]
        path = "/".join(above) + entry["slash"]
        assert path not in lines, f"twice in the tree: {path}"
        lines[path] = entry["what"]
        if not entry["slash"]:
            above.pop()
    return lines


def there() -> set[str]:
    paths = set()
    for top in ("mold", "mold_kernels", "csrc"):
        for path in (ROOT / top, *(ROOT / top).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if "__pycache__" in path.parts:
                continue
            if path.is_dir() and any(file.is_file() for file in path.iterdir()):
                paths.add(f"{name}/")
            elif path.suffix in SUFFIXES and not is_bare(path):
                paths.add(name)
    return paths


def is_bare(path: Path) -> bool:
    """Whether it is the __init__.py of a folder that has nothing to say but what the folder is."""
    return path.name == "__init__.py" and len(ast.parse(path.read_text()).body) <= 1


def suggested(path: str) -> str:
    """A line for the tree, from the file's own docstring, to be shortened."""
    source = ROOT / path if path.endswith(".py") else ROOT / path / "__init__.py"
    text = ast.get_docstring(ast.parse(source.read_text())) if source.is_file() else None
    name = Path(path).name + "/" * path.endswith("/")
    return f"{'  ' * path.rstrip('/').count('/')}{name}  {(text or '?').splitlines()[0]}"


def test_the_tree_has_a_line_for_every_file():
    missing, stale = sorted(there() - told().keys()), sorted(told().keys() - there())
    assert not missing, "missing in CONTRIBUTING's tree:\n" + "\n".join(map(suggested, missing))
    assert not stale, "stale in CONTRIBUTING's tree:\n" + "\n".join(stale)


def test_the_tree_is_in_order():
    """Files before folders, each by the alphabet: a newcomer finds a line, a merge its place."""
    paths = [path for path in told() if path.count("/") - path.endswith("/")]
    for folder in {path.rstrip("/").rpartition("/")[0] for path in paths}:
        inside = [path for path in paths if path.rstrip("/").rpartition("/")[0] == folder]
        assert inside == sorted(inside, key=lambda path: (path.endswith("/"), path))


def test_lines_are_short():
    assert all(len(line) <= 120 for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines())
