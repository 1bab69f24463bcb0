"""What mkdocs.yml has of our own: formulas become MathML, and results of benchmarks become pages.

Formulas need no script in the browser. A page links to a result where it lies in the repository, so that the link
works there too.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>([.,:;)]*)', re.DOTALL)
_RESULT = re.compile(r"\]\(((?:\.\./)*)\.\./benchmarks/results/(\w+)\.(?:md|txt)\b")


def on_files(files, config):
    """Add a page for every result that is text."""
    for path in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("*.txt")]):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            text = f"```text\n{text}\n```\n"
        if not text.startswith("# "):
            text = f"# {path.name}\n\n{text}"
        files.append(File.generated(config, f"benchmarks/results/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown, **_):
    """Lead links to results to their pages."""
    return _RESULT.sub(r"](\1benchmarks/results/\2.md", markdown)


def on_page_content(content, **_):
    """Write formulas as MathML; no line begins with what punctuates them."""

    def written(found: re.Match) -> str:
        formula = convert(html.unescape(found[3]).strip(), display="block" if found[2] == "[" else "inline")
        formula = formula.replace("<mo>&#x0002B;</mo><mo>&#x0003D;</mo>", "<mo>+=</mo>")  # one operator
        return f'<{found[1]} class="formula">{formula}{found[4]}</{found[1]}>'

    return _FORMULA.sub(written, content)
