"""Packages that only a part of `mold` needs."""

from __future__ import annotations


def missing_extra(what: str, package: str, extra: str) -> ImportError:
    """The error of an option or file whose package is not installed: ``raise missing_extra(...) from error``.

    Args:
        what: needs the package, such as "peft_config".
        package: as pip names it.
        extra: of mold-distill, in pyproject.toml, that installs it.
    """
    return ImportError(f"{what}: needs {package}: pip install 'mold-distill[{extra}]'")
