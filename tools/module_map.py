"""Write the map of modules in CONTRIBUTING.md from the modules' own docstrings.

Run as `python -m tools.module_map` (`make module-map`). With `--check` it changes nothing and fails when the map is out of date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "CONTRIBUTING.md"
BEGIN = "<!-- modules: begin; written by `make module-map` -->"
END = "<!-- modules: end -->"


def packages(root: Path) -> list[str]:
    """Return the product's top-level packages, in the order of `packages.find` in pyproject.toml."""
    include = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    return [name for name in (pattern.rstrip("*") for pattern in include) if (root / name / "__init__.py").exists()]


def modules(root: Path) -> list[Path]:
    """Return every module of the product, relative to `root`: packages in order, then by path."""
    return [file.relative_to(root) for name in packages(root) for file in sorted((root / name).rglob("*.py"))]


def purpose(file: Path) -> str:
    """Return the first sentence of a module's docstring on one line.

    Raises:
        ValueError: the module has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    if not docstring:
        raise ValueError(f"{file} has no docstring: start it with one sentence about the module's purpose")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph)[0]


def table(root: Path) -> str:
    """Return the map as Markdown: a table of all modules with the purpose of each."""
    rows = [f"| `{file.as_posix()}` | {purpose(root / file).replace('|', chr(92) + '|')} |" for file in modules(root)]
    return "\n".join(["| module | purpose |", "| --- | --- |", *rows])


def updated(page: str, content: str) -> str:
    """Return `page` with `content` between the two markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks a marker of the module map; put these lines around it: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the map; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.module_map", description="Write the map of modules in CONTRIBUTING.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the map is out of date")
    check = parser.parse_args(arguments).check
    page = root / PAGE
    old = page.read_text()
    new = updated(old, table(root))
    if new == old:
        return 0
    if check:
        print(f"{PAGE}: the map of modules is out of date; run `make module-map`", file=sys.stderr)
        return 1
    page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
