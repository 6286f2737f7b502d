"""The page of the test suites, generated from the markers in `tests/`: which tests only `make test` or `make test-all` runs.

Reads the source of the tests and imports none of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("slow", "full")

_HEAD = """# Test suites

```bash
make test       # the tests of every change
make test-all   # all tests
```

| command | runs | time on 2 CPU cores |
| --- | --- | --- |
| `make test-fast` | tests without a marker | minutes |
| `make test` | tests without a marker, with coverage; then tests marked `slow` | up to 20 minutes |
| `make test-all` | all tests, also those marked `full` | longer |

Tests marked `slow` run the real small models or several processes. Tests marked `full` take too long for every change.
The lists below are generated from the markers in `tests/`.
"""


@dataclass(frozen=True)
class MarkedTest:
    """A test function with a marker."""

    path: str
    """Relative to the root, with forward slashes."""
    name: str
    marker: str
    """`slow` or `full`; `full` if the test has both."""


def marked_tests(root: Path = ROOT) -> Iterator[MarkedTest]:
    """Yield the tests with a marker, by path and position.

    A marker of the module, the class, the function or one of its parameter sets counts.
    """
    for file in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        yield from _marked(tree, file.relative_to(root).as_posix(), _module_markers(tree))


def tests_page(root: Path = ROOT) -> str:
    """Return the page as Markdown."""
    found = list(marked_tests(root))
    lines = [_HEAD]
    for marker, title, nothing in (
        ("full", "Only in `make test-all`", "No test has the marker `full` in this version."),
        ("slow", "In `make test` and `make test-all`, not in `make test-fast`", "No test has the marker `slow` in this version."),
    ):
        lines += [f"## {title}", ""]
        chosen = [test for test in found if test.marker == marker]
        if chosen:
            lines += ["| file | test |", "| --- | --- |"]
            lines += [f"| `{test.path}` | `{test.name}` |" for test in chosen]
        else:
            lines.append(nothing)
        lines.append("")
    return "\n".join(lines)


def _marked(node: ast.Module | ast.ClassDef, path: str, outer: frozenset[str]) -> Iterator[MarkedTest]:
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _marked(child, path, outer | _decorator_markers(child))
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and child.name.startswith("test_"):
            markers = outer | _decorator_markers(child)
            if markers:
                yield MarkedTest(path, child.name, "full" if "full" in markers else "slow")


def _decorator_markers(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    return frozenset(marker for decorator in node.decorator_list for marker in _markers(decorator))


def _module_markers(tree: ast.Module) -> frozenset[str]:
    """Return the markers in the module's `pytestmark`."""
    assigned = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)
    ]
    return frozenset(marker for value in assigned for marker in _markers(value))


def _markers(node: ast.AST) -> Iterator[str]:
    """Yield the markers that an expression names as `pytest.mark.NAME`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr in MARKERS and isinstance(part.value, ast.Attribute) and part.value.attr == "mark":
            yield part.attr
