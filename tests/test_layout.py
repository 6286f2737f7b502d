"""The layout of the packages: imports point one way and form no circles; the tests mirror the modules."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import itself and the packages of lower rank. Packages of equal rank do not import each other.
RANK = {"cluster": 0, "generation": 1, "training": 2, "serving": 3, "evaluation": 3, "cappy": 4, "benchmarks": 5, "tests": 6}
PRODUCT = tuple(package for package in RANK if package not in ("benchmarks", "tests"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for package in PRODUCT for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return the modules of the project that each module imports, anywhere in its text."""
    return {name: frozenset(imported_by(path.read_text(encoding="utf-8"))) - {name} for name, path in modules().items()}


def imported_by(source: str) -> set[str]:
    """Return the modules a source text imports that `RANK` has a package for; `from package import module` is that module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = names & modules().keys()
            found.update(inside)
            if names - inside:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in RANK}


def package(module: str) -> str:
    return module.split(".")[0]


def upward(graph: dict[str, frozenset[str]]) -> list[str]:
    """Return the imports from a package into one of higher rank, or into another of the same rank."""
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if package(name) != package(other) and RANK[package(other)] >= RANK[package(name)]
    ]


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Return the strongly connected groups of two or more modules."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {frozenset({name, *(other for other in reach[name] if name in reach.get(other, ()))}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_import_runs_up():
    assert upward(imports()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(imports()) == []


def test_an_upward_import_and_a_circle_are_found():
    graph = {
        "cluster.a": frozenset({"generation.b"}),
        "generation.b": frozenset({"generation.c"}),
        "generation.c": frozenset({"generation.b"}),
    }
    assert upward(graph) == ["cluster.a imports generation.b"]
    assert circles(graph) == [["generation.b", "generation.c"]]
    assert upward({"serving.a": frozenset({"evaluation.b"})}) == ["serving.a imports evaluation.b"]


@pytest.mark.parametrize("verb", ["generate", "extend", "annotate", "export", "train", "adapt", "evaluate", "serve", "plan", "doctor"])
def test_each_verb_has_a_file_of_its_name(verb: str):
    assert [name for name in modules() if name.split(".")[-1] == verb]
